"""Is a cell beyond chance? Its rank among random interventions of the same form and size (control.csv), by one statistic for all.

p = (1 + #{random >= own}) / (1 + draws): exact when the user's intervention is one more random one (Phipson & Smyth 2010).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spilt.analysis.questions import Array, Questions, interpolate
from spilt.analysis.recommend import BUDGET, best

LEVEL = 0.05
NAMES = {"slope": "slope", "gain": "gain at equal drop", "behaviour": "generated behaviour"}


class Curves(NamedTuple):
    """Mean curves [draw, multiplier] of a control, the user's own on the same multipliers and questions first; dose nan where unknown."""

    multipliers: Array
    preference: Array
    utility: Array
    dose: Array
    questions: int


def curves(frame: pd.DataFrame, control: pd.DataFrame | None) -> Curves | None:
    """None where the user's own cannot be put beside them: other items, stored averages only, no m = 0, no two common strengths."""
    if control is None or not len(control):
        return None
    control = control.assign(multiplier=[float(f"{m:.9g}") for m in control["multiplier"]])  # +m and -m are found as such
    own = frame[frame["split"] == str(control["split"].iloc[0])]
    n = int(control["n"].max()) if "n" in control else 0
    if own.empty or not n or "example" not in own:
        return None
    questions = Questions.of(own).first(n)
    if questions.zero < 0 or np.bincount(questions.concept).max() < n:  # the control was measured on more than is there
        return None
    m = np.sort(control["multiplier"].dropna().unique()).astype(float)
    m = m[(m >= questions.multipliers[0]) & (m <= questions.multipliers[-1])]
    if 0.0 not in m or len(m) < 2:
        return None

    def drawn(name: str) -> Array:
        if name not in control:
            return np.full((control["draw"].nunique(), len(m)), np.nan)
        return control.pivot_table(index="draw", columns="multiplier", values=name, dropna=False).reindex(columns=m).to_numpy(float)

    random = {name: drawn(name) for name in ("preference", "utility", "dose", "n_undefined", "n")}
    random["utility"] = np.where(random["n_undefined"] > random["n"] / 2, np.nan, random["utility"])
    out = []
    for name in ("preference", "utility", "dose"):
        mean = questions.mean(name) if name in questions.values else np.full((1, len(questions.multipliers)), np.nan)
        mean = np.where(questions.usable, mean, np.nan) if name == "utility" else mean
        out.append(np.vstack([interpolate(questions.multipliers, np.repeat(mean, len(m), axis=0), m), random[name]]))
    return Curves(m, out[0], out[1], out[2], n)


def beyond_chance(there: Curves | None, texts: pd.DataFrame | None = None, budget: float = BUDGET) -> dict[str, Any] | None:
    """{draws, questions, unit, tests: name -> {own, random, rank, p}, beyond, reason}; None where it was not tested.

    slope: |P(h) - P(-h)| / 2h at the smallest strength of the control, h in relative dose (in m where it is unknown).
    gain: best() on the control's own multipliers, for all alike, either sign of m. behaviour: the largest share over multipliers, of
    equal ones the one with the larger gain first (a share of few answers reaches 1).
    Beyond chance: p <= 5% for gain, and for behaviour where it was scored. random: median of the random ones.
    """
    if there is None:
        return None
    tests = {"slope": _slope(there), "gain": best(there.multipliers, there.preference, there.utility, budget).gain}
    if texts is not None and len(texts):
        score = texts.groupby("draw")["score"].max()
        if -1 in score.index and len(score) > 1:
            tests["behaviour"] = np.append(score[-1], score.drop(-1)).astype(float)
    finer = {"behaviour": tests["gain"]} if len(tests.get("behaviour", ())) == len(tests["gain"]) else {}
    found = {name: _ranked(values, finer.get(name)) for name, values in tests.items() if np.isfinite(values[0])}
    out: dict[str, Any] = {"draws": len(there.preference) - 1, "questions": there.questions}
    out |= {"unit": "dose" if _has_dose(there) else "m", "tests": found}
    failed = [name for name in ("gain", "behaviour") if name in found and found[name]["p"] > LEVEL]
    short = [f"{NAMES[name]} ranks {found[name]['rank']} of {found[name]['of']} (p = {found[name]['p']:.2f})" for name in failed]
    few = "" if out["draws"] >= 1 / LEVEL - 1 else f"; {out['draws']} random ones are too few for p <= {LEVEL:g}"
    reason = f"not beyond chance: {', '.join(short)} among random interventions of the same size{few}" if failed else ""
    return out | {"beyond": not failed and "gain" in found, "reason": reason}


def _ranked(values: Array, finer: Array | None = None) -> dict[str, Any]:
    """Of the first among all; a draw without a value is none. finer: decides between equal ones."""
    own, there = float(values[0]), np.isfinite(values[1:])
    random = values[1:][there]
    level = True if finer is None else ~(finer[1:][there] < finer[0])  # ahead, or nothing tells them apart
    above = int(((random > own) | (random == own) & level).sum())
    middle = float(np.median(random)) if len(random) else None
    return {"own": own, "random": middle, "rank": 1 + above, "of": 1 + len(random), "p": (1 + above) / (1 + len(random))}


def _strength(there: Curves) -> tuple[int, int] | None:
    """Columns of the smallest strength that the control has on both sides."""
    both = [m for m in there.multipliers if m > 0 and -m in there.multipliers]
    return (int(np.flatnonzero(there.multipliers == -both[0])[0]), int(np.flatnonzero(there.multipliers == both[0])[0])) if both else None


def _has_dose(there: Curves) -> bool:
    at = _strength(there)
    return at is not None and bool((there.dose[:, list(at)] > 0).all())


def _slope(there: Curves) -> Array:
    at = _strength(there)
    if at is None:
        return np.full(len(there.preference), np.nan)
    low, high = at
    width = there.dose[:, low] + there.dose[:, high] if _has_dose(there) else there.multipliers[high] - there.multipliers[low]
    return np.asarray(np.abs(there.preference[:, high] - there.preference[:, low]) / width)
