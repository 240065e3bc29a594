"""Changed inputs, clocks, company, and files that vanish: nothing stale counts as done, nothing is lost."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import forked
import pytest
from counts import count
from faults import APPLY, FIT, LOSS, Here

from spilt import plan, verify


@pytest.mark.long
def test_a_swapped_model(here: Here) -> None:
    """Everything made from it is stale: verify says so, and the same command makes it again."""
    folder = here.path("models/tiny")
    families.build("qwen2", seed=1).save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    assert set(here.states().values()) == {"stale"}
    assert verify.main(["--base_dir", str(here.base.path)]) == 0
    before = here.listing()
    for words in (FIT, APPLY, LOSS):
        assert "stale" in here.run(*words, "--dry_run")[1]
        assert "already done" not in here.run(*words, form="all")[1]
    assert set(here.states().values()) == {"ok"}
    after = here.listing()
    assert all(after[name] != before[name] for name in before if name.endswith((".pt", ".csv")))


@pytest.mark.long
def test_one_weight_changed_in_a_model_file(here: Here) -> None:
    path = here.path("models/tiny/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert set(here.states().values()) == {"stale"}


def test_edited_settings(here: Here) -> None:
    """A changed value is another request; the file's comments and order are not."""
    path = here.base.hparams("mine", "sft", "generate_sft_vector.yaml")
    text = path.read_text()
    path.write_text("# a comment\n" + "\n".join(reversed(text.splitlines())) if "layers:\n" not in text else "# a comment\n" + text)
    assert "already done" in here.run(*FIT)[1]
    before = here.vector().read_bytes()
    path.write_text(text.replace("1e-2", "2e-2"))
    exit_code, said = here.run(*FIT)
    assert exit_code == 0 and "already done" not in said and here.vector().read_bytes() != before
    for words in (APPLY, LOSS):  # what was made with the old vector
        assert "already done" not in here.run(*words)[1]
    path.write_text(text)
    assert here.run(*FIT)[0] == 0 and here.vector().read_bytes() == before


def test_edited_dataset_format(here: Here) -> None:
    """Other columns of the same data file are other data."""
    path = here.path("hparams/Steer/dataset_format.yaml")
    text = path.read_text()
    swapped = text.replace("matching: matching", "matching: TEMPORARY").replace("not_matching: not_matching", "not_matching: matching")
    assert swapped != text
    path.write_text(swapped.replace("TEMPORARY", "not_matching").replace("not_not_matching", "matching"))
    before = here.vector().read_bytes()
    exit_code, said = here.run(*FIT)
    assert exit_code == 0 and "already done" not in said, "fitted toward the other answer, and called done"
    assert here.vector().read_bytes() != before


def test_edited_data(here: Here) -> None:
    """Fits and losses read train.jsonl, texts valid.jsonl: each is stale with its own file."""
    path = here.base.data("mine", "train")
    path.write_text(path.read_text().replace("is 3 odd", "is 4 odd"))
    states = here.states()
    assert states["vectors/tiny/sft/mine/sft_vector/layer_2.pt"] == "stale"
    assert states[str(here.texts(1.0).relative_to(here.base.path))] == "ok"
    assert "already done" not in here.run(*FIT)[1]
    assert here.states()[str(here.texts(1.0).relative_to(here.base.path))] == "stale"  # its vector has changed now


def test_a_cell_fitted_again_makes_what_was_made_from_it_stale(here: Here) -> None:
    assert here.run(*FIT, "--force", "--set", "lr=0.5")[0] == 0
    states = here.states()
    assert {states[str(path.relative_to(here.base.path))] for path in (here.texts(1.0), here.losses(1.0))} == {"stale"}
    assert states[str(here.texts(1.0, "lora").relative_to(here.base.path))] == "ok"


# ---------------------------------------------------------------- clocks


