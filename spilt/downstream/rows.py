"""Tasks whose answers are right or wrong: a row of a data set -> {prompt, completion, label}. One row of TASKS each; the wording is ours.

All prompts end with a line break and the completion follows directly. Official splits are cut as the row says, shuffled by one seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spilt.data.sources import seen
from spilt.downstream import listops
from spilt.downstream.answers import LETTERS, NLI, extractor, numbers
from spilt.errors import unknown


class Example(NamedTuple):
    """What the model reads, what it learns to write, and the answer that is right."""

    prompt: str
    completion: str
    label: Any


class Part(NamedTuple):
    """From `start` to `end` (shares of 1) of an official split, shuffled."""

    official: str
    start: float = 0.0
    end: float = 1.0


class Task(NamedTuple):
    """A data set as a task. source: its name at the hub, and the configuration; '' for what is made here or is the user's own."""

    name: str
    source: str
    build: Callable[[Mapping[str, Any]], Example | None]  # None: a row without an answer
    extract: str  # of answers.EXTRACTORS
    splits: Mapping[str, Part]
    max_length: int = 256  # tokens of prompt and completion together
    max_new_tokens: int = 100
    epochs: int = 1


SPLITS = ("train", "validation", "test")
OFFICIAL = {name: Part(name) for name in SPLITS}


def boolq(row: Mapping[str, Any]) -> Example:
    answer = "True" if _flag(row["answer"]) else "False"
    asked = "Read the passage and say whether the answer to the question is true or false."
    prompt = f"{asked}\nPassage: {row['passage']}\nQuestion: {row['question']}\n"
    return Example(prompt, f"Answer: {answer}.", answer.lower())


def winogrande(row: Mapping[str, Any]) -> Example | None:
    if not str(row["answer"]).strip():  # its official test split has none
        return None
    if str(row["answer"]) not in ("1", "2"):
        raise ValueError(f"answer {row['answer']!r} is neither 1 nor 2")
    prompt = f"Which option fills the blank (_) of the sentence?\n{row['sentence']}\nOption1: {row['option1']}\nOption2: {row['option2']}\n"
    return Example(prompt, f"Answer: Option{row['answer']}.", int(row["answer"]))


LISTOPS_SAYS = (
    "Evaluate the nested list expression: each list begins with an operator, and lists may stand in lists.\n"
    "Write nothing but the resulting number inside answer tags: <answer>...</answer>\n"
)


def list_ops(row: Mapping[str, Any]) -> Example:
    target = extractor("tag").label(row["Target"])
    return Example(f"{LISTOPS_SAYS}\nExpression:\n{row['Source']}\n", f"<answer>{target}</answer>", target)


def gsm8k(row: Mapping[str, Any]) -> Example:
    rationale, _, final = str(row["answer"]).rpartition("####")
    return _sum(str(row["question"]), rationale.strip(), final.strip())


def mawps(row: Mapping[str, Any]) -> Example:
    rationale = str(row.get("equation") or row.get("expression") or "").strip()
    return _sum(str(row["question"]), rationale, _first(row, "result_float", "result", "answer"))


def svamp(row: Mapping[str, Any]) -> Example:
    body = str(row["Body"]).strip()
    joined = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {str(row['Question']).strip()}"
    return _sum(joined, str(row.get("Equation") or "").strip(), str(row["Answer"]))


def asdiv(row: Mapping[str, Any]) -> Example | None:
    found = numbers(str(row["answer"]).partition("(")[0])  # 9 (apples)
    if len(found) != 1:  # a ratio, several numbers, a word
        return None
    return _sum(f"{row['body']} {row['question']}", str(row.get("formula") or "").strip(), str(row["answer"]).partition("(")[0].strip())


def _sum(question: str, rationale: str, final: str) -> Example:
    value = extractor("number").label(re.sub(r"(?<=[0-9])_(?=[0-9])", "", final))  # 1_000
    said = f"{value:.10g}" if value != int(value) else str(int(value))
    return Example(f"{question}\n", f"{rationale}\nAnswer: {said}" if rationale else f"Answer: {said}", value)


def arc(row: Mapping[str, Any]) -> Example:
    texts, names = list(row["choices"]["text"]), [str(name) for name in row["choices"]["label"]]
    right = names.index(str(row["answerKey"]))
    options = "".join(f"({letter}) {text}\n" for letter, text in zip(LETTERS, texts, strict=False))
    prompt = f"Choose the option that answers the question.\nQuestion: {row['question']}\n{options}"
    return Example(prompt, f"Answer: ({LETTERS[right]}) {texts[right]}.", LETTERS[right])


