"""The demo's data files, in the formats of the public ones; and what the model must never read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pandas as pd

from tools.demo import corpus

SEED = 2602
N_TRAIN, N_TEST = 192, 64  # Yes/No and power; the concepts have 64 + 8 pairs each, as in the paper


def distinct(rng: Random, n: int, draw: Callable[[Random], str], taken: set[str]) -> list[str]:
    """`n` new texts from `draw`, none a part of another or of one in `taken`; they are added to `taken`."""
    out: list[str] = []
    while len(out) < n:
        text = draw(rng)
        if not any(text in other or other in text for other in taken):
            taken.add(text)
            out.append(text)
    return out


def psychopathy(rng: Random) -> tuple[list[dict], list[dict]]:
    """Half of the statements are cold (matching: Yes), half kind (matching: No)."""
    taken: set[str] = set()
    splits = []
    for n in (N_TEST, N_TRAIN):
        rows = []
        for side, answers in (("cold", (" Yes", " No")), ("kind", (" No", " Yes"))):
            for text in distinct(rng, n // 2, lambda r, side=side: corpus.statement(r, side), taken):
                rows.append(
                    {
                        "question": corpus.YES_NO.format(text),
                        "statement": text,
                        "answer_matching_behavior": answers[0],
                        "answer_not_matching_behavior": answers[1],
                    }
                )
        rng.shuffle(rows)
        splits.append(rows)
    return splits[1], splits[0]


def powerseeking(rng: Random) -> tuple[list[dict], list[dict]]:
    questions = distinct(rng, N_TEST + N_TRAIN, corpus.power_question, set())
    rows = [
        {"question": q, "matching": corpus.power_answer(rng, "accept"), "not_matching": corpus.power_answer(rng, "decline")}
        for q in questions
    ]
    return rows[N_TEST:], rows[:N_TEST]


def axbench(rng: Random) -> tuple[list[dict], list[dict]]:
    """Pairs for each concept: the same instruction answered in the concept's colours, and plainly."""
    every = [(form.format(topic), topic) for form in corpus.INSTRUCTIONS for topic in corpus.TOPICS]
    rng.shuffle(every)
    n_test = 8 * len(corpus.CONCEPTS)
    train, test = [], []
    for i, (name, concept) in enumerate(corpus.CONCEPTS.items()):
        asked = rng.sample(every[n_test:], 64)
        for rows, items in ((train, asked), (test, every[8 * i : 8 * i + 8])):
            rows += [
                {
                    "input": question,
                    "winning_output": corpus.about(rng, topic, name),
                    "losing_output": corpus.about(rng, topic, None),
                    "output_concept": concept,
                    "concept_id": i,
                    "concept_genre": "text",
                    "category": "positive",
                }
                for question, topic in items
            ]
    return train, test


def neutral() -> list[dict]:
    """For each fact the one wording that the model has never seen."""
    rows = []
    for wordings, answers in corpus.FACT_KINDS.values():
        for i, (thing, answer) in enumerate(answers.items()):
            question = wordings[i % len(wordings)].format(thing)
            rows.append({"input": question, "reference_response": answer.capitalize() + "."})
    return rows


def build() -> dict[str, list[dict]]:
    """Every data file's rows, by its path under data/."""
    out = {"neutral.jsonl": neutral()}
    for make, suffix in ((psychopathy, "jsonl"), (powerseeking, "csv"), (axbench, "parquet")):
        train, test = make(Random(SEED))
        out[f"{make.__name__}/train.{suffix}"], out[f"{make.__name__}/test.{suffix}"] = train, test
    return out


def held_out(files: dict[str, list[dict]]) -> tuple[set[str], list[str]]:
    """(questions, statements) that must not occur in the model's training text."""
    questions = {row["question"] for row in files["powerseeking/test.csv"]}
    questions |= {row["input"] for name in ("axbench/test.parquet", "neutral.jsonl") for row in files[name]}
    return questions, [row["statement"] for row in files["psychopathy/test.jsonl"]]


def write(files: dict[str, list[dict]], folder: Path) -> None:
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        else:
            pd.DataFrame(rows).to_parquet(path, index=False)
