"""Answers of tasks: how they are read out of a text, ListOps, and the rows of every data set in its published columns."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from spilt.data import hub
from spilt.data.sources import Record
from spilt.downstream import listops, load, rows
from spilt.downstream.answers import EXTRACTORS, extractor, numbers
from spilt.errors import UserError

NUMBERS = {
    "70000": 70000.0, "1,200": 1200.0, "it is 1,200.": 1200.0, "$70,000.50": 70000.5, "12,34": 34.0, "-5": -5.0, "16-3=13": 13.0, ".5": 0.5,
    "Answer: 7\nAnswer: none": 7.0, "Answer: 3 eggs for 2 dollars": 3.0, "Answer: 16 - 3 = 13 eggs": 13.0, "Answer:\n1,234,567": 1234567.0,
    "1e5": 1e5, "answer is 4. Then 5": 4.0, "Answer: 1\nAnswer: 2": 2.0, "v1.2.3": None, "none": None, "": None,
}  # fmt: skip
LETTERS = {
    "the answer choice is D ... Answer: D.": "D", "Answer by elimination": None, "Answer: (B) text.": "B", "the answer is a dog": None,
    "answer: d": "D", "The answer is C because": "C", "(A) no (E) yes": "E", "D": "D", " D) foo": "D", "A dog": None, "Answer: A dog": None,
    "Answer: E's": None, "ANSWER - B": "B", "The correct answer is option C.": "C", "Answer: **C**": "C", "Answer: B\nAnswer: C": "C",
    "Answer: 3": None, "Answer: F": None, "": None,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "boolean": {"Answer: True.": "true", "true. Answer: False": "false", "it is untrue": None, "FALSE": "false", "true or false": "false"},
    "option": {"Answer: Option1.": 1, "answer- 2": 2, "option 2 or option1": 1, "Option12": None, "2": None},
    "tag": {"<answer>3</answer> <answer> 4 </answer>": 4, "<answer>...</answer>": None, "<answer>3": None, "<ANSWER>\n7</ANSWER>": 7},
    "nli": {"neutral ... Answer: contradiction.": "contradiction", "entailment": "entailment", "neutrality": None},
    "text": {"so. Answer: The  Sea.": "the sea", "blue": "blue", " ": None},
    "number": NUMBERS,
    "letter": LETTERS,
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, table in OTHERS.items() for text in table])
def test_an_answer_is_read(name: str, text: str) -> None:
    assert extractor(name).find(text) == OTHERS[name][text]


def test_every_extractor_is_tested_and_none_fails_on_junk() -> None:
    assert set(OTHERS) == set(EXTRACTORS)
    draw = random.Random(0)
    alphabet = "Answer: is(A)1,.-$ \n<>/answeroptiontrue70é\u2212"
    for _ in range(300):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(40)))
        for one in EXTRACTORS.values():
            one.find(text)


def test_no_answer_is_told_apart_from_a_wrong_one() -> None:
    number = extractor("number")
    assert (number.score("Answer: 70,000", "70000"), number.score("Answer: 700", 70000), number.score("who knows", 7)) == (
        True,
        False,
        None,
    )
    assert number.score("Answer: 2.00001", 2.0) and not number.score("Answer: 2.001", 2.0)
    for name, label in (("number", "two"), ("letter", "AB"), ("boolean", "yes"), ("option", 3), ("nli", "maybe")):
        with pytest.raises(ValueError, match="is"):
            extractor(name).score("x", label)
    with pytest.raises(UserError, match="did you mean 'letter'"):
        extractor("leter")


def test_whole_numbers_are_never_cut() -> None:
    draw = random.Random(1)
    for _ in range(500):
        value = draw.randrange(10 ** draw.randint(1, 12))
        for text in (str(value), f"{value:,}", f"-{value}", f"x = {value}.", f"({value:,})", f"${value:,}."):
            assert [abs(found) for found in numbers(text)] == [float(value)], text


# ---------------------------------------------------------------- ListOps


def slow(text: str) -> int:
    """An expression's value by another way: as nested Python lists."""
    spaced = text.replace("[", "['").replace("]", "],").strip(",")
    for name in listops.OPERATORS:
        spaced = spaced.replace(f"'{name} ", f"'{name}',")
    tree = eval(", ".join(spaced.split()).replace(",,", ",").replace(",,", ","))  # noqa: S307 - of digits and our own operators

    def of(node: Any) -> int:
        if isinstance(node, int):
            return node
        name, *values = node
        found = sorted(map(of, values)) if name in ("MIN", "MAX", "MED") else list(map(of, values))
        middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) // 2
        return {"MIN": found[0], "MAX": found[-1], "MED": middle, "SM": sum(found) % 10, "FIRST": found[0], "LAST": found[-1]}[name]

    return of(tree)


