"""Several fits of a cell that differ in their seed alone: each in a folder of its own, through fit, apply, loss, verify, recommend."""

from __future__ import annotations

from pathlib import Path

import families
import pandas as pd
import pytest
import torch

from spilt import cli, report, verify
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.report.places import find, label


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> families.Base:
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))
    return families.make_base(tmp_path / "base", train=6)


def run(base: families.Base, mode: str, *words: str, method: str = "sft") -> int:
    return cli.main([*base.argv(method, "vector", "--mode", mode, *words), "--quiet"])


def cell(base: families.Base, seed: int | None, method: str = "sft") -> Cell:
    return Cell(base.model, base.one, method, "vector", (base.layer,), None, seed)


def vector(base: families.Base, seed: int | None, method: str = "sft") -> torch.Tensor:
    return torch.load(Store(base.path).vector(cell(base, seed, method), base.layer), weights_only=True)


def test_fits_of_several_seeds(base: families.Base) -> None:
    assert run(base, "both", "--seeds", "1", "2", "--multipliers", "1") == 0
    assert run(base, "generate", "--seed", "2") == 0
    assert torch.equal(vector(base, None), vector(base, 2)), "the fit of a seed is the fit of that seed"
    assert not torch.equal(vector(base, 1), vector(base, 2))
    assert run(base, "loss", "--seeds", "1", "2", "--multipliers", "-1", "1", "--no-released_files") == 0
    store = Store(base.path)
    for seed in (1, 2):
        assert store.results(cell(base, seed), 1.0).is_file() and store.loss_table(cell(base, seed), "train").is_file()
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    places = find(base.path, base.model, base.one)
    assert [place.intervention for place in places] == ["vector@seed1", "vector@seed2"]
    assert [place.form for place in places] == ["vector", "vector"]
    assert label("sft", "vector@seed2") == "sft vector, seed 2"
    assert run(base, "both", "--seeds", "1", "2", "--multipliers", "1") == 0


def test_what_a_seed_does_not_decide_is_fitted_once(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "generate", "--seeds", "1", "2", "--dry_run", method="all") == 0
    said = capsys.readouterr().out
    assert "caa_vector/layer_" in said and "caa_vector@seed" not in said
    assert "sft_vector@seed1/layer_" in said and "sft_vector@seed2/layer_" in said and "--seeds 2" in said


@pytest.mark.parametrize(
    "words", [("--seeds", "1", "--seed", "2"), ("--seeds", "1", "--set", "seed=2"), ("--seeds", "-1"), ("--seeds", "a")]
)
def test_seeds_that_contradict_each_other_are_refused(base: families.Base, words: tuple[str, ...]) -> None:
    assert run(base, "generate", *words) == 2


@pytest.mark.long
def test_claims_are_judged_on_the_mean_over_fits(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    words = ["--multipliers", "-2", "-1", "0", "1", "2", "--no_report"]
    assert run(base, "generate", "--seeds", "1", "2") == run(base, "loss", "--seeds", "1", "2", *words) == 0
    assert run(base, "generate", method="reps") == run(base, "loss", *words, method="reps") == 0
    page = report.update(base.path, base.model, base.one)
    told = pd.read_csv(page.parent / "claims.csv")
    assert set(told["cell"]) == {"sft vector", "reps vector"}
    of_pairs = told[told["than"].notna()]
    assert of_pairs["fits"].tolist() == [1] * len(of_pairs)  # the fewer of the two
    assert set(told.loc[told["than"].isna() & (told["cell"] == "sft vector"), "fits"].dropna()) == {2}
