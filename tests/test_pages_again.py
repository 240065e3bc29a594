"""A report page is drawn again when what it shows has changed, and not otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import families
import pytest
from faults import draw_nothing

from spilt import cli, report, verify
from spilt.analysis import freshness


def loss(base: families.Base, *words: str) -> int:
    return cli.main([*base.argv("sft", "vector", "--mode", "loss", "--multipliers", "1", "2", *words), "--quiet"])


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file below a folder was written."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """When it is drawn is asked here, not what."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Fitted, measured and drawn."""
    made = families.make_base(tmp_path_factory.mktemp("pages") / "base", train=6)
    assert cli.main([*made.argv("sft", "vector", "--multipliers", "1"), "--quiet"]) == 0
    assert loss(made) == 0
    return made


def page(base: families.Base) -> Path:
    return freshness.page(base.path, base.model, base.one)


def current(base: families.Base) -> bool:
    return freshness.problems_of_current(base.path, base.model, base.one) is not None


@pytest.mark.long
def test_nothing_is_written_when_nothing_has_changed(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    before = states(base.path)
    capsys.readouterr()
    assert loss(base) == 0
    said = capsys.readouterr().out
    page = f"vectors/{base.model}/get_sft_loss/report/{base.one}/report.html"
    assert re.search(rf"^report +already done +[0-9.]+ +{re.escape(page)}$", said, re.MULTILINE)
    assert states(base.path) == before and current(base)
    assert [found for found in verify.check(base.path) if found.state != verify.OK] == []


@pytest.mark.long
def test_the_page_without_it_would_be_the_same(base: families.Base) -> None:
    """Drawn over from the same files, by force: the same bytes, so what is left as it is was right."""
    before = page(base).read_bytes()
    page(base).unlink()
    assert not current(base) and loss(base) == 0  # deleting it brings it back
    assert page(base).read_bytes() == before and current(base)


LEAF = "vectors/tiny/get_sft_loss/sft/mine/sft_vector"
CHANGES: dict[str, str] = {
    "a stored loss": f"{LEAF}/vector_sft_m1.0_winning_only/train_losses.csv",
    "its manifest": f"{LEAF}/vector_sft_m1.0_winning_only/train_losses.manifest.json",
    "the vector": "vectors/tiny/sft/mine/sft_vector/layer_2.pt",
    "a text": "generation/tiny/sft/mine/sft_vector/m1.0/mine_results.json",
    "a fit": f"{LEAF}/fit.json",
    "a picture": f"{LEAF}/curves.png",
    "a summary": f"{LEAF}/preference_utility.csv",
    "a picture of the page": "vectors/tiny/get_sft_loss/report/mine/paper.svg",
    "a table of the page": "vectors/tiny/get_sft_loss/report/mine/fits.csv",
    "the page": "vectors/tiny/get_sft_loss/report/mine/report.html",
    "the page's manifest": "vectors/tiny/get_sft_loss/report/mine/report.manifest.json",
}


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("change", [damage, Path.unlink], ids=["changed", "gone"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_makes_a_page_old(base: families.Base, what: str, change: Callable[[Path], None]) -> None:
    path = base.path / CHANGES[what]
    held = path.read_bytes()
    assert current(base)
    change(path)
    still = current(base)
    path.write_bytes(held)
    assert still is ("manifest" in what and change is damage)  # a blank behind JSON says the same
    assert current(base)


def test_new_files_and_new_code_make_it_old(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new table of losses, a new method's folder; not a log, and not another dataset's."""
    for name, old in (
        (f"{LEAF}/new.csv", True), ("vectors/tiny/get_sft_loss/reps/mine/reps_vector/new/train_losses.csv", True),
        (f"{LEAF}/train.log", False), ("vectors/tiny/get_sft_loss/sft/mine2/sft_vector/new.csv", False),
    ):  # fmt: skip
        path = base.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        assert current(base) is not old, name
        path.unlink()
    assert current(base)
    monkeypatch.setattr(freshness, "_code", lambda: "another")
    assert not current(base)


def test_the_code_is_that_of_analysis_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates too; nothing has to be raised by hand when one is edited."""
    freshness._code.cache_clear()
    before = freshness._code()
    names: list[str] = []
    monkeypatch.setattr(freshness.manifest, "file_hash", lambda path: names.append(str(path)) or "x")
    freshness._code.cache_clear()
    assert freshness._code() != before
    freshness._code.cache_clear()
    for part in ("report/templates/report.html", "report/figures.py", "analysis/odds.py", "report/templates/style.css"):
        assert any(name.endswith(f"spilt/{part}") for name in names)


@pytest.mark.long
def test_other_settings_and_force_draw_it(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """`spilt report` draws always; what it drew with a budget of its own is no page of loss mode."""
    old = states(page(base).parent)
    assert report.main(["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one, "--budget", "1"]) == 0
    assert not current(base) and all(when != old[name] for name, when in states(page(base).parent).items())
    assert loss(base) == 0 and current(base)
    drawn = states(page(base).parent)
    assert loss(base, "--force") == 0 and all(when != drawn[name] for name, when in states(page(base).parent).items())


@pytest.mark.long
def test_no_report_draws_none(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    page(base).unlink()
    capsys.readouterr()
    assert loss(base, "--no_report") == 0
    assert "report " not in capsys.readouterr().out and not page(base).exists()
    assert loss(base) == 0 and page(base).exists()


@pytest.mark.long
def test_what_was_left_out_is_told_again(base: families.Base, caplog: pytest.LogCaptureFixture) -> None:
    path = base.path / "generation/tiny/sft/mine/sft_vector/m1.0/mine_results.json"
    held = path.read_bytes()
    path.write_text("[")
    for drawn in (True, False):
        before = states(page(base).parent)
        caplog.clear()
        assert loss(base) == 0
        assert (states(page(base).parent) != before) is drawn
        assert sum("texts left out" in record.message for record in caplog.records) == 1
    path.write_bytes(held)


def test_a_pipe_in_the_way_is_no_reason_to_wait(base: families.Base) -> None:
    path = base.path / LEAF / "pipe.csv"
    os.mkfifo(path)
    freshness.problems_of_current(base.path, base.model, base.one)
    path.unlink()
