"""`--train FILE`: a file of the user's own through every stage, without an entry of dataset_format.yaml and without settings files."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from refusal import message

from spilt import cli, verify
from spilt.artifacts.atomic import HALF_REPLACED
from spilt.cell import FORMS
from spilt.data import own
from spilt.data.sources import read_rows
from spilt.report.places import find, label
from spilt.settings import FitSettings, resolve_fit

COLUMNS = "question=ask,matching=good,not_matching=bad"
ROWS = [{"ask": row["question"], "good": row["matching"], "bad": row["not_matching"]} for row in families.pairs(20)]


def text_of(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    """A model, and no settings at all: what a newcomer has."""
    made = families.make_base(tmp_path / "base", train=4)
    shutil.rmtree(made.path / "hparams")
    shutil.rmtree(made.path / "data")
    return made


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "Mine.csv"
    path.write_text(text_of(ROWS, ";"), encoding="utf-8")
    return path


def run(base: families.Base, mine: Path, *words: str, method: str = "sft", form: str = "vector", test: str | None = "0.2") -> int:
    given = ["--train", str(mine), "--columns", COLUMNS, *(["--test", test] if test else []), "--model_name", base.model]
    given += ["--method", method, "--intervention_method", form, "--device", "cpu", "--base_dir", str(base.path), "--dtype", "float32"]
    return cli.main([*given, "--set", "n_epochs=1", "--quiet", *words])


def states(base: families.Base) -> dict[str, int]:
    found = [one.state for one in verify.check(base.path)]
    return {state: found.count(state) for state in set(found)}


TEXTS = ("--set", "generation_params.max_new_tokens=4")


@pytest.mark.long
def test_a_csv_is_enough_for_every_stage(base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit, texts, losses, page, verify, recommend, say; a rerun finds all done, with --train and by the dataset's name alone."""
    assert run(base, mine, "--layers", "1", "--multipliers", "0", "1", *TEXTS) == 0
    assert "16 pairs in train.jsonl, 4 pairs in test.jsonl from Mine.csv" in capsys.readouterr().out
    assert (
        run(base, mine, "--layers", "1", "--mode", "loss", "--multipliers", "sweep", "--set", "sweep_points=5", "--control_pairs", "0") == 0
    )
    assert (base.path / "vectors/tiny/sft/Mine/sft_vector@layer1/layer_1.pt").is_file()
    assert (base.path / "vectors/tiny/get_sft_loss/report/Mine/report.html").is_file()
    assert states(base).keys() == {verify.OK}
    (place,) = find(base.path, base.model, "Mine")
    assert place.layers == (1,) and place.form == "vector" and label(place.method, place.intervention) == "sft vector, layer 1"
    capsys.readouterr()
    assert run(base, mine, "--layers", "1", "--multipliers", "0", "1", *TEXTS) == 0
    said = capsys.readouterr().out
    assert "2 already done" in said and "pairs in" not in said
    named = ["--dataset", "Mine", "--model_name", base.model, "--base_dir", str(base.path)]
    cell = [*named, "--method", "sft", "--intervention_method", "vector", "--device", "cpu"]
    more = ["--dtype", "float32", "--set", "n_epochs=1", "--quiet"]
    assert cli.main([*cell, "--layers", "1", "--multipliers", "0", "1", *TEXTS, *more]) == 0
    assert "2 already done" in capsys.readouterr().out
    assert cli.main(["say", "is 3 odd?", *cell, "--layers", "1", "--set", "dtype=float32", "--max_new_tokens", "3"]) == 0
    for word in ("recommend", "look", "report"):
        assert cli.main([word, *named]) == 0, word
    assert "layer 1" in capsys.readouterr().out


