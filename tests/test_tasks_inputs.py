"""spilt tasks on wrong, empty and surprising rows, words and files: nothing is counted that is not so, nothing left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import listops_world as world
import pytest
from test_tasks import Said, words

from spilt import cli
from spilt.data.sources import Record
from spilt.downstream import load
from spilt.downstream.answers import extractor
from spilt.downstream.places import Place, runs, summaries
from spilt.errors import UserError

QUICK = ["--variant", "vector", "--lr", "1e-2", "--bs", "4", "--quiet"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made = world.write_untrained(tmp_path)
    world.write_task(made / "new", 1, train=16, test=6)
    return made


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(base: Path, capsys: Said, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(words(base, "evaluate", *more, "--json")) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    return dict(run["test"])


# ---------------------------------------------------------------- labels and completions


@pytest.mark.parametrize(
    ("name", "label", "said"),
    [
        ("number", True, "True is not one number"),
        ("number", float("inf"), "inf is not one number"),
        ("number", 10**400, "too large"),
        ("number", "\u0663", "is not one number"),  # an Arabic-Indic three
        ("tag", True, "True is not one number"),
        ("tag", 3.7, "3.7 is no whole number"),
        ("tag", "3.7", "'3.7' is no whole number"),
        ("text", ".", "'.' is no text"),
        ("text", ["a", "b"], r"label is \['a', 'b'\]; wanted a text, a number"),
        ("letter", False, "False is no letter"),
        ("option", True, "True is neither 1 nor 2"),
        ("option", 1.0, "1.0 is neither 1 nor 2"),
    ],
)
def test_a_label_of_another_kind_is_refused(name: str, label: object, said: str) -> None:
    task = load.rows.Task("mine", load.OWN, load.rows.own, name, load.rows.OFFICIAL)
    with pytest.raises(UserError, match=f"row 0: is no row of mine: .*{said}"):
        load._examples(task, [Record(0, "row 0", {"prompt": "p", "completion": "c", "label": label})])


def test_a_label_is_read_as_an_answer_is() -> None:
    """What a label says in the words of an answer is that answer; whole numbers are kept to the last digit."""
    find = extractor("text")
    assert find.score("The answer is blue.", "The answer is blue") and find.score("Blue", "Answer: blue")
    assert find.score("blueberry", "blue") is False and extractor("boolean").score("untrue", "true") is None
    exact = extractor("tag")
    assert exact.score("<answer>9007199254740993</answer>", "9007199254740993") is True
    assert exact.score("<answer>9007199254740992</answer>", 9007199254740993) is False
    assert exact.score("<answer>\u0663</answer>", 3) is None  # digits of other scripts are no answer


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completion": "3"}, "no answer is read (the whole number in <answer></answer>)"),
        ({"completion": "<answer>3</answer> or <answer>4</answer>", "label": 3}, "4 is read"),
    ],
)
def test_teaching_what_would_be_counted_as_wrong_is_refused(
    change: dict[str, Any], said: str, base: Path, capsys: Said, caplog: pytest.LogCaptureFixture
) -> None:
    """All rows: an error, since what learns them perfectly has an accuracy of 0. Some: how many, and the first."""
    path = base / "new" / "train.jsonl"
    rows = rows_of(path)
    write(path, [{**row, **change} for row in rows])
    assert cli.main(words(base, "train", *QUICK)) == 2
    err = capsys.readouterr().err
    assert "what is taught would be counted as wrong in every training row; row 0 (0-based)" in err and said in err
    assert "another --extractor reads it otherwise" in err and not (base / "tasks").exists()
    write(path, [rows[0], {**rows[1], **change}, *rows[2:]])
    assert cli.main(words(base, "train", *QUICK)) == 0
    assert "in 1 of 16 training rows what is taught would be counted as wrong; row 1 (0-based)" in caplog.text


def test_one_label_alone_and_rows_without_any_are_told(base: Path, capsys: Said) -> None:
    path = base / "new" / "test.jsonl"
    rows = rows_of(path)
    write(path, [{**row, "label": 3} for row in rows[:4]] + [{**row, "label": None} for row in rows[4:]])
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    said = capsys.readouterr().out
    assert "of 4;" in said and "2 rows without answer" in said and "every label is the same" in said
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    said = capsys.readouterr().out
    assert "Every label is the same. 2 rows without an answer were left out." in said
    write(path, [{**row, "label": i % 3} for i, row in enumerate(rows)])
    assert evaluated(base, capsys, "--variant", "base")["commonest"] == pytest.approx(2 / 6)
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    assert "The commonest label is that of 33.3% of the rows." in capsys.readouterr().out


# ---------------------------------------------------------------- training rows among those evaluated, or not at hand


def test_test_rows_that_were_trained_on_are_counted_as_the_files_are_now(base: Path, capsys: Said) -> None:
    """Counted among the rows that are evaluated, against those that were trained on, also where the answers are already stored."""
    assert evaluated(base, capsys, "--variant", "base")["seen_in_train"] == 0
    train, test = (rows_of(base / "new" / f"{name}.jsonl") for name in ("train", "test"))
    write(base / "new" / "train.jsonl", [*test[:4], *train])
    capsys.readouterr()
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    assert "4 seen in train" in capsys.readouterr().out
    assert evaluated(base, capsys, "--variant", "base", "--limit-eval", "3")["seen_in_train"] == 3
    assert evaluated(base, capsys, "--variant", "base", "--limit-eval", "3", "--limit", "2")["seen_in_train"] == 2
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    assert "base: 2 of these prompts are also training prompts." in capsys.readouterr().out


def test_answers_are_evaluated_without_the_training_rows(base: Path, capsys: Said, caplog: pytest.LogCaptureFixture) -> None:
    """What was learned is known by its manifest; only whether test rows were among the training rows cannot be told, and that is said."""
    assert cli.main(words(base, "train", *QUICK)) == 0
    rows = (base / "new" / "train.jsonl").read_bytes()
    (base / "new" / "train.jsonl").unlink()
    capsys.readouterr()
    assert cli.main(words(base, "evaluate", *QUICK)) == 0
    out, err = capsys.readouterr()
    assert "has no training rows, so nobody tells whether a row of test is one of them" in err and "new test vector_block: " in out
    (place,) = runs(base)
    alone = place.results("test").read_bytes()
    assert summaries(place)["test"]["seen_in_train"] is None and "was learned with" not in caplog.text
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    assert "the training rows were not at hand" in capsys.readouterr().out
    assert cli.main(words(base, "train", *QUICK)) == 2
    assert "wanted one file train.jsonl" in capsys.readouterr().err
    (base / "new" / "train.jsonl").write_bytes(rows)  # they are back: counted, and the answers are the same
    assert evaluated(base, capsys, *QUICK)["seen_in_train"] == 0 and summaries(place)["test"]["seen_in_train"] == 0
    assert place.results("test").read_bytes() == alone
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    assert "at hand" not in capsys.readouterr().out


def test_of_a_single_file_it_is_said_what_part_was_evaluated(base: Path, capsys: Said) -> None:
    path = base / "all.jsonl"
    write(path, rows_of(base / "new" / "train.jsonl") * 2)
    flags = [word if word != str(base / "new") else str(path) for word in words(base, "evaluate", "--variant", "base")]
    assert cli.main(flags) == 0
    said = capsys.readouterr().out
    assert "of 3; " in said and "test is 90% to 100% of all.jsonl, shuffled" in said and " seen in train" in said


# ---------------------------------------------------------------- words and stored files


@pytest.mark.parametrize(
    ("verb", "more", "match"),
    [
        ("evaluate", ["--variant", "base", "--multiplier", "nan"], "--multiplier nan: wanted a finite number"),
        ("evaluate", ["--variant", "base", "--multiplier", "inf"], "--multiplier inf: wanted a finite number"),
        ("evaluate", ["--variant", "base", "--split", "tset"], "invalid choice: 'tset'"),
        ("evaluate", ["--variant", "vector"], "nothing was learned there yet"),
        ("train", ["--seed", "99999999999999999999999"], "--seed 99999999999999999999999: wanted 0"),
        ("train", ["--seed", "-1"], "--seed -1: wanted 0"),
        ("train", ["--alpha", "nan"], "alpha nan: wanted a finite number"),
        ("train", ["--variant", "loreft", "--adapter-rank", "65", "--epochs", "2"], "loreft of rank 65"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_one_message(base: Path, verb: str, more: list[str], match: str, capsys: Said) -> None:
    try:
        code = cli.main(words(base, verb, *more))
    except SystemExit as stopped:
        code = int(str(stopped.code))
    said = capsys.readouterr().err
    assert code == 2 and match in said and "Traceback" not in said and not (base / "tasks").exists()


def test_what_lies_there_under_other_words_is_named(base: Path, capsys: Said) -> None:
    assert cli.main(words(base, "train", *QUICK)) == 0
    assert cli.main(words(base, "evaluate", "--variant", "vector", "--lr", "2e-2")) == 2
    assert "; of vector_block there is: lr0.01_bs4x2_ep1_warmup0.03_wd0_seed42" in capsys.readouterr().err


def test_a_smaller_evaluation_in_the_place_of_another_is_told(base: Path, capsys: Said, caplog: pytest.LogCaptureFixture) -> None:
    assert evaluated(base, capsys, "--variant", "base")["n"] == 6 and "made again" not in caplog.text
    assert evaluated(base, capsys, "--variant", "base", "--max-new-tokens", "3", "--limit-eval", "2")["n"] == 2
    assert "was made with another data, max_new_tokens 6 (now 3), and is made again" in caplog.text


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--reference", "bsae"], "unknown reference (of the variants evaluated) 'bsae'; did you mean 'base'?"),
        (["--model-name", "tinny"], "unknown model (of those evaluated) 'tinny'; did you mean 'tiny'?"),
        (["--dataset-name", "knew"], "unknown task (of those evaluated) 'knew'; did you mean 'new'?"),
    ],
)
def test_a_table_of_what_is_not_there_is_refused(base: Path, more: list[str], match: str, capsys: Said) -> None:
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    assert cli.main(["tasks", "table", "--base_dir", str(base), *more]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"accuracy": 0.99}, "accuracy 0.99 (now 0.0)"),
        ({"parameters": 1}, "parameters 1 (now 0)"),
        ({"variant": "lora_r8"}, 'variant "lora_r8" (now "base")'),
    ],
)
def test_a_summary_that_was_changed_by_hand_is_in_no_table(base: Path, change: dict[str, Any], match: str, capsys: Said) -> None:
    """The numbers of a table are those of the manifest, which knows its own bytes."""
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    (place,) = runs(base)
    told = summaries(place)
    place.summary.write_text(json.dumps({"test": {**told["test"], **change}}))
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 2
    assert match in capsys.readouterr().err
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0 and summaries(place) == told
    place.summary.write_text('{"test": {"split": "test"}}')
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 2
    assert "is not what was evaluated" in capsys.readouterr().err


def test_two_sets_of_rows_are_two_tables_that_tell_them_apart(base: Path, capsys: Said) -> None:
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    assert cli.main(words(base, "train", *QUICK, "--do-eval", "--test-only", "--limit-eval", "3")) == 0
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles)) == 2 and all(", rows " in title for title in titles)
    assert "base was not evaluated on these rows, so there is no difference to it" in said


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_compared(base: Path, capsys: Said) -> None:
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    assert cli.main(words(base, "train", *QUICK, "--do-eval", "--test-only")) == 0
    place = next(place for place in runs(base) if "vector" in str(place.folder))
    Place(place.folder).results("test").write_text("{}\n")
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 0
    out, err = capsys.readouterr()
    assert "| base |" in out and "vector" not in out and "left out" in err and "is not what its manifest speaks of" in err