def test_listops_values() -> None:
    for text, value in {"[MAX 2 9 [MIN 4 7 ] 0 ]": 9, "[MED 1 4 ]": 2, "[SM 5 6 7 ]": 8, "[FIRST 3 [LAST 1 2]]": 3, "7": 7}.items():
        assert listops.value(text) == value
    shape = listops.Shape(tuple(listops.OPERATORS), depth=4)
    made = listops.expressions(300, shape, seed=3)
    assert [listops.value(text) for text in made] == [slow(text) for text in made]
    assert made == listops.expressions(300, shape, seed=3) != listops.expressions(300, shape, seed=4)
    assert len(set(made)) == 300 and max(text.count("[") for text in made) > 4
    assert statistics.median([1, 4]) == 2.5
    for wrong in ("[MAX ]", "[MAX 1", "MAX 1 2", "[ADD 1 2 ]", "[MAX 1 ] ]", "12", ""):
        with pytest.raises(UserError, match="no ListOps expression"):
            listops.value(wrong)
    with pytest.raises(UserError, match="only .* different expressions of depth 1"):
        listops.expressions(1000, listops.Shape(("MIN",), 1, 2, 2), 0)


def test_made_splits_share_no_expression() -> None:
    source = load.source("listops", made="operators=MIN+MAX,depth=1,fewest=2,most=3,train=150,validation=30,test=60,seed=5")
    parts = {name: source.split(name) for name in rows.SPLITS}
    prompts = [example.prompt for data in parts.values() for example in data.examples]
    assert len(prompts) == len(set(prompts)) == 240 and load.seen_in(parts["train"], parts["test"]) == 0
    example = parts["test"].examples[0]
    expression = example.prompt.rpartition("Expression:\n")[2].strip()
    assert example.completion == f"<answer>{listops.value(expression)}</answer>" and example.label == listops.value(expression)
    for said, match in (
        ("operators=ADD", "unknown operator"),
        ("dept=1", "did you mean 'depth'"),
        ("depth=0", "at least 1"),
        ("fewest=9", "more"),
    ):
        with pytest.raises(UserError, match=match):
            load.source("ListOps", made=said)


# ---------------------------------------------------------------- rows

ROWS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "BoolQ": ({"question": "is it", "passage": "It is.", "answer": True}, "Answer: True.", "true"),
    "Winogrande": ({"sentence": "The _ ran.", "option1": "dog", "option2": "cup", "answer": "1"}, "Answer: Option1.", 1),
    "ListOps": ({"Source": "[MAX 1 2 ]", "Target": 2}, "<answer>2</answer>", 2),
    "GSM8K": ({"question": "How many?", "answer": "3*4=<<3*4=12>>12\n#### 1,200"}, "3*4=<<3*4=12>>12\nAnswer: 1200", 1200.0),
    "ARC_Challenge": (
        {"id": "x", "question": "Which?", "choices": {"text": ["air", "sea"], "label": ["1", "2"]}, "answerKey": "2"},
        "Answer: (B) sea.",
        "B",
    ),
    "AQuA": ({"question": "x?", "options": ["A)21", "B)22"], "rationale": "So.", "correct": "B"}, "So.\nAnswer: B.", "B"),
    "MAWPS": ({"question": "x?", "equation": "1 + 2", "result": "3"}, "1 + 2\nAnswer: 3", 3.0),
    "SVAMP": ({"Body": "A has 2", "Question": "x?", "Equation": "( 2.0 )", "Answer": "2.0"}, "( 2.0 )\nAnswer: 2", 2.0),
    "ASDiv": ({"body": "A.", "question": "x?", "formula": "7+2=9", "answer": "9 (apples)"}, "7+2=9\nAnswer: 9", 9.0),
    "MNLI": ({"premise": "A.", "hypothesis": "B.", "label": 2}, "Answer: contradiction.", "contradiction"),
}


SHOWN = {
    "BoolQ": ("Passage: It is.", "Question: is it"),
    "Winogrande": ("The _ ran.", "Option1: dog\nOption2: cup"),
    "GSM8K": ("How many?",),
    "ListOps": ("Expression:\n[MAX 1 2 ]", "<answer>...</answer>"),
    "ARC_Challenge": ("Which?", "(A) air\n(B) sea"),
    "AQuA": ("A)21\nB)22",),
    "MAWPS": ("x?",),
    "SVAMP": ("A has 2. x?",),
    "ASDiv": ("A. x?",),
    "MNLI": ("Premise: A.\nHypothesis: B.",),
}