def test_without_words_it_is_the_middle_block_and_the_released_defaults(
    base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One source: the defaults of settings/fields.py, for every method and form; the plan shows them."""
    assert run(base, mine, "--dry_run", method="all", form="all") == 0
    said = capsys.readouterr().out
    assert "Mine has no settings files, so the released defaults (layer 2)" in said and "16 pairs in train.jsonl" in said
    assert not (base.path / "data").exists() and not (base.path / "vectors").exists()
    for method, form in families.PAIRS:
        found = resolve_fit(base.path, base.model, "Mine", method, form, {"dtype": "float32"}, layers=(2,), own=True)
        assert found.settings == FitSettings(method=method, intervention_method=form, layers=(2,), dtype="float32")
        assert f"lr={FORMS[form].lr:g} " in said
    assert run(base, mine, "--mode", "generate") == 0
    assert (base.path / "vectors/tiny/sft/Mine/sft_vector/layer_2.pt").is_file()


def test_settings_of_the_base_are_no_hindrance(tmp_path: Path, mine: Path) -> None:
    """Where hparams/ has other datasets, the file still needs no entry and no settings; those of all datasets hold for it too."""
    base = families.make_base(tmp_path / "full", train=4)
    assert run(base, mine, "--mode", "generate", test=None) == 0
    assert (base.path / "vectors/tiny/sft/Mine/sft_vector/layer_2.pt").is_file()
    assert run(base, mine, "--dataset", base.one, "--mode", "generate") == 2, "the name is taken"


def test_without_held_out_rows_the_questions_of_the_fit_are_asked_and_it_is_said(
    base: families.Base, mine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(base, mine, "--multipliers", "1", "--limit", "3", *TEXTS, test=None) == 0
    assert "questions are in both" in caplog.text
    assert run(base, mine, "--mode", "loss", "--multipliers", "1", "--split", "test", "--no_report", test=None) == 2


def test_the_split_is_seeded_stable_and_by_question(tmp_path: Path) -> None:
    rows = [{"question": f"{i // 2}?", "matching": f"a{i}", "not_matching": f"b{i}"} for i in range(40)]

    def split(rows: list[dict[str, str]], name: str, **more: Any) -> tuple[list[Any], list[Any]]:
        path = tmp_path / f"{name}.jsonl"
        families.write_jsonl(path, rows)
        own.bring(tmp_path, name, own.Own((path,), **more))
        return tuple([r.values for r in read_rows(tmp_path / f"data/{name}/{part}.jsonl")] for part in ("train", "test"))  # type: ignore[return-value]

    train, test = split(rows, "one", test=0.25)
    asked = {row["question"] for row in test}
    assert len(asked) == 5 and len(test) == 10 and not asked & {row["question"] for row in train}
    assert sorted([*train, *test], key=str) == sorted(rows, key=str)
    assert split(rows[::-1], "two", test=0.25)[1] == test[::-1], "not by the order of the file"
    assert split(rows, "three", test=0.25, seed=1)[1] != test
    assert len(split(rows, "four", test=3)[1]) == 6
    longer = [*rows, *({"question": f"new {i}", "matching": "a", "not_matching": "b"} for i in range(4))]
    assert len(asked - {row["question"] for row in split(longer, "five", test=0.25)[1]}) <= 1, "most of what was held out still is"


def test_a_file_that_changed_is_taken_over_and_what_was_made_of_it_is_made_again(
    base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, mine, "--mode", "generate") == 0
    mine.write_text(text_of(ROWS[:-1], ";"), encoding="utf-8")
    capsys.readouterr()
    assert run(base, mine, "--mode", "generate") == 0
    said = capsys.readouterr().out
    assert "was replaced" in said and "1 done" in said
    assert run(base, mine, "--mode", "generate", test=None) == 0
    assert not (base.path / "data/Mine/test.jsonl").exists()
    other = mine.with_name("other.csv")
    shutil.copy(mine, other)
    assert run(base, other, "--mode", "generate", "--dataset", "Mine") == 2
    assert "holds the rows of Mine.csv" in capsys.readouterr().err
    families.write_jsonl(base.path / "data/theirs/train.jsonl", families.pairs(3))
    assert run(base, other, "--mode", "generate", "--dataset", "theirs") == 2
    assert "holds other data (train.jsonl)" in capsys.readouterr().err


def _parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


FILES: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda p: p.write_text(text_of(ROWS)),
    "semicolon.csv": lambda p: p.write_text(text_of(ROWS, ";")),
    "bar.csv": lambda p: p.write_text(text_of(ROWS, "|")),
    "tab.csv": lambda p: p.write_text(text_of(ROWS, "\t")),
    "a.tsv": lambda p: p.write_text(text_of(ROWS, "\t")),
    "a.csv.gz": lambda p: p.write_bytes(gzip.compress(text_of(ROWS).encode())),
    "a.jsonl": lambda p: families.write_jsonl(p, ROWS),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "list.json": lambda p: p.write_text(json.dumps(ROWS)),
    "wrapped.json": lambda p: p.write_text(json.dumps({"version": 1, "tags": ["a"], "data": ROWS})),
    "columns.json": lambda p: p.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
    "pandas.json": lambda p: p.write_text(json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]})),
    "a.parquet": _parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    assert [record.values for record in read_rows(path)] == ROWS
    own.bring(tmp_path, "rows", own.Own((path,), columns=own.columns_from(COLUMNS)))
    assert [row.values["question"] for row in read_rows(tmp_path / "data/rows/train.jsonl")] == [row["ask"] for row in ROWS]


def test_several_files_are_one_set(tmp_path: Path) -> None:
    FILES["a.csv"](tmp_path / "a.csv")
    FILES["a.parquet"](tmp_path / "b.parquet")
    own.bring(tmp_path, "rows", own.Own((tmp_path / "a.csv", tmp_path / "b.parquet"), (tmp_path / "a.csv",), own.columns_from(COLUMNS)))
    assert [len(read_rows(tmp_path / f"data/rows/{part}.jsonl")) for part in ("train", "test")] == [40, 20]


WRONG: dict[str, tuple[str, str]] = {
    "columns.csv": (
        "a,b,c\nis it?,yes,no\n",
        "no column 'ask', 'good', 'bad' (columns found: a, b, c); say which is which: --columns question=ask",
    ),
    "empty.csv": ("ask,good,bad\nis it?,yes,\nwas it?,yes,no\n", "line 2: empty answer '' in column 'bad' (not_matching); write an answer"),
    "ragged.csv": ('ask,good,bad\n"is it?",yes,no, never\n', "4 fields where the header has 3 (quote fields that hold a comma"),
    "same.csv": ("ask,good,bad\nis it?,yes,yes\nwas it?,no,no\n", "hold the same answer in every one of 2 pairs"),
    "broken.jsonl": ('{"ask": "is it?", "good": "yes", "bad": "no"}\n{"ask": "was', "line 2: not JSON"),
    "nothing.json": ("[]", "no rows; wanted one pair of answers a row"),
    "torn.csv.gz": ("no gzip", "is not readable as gzip"),
    "two.json": ('{"train": [{"ask": "a"}], "test": [{"ask": "b"}]}', "rows under 'train', 'test'; give a file for each"),
    "lengths.json": ('{"ask": ["a", "b"], "good": ["c"], "bad": ["d"]}', "columns of different lengths ('ask' 2, 'good' 1, 'bad' 1)"),
    "latin.csv": ("ask,good,bad\nist es s\udce4mig?,ja,nein\n", "line 2: byte 0xe4 is not UTF-8; save the file as UTF-8"),
    "table.xlsx": ("x", "unknown ending '.xlsx'; have: .jsonl, .json, .csv, .tsv, .parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_gives_one_good_message(name: str, base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, the file, the line, the fact, the way out; nothing written."""
    path, (text, wanted) = tmp_path / name, WRONG[name]
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert run(base, path, test=None) == 2
    said = capsys.readouterr().err
    assert wanted in said and str(path) in said and "Traceback" not in said
    assert not (base.path / "data").exists() and not (base.path / "vectors").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--test", "0"), "wanted a share of the questions such as 0.2"),
        (("--test", "0.01"), "both parts need one at least"),
        (("--test", "20"), "both parts need one at least"),
        (("--test", "gone.csv"), "gone.csv can't be read: No such file or directory"),
        (("--columns", "question"), "is no field=column"),
        (("--columns", "questoin=ask"), "unknown field 'questoin'; did you mean 'question'?"),
        (("--dataset", "../x"), "cannot be a folder name"),
        (("--layers", "9"), "layer"),
        (("--layers", "1,2"), "wanted block numbers from 0 such as 10 14, 10+14"),
        (("--layers", "1+1"), "names a block twice"),
        (
            ("--layers", "+".join(map(str, range(130)))),
            "130 blocks that act together give a folder a name that is too long; name them in the settings",
        ),
        (("--layers", "1", "--set", "layers=2"), "give one of them"),
        (("--method", "stf"), "did you mean 'sft'?"),
    ],
)
def test_wrong_words(words: tuple[str, ...], wanted: str, base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, mine, *words) == 2
    assert wanted in capsys.readouterr().err and not (base.path / "data").exists()


