"""Two cells of a form compared at equal disturbance (KL), equal preference and equal utility: paired over questions, all on the same ones.

At equal KL: gain P(m) - P(0) and kept utility U(m) - U(0), each cell at the multiplier at which it meets one budget of KL (interpolated).
At equal utility: the largest gain within a utility drop of the budget. At equal preference: claims.keeps. Several fits of a cell (seeds):
their mean, with the variance between them as in claims. Holm's correction over the rows of each kind. `levels`: one cell by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spilt.analysis import claims
from spilt.analysis.claims import Case
from spilt.analysis.questions import Array, Questions, interpolate, on_shared
from spilt.analysis.recommend import best

KL, PREFERENCE, UTILITY = "KL", "preference", "utility"
COLUMNS = ["at equal", "form", "cell", "than", "of", "difference", "low", "high", "p", "own", "other", "fits"]
Statistic = Callable[[Questions, Array | None], Array]  # of one fit: (questions, resampling weights) -> [draws]


class Cell(NamedTuple):
    """A method and form: its case, and of each fit the multiplier at which it meets the KL budget (None: it does not, or is not known)."""

    case: Case
    at_kl: tuple[float | None, ...] = ()


def change(name: str, m: float, questions: Questions, weights: Array | None) -> Array:
    """Of a mean from m = 0 to m [draws]."""
    mean = questions.mean(name, weights)
    return interpolate(questions.multipliers, mean, m) - mean[:, questions.zero]


def gain_within(budget: float, questions: Questions, weights: Array | None) -> Array:
    """Largest gain in preference of all m that keep the utility drop within the budget on the way from 0 [draws]."""
    preference, utility = (questions.mean(name, weights) for name in ("preference", "utility"))
    return best(questions.multipliers, preference, utility, budget, questions.usable).gain


def told(questions: Questions, statistic: Statistic, weights: Array, sign: float = 1.0) -> dict[str, float]:
    """value, low, high of sign x a statistic of one fit."""
    low, high = questions.interval(sign * statistic(questions, weights)[:, None])[:, 0]
    return {"value": float(sign * statistic(questions, None)[0]) + 0.0, "low": float(low), "high": float(high)}


class Level(NamedTuple):
    """A multiplier, and the change from m = 0 there: gain in preference, drop of utility, each as value, low, high in nats."""

    multiplier: float
    gain: dict[str, float]
    drop: dict[str, float]


def levels(questions: Questions, at_kl: float | None, budget: float, level: float, seed: int = 0) -> dict[str, Level]:
    """One fit at equal KL (at_kl: its multiplier there), at equal utility (within the drop of the budget) and at equal preference
    (where a gain of the level costs least); what it does not reach is left out."""
    if questions.zero < 0:
        return {}
    weights = questions.resamples(seed)
    m, usable = questions.multipliers, questions.usable
    preference, utility = (questions.mean(name) for name in ("preference", "utility"))
    within = float(best(m, preference, utility, budget, usable).multiplier[0])
    found = {KL: at_kl} if at_kl is not None else {}
    found |= {UTILITY: within} if within else {}
    if level > 0 and (preference[0, usable] - preference[0, questions.zero]).max() >= level:
        found[PREFERENCE] = claims.kept_at(m[usable], preference[:, usable], utility[:, usable], level)

    def at(m: float) -> Level:
        of = {name: partial(change, name, m) for name in ("preference", "utility")}
        return Level(m, told(questions, of["preference"], weights), told(questions, of["utility"], weights, -1.0))

    return {kind: at(multiplier) for kind, multiplier in found.items()}


def compared(
    one: Sequence[tuple[Questions, Statistic]], other: Sequence[tuple[Questions, Statistic]], seed: int = 0
) -> dict[str, Any] | None:
    """Mean over the fits of one, less that of the other: difference, interval and p; None where the questions do not allow it."""
    shared = on_shared([questions for questions, _ in (*one, *other)])
    if shared[0].freedom < 1 or any(questions.zero < 0 for questions in shared):
        return None
    weights = shared[0].resamples(seed)
    of = [statistic for _, statistic in (*one, *other)]

    def each(w: Array | None) -> tuple[Array, Array]:
        values = np.stack([statistic(questions, w) for statistic, questions in zip(of, shared, strict=True)])
        return values[: len(one)], values[len(one) :]

    own, theirs = each(None)
    if not np.isfinite([*own.ravel(), *theirs.ravel()]).all():
        return None
    drawn = [side.mean(axis=0) for side in each(weights)]
    spreads = [side for side in (own, theirs) if len(side) > 1]
    row = claims.judged(shared[0], own.mean(axis=0) - theirs.mean(axis=0), (drawn[0] - drawn[1])[:, None], False, spreads)
    names = {"difference": row["estimate"], **{name: row[name] for name in ("low", "high", "p")}}
    return {**names, "own": float(own.mean()), "other": float(theirs.mean()), "fits": min(len(one), len(other))}


def pairs(cells: Mapping[str, Cell], budget: float, first: str = "spilt", seed: int = 0) -> pd.DataFrame:
    """Every cell of the method `first` against each other one of its form: COLUMNS."""
    rows: list[dict[str, Any]] = []
    for name, cell in cells.items():
        for against, other in cells.items():
            if cell.case.method != first or other.case.method == first or other.case.form != cell.case.form:
                continue
            asked: list[tuple[str, str, list[list[Statistic]]]] = []
            met = [[m for m in side.at_kl if m is not None] for side in (cell, other)]
            if [len(side.case.fits) for side in (cell, other)] == [*map(len, met)]:
                for of in ("preference", "utility"):
                    asked.append((KL, of, [[partial(change, of, m) for m in side] for side in met]))
            asked.append((UTILITY, "preference", [[partial(gain_within, budget)] * len(side.case.fits) for side in (cell, other)]))
            for at, of, statistics in asked:
                one, two = ([*zip(side.case.fits, own, strict=True)] for side, own in zip((cell, other), statistics, strict=True))
                if found := compared(one, two, seed):
                    rows.append({"at equal": at, "form": cell.case.form, "cell": name, "than": against, "of": of, **found})
            if kept := claims.keeps(name, cell.case, against, other.case, seed):
                told = {key: kept[key] for key in ("low", "high", "p", "fits")}
                names = {"at equal": PREFERENCE, "form": cell.case.form, "cell": name, "than": against, "of": "utility"}
                rows.append({**names, "difference": kept["estimate"], **told})
    table = pd.DataFrame(rows, columns=COLUMNS)
    for _, part in table.groupby("at equal"):
        table.loc[part.index, "p"] = claims.holm(part["p"].to_numpy(float))
    return table.sort_values("at equal", kind="stable", ignore_index=True)