def aqua(row: Mapping[str, Any]) -> Example:
    options = "".join(f"{text}\n" for text in row["options"])
    prompt = f"Solve the problem and choose an option.\nQuestion: {row['question']}\n{options}"
    return Example(prompt, f"{str(row['rationale']).strip()}\nAnswer: {row['correct']}.", str(row["correct"]))


def mnli(row: Mapping[str, Any]) -> Example | None:
    said = str(row["label"]).strip()
    if said in ("-1", "-"):  # annotators who did not agree
        return None
    if said not in (known := {**{str(number): word for number, word in enumerate(NLI)}, **{word: word for word in NLI}}):
        raise ValueError(f"label {row['label']!r} is none of {', '.join(known)}, nor -1")
    label = known[said]
    prompt = (
        f"Does the premise entail the hypothesis, contradict it, or neither? Write {NLI[0]}, {NLI[2]} or {NLI[1]}.\n"
        f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\n"
    )
    return Example(prompt, f"Answer: {label}.", label)


def own(row: Mapping[str, Any]) -> Example | None:
    label = row["label"]
    if label is None or label != label or not str(label).strip():  # null, nan: no answer to be right about
        return None
    if not isinstance(label, str | bool | int | float):
        raise ValueError(f"label is {seen(label)}; wanted a text, a number, true or false")
    return Example(_said(row, "prompt"), _said(row, "completion"), label)


def _said(row: Mapping[str, Any], name: str) -> str:
    """A text or a number as text: null or a list of turns would be learned as the word that Python has for it."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise ValueError(f"{name} is {seen(value)}; wanted text")
    return str(value)


def _flag(value: Any) -> bool:
    said = str(value).strip().lower()
    if said not in ("true", "false", "1", "0"):
        raise ValueError(f"{value!r} is neither true nor false")
    return said in ("true", "1")


def _first(row: Mapping[str, Any], *names: str) -> str:
    return next(str(row[name]) for name in (*names, names[-1]) if name in row or name == names[-1])


HALVES = {"train": Part("train"), "validation": Part("validation", 0, 0.5), "test": Part("validation", 0.5, 1)}
OF_ONE = {"train": Part("train", 0, 0.8), "validation": Part("train", 0.8, 0.9), "test": Part("train", 0.9, 1)}
OWN = "own"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "BoolQ", "google/boolq", boolq, "boolean",
            {"train": Part("train"), "validation": Part("validation", 0, 0.8), "test": Part("validation", 0.8, 1)}, 256, 10,
        ),
        Task("Winogrande", "allenai/winogrande:winogrande_debiased", winogrande, "option", HALVES, 256, 10),
        Task("ListOps", "", list_ops, "tag", OFFICIAL, 512, 10),
        Task(
            "GSM8K", "openai/gsm8k:main", gsm8k, "number",
            {"train": Part("train"), "validation": Part("test", 0, 0.2), "test": Part("test", 0.2, 1)}, 256, 100, 3,
        ),
        Task("ARC_Challenge", "allenai/ai2_arc:ARC-Challenge", arc, "letter", HALVES, 256, 100),
        Task("AQuA", "deepmind/aqua_rat:raw", aqua, "letter", OFFICIAL, 512, 256),
        Task("MAWPS", "MU-NLPC/Calc-mawps", mawps, "number", OFFICIAL, 256, 100, 3),
        Task(
            "SVAMP", "ChilleD/SVAMP", svamp, "number",
            {"train": Part("train", 0, 0.9), "validation": Part("train", 0.9, 1), "test": Part("test")}, 256, 100,
        ),
        Task(
            "ASDiv", "EleutherAI/asdiv", asdiv, "number",
            {name: part._replace(official="validation") for name, part in OF_ONE.items()}, 256, 100,
        ),
        Task(
            "MNLI", "nyu-mll/multi_nli", mnli, "nli",
            {"train": Part("train"), "validation": Part("validation_matched", 0, 0.5), "test": Part("validation_matched", 0.5, 1)}, 256, 20,
        ),
    )
}  # fmt: skip
ALIASES = {"ARC": "ARC_Challenge"}


def task(name: str) -> Task:
    """The row of a name or an alias, in any letter case. Raises UserError for another."""
    known = {key.lower(): key for key in TASKS} | {key.lower(): value for key, value in ALIASES.items()}
    if name.lower() not in known:
        raise unknown("task", name, (*TASKS, *ALIASES))
    return TASKS[known[name.lower()]]


def of_listops(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Expressions as the rows of the published schema."""
    return [{"Source": text, "Target": listops.value(text)} for text in texts]