def test_what_is_drawn_must_prefer_something_and_nothing_is_written_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of four questions have one answer twice: a file that prefers something, and a draw of it that does not."""
    path = tmp_path / "rows.csv"
    path.write_text(text_of([{"question": f"{n}?", "matching": "x", "not_matching": "xy"[n > 1]} for n in range(4)]))
    found = set()
    for seed in range(12):
        words = ["prepare", "--input", str(path), "--test", "0.5", "--base_dir", str(tmp_path), "--seed", str(seed), "--name", f"d{seed}"]
        found.add(code := cli.main(words))
        said = capsys.readouterr()
        assert (tmp_path / "data" / f"d{seed}").exists() == (code == 0)
        assert code == 0 or "of what is drawn for" in said.err and "another --seed draws others" in said.err
    assert found == {0, 2}


def test_words_that_need_a_file(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--method", "sft", "--intervention_method", "vector", "--model_name", base.model, "--base_dir", str(base.path)]
    assert cli.main(given) == 2 and "which data? give --dataset NAME, or --train FILE" in capsys.readouterr().err
    assert cli.main([*given, "--dataset", "x", "--test", "0.2"]) == 2 and "--test goes with --train FILE" in capsys.readouterr().err


def test_the_name_is_the_files_or_its_folders(tmp_path: Path) -> None:
    (tmp_path / "honesty").mkdir()
    assert own.name_of((tmp_path / "honesty/train.csv.gz",)) == "honesty"
    assert own.name_of((tmp_path / "polite.jsonl",)) == "polite"
    assert "give --dataset NAME" in message(own.name_of, (tmp_path / "my data.csv",))


def test_prepare_takes_any_file(base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files as --train makes, so that a later run with --train finds all there."""
    words = ["prepare", "--input", str(mine), "--columns", COLUMNS, "--test", "0.2", "--base_dir", str(base.path)]
    assert cli.main(words) == 0 and "16 pairs in train.jsonl, 4 pairs in test.jsonl" in capsys.readouterr().out
    before = families.listing(base.path / "data")
    assert cli.main(words) == 0 and "is there just so" in capsys.readouterr().out
    assert run(base, mine, "--mode", "generate") == 0
    assert families.listing(base.path / "data") == before
    for more, wanted in ((("--train", "3"), "--train goes with --source"), (("--source", "psychopathy"), "leave out --columns")):
        assert cli.main([*words, *more]) == 2 and wanted in capsys.readouterr().err


