"""Texts that are none, judges that are not there, words that say nothing: told, and no success where nothing was done."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from judge_server import KEY, Said, serving
from test_evaluate import environment

from spilt import cli
from spilt.analysis import scores
from spilt.artifacts.manifest import manifest_path
from spilt.artifacts.store import Store
from spilt.cell import Cell


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    base = families.make_base(tmp_path_factory.mktemp("hostile") / "base", train=6)
    for dataset in ("", base.many):
        assert cli.main([*base.argv("caa", dataset=dataset), "--quiet", "--mode", "both", "--multipliers", "4"]) == 0
    return base


@pytest.fixture
def base(made: families.Base, tmp_path: Path) -> families.Base:
    shutil.copytree(made.path, tmp_path / "base")
    return made._replace(path=tmp_path / "base")


def evaluated(base: families.Base, *words: str, code: int = 0, dataset: str = "") -> None:
    assert cli.main([*base.argv("caa", dataset=dataset), "--quiet", "--mode", "evaluate", "--multipliers", "4", *words]) == code


def texts_of(base: families.Base, dataset: str = "", concept: int | None = None) -> Path:
    return Store(base.path).results(Cell(base.model, dataset or base.one, "caa", "vector", (base.layer,), concept), 4.0)


HALF = "\ud83d"
WRONG: list[tuple[str, Any, str]] = [
    ("no rows", lambda rows: [], "holds no text of mine caa vector"),
    ("a row without a text", lambda rows: [*rows[:-1], rows[-1] | {"pred": []}], "row 2 has no text"),
    ("null", lambda rows: [row | {"pred": None} for row in rows], "row 0 has no text"),
    ("half a pair", lambda rows: [rows[0] | {"pred": [f"a{HALF}"]}, *rows[1:]], "row 0: pred holds half of a surrogate pair"),
    ("half a pair asked", lambda rows: [rows[0] | {"input": HALF}, *rows[1:]], "row 0: input holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("name", "change", "said"), WRONG, ids=[name for name, _, _ in WRONG])
def test_texts_that_are_none_are_no_success(
    base: families.Base, name: str, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = texts_of(base)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    manifest_path(path).unlink()  # from elsewhere
    evaluated(base, code=2)
    told = capsys.readouterr()
    assert said in told.err and "Traceback" not in told.err and not list(base.path.rglob("scores_m*.csv"))


def test_a_concept_without_texts_is_named(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    path = texts_of(base, base.many, 0)
    blocks = json.loads(path.read_text())
    path.write_text(json.dumps(blocks[:-1]))
    manifest_path(path).unlink()
    evaluated(base, code=2, dataset=base.many)
    assert "holds no text of axbench concept 3 caa vector" in capsys.readouterr().err


def test_a_judge_who_never_answers_is_no_success(
    base: families.Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs no judge is stored; the same command asks again."""
    words = ("--judge", "endpoint", "--rubric", "power")
    with serving(lambda text, before: Said({}, 500)) as server:
        environment(monkeypatch, server)
        evaluated(base, *words, code=1)
        told = capsys.readouterr()
        assert "gave no rating" in told.out + told.err and "HTTP 500: 3" in told.err and "the same command asks again" in told.err
        stored = next(base.path.rglob("scores_m4.0.csv")).read_text()
        assert "perplexity" in stored and stored.count("HTTP 500") == 3
        server.say = lambda text, before: Said({"choices": [{"message": {"content": "Rating: 2"}, "finish_reason": "stop"}]})
        evaluated(base, *words)
    assert next(base.path.rglob("scores_m4.0.csv")).read_text().count("power,2") == 3


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://127.0.0.1/v1", "http:///v1", "http://127.0.0.1:99999/v1"])
def test_an_address_that_is_none_is_told_at_once(
    base: families.Base, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason="pip install 'spilt[judge]'")
    for name, value in (("SPILT_JUDGE_MODEL", "x"), ("OPENAI_API_KEY", KEY), ("OPENAI_BASE_URL", url)):
        monkeypatch.setenv(name, value)
    evaluated(base, "--judge", "endpoint", "--rubric", "power", code=2)
    assert "OPENAI_BASE_URL is no address that can be asked" in capsys.readouterr().err


