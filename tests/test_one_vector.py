"""A curve, a table and a page are of one vector: losses, controls and texts of another are left out and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from families import Base, make_base
from test_identity import edit, losses, run, texts, vector

from spilt import recommend
from spilt.analysis import odds
from spilt.artifacts import manifest
from spilt.artifacts.losses import SPLITS, SUMMARY_FILE
from spilt.report import cells, places

pytestmark = pytest.mark.usefixtures("no_pictures")
SWEEP = ("-3", "-2", "-1", "0", "1", "2", "3")


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base", train=6, test=2)


def folder(base: Base) -> Path:
    return losses(base).parents[1]


def refit(base: Base) -> None:
    edit(base, lr=0.3, n_epochs=2)
    assert run(base, "--mode", "generate", "--quiet") == 0


@pytest.mark.long
def test_losses_of_two_vectors_are_not_one_curve(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "loss", "--multipliers", *SWEEP, "--quiet", "--no_report") == 0
    refit(base)
    assert run(base, "--mode", "loss", "--multipliers", "2", "--quiet") == 0
    for split in SPLITS:
        frame = odds.collect(folder(base), split)
        assert sorted(frame["multiplier"].unique()) == [-2, 2]
        (note,) = frame.attrs["notes"]
        # the folders of 2 hold the new losses, of +2 and of -2; the others are of the old vector
        assert "m = -3, -2, -1, 0, 1, 3 left out: measured with another vector" in note
    summary = pd.read_csv(folder(base) / SUMMARY_FILE)
    assert sorted(summary["multiplier"].unique()) == [-2, 2]
    assert any("another vector" in note for note in json.loads((folder(base) / "fit.json").read_text())["notes"])
    page = (folder(base).parents[2] / "report" / base.one / "report.html").read_text()
    assert "another vector" in page
    capsys.readouterr()
    assert recommend.main(["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one]) == 0
    assert "sft vector: train: m = -3, -2, -1, 0, 1, 3 left out" in capsys.readouterr().err


@pytest.mark.long
def test_no_curve_when_all_losses_are_of_another_vector(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--quiet", method="all") == 0
    assert run(base, "--mode", "loss", "--multipliers", *SWEEP, "--quiet", "--no_report", method="all") == 0
    refit(base)
    from spilt import report

    assert report.main(["--base_dir", str(base.path)]) == 0
    page = (folder(base).parents[2] / "report" / base.one / "report.html").read_text()
    assert "sft vector" in page and "another vector than the one that lies there now" in page
    capsys.readouterr()
    assert recommend.main(["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one]) in (0, 2)
    told = capsys.readouterr()
    assert "another vector" in told.out + told.err


@pytest.mark.long
def test_a_vector_that_is_gone_leaves_the_last_measured(base: Base) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "loss", "--multipliers", *SWEEP, "--quiet", "--no_report") == 0
    old = manifest.manifest_path(losses(base, "1.0"))
    record = json.loads(old.read_text())
    old.write_text(json.dumps({**record, "created": "2020-01-01T00:00:00+00:00", "parts": {**record["parts"], "vectors": ["0" * 64]}}))
    shutil.rmtree(vector(base).parent)
    frame = odds.collect(folder(base))
    # the other file of m = 1 and the folders of m = -1 still hold what is needed for one text each
    assert {-3, -2, 0, 2, 3} <= set(frame["multiplier"])
    assert "m = 1 left out: measured with another vector" in frame.attrs["notes"][0]


@pytest.mark.long
def test_losses_of_other_questions_are_not_one_curve(base: Base) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "loss", "--multipliers", "1", "2", "--limit", "2", "--quiet", "--no_report") == 0
    assert run(base, "--mode", "loss", "--multipliers", "3", "--quiet", "--no_report") == 0
    frame = odds.collect(folder(base))
    assert sorted(frame["multiplier"].unique()) == [-3, 3]
    assert "m = 1, 2 left out: measured with limit 2 (now null)" in frame.attrs["notes"][0]


@pytest.mark.long
def test_released_losses_without_manifest_still_make_a_curve(base: Base) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "loss", "--multipliers", *SWEEP, "--quiet", "--no_report") == 0
    for path in folder(base).rglob("*.manifest.json"):
        path.unlink()
    frame = odds.collect(folder(base))
    assert sorted(frame["multiplier"].unique()) == sorted(map(float, SWEEP)) and frame.attrs["notes"] == []


@pytest.mark.long
def test_the_control_of_another_vector_is_left_out(base: Base) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "loss", "--multipliers", "sweep", "--quiet", "--no_report", "--limit", "2") == 0
    (place,) = places.find(base.path, base.model, base.one)
    table, notes = cells.read_control(place)
    assert table is not None and notes == []
    refit(base)
    table, notes = cells.read_control(place)
    assert table is None and "control.csv is of another vector" in notes[0]


def test_texts_of_another_vector_are_not_shown(base: Base, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    from spilt import look

    assert run(base, "--mode", "both", "--multipliers", "1", "2", "--quiet") == 0
    refit(base)
    assert run(base, "--mode", "apply", "--multipliers", "2", "--quiet") == 0
    assert texts(base, m="1.0").exists()
    capsys.readouterr()
    assert look.main(["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one]) == 0
    assert "m=2" in (out := capsys.readouterr().out) and "m=1 " not in out
    assert "m=1 left out: of another vector" in caplog.text
    place = places.Place(base.path, base.model, base.one, "sft", "vector", folder(base))
    assert all(set(sample.texts) == {2.0} for sample in cells.samples(place))
    assert "texts at m = 1 left out" in cells.left_out_texts(place)
