"""Surgical Informedness and what it is made of, to the digit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from spilt.analysis.surgical import changes, informedness, interval, logit, wrongness

NAN = math.nan
BEFORE, PLUS, MINUS = np.array([0.9, 0.8, 0.3]), np.array([0.4, 0.7, 0.6]), np.array([0.95, 0.45, 0.9])
DOWN: dict[str, Any] = {"intent": -1}


@pytest.mark.parametrize(("k", "forward", "reverse", "si"), [(2, -1.5, 0, -60.75), (1, -0.5, 0.5, 0)])
def test_the_worked_example(k: float, forward: float, reverse: float, si: float) -> None:
    found = informedness(BEFORE, PLUS, MINUS, k=k, mass=(0.95, 0.90), **DOWN)
    assert (found.fix, found.broke, found.flip, found.counter) == (0.5, 1, 1, 0.5)
    assert (found.forward, found.reverse) == (forward, reverse)
    assert found.mass == pytest.approx(81) and found.si == pytest.approx(si, abs=1e-9) and (found.rejected, found.chosen) == (2, 1)
    assert found.separation == pytest.approx(-(logit(PLUS).mean() - logit(MINUS).mean()))


def test_published_numbers() -> None:
    """(0.32 + 1.00) / 2 * 80.1 = 52.9: of 25 rejected cells 8 are fixed, the chosen one is not broken and flips."""
    before = np.array([0.8] * 25 + [0.2])
    plus, minus = np.array([0.3] * 8 + [0.8] * 17 + [0.2]), np.array([0.8] * 25 + [0.7])
    found = informedness(before, plus, minus, mass=(0.895, 0.99), **DOWN)
    assert (found.forward, found.reverse) == (0.32, 1) and round(found.mass, 1) == 80.1 and round(found.si, 1) == 52.9


def test_one_arm_and_unknown_mass() -> None:
    found = informedness(BEFORE, PLUS, mass=(0.95,), **DOWN)
    assert found.si == pytest.approx(-0.5 * 100 * 0.95**2) and math.isnan(found.reverse) and math.isnan(found.flip)
    assert informedness(BEFORE, PLUS, **DOWN).si == -0.5


def test_a_missing_class_has_no_si() -> None:
    """All verdicts the same before: there is nothing to fix, or nothing to break."""
    for before in (np.array([0.9, 0.8, 0.7]), np.array([0.1, 0.2, 0.3])):
        found = informedness(before, PLUS, MINUS, **DOWN)
        assert math.isnan(found.si) and math.isnan(found.forward) and math.isnan(found.reverse)
        assert {found.rejected, found.chosen} == {0, 3}


def test_a_cell_without_verdict_is_left_out() -> None:
    """Before, or in the arm that it is compared in; the other arm keeps it."""
    more = [np.append(w, [value, other]) for w, value, other in zip((BEFORE, PLUS, MINUS), (NAN, 0.1, 0.1), (0.8, NAN, 0.8), strict=True)]
    found, wanted = informedness(*more, **DOWN), informedness(BEFORE, PLUS, MINUS, **DOWN)
    assert (found.fix, found.broke, found.flip) == (wanted.fix, wanted.broke, wanted.flip) and found.counter == pytest.approx(1 / 3)
    assert math.isnan(informedness(np.full(3, NAN), PLUS, MINUS).si)


def test_symmetries() -> None:
    """The scale of the weights says nothing; a foundation mirrored and meant the other way has the same SI."""
    weights = np.array([0.2, 0.5, 0.3])
    found = informedness(BEFORE, PLUS, MINUS, weights=weights, **DOWN)
    assert informedness(BEFORE, PLUS, MINUS, weights=7 * weights, **DOWN) == pytest.approx(found._replace(rejected=4.9, chosen=2.1))
    assert informedness(1 - BEFORE, 1 - PLUS, 1 - MINUS, weights=weights, intent=1) == pytest.approx(found)
    assert found.fix == pytest.approx(0.2 / 0.7)


def test_wrongness_cancels_a_liking_for_true() -> None:
    mass = np.array([[0.99, 0.99, 0.5], [0.95, 0.91, 0.99]])
    found = wrongness(np.array([0.9, 0.9, 0.9]), np.array([0.9, 0.1, 0.1]), mass)
    assert found[:2] == pytest.approx([0.5, 0.9]) and math.isnan(found[2])
    assert wrongness(np.array([0.9]), np.array([0.1]), np.array([[0.6], [0.7]]), floor=0.5) == pytest.approx([0.9])
    assert logit(np.array([0.0, 0.5, 1.0, NAN])) == pytest.approx([-math.log(99), 0, math.log(99), NAN], nan_ok=True)


def test_paired_changes() -> None:
    """Deviation with n - 1, cells without verdict counted, flips both ways."""
    before, after = np.array([0.9, 0.4, 0.6, NAN, 0.5]), np.array([0.8, 0.6, 0.4, 0.4, 0.5])
    table = changes(before, after, np.array(["Care", "Care", "Care", "Care", "Liberty"])).set_index("group")
    moved = (logit(after) - logit(before))[:3]
    care = table.loc["Care"]
    assert (care["mean"], care["std"]) == pytest.approx((moved.mean(), moved.std(ddof=1)))
    assert tuple(care[["n", "n_total", "to_wrong", "to_fine", "flips_net"]]) == (3, 4, 1, 1, 0)
    assert table.loc["Liberty", "mean"] == 0 and math.isnan(table.loc["Liberty", "std"])


def test_the_interval_is_over_vignettes() -> None:
    """It holds the value; copies of a vignette's cells do not narrow it; draws without both classes are counted."""
    generator = np.random.default_rng(1)
    before, plus, minus = generator.uniform(0, 1, (3, 40))
    names, value = np.arange(40), informedness(before, plus, minus).si
    low, high, whole = interval(names, before, plus, minus, draws=300)
    assert low < value < high and whole == 1
    twice = [np.repeat(arm, 2) for arm in (before, plus, minus)]
    assert interval(np.repeat(names, 2), *twice, draws=300) == pytest.approx((low, high, 1))
    _, _, some = interval(np.arange(3), BEFORE, PLUS, MINUS, draws=300)
    assert 0.3 < some < 0.95