def test_files_whose_replacement_was_cut_off_are_written_again(base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill between the renames: refused by name alone, mended by the same command."""
    assert run(base, mine, "--mode", "generate") == 0
    note = base.path / "data/Mine" / HALF_REPLACED
    note.write_text(json.dumps(["train.jsonl", "test.jsonl", "source.json"]))
    (base.path / "data/Mine/test.jsonl").write_bytes(b"\xff")
    named = ["--dataset", "Mine", "--model_name", base.model, "--base_dir", str(base.path), "--method", "sft", "--device", "cpu"]
    assert cli.main([*named, "--intervention_method", "vector", "--mode", "generate"]) == 2
    assert "is not to be used" in capsys.readouterr().err
    assert run(base, mine, "--mode", "generate") == 0 and not note.exists()
    assert len(read_rows(base.path / "data/Mine/test.jsonl")) == 4


def test_on_a_cpu_the_default_is_float32(base: families.Base, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The released bfloat16 is slower there; a word of the user's goes before, on the command line and in a file of all datasets."""
    words = ["--train", str(mine), "--columns", COLUMNS, "--model_name", base.model, "--method", "sft", "--intervention_method", "vector"]
    for device, dtype, said in (("cpu", "float32", "released defaults in float32 (layer 2)"), ("cuda", "bfloat16", "defaults (layer 2)")):
        assert cli.main([*words, "--base_dir", str(base.path), "--device", device, "--dry_run"]) == 0
        shown = capsys.readouterr().out
        assert f"dtype={dtype}" in shown and said in shown
    asked: dict[str, Any] = {"layers": (2,), "own": True, "device": "cpu"}
    assert resolve_fit(base.path, base.model, "Mine", "sft", "vector", {"dtype": "bfloat16"}, **asked).settings.dtype == "bfloat16"
    base.experiment.mkdir(parents=True)
    (base.experiment / "config.yaml").write_text("torch_dtype: float16\n")
    assert resolve_fit(base.path, base.model, "Mine", "sft", "vector", **asked).settings.dtype == "float16"
