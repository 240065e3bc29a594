"""Loss mode through the command line: the stored intervention is what is measured, m = 0 is the base model, a sweep is symmetric."""

from __future__ import annotations

from pathlib import Path

import families
import pandas as pd
import pytest
import torch

from spilt import cli
from spilt.artifacts.losses import PREFERENCE_TYPES
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.tasks import control as control_task
from spilt.tasks.measure import SOLVED
from spilt.verbs.measure import SWEEP_MOST


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=6)


def cell(base: families.Base, form: str = "vector", method: str = "sft") -> Cell:
    return Cell(base.model, base.one, method, form, (base.layer,))


def put(base: families.Base, vector: torch.Tensor) -> None:
    path = Store(base.path).vector(cell(base), base.layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vector, path)


def measured(base: families.Base, *multipliers: str, form: str = "vector") -> dict[tuple[float, str], pd.DataFrame]:
    """(multiplier, preference type) -> rows of train_losses.csv."""
    words = base.argv("sft", form, "--mode", "loss", "--multipliers", *multipliers, "--split", "train", "--quiet", "--no_report")
    assert cli.main(words) == 0
    store = Store(base.path)
    return {
        (float(m), kind): pd.read_csv(store.losses(cell(base, form), float(m), kind, "train"))
        for m in multipliers
        for kind in PREFERENCE_TYPES
    }


@pytest.mark.long
def test_the_stored_vector_is_measured(base: families.Base) -> None:
    """Two vectors give two sets of losses; the zero vector gives the base model's at every strength (trap 1)."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for vector in (torch.randn(families.HIDDEN, generator=generator), torch.randn(families.HIDDEN, generator=generator)):
        put(base, vector)
        losses.append(measured(base, "1")[1.0, "winning_only"]["loss_sum"])
    assert (losses[0] != losses[1]).all()
    put(base, torch.zeros(families.HIDDEN))
    found = measured(base, "-3", "0", "1")
    for kind in PREFERENCE_TYPES:
        unsteered = found[0.0, kind]["loss_sum"].to_numpy()
        for m in (-3.0, 1.0):
            assert found[m, kind]["loss_sum"].to_numpy() == pytest.approx(unsteered, abs=1e-5)


@pytest.mark.long
def test_zero_is_the_base_model_bit_for_bit(base: families.Base) -> None:
    """Whatever is stored, and whatever other strengths are asked for: the same bits at m = 0."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    for vector, others in ((torch.zeros(families.HIDDEN), ["2"]), (torch.randn(families.HIDDEN, generator=generator), ["-1", "0.5", "4"])):
        put(base, vector)
        seen.append(measured(base, "0", *others)[0.0, "winning_only"].drop(columns=["pos_steering_factors", "neg_steering_factors"]))
    assert cli.main([*base.argv("sft", "lora", "--mode", "generate"), "--quiet"]) == 0
    seen.append(measured(base, "0", "1", form="lora")[0.0, "winning_only"].drop(columns=["pos_steering_factors", "neg_steering_factors"]))
    assert seen[0].equals(seen[1]) and seen[0].equals(seen[2])


@pytest.mark.parametrize("form", families.FORMS)
@pytest.mark.few(1)
def test_minus_m_is_the_other_side_of_m(base: families.Base, form: str) -> None:
    """The rows of pair orig_sub at m are those of orig_add at -m: the same text at the same applied strength."""
    assert cli.main([*base.argv("sft", form, "--mode", "generate"), "--quiet"]) == 0
    found = measured(base, "-1", "1", form=form)
    for kind, other in (PREFERENCE_TYPES, PREFERENCE_TYPES[::-1]):
        here, there = found[1.0, kind], found[-1.0, other]
        sub, add = here[here["pair"] == "orig_sub"], there[there["pair"] == "orig_add"]
        assert len(sub) == len(add) == 6
        assert (sub["target"].to_numpy() == add["target"].to_numpy()).all()
        assert (sub["pos_steering_factors"].to_numpy() == -1).all() and (add["pos_steering_factors"].to_numpy() == -1).all()
        assert (sub["loss_sum"].to_numpy() == add["loss_sum"].to_numpy()).all()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_a_sweep(base: families.Base) -> None:
    """21 strengths symmetric about 0, or 31 when a tail moves, and the one that meets the budget; 40 random directions beside them; caa on
    the scale of the trained vectors."""
    assert cli.main([*base.argv("sft", "vector", "--mode", "generate"), "--quiet"]) == 0
    assert cli.main([*base.argv("caa", "vector", "--mode", "generate"), "--quiet"]) == 0
    assert cli.main([*base.argv("all", "vector", "--mode", "loss", "--multipliers", "sweep"), "--quiet"]) == 0
    store, tops = Store(base.path), {}
    for method in ("sft", "caa"):
        folder = store.loss_folder(cell(base, method=method))
        table = pd.read_csv(folder / "preference_utility.csv")
        for split in ("train", "test"):
            m = sorted(table[table["split"] == split]["multiplier"])
            spaced = [x for x in m if -x in m]
            assert len(spaced) in (21, SWEEP_MOST) and 0.0 in m and len(m) - len(spaced) <= SOLVED
        assert not list(folder.glob("*/*_losses.csv")), "one table, no folder for each multiplier"
        norm = torch.load(store.vector(cell(base, method=method), base.layer), weights_only=True).norm().item()
        tops[method] = max(spaced) * norm / len(spaced)  # largest |m v|, up to the widening
        control = pd.read_csv(folder / "control.csv")
        assert control["draw"].nunique() == control_task.DRAWS == 40
        at_zero = control[control["multiplier"] == 0]
        assert at_zero["preference"].nunique() == 1, "no direction does anything at 0"
        assert (folder / "curves.png").is_file() and (folder / "fit.json").is_file()
    assert tops["caa"] == pytest.approx(tops["sft"], rel=0.06), "rounded to two digits"
    assert cli.main([*base.argv("all", "vector", "--mode", "loss", "--multipliers", "sweep"), "--quiet"]) == 0
