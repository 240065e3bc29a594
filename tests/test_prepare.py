"""Splits of the public sources: sizes, balance, no question in both, same seed same bytes, and mistakes that exit 2 and write nothing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from spilt.data import concepts, load_formats, read_pairs, read_prompts
from spilt.data.readers import FORMATS_FILE
from spilt.prepare import main

REPO = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data here")


def statements(path: Path, n: int, **changed: object) -> Path:
    """A source like psychopathy.jsonl: Yes and No in turn; `changed` goes into the third row."""
    rows = [
        {"question": f"Would you say {i}?", "label_confidence": 0.9, "answer_matching_behavior": yes, "answer_not_matching_behavior": no}
        for i in range(n)
        for yes, no in [(" Yes", " No") if i % 2 else (" No", " Yes")]
    ]
    rows[2].update(changed)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path: Path, names: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "matching", "not_matching"])
        writer.writerows([name, f'yes, "{i}"', f"no\n{i}"] for i, name in enumerate(names))
    return path


def concept_pairs(path: Path, ids: range, n: int, **changed: object) -> Path:
    rows = [
        {"input": f"Ask {i}", "winning_output": f"with {c} {i}", "losing_output": f"without {i}", "output_concept": f"about {c}"}
        | {"concept_id": c, "concept_genre": "text", "category": "positive"}
        for c in ids
        for i in range(n)
    ]
    rows[1].update(changed)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(base: Path, source: str, *arguments: object) -> int:
    return main(["--source", source, "--name", source, "--base_dir", str(base), *map(str, arguments)])


def fails(capsys: pytest.CaptureFixture[str], base: Path, source: str, *arguments: object) -> str:
    """The message of a run that exits 2; nothing is written."""
    before = sorted(base.rglob("*"))
    assert run(base, source, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and sorted(base.rglob("*")) == before
    return captured.err


def entries(base: Path, dataset: str) -> tuple:
    """The shipped dataset_format.yaml must read what is written."""
    (base / FORMATS_FILE).parent.mkdir(parents=True, exist_ok=True)
    (base / FORMATS_FILE).write_text((REPO / FORMATS_FILE).read_text())
    formats = load_formats(base)
    return tuple(formats[section][dataset] for section in ("train", "valid", "generation"))


def test_psychopathy_is_balanced_and_apart(tmp_path, capsys):
    assert run(tmp_path, "psychopathy", "--input", statements(tmp_path / "in.jsonl", 60), "--train", 20, "--test", 10) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'data/psychopathy/train.jsonl'}: 20 pairs" in out and "10 Yes + 10 No in train, 5 + 5 in test" in out
    train, test, prompts = entries(tmp_path, "psychopathy")
    pairs, held_out = read_pairs(train), read_pairs(test)
    assert Counter(pair.matching for pair in pairs) == {" Yes": 10, " No": 10}
    assert Counter(pair.matching for pair in held_out) == {" Yes": 5, " No": 5}
    assert Counter(pair.matching for pair in pairs[:6]) == {" Yes": 3, " No": 3}  # so that --limit stays balanced
    assert not {pair.question for pair in pairs} & {pair.question for pair in held_out}
    assert len({pair.question for pair in pairs}) == 20
    assert read_prompts(prompts)[0].extra["label_confidence"] == 0.9


def test_same_seed_same_bytes_and_another_seed_other_rows(tmp_path):
    source = statements(tmp_path / "in.jsonl", 60)
    written = []
    for i, seed in enumerate((42, 42, 7)):
        assert run(tmp_path / str(i), "psychopathy", "--input", source, "--train", 20, "--test", 10, "--seed", seed) == 0
        written.append([(tmp_path / str(i) / f"data/psychopathy/{name}.jsonl").read_bytes() for name in ("train", "test")])
    assert written[0] == written[1] and written[0][0] != written[2][0] and written[0][1] != written[2][1]


def test_files_that_are_there_are_kept_without_force(tmp_path, capsys):
    source = statements(tmp_path / "in.jsonl", 60)
    sizes = ("--train", 4, "--test", 2)
    test = tmp_path / "data/psychopathy/test.jsonl"
    test.parent.mkdir(parents=True)
    test.write_text("mine")
    said = fails(capsys, tmp_path, "psychopathy", "--input", source, *sizes)
    assert f"{test} is there already" in said and "--force" in said and test.read_text() == "mine"
    assert run(tmp_path, "psychopathy", "--input", source, *sizes, "--force") == 0
    assert len(test.read_text().splitlines()) == 2
    assert sorted(path.name for path in test.parent.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_powerseeking_of_two_files(tmp_path, capsys):
    train = questions(tmp_path / "train.csv", [*[f"train {i}" for i in range(12)], "", "test 3", "train 1"])
    test = questions(tmp_path / "test.csv", [f"test {i}" for i in range(5)])
    assert run(tmp_path, "powerseeking", "--input", train, test, "--train", 10, "--test", 5) == 0
    out = capsys.readouterr().out
    assert (
        "left out 1 row(s) of train.csv with an empty question" in out
        and "left out 1 row(s) of train.csv whose question is in the test" in out
    )
    fit, score, prompts = entries(tmp_path, "powerseeking")
    assert [pair.question for pair in read_pairs(score)] == [f"test {i}" for i in range(5)]  # all of them: the file's order
    pairs = read_pairs(fit)
    assert len(pairs) == 10 and all(pair.question.startswith("train") for pair in pairs)
    assert pairs[0].matching.startswith('yes, "') and pairs[0].not_matching.startswith("no\n")
    assert read_prompts(prompts)[0].reference_response == 'yes, "0"'
    said = fails(capsys, tmp_path, "powerseeking", "--input", train, test, "--train", 14, "--test", 5, "--force")
    assert "13 rows of" in said and "14 wanted; lower --train" in said


def test_powerseeking_of_one_file_keeps_a_questions_rows_together(tmp_path):
    source = questions(tmp_path / "all.csv", [f"q {i // 2}" for i in range(20)])
    assert run(tmp_path, "powerseeking", "--input", source, "--train", 11, "--test", 8) == 0
    fit, score, _ = entries(tmp_path, "powerseeking")
    sides = [[pair.question for pair in read_pairs(side)] for side in (fit, score)]
    assert [len(side) for side in sides] == [11, 8] and not set(sides[0]) & set(sides[1])


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_axbench_counts_per_concept(tmp_path, capsys, ending):
    source = concept_pairs(tmp_path / "in.jsonl", range(-1, 12), 20)
    if ending != ".jsonl":
        import pandas as pd

        frame = pd.read_json(source, lines=True)
        source = tmp_path / f"in{ending}"
        frame.to_csv(source, index=False) if ending == ".csv" else frame.to_parquet(source)
    assert run(tmp_path, "axbench", "--input", source, "--train", 16, "--test", 4) == 0
    out = capsys.readouterr().out
    assert "160 pairs of 10 concepts" in out and "40 pairs of 10 concepts" in out and "10 concepts, 16 + 4 pairs each" in out
    fit, score, prompts = entries(tmp_path, "axbench")
    assert concepts(fit) == {c: f"about {c}" for c in range(10)} == concepts(prompts)
    for concept in range(10):
        train, test = read_pairs(fit, concept), read_pairs(score, concept)
        assert (len(train), len(test)) == (16, 4) and not {pair.question for pair in train} & {pair.question for pair in test}
        assert {pair.matching.split()[1] for pair in train} == {str(concept)}
    assert read_prompts(prompts, 3)[0].extra["category"] == "positive"


def test_axbench_mistakes(tmp_path, capsys):
    source = concept_pairs(tmp_path / "in.jsonl", range(3), 20)
    said = fails(capsys, tmp_path, "axbench", "--input", source)
    assert "no rows of concept_id 3, 4, 5, 6, 7, 8, 9" in said and "--concepts from: 0, 1, 2" in said
    said = fails(capsys, tmp_path, "axbench", "--input", source, "--concepts", 1, 2)
    assert "20 rows of" in said and "with concept_id 1" in said and "64 for train and 8 for test; lower --train or --test" in said
    for changed, wanted in (
        ({"losing_output": ""}, "line 2: losing_output is ''"),
        ({"concept_id": "x"}, "line 2: concept_id is 'x'"),
        ({"category": "\ud83d"}, "line 2: category has half of a surrogate pair"),
    ):
        assert wanted in fails(capsys, tmp_path, "axbench", "--input", concept_pairs(tmp_path / "in.jsonl", range(3), 20, **changed))
    concept_pairs(tmp_path / "in.jsonl", range(3), 20, category=3)  # a number among texts
    said = fails(capsys, tmp_path, "axbench", "--input", source, "--concepts", 0, "--train", 16, "--test", 4)
    assert "can't be written as parquet" in said and "one type" in said


def test_concept10_is_refused_with_what_is_missing(tmp_path, capsys):
    row = {"input": "Ask", "output": "Text", "output_concept": "about", "concept_id": 0, "concept_genre": "text", "category": "positive"}
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    said = fails(capsys, tmp_path, "axbench", "--input", source)
    assert all(part in said for part in ("Concept10", "not paired", "winning_output", "losing_output", "columns found: input, output,"))


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"answer_matching_behavior": " Maybe"}, "line 3: answer_matching_behavior is ' Maybe'; wanted ' Yes' or ' No'"),
        ({"answer_matching_behavior": 3}, "line 3: answer_matching_behavior is 3; wanted text"),
        ({"answer_not_matching_behavior": " "}, "line 3: answer_not_matching_behavior is ' '"),
    ],
)
def test_psychopathy_rows_that_are_wrong(tmp_path, capsys, changed, wanted):
    said = fails(capsys, tmp_path, "psychopathy", "--input", statements(tmp_path / "in.jsonl", 60, **changed))
    assert wanted in said and "in.jsonl" in said


def test_psychopathy_requests_that_cannot_be(tmp_path, capsys):
    source = statements(tmp_path / "in.jsonl", 60)
    said = fails(capsys, tmp_path, "psychopathy", "--input", source)
    assert "30 rows of" in said and "is Yes" in said and "250 for train and 50 for test" in said
    assert "--test 3: psychopathy splits are half Yes" in fails(
        capsys, tmp_path, "psychopathy", "--input", source, "--train", 4, "--test", 3
    )
    assert "2 files; this source is one file" in fails(capsys, tmp_path, "psychopathy", "--input", source, source)
    assert "can't be read" in fails(capsys, tmp_path, "psychopathy", "--input", tmp_path / "none.jsonl")
    assert "no column 'answer_matching_behavior'" in fails(capsys, tmp_path, "psychopathy", "--input", questions(tmp_path / "q.csv", ["a"]))
    (tmp_path / "empty.jsonl").write_text("")
    assert "no rows" in fails(capsys, tmp_path, "psychopathy", "--input", tmp_path / "empty.jsonl")
    assert "3 files for powerseeking" in fails(capsys, tmp_path, "powerseeking", "--input", source, source, source)
    both = statements(tmp_path / "both.jsonl", 8, question="Would you say 1?")
    assert "Yes in one row and No in another" in fails(capsys, tmp_path, "psychopathy", "--input", both, "--train", 4, "--test", 4)


def test_a_base_dir_that_cannot_be_written(tmp_path, capsys):
    source = statements(tmp_path / "in.jsonl", 60)
    (tmp_path / "data").write_text("a file where a folder is wanted")
    assert "can't be written" in fails(capsys, tmp_path, "psychopathy", "--input", source, "--train", 4, "--test", 2)


def test_usage_errors_and_the_module_from_the_shell(tmp_path):
    for arguments in (
        ["--source", "psycho", "--input", "a"],
        ["--source", "axbench"],
        ["--source", "axbench", "--input", "a", "--train", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    command = [sys.executable, "-m", "spilt.prepare", "--source", "psychopathy", "--input", "none.jsonl", "--base_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and done.stderr.startswith("error: data file none.jsonl") and "Traceback" not in done.stderr


@real
def test_real_sources_at_the_papers_sizes(tmp_path, capsys):
    assert run(tmp_path, "psychopathy", "--input", DATA / "psychopathy/psychopathy.jsonl") == 0
    fit, score, _ = entries(tmp_path, "psychopathy")
    for entry, half in ((fit, 250), (score, 50)):
        assert Counter(pair.matching for pair in read_pairs(entry)) == {" Yes": half, " No": half}
    assert not {pair.question for pair in read_pairs(fit)} & {pair.question for pair in read_pairs(score)}
    assert run(tmp_path, "powerseeking", "--input", DATA / "powerseeking/train.csv", DATA / "powerseeking/test.csv") == 0
    fit, score, _ = entries(tmp_path, "powerseeking")
    train, test = read_pairs(fit), read_pairs(score)
    assert (len(train), len(test)) == (500, 200) and not {pair.question for pair in train} & {pair.question for pair in test}
    assert all(pair.question.strip() for pair in train)
    capsys.readouterr()
    assert "not paired" in fails(capsys, tmp_path, "axbench", "--input", DATA / "axbench/train_data.parquet")
