"""Every named data set from files in its published columns, with their quirks: read, taught, trained and evaluated by the command line."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest

from spilt import cli
from spilt.data.sources import Record
from spilt.downstream import load, rows, work
from spilt.downstream.answers import extractor
from spilt.downstream.words import TrainSettings, Variant
from spilt.errors import UserError
from spilt.model import host as hosts

Rows = list[dict[str, Any]]
# as published, with quirks: (rows, right labels; None: a row without an answer)
PUBLISHED: dict[str, tuple[Rows, list[Any]]] = {
    "BoolQ": (
        [
            {"question": "is the sea salt", "title": "Sea", "answer": True, "passage": "The sea (in Latin, mare) is salt."},
            {"question": "do stones swim", "title": "Stone", "answer": False, "passage": "A stone's weight\nis the reason: no."},
        ],
        ["true", "false"],
    ),
    "Winogrande": (
        [
            {"sentence": "The cup fits the bag as the _ is small.", "option1": "cup", "option2": "bag", "answer": "1"},
            {"sentence": "Ann paid Eve because _ sold.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            {"sentence": "The _ of the test split.", "option1": "dog", "option2": "cat", "answer": ""},
        ],
        [1, 2, None],
    ),
    "GSM8K": (
        [
            {"question": "9 eggs a day?", "answer": "9 * 8 = $<<9*8=72>>72 a week.\nThat's all.\n#### 72"},
            {"question": "Cost?", "answer": "So 1,000 + 200 = <<1000+200=1200>>1,200\n#### 1,200"},
            {"question": "Less?", "answer": "It is <<3-10=-7>>-7.\n#### -7"},
        ],
        [72.0, 1200.0, -7.0],
    ),
    "ARC_Challenge": (
        [
            {"id": "A_1", "question": "Which?", "choices": {"text": ["air", "sea", "ice"], "label": ["A", "B", "C"]}, "answerKey": "C"},
            {"id": "B_2", "question": "What?", "choices": {"text": ["a", "b", "c", "d", "e"], "label": [*"12345"]}, "answerKey": "5"},
        ],
        ["C", "E"],
    ),
    "AQuA": (
        [
            {"question": "4 x?", "options": ["A)10", "B)8 km", "C)$9", "D)1/2", "E)None"], "rationale": "2*4\n= 8.\nANS B", "correct": "B"},
            {"question": "1 x?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "Answer: A. No: it is E.", "correct": "E"},
        ],
        ["B", "E"],
    ),
    "MAWPS": (
        [
            {"id": "mawps__1", "question": "Pens?", "chain": "<gadget>..", "result": "1_200", "equation": "x = 1_000 + 200"},
            {"id": "mawps__2", "question": "Half?", "result": "12345.75", "result_float": 12345.75, "expression": "24691.5 / 2"},
        ],
        [1200.0, 12345.75],
    ),
    "SVAMP": (
        [
            {"ID": "chal-1", "Body": "He has 8 pens", "Question": "How many?", "Equation": "( 8.0 - 3.0 )", "Answer": "5.0", "Type": "-"},
            {"ID": "chal-2", "Body": "There are 4.", "Question": "How many?", "Equation": "( 4.0 )", "Answer": 4.0, "Type": "-"},
        ],
        [5.0, 4.0],
    ),
    "ASDiv": (
        [
            {"body": "Nine.", "question": "How many?", "solution_type": "Sum", "answer": "9 (apples)", "formula": "7+2=9"},
            {"body": "Some.", "question": "Who?", "solution_type": "Comparison", "answer": "Bob", "formula": "8>5"},
            {"body": "Two.", "question": "Ratio?", "solution_type": "Ratio", "answer": "3:2", "formula": "3:2"},
        ],
        [9.0, None, None],
    ),
    "MNLI": (
        [
            {"promptID": 1, "premise": "It is so.", "hypothesis": "It is.", "genre": "fiction", "label": 0},
            {"promptID": 2, "premise": "A — é.", "hypothesis": "So.", "genre": "fiction", "label": 1},
            {"promptID": 3, "premise": "No.", "hypothesis": "Yes.", "genre": "fiction", "label": -1},
            {"promptID": 4, "premise": "No one.", "hypothesis": "All.", "genre": "fiction", "label": 2},
        ],
        ["entailment", "neutral", None, "contradiction"],
    ),
}


def jsonl(path: Path, found: Rows) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def packed(path: Path, found: Rows) -> None:
    path.with_suffix(".json.gz").write_bytes(gzip.compress(json.dumps(found).encode()))


def parquet(path: Path, found: Rows) -> None:
    import pandas as pd

    pd.DataFrame(found).to_parquet(path.with_suffix(".parquet"))


def comma(path: Path, found: Rows) -> None:
    """As a spreadsheet writes it: a byte order mark and CRLF."""
    names = list(dict.fromkeys(name for row in found for name in row))
    with path.with_suffix(".csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(found)


WRITERS = {"BoolQ": comma, "Winogrande": comma, "ARC_Challenge": parquet, "AQuA": parquet, "MAWPS": packed, "MNLI": comma}


def write(folder: Path, name: str, writer: Callable[[Path, Rows], None]) -> Path:
    """Each official split: the published rows, forty times, told apart by what is asked."""
    folder.mkdir(parents=True)
    asked = next(column for column in ("question", "Question", "sentence", "hypothesis") if column in PUBLISHED[name][0][0])
    for split in dict.fromkeys(part.official for part in rows.TASKS[name].splits.values()):
        writer(folder / split, [{**row, asked: f"{n} {row[asked]}"} for n in range(40) for row in PUBLISHED[name][0]])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    return families.make_base(tmp_path_factory.mktemp("tasks"), train=4)


def test_every_named_data_set_is_here() -> None:
    assert PUBLISHED.keys() == rows.TASKS.keys() - {"ListOps"}  # made here


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_rows_have_these_answers(name: str) -> None:
    found = load._examples(rows.TASKS[name], [Record(i, f"row {i}", row) for i, row in enumerate(PUBLISHED[name][0])])
    assert [example.label for example in found.examples] == [label for label in PUBLISHED[name][1] if label is not None]
    assert found.without_answer == PUBLISHED[name][1].count(None)
    find = extractor(rows.TASKS[name].extract)
    assert all(find.score(example.completion, example.label) is True for example in found.examples)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", PUBLISHED)
def test_from_its_files_to_an_accuracy(name: str, base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained one epoch and evaluated on both splits; what the tokens teach is read back as the right label."""
    folder = write(tmp_path / name, name, WRITERS.get(name, jsonl))
    flags = ["--model-name", base.model, "--base_dir", str(base.path), "--dataset-name", name, "--data", str(folder), "--device", "cpu"]
    small = ["--epochs", "1", "--max-length", "512", "--max-new-tokens", "4", "--limit", "8", "--bs", "2", "--limit-eval", "2", "--quiet"]
    assert cli.main(["tasks", "train", *flags, *small, "--do-eval", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["train"] == "done" and told["validation"]["n"] == 2 == told["test"]["n"]
    source = load.source(name, str(folder))
    for split in ("validation", "test"):
        assert told[split]["rows_without_answer"] == source.split(split).without_answer
    host = hosts.load(base.path / "models" / base.model, "float32", "cpu", "")
    request = work.Request(source._replace(task=source.task._replace(max_length=512)), base.model, Variant(), TrainSettings(), base.path)
    data = work.cut(source.split("train"), 8)
    sequences, truncated, dropped = request.encoding(host).training(data.examples)
    assert (truncated, dropped) == (0, 0)
    find = extractor(source.task.extract)
    for example, one in zip(data.examples, sequences, strict=True):
        taught = host.tokenizer.decode(one.input_ids[one.prompt_length :], skip_special_tokens=True)
        assert find.score(taught, example.label) is True, taught


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("Winogrande", {"answer": "3"}, "answer '3' is neither 1 nor 2"),
        ("MNLI", {"label": 7}, "label 7 is none of 0, 1, 2, entailment, neutral, contradiction, nor -1"),
        ("GSM8K", {"answer": "no end"}, "'no end' is not one number"),
        ("SVAMP", {"Answer": "two"}, "'two' is not one number"),
        ("ARC_Challenge", {"answerKey": "F"}, "'F' is not in list"),
        ("BoolQ", {"answer": "perhaps"}, "'perhaps' is neither true nor false"),
    ],
)
def test_a_row_of_another_kind_is_told(name: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"line 2: is no row of {name}: .*{said}"):
        load._examples(rows.TASKS[name], [Record(1, "line 2", {**PUBLISHED[name][0][0], **change})], "train.jsonl")