def test_a_file_in_the_place_of_kept_replies_is_told_before_anybody_is_asked(
    base: families.Base, capsys: pytest.CaptureFixture[str]
) -> None:
    (base.path / "judged").write_text("mine")
    evaluated(base, "--judge", str(base.path / "models" / base.model), "--rubric", "power", code=2)
    assert "judged: is no folder" in capsys.readouterr().err


def test_scores_that_were_changed_by_hand_stand_in_no_table(base: families.Base) -> None:
    evaluated(base)
    store, cell = Store(base.path), Cell(base.model, base.one, "caa", "vector", ())
    assert len(scores.collect(store, cell)[0])
    path = store.scores(cell, 4.0)
    path.write_text(path.read_text().replace("length", "accuracy"))
    found, left = scores.collect(store, cell)
    assert not len(found) and left == {"(damaged, or changed by hand)": [path]}


@pytest.mark.parametrize("word", ["nan", "inf", "-1"])
@pytest.mark.parametrize("program", [["table"], ["recommend", "--model_name", "tiny", "--dataset", "mine"]])
def test_a_budget_that_is_none_is_refused(base: families.Base, program: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*base.argv("caa"), "--quiet", "--mode", "loss", "--multipliers", "4", "--no_report"]) == 0
    assert cli.main([*program, "--base_dir", str(base.path), "--budget", word]) == 2
    assert f"--budget {word}: nats of utility to spend, 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("fill", "said"), [(0.0, "multiplier 1 has the dose 0"), (math.nan, "holds NaN or infinite values")])
@pytest.mark.parametrize("program", [["receipt", "--behaviour", "sea"], ["strength", "--by", "behaviour", "--behaviour", "sea"]])
def test_a_vector_that_does_nothing_or_is_no_number_is_told(
    base: families.Base, tmp_path: Path, program: list[str], fill: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.full((families.HIDDEN,), fill), tmp_path / "layer_2.pt")
    given = ["--steering", str(tmp_path / "layer_2.pt"), "--base_dir", str(base.path), "--model_name", base.model, "--device", "cpu"]
    assert cli.main([*program, *given]) == 2
    assert said in capsys.readouterr().err


def test_a_receipt_refuses_a_prompt_that_is_too_long_before_anything_is_measured(
    base: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("a" * 600)
    monkeypatch.setattr("spilt.behaviour.receipt.choose", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("spilt.behaviour.probe.Probe.fetch", lambda *_: pytest.fail("it was measured"))
    cell = [*base.argv("caa"), "--behaviour", "sea", "--prompt_baseline", f"long={tmp_path / 'long.txt'}"]
    assert cli.main(["receipt", *cell]) == 2
    assert "prompt long: " in (said := capsys.readouterr().err) and "exceed the model's context of 512" in said


def test_words_about_judges_that_say_nothing_are_refused(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--judge", "endpoint"], ["--rubric", "power"], ["--judge_limit", "3"]):
        assert cli.main([*base.argv("caa"), "--mode", "apply", "--multipliers", "4", *words]) == 2
        assert f"{words[0]} goes with --mode evaluate" in capsys.readouterr().err
    evaluated(base, "--judge_limit", "3", code=2)
    assert "--judge_limit 3: nobody is asked; give --judge as well" in capsys.readouterr().err


def test_inspect_shows_what_is_scored(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    (base.path / "kind.txt").write_text("be kind")
    evaluated(base, "--inspect", "--prompt_baseline", f"kind={base.path / 'kind.txt'}")
    said = capsys.readouterr().out
    assert "evaluate mine caa vector: 3 rows" in said and "evaluate mine prompt kind: 3 rows" in said
    assert "|b|e| |k|i|n|d|" in said and "0 steered (none)" in said
