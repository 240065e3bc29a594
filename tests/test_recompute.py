"""Every number of a verdict again, from the stored CSV files alone: plain loops, another bootstrap, nothing of spilt.analysis."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_report import DATASET, MODEL, write_control, write_losses

from spilt import report

CELLS = (("sft", "vector", 20.0), ("spilt", "lora", 2.0))
BUDGET, DRAWS = 0.5, 2000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recompute")
    for method, form, end in CELLS:
        cell = write_losses(made, method, form, end, {"train": 32, "test": 16}, points=11)
        write_control(cell, end)
    report.update(made, MODEL, DATASET)
    return made


def folder_of(base: Path, method: str, form: str) -> Path:
    return base / f"vectors/{MODEL}/get_sft_loss/{method}/{DATASET}/{method}_{form}"


def losses_of(folder: Path, split: str) -> dict[float, dict[int, dict[str, float]]]:
    """multiplier -> question -> answer -> loss per token."""
    out: dict[float, dict[int, dict[str, float]]] = {}
    for path in folder.glob(f"*/{split}_losses.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                m = round(float(row["pos_steering_factors"]), 9) + 0.0
                loss = float(row["answer_loss_sum"]) / float(row["answer_tokens"])
                out.setdefault(m, {}).setdefault(int(row["example"]), {})[row["target"]] = loss
    return out


def odds(losses: dict[float, dict[int, dict[str, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(multipliers, preference, utility) [question, multiplier]."""
    m = sorted(losses)
    preference, utility = np.empty((2, len(losses[m[0]]), len(m)))
    for k, x in enumerate(m):
        for q, loss in losses[x].items():
            p, n = math.exp(-loss["matching"]), math.exp(-loss["not_matching"])
            preference[q, k] = loss["not_matching"] - loss["matching"]
            utility[q, k] = math.log((p + n) / (1 - p - n))
    return np.array(m), preference, utility


def walk(m: np.ndarray, preference: np.ndarray, utility: np.ndarray) -> tuple[float, float]:
    """(m*, gain) of two mean curves, step by step outwards from 0."""
    zero = int(np.flatnonzero(m == 0)[0])
    best = (0.0, 0.0)
    for step in (1, -1):
        k = zero
        while 0 <= k + step < len(m):
            drop, further = utility[zero] - utility[k], utility[zero] - utility[k + step]
            share = 1.0 if further <= BUDGET else (BUDGET - drop) / (further - drop)
            gain = preference[k] + share * (preference[k + step] - preference[k]) - preference[zero]
            if gain > best[1]:
                best = (float(m[k] + share * (m[k + step] - m[k])), float(gain))
            if share < 1:
                break
            k += step
    return best


@pytest.mark.parametrize(("method", "form", "end"), CELLS)
@pytest.mark.long
def test_the_summary(base: Path, method: str, form: str, end: float) -> None:
    stored = pd.read_csv(folder_of(base, method, form) / "preference_utility.csv")
    for split in ("train", "test"):
        losses = losses_of(folder_of(base, method, form), split)
        m, preference, utility = odds(losses)
        rows = stored[stored["split"] == split]
        assert rows["multiplier"].tolist() == pytest.approx(list(m))
        matching, other = (np.array([[losses[x][q][a] for x in m] for q in losses[m[0]]]) for a in ("matching", "not_matching"))
        moved = preference - preference[:, m == 0]
        mass = np.exp(-matching.mean(0)) + np.exp(-other.mean(0))
        expected = {
            **{"preference": preference.mean(0), "utility": utility.mean(0), "accuracy": (preference > 0).mean(0)},
            **{"loss_matching": matching.mean(0), "loss_not_matching": other.mean(0)},
            "answer_mass": (np.exp(-matching) + np.exp(-other)).mean(0),
            "moved_wrong": ((moved * m) < 0).mean(0),
            "utility_pooled": np.log(mass / (1 - mass)),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, rtol=1e-8, atol=1e-9, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize(("method", "form", "end"), CELLS)
def test_the_recommendation_and_its_intervals(base: Path, method: str, form: str, end: float) -> None:
    folder = folder_of(base, method, form)
    m, preference, utility = odds(losses_of(folder, "train"))
    star, gain = walk(m, preference.mean(0), utility.mean(0))
    table = report.recommend(base, MODEL, DATASET, BUDGET)
    row: dict[str, Any] = table[(table["method"] == method) & (table["intervention"] == form)].iloc[0].to_dict()
    assert row["multiplier"] == pytest.approx(star, rel=1e-3) and row["preference_gain_train"] == pytest.approx(gain, rel=2e-3)
    assert row["utility_drop_train"] == pytest.approx(BUDGET, abs=2e-3)

    rng, n = np.random.default_rng(99), len(preference)
    drawn = np.array([walk(m, preference[pick].mean(0), utility[pick].mean(0)) for pick in rng.integers(0, n, (DRAWS, n))])[:, 0]
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = high - low
    # the stored interval is a little wider, as Student's t is
    assert -0.05 * width < low - row["multiplier_low"] < 0.25 * width and -0.05 * width < row["multiplier_high"] - high < 0.25 * width

    grid, preference, utility = odds(losses_of(folder, "test"))
    at = {"gain": preference, "drop": -utility}
    for name, values in at.items():
        change = np.array([np.interp(row["multiplier"], grid, one) for one in values]) - values[:, grid == 0][:, 0]
        mean = float(change.mean())
        half = 2.131 * change.std(ddof=1) / math.sqrt(len(change))  # Student's t, 15 degrees of freedom
        told = row["preference_gain_test"] if name == "gain" else row["utility_drop_test"]
        assert told == pytest.approx(mean, rel=1e-9)
        assert row[f"{name}_low_test"] == pytest.approx(mean - half, abs=0.35 * half)
        assert row[f"{name}_high_test"] == pytest.approx(mean + half, abs=0.35 * half)


@pytest.mark.long
@pytest.mark.parametrize(("method", "form", "end"), CELLS)
def test_the_rank_among_random_ones(base: Path, method: str, form: str, end: float) -> None:
    folder = folder_of(base, method, form)
    control = pd.read_csv(folder / "control.csv")
    m, preference, utility = odds(losses_of(folder, "test"))
    x = np.array(sorted(control["multiplier"].unique()))
    own = walk(x, np.interp(x, m, preference.mean(0)), np.interp(x, m, utility.mean(0)))[1]
    random = []
    for _, part in control.groupby("draw"):
        part = part.sort_values("multiplier")
        random.append(walk(x, part["preference"].to_numpy(), part["utility"].to_numpy())[1])
    rank = 1 + sum(gain >= own for gain in random)
    stored = pd.read_csv(base / f"vectors/{MODEL}/get_sft_loss/report/{DATASET}/control.csv")
    row = stored[(stored["method"] == method) & (stored["intervention"] == form)].iloc[0]
    assert row["gain_own"] == pytest.approx(own) and row["gain_rank"] == rank and row["gain_p"] == pytest.approx(rank / 41)
    h = x[x > 0].min()
    slope = abs(np.interp(h, m, preference.mean(0)) - np.interp(-h, m, preference.mean(0))) / (2 * h)
    assert row["slope_own"] == pytest.approx(slope)