OK = [{"prompt": f"{n}? ", "completion": "Answer: é—漢😀", "label": "é—漢😀"} for n in range(12)]


def lines(found: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in found).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "own.jsonl: has no rows"),
        (b"\r\n\n", "own.jsonl: has no rows"),
        (lines(OK[:1]), "own.jsonl: its 1 rows leave none for test"),
        (
            lines([*OK[:3], {"prompt": "?", "completion": "x"}, *OK]),
            "own.jsonl line 4: no column 'label' of own; columns found: prompt, comp",
        ),
        (lines([{**row, "label": None} for row in OK]), "no row that has an answer"),
        (lines([{**row, "prompt": None} for row in OK]), "nothing in column 'prompt' of own"),
        (lines([{**row, "prompt": ["a"]} for row in OK]), r"is no row of own: prompt is \['a'\]; wanted text"),
        (lines([{**row, "completion": True} for row in OK]), "is no row of own: completion is True; wanted text"),
        (lines([{**row, "completion": " "} for row in OK]), "its prompt or its completion is empty"),
        (lines([[1, 2]] * 12), "line 1: list .* where an object with named columns was wanted"),
        ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OK).encode("utf-16"), "is not UTF-8"),
    ],
)
def test_a_file_that_is_none_is_one_message(
    content: bytes, said: str, base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    words = ["--model-name", base.model, "--base_dir", str(base.path), "--dataset-name", "own", "--data", str(tmp_path / "own.jsonl")]
    assert cli.main(["tasks", "evaluate", *words, "--variant", "base"]) == 2
    (err,) = capsys.readouterr().err.splitlines()
    assert re.search(said, err)


def test_unicode_and_line_ends_and_a_prompt_beyond_the_context(
    base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """CRLF and a byte order mark are the same rows; a prompt is cut to --max-length, and told where that is beyond the context."""
    parts = []
    written = {"lf": lines(OK), "crlf": lines(OK, "\r\n"), "bom": b"\xef\xbb\xbf" + lines(OK)}
    for name, content in written.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        parts.append(load.source("own", str(tmp_path / f"{name}.jsonl")).split("train"))
    assert parts[0] == parts[1] == parts[2] and parts[0].examples[0].label == "é—漢😀"
    (tmp_path / "long.jsonl").write_bytes(lines([{**row, "prompt": row["prompt"] + "x" * 700} for row in OK]))
    words = ["--model-name", base.model, "--base_dir", str(base.path), "--dataset-name", "long", "--data", str(tmp_path / "long.jsonl")]
    for more, said, cut in ((["--max-length", "2000"], "1 of 1 are longer than the model's context of 512 tokens", 0), ([], "", 1)):
        assert cli.main(["tasks", "evaluate", *words, "--variant", "base", "--max-new-tokens", "4", *more, "--json"]) == 0
        assert said in caplog.text and json.loads(capsys.readouterr().out)["runs"][0]["test"]["prompts_truncated"] == cut