@pytest.mark.long
def test_a_clock_that_goes_backwards(bare: Here, prepared: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result and no decision depends on the time of day."""
    now = [2e9]

    def back(*_: Any) -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(back() * 1e9))
    for words in (FIT, APPLY, LOSS):
        assert bare.run(*words, "--checkpoint_seconds", "0", form="all")[0] == 0
        assert bare.run(*words, form="all")[1].count("already done") >= 3
    made, reference = bare.listing(), Here(prepared, bare.capsys).listing()
    assert made == reference


def test_a_change_with_an_older_time_is_seen(here: Here) -> None:
    """Same size, and a time before the last run: content counts."""
    path = here.base.data("mine", "train")
    path.write_text(path.read_text().replace("is 3 odd", "is 7 odd"))
    os.utime(path, (1, 1))
    os.utime(here.vector(), (2e9, 2e9))
    assert "already done" not in here.run(*FIT)[1]


# ---------------------------------------------------------------- company


@pytest.mark.slow
@pytest.mark.parametrize("round", range(count(2, 1)))
@pytest.mark.long
def test_two_runs_of_the_same_request_at_once(bare: Here, prepared: families.Base, round: int) -> None:
    """Both end well, and what is stored is what one alone stores: the last whole file wins, and both are the same."""
    words = bare.base.argv("sft", "all", "--mode", "both", "--multipliers", "-1", "1", "--quiet", "--checkpoint_seconds", "0")
    runs = [forked.Run(["run_spilt.py", *words], together=True) for _ in range(2)]
    said = [run.communicate(timeout=180)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    reference = {name: value for name, value in Here(prepared, bare.capsys).listing().items() if "get_sft_loss" not in name}
    assert bare.listing() == reference
    assert set(bare.states().values()) == {"ok"}


def test_another_run_takes_the_unfinished_texts_away(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one cell share the file of unfinished texts; the one that ends first removes it while the other looks."""
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_vector"))
    lines = here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl")
    lines.parent.mkdir()
    lines.write_bytes(b"")
    real = Path.exists

    def exists(self: Path, **kwargs: Any) -> bool:
        found = real(self, **kwargs)
        if self == lines and found:
            lines.unlink()
        return found

    monkeypatch.setattr(Path, "exists", exists)
    exit_code, said = here.run(*APPLY)
    assert exit_code == 0, said


# ---------------------------------------------------------------- files that vanish


def when_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """`act` once, after the plan is made and before the first step."""
    from spilt.model import host

    real = host.load

    def load(*args: Any, **how: Any) -> Any:
        made = real(*args, **how)
        act()
        return made

    monkeypatch.setattr(host, "load", load)


@pytest.mark.parametrize("words", [APPLY, LOSS], ids=["apply", "loss"])
def test_a_vector_vanishes_midway(here: Here, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    when_the_model_is_loaded(monkeypatch, here.vector("lora").unlink)
    exit_code, said = here.run(*words, "--force", form="all")
    assert "Traceback" not in said and str(here.vector("lora").name) in said
    assert exit_code == 0 and " skipped " in said  # as a vector that was never there
    assert said.count("  done  ") >= 2


def test_the_data_vanishes_midway(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here.base.data("mine", "train")
    when_the_model_is_loaded(monkeypatch, path.unlink)
    before = here.listing()
    exit_code, said = here.run(*FIT, "--force", form="all")
    assert exit_code in (1, 2) and str(path) in said and "Traceback" not in said
    assert here.listing() == before


def test_the_model_vanishes_before_it_is_loaded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    from spilt.model import host

    real = host.load

    def load(*args: Any, **how: Any) -> Any:
        shutil.rmtree(here.path("models/tiny"))
        return real(*args, **how)

    monkeypatch.setattr(host, "load", load)
    before = here.listing()
    exit_code, said = here.run(*APPLY, "--force")
    assert exit_code in (1, 2) and "models/tiny" in said and "Traceback" not in said
    assert here.listing() == before


def test_the_data_vanishes_between_plan_and_run(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment, there is a message and no traceback."""
    real, path = plan.make, here.base.data("mine", "train")

    def make(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        path.unlink()
        return made

    monkeypatch.setattr(plan, "make", make)
    exit_code, said = here.run(*FIT)
    assert exit_code in (1, 2) and path.name in said and "Traceback" not in said