@pytest.mark.parametrize("name", rows.TASKS)
def test_a_published_row_is_an_example_whose_completion_is_right(name: str) -> None:
    row, completion, label = ROWS[name]
    example = rows.TASKS[name].build(row)
    assert example is not None and (example.completion, example.label) == (completion, label) and example.prompt.endswith("\n")
    assert extractor(rows.TASKS[name].extract).score(example.completion, example.label) is True
    for value in SHOWN[name]:
        assert value in example.prompt
    assert completion not in example.prompt


def test_rows_without_an_answer_are_counted_and_wrong_ones_told(tmp_path: Path) -> None:
    row = ROWS["Winogrande"][0]
    for name in ("train", "validation"):
        items = [{**row, "sentence": f"{i} _", "answer": "1" if i % 4 else ""} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    source = load.source("winogrande", str(tmp_path))
    parts = [source.split(name) for name in rows.SPLITS]
    assert [len(data.examples) + data.without_answer for data in parts] == [40, 20, 20]
    assert parts[0].without_answer == parts[1].without_answer + parts[2].without_answer == 10
    assert not {e.prompt for e in parts[1].examples} & {e.prompt for e in parts[2].examples}
    (tmp_path / "train.jsonl").write_text(json.dumps({"sentence": "x", "answer": "1"}) + "\n")
    with pytest.raises(UserError, match=r"train.jsonl line 1: no column 'option1' of Winogrande; columns found: sentence, answer"):
        source.split("train")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"wanted one file train.jsonl .* there is none"):
        source.split("train")
    with pytest.raises(UserError, match=r"arc.*did you mean|have: .*ARC"):
        load.source("ARCC")
    assert rows.task("arc") is rows.TASKS["ARC_Challenge"]
    with pytest.raises(UserError, match="no such file or folder"):
        load.source("mine", str(tmp_path / "none")).split("test")


def test_own_rows_and_an_extractor_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1?", "completion": f"Answer: {i + 1}", "label": i + 1}) + "\n" for i in range(20)))
    source = load.source("mine", str(path), extract="number")
    sizes = [len(source.split(name).examples) for name in rows.SPLITS]
    assert sizes == [16, 2, 2] and load.seen_in(source.split("train"), source.split("test")) == 0
    with pytest.raises(UserError, match="is no row of mine: .* is no letter"):
        load.source("mine", str(path), extract="letter").split("test")
    with pytest.raises(UserError, match="answers of GSM8K are read as number"):
        load.source("GSM8K", extract="letter")


@pytest.mark.parametrize("value", [None, [{"role": "user", "content": "2+1?"}], True], ids=str)
@pytest.mark.parametrize("name", ["prompt", "completion"])
def test_own_rows_are_texts(name: str, value: Any, tmp_path: Path) -> None:
    """A null is not the word None, a list of turns no text; a row without a label is left out, and counted."""
    good = {"prompt": "1+1?", "completion": "Answer: 2", "label": "2"}
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**good, "prompt": 7}, {**good, "label": None}, {**good, "label": " "})))
    found = load.source("mine", str(tmp_path)).split("train")
    assert [example.prompt for example in found.examples] == ["7"] and found.without_answer == 2
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, name: value}) + "\n")
    with pytest.raises(UserError, match=f"line 2: (is no row of mine: {name} is .*; wanted text|nothing in column '{name}' of mine)"):
        load.source("mine", str(tmp_path)).split("train")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the datasets library, in its process: name, configuration and split as the library wants them."""
    asked: list[tuple[str, bool]] = []

    def known(said: str, download: bool = False) -> tuple[Record, ...]:
        asked.append((said, download))
        return tuple(Record(i, f"row {i} (0-based)", {**ROWS["GSM8K"][0], "question": f"{i}?"}) for i in range(50))

    monkeypatch.setattr(hub, "rows", known)
    source = load.source("GSM8K", download=True)
    assert [len(source.split(name).examples) for name in rows.SPLITS] == [50, 10, 40]
    assert asked == [("hf:openai/gsm8k:main:train", True), *[("hf:openai/gsm8k:main:test", True)] * 2]
    assert all(hub.spec_of(f"hf:{task.source}:train") for task in rows.TASKS.values() if task.source)


def test_a_file_too_small_for_a_split_says_so(tmp_path: Path) -> None:
    """Four rows leave none for a tenth: that is no fault of their answers."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": " yes", "label": "yes"}) + "\n" for n in range(4)))
    found = load.source("few", str(path), extract="text")
    assert len(found.split("train").examples) == 3
    with pytest.raises(UserError, match="few.jsonl: its 4 rows leave none for test, which is 90% to 100% of them; .* a folder with"):
        found.split("test")
