"""What is read from the curves: regions, utility peak and drops, the recommended multiplier, flat tails. Units: nats, m dimensionless.

`summary` is a table of spilt.analysis.odds.summarise: one row per split and multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from spilt.analysis.curves.fitting import CurveFit, warned_of

Array = npt.NDArray[np.float64]

BUDGET = 0.5  # nats of utility that a recommendation may cost
LINEAR_TOLERANCE = 0.05  # of the curve's range: how far the linear region may lie from a straight line
CONVERGED_SLOPE = 0.1  # of the linear region's slope: below it, out to the end, the curve has converged
TAIL, FLAT = 0.2, 0.05  # a tail is the outer 20% of a side; it is flat when it moves less than 5% of the curve's range


def regions(fit: CurveFit, multiplier: npt.ArrayLike, value: npt.ArrayLike) -> dict[str, Any] | None:
    """The three regions of the preference curve, as intervals of m; None without a fit to read them from.

    linear: the widest interval around 0 whose fitted curve stays within 5% of its range of one straight line;
    convergence: the outer parts where the slope stays under 10% of the linear region's; transitional: between the two.
    slope [nats per unit of m] and r2_linear: of a straight line through the measured points of the linear region (3 at least).
    """
    if fit.parameters is None or warned_of(fit, "spike"):
        return None
    grid = np.linspace(*fit.extent, 401)
    curve = fit(grid)
    tolerance = LINEAR_TOLERANCE * float(np.ptp(curve))
    if tolerance == 0:
        return None
    left = right = int(np.abs(grid).argmin())
    grows = [True, True]
    while any(grows):
        for side in (0, 1):
            if not grows[side]:
                continue
            a, b = (left - 1, right) if side == 0 else (left, right + 1)
            grows[side] = a >= 0 and b < len(grid) and _off_line(grid[a : b + 1], curve[a : b + 1]) <= tolerance
            if grows[side]:
                left, right = a, b
    slope_of_curve = np.gradient(curve, grid)
    if right > left:
        steep = np.abs(slope_of_curve) >= CONVERGED_SLOPE * abs(np.polyfit(grid[left : right + 1], curve[left : right + 1], 1)[0])
    else:
        steep = np.ones(len(grid), dtype=bool)
    ends_right = max(right, int(np.flatnonzero(steep)[-1])) if steep.any() else right
    ends_left = min(left, int(np.flatnonzero(steep)[0])) if steep.any() else left

    def spans(*pairs: tuple[int, int]) -> list[list[float]]:
        return [[float(grid[a]), float(grid[b])] for a, b in pairs if b - a > 2]

    m, y = np.asarray(multiplier, dtype=float), np.asarray(value, dtype=float)
    inside = np.isfinite(y) & (m >= grid[left] - 1e-12) & (m <= grid[right] + 1e-12)
    slope = r2 = None
    if inside.sum() >= 3 and np.ptp(y[inside]) > 0:
        slope, _ = (float(v) for v in np.polyfit(m[inside], y[inside], 1))
        r2 = float(np.corrcoef(m[inside], y[inside])[0, 1] ** 2)
    return {
        "linear": [float(grid[left]), float(grid[right])],
        "transitional": spans((ends_left, left), (right, ends_right)),
        "convergence": spans((0, ends_left), (ends_right, len(grid) - 1)),
        "slope": slope,
        "r2_linear": r2,
        "n_linear": int(inside.sum()),
    }


def _off_line(x: Array, y: Array) -> float:
    """Largest distance of y from its least-squares line."""
    x = x - x.mean()
    slope = (x @ y) / (x @ x)
    return float(np.abs(y - y.mean() - slope * x).max())


def utility_peak(fit: CurveFit, multiplier: npt.ArrayLike, utility: npt.ArrayLike) -> dict[str, Any] | None:
    """argmax of utility: on the fitted curve, or on the measured points where the fit is not good enough (`source` says which)."""
    m, y = np.asarray(multiplier, dtype=float), np.asarray(utility, dtype=float)
    m, y = m[np.isfinite(y)], y[np.isfinite(y)]
    if not len(m):
        return None
    if _trusted(fit):
        m, source = np.linspace(*fit.extent, 2001), "fit"
        y = fit(m)
    else:
        source = "points"
    at = int(y.argmax())
    return {"multiplier": float(m[at]), "utility": float(y[at]), "source": source}


def utility_drops(fit: CurveFit, multiplier: npt.ArrayLike, utility: npt.ArrayLike, drop: float = BUDGET) -> dict[str, Any]:
    """Where utility has first fallen `drop` nats below its value at m = 0, going outwards on each side; None where it does not."""
    m, y = np.asarray(multiplier, dtype=float), np.asarray(utility, dtype=float)
    m, y = m[np.isfinite(y)], y[np.isfinite(y)]
    order = np.argsort(m)
    m, y = m[order], y[order]
    source = "points"
    if _trusted(fit) and fit.extent[0] <= 0 <= fit.extent[1]:
        m, source = np.union1d(np.linspace(*fit.extent, 2001), [0.0]), "fit"
        y = fit(m)
    out: dict[str, Any] = {"drop": drop, "minus": None, "plus": None, "source": source}
    if not (m == 0).any():
        return out
    floor = y[m == 0][0] - drop
    for side, rows in (("plus", m >= 0), ("minus", m <= 0)):
        x, u = (m[rows], y[rows]) if side == "plus" else (m[rows][::-1], y[rows][::-1])
        below = np.flatnonzero(u < floor)
        if len(below):
            i = below[0]  # >= 1: at m = 0 nothing has dropped
            share = (u[i - 1] - floor) / (u[i - 1] - u[i])
            out[side] = float(x[i - 1] + share * (x[i] - x[i - 1]))
    return out


def _trusted(fit: CurveFit) -> bool:
    return fit.parameters is not None and not any(warned_of(fit, name) for name in ("low_r2", "low_held_out_r2", "spike"))


def recommendation(summary: pd.DataFrame, budget: float = BUDGET) -> dict[str, Any]:
    """The measured multiplier with the largest preference gain over m = 0 whose utility drop from m = 0 is at most `budget` nats.

    Chosen on training items, reported on test items (on what there is, when a split was not measured: `chosen_on`, `reported_on`).
    A multiplier where more than half of the questions have no utility is not chosen; `left_out` lists it.
    """
    have = list(dict.fromkeys(summary["split"]))
    split = "train" if "train" in have else (have[0] if have else None)
    out: dict[str, Any] = {"budget": budget, "multiplier": None, "chosen_on": split, "reported_on": None, "chosen": None, "reported": None}
    out["within_chance"] = False
    rows = summary[summary["split"] == split].set_index("multiplier")
    usable = np.isfinite(rows["preference"]) & np.isfinite(rows["utility"]) & ~(rows["n_undefined"] > rows["n"] / 2)
    out["left_out"] = [float(m) for m in rows.index[~usable]]
    if 0.0 not in rows.index:
        return {**out, "reason": "m = 0 was not measured: no gain or drop to compare"}
    if not usable[0.0]:
        return {**out, "reason": "at m = 0 there is no preference, or no utility for most questions: no drop to compare"}
    gain = rows["preference"] - rows["preference"][0.0]
    drop = rows["utility"][0.0] - rows["utility"]
    allowed = gain[usable & (drop <= budget)]
    best = float(allowed.idxmax())
    out.update(multiplier=best, chosen=_numbers(summary, split, best))
    if split == "train" and "test" in have:
        out.update(reported_on="test", reported=_numbers(summary, "test", best))
    if best == 0:
        reason = f"no measured multiplier raises preference within a utility drop of {budget:g} nat"
    elif best in (rows.index.min(), rows.index.max()):
        reason = "the largest gain within the budget lies at the end of the sweep: a wider sweep may find more"
    else:
        reason = "largest preference gain within the budget"
    # without stored intervals (another tool's CSV) nothing can be said about chance
    low = rows["gain_low"].get(best, np.nan) if best != 0 and "gain_low" in rows else np.nan
    out["within_chance"] = bool(low <= 0)
    reason += "; the gain is within its 95% interval of 0" if low <= 0 else ""
    return {**out, "reason": reason}


def _numbers(summary: pd.DataFrame, split: str | None, multiplier: float) -> dict[str, float | None] | None:
    """One split's numbers at a multiplier and their change from m = 0; None where that was not measured."""
    rows = summary[summary["split"] == split].set_index("multiplier")
    if multiplier not in rows.index or 0.0 not in rows.index:
        return None
    here, base = rows.loc[multiplier], rows.loc[0.0]
    numbers: Mapping[str, Any] = {
        **{name: here[name] for name in summary.columns if name not in ("split", "multiplier")},
        "preference_gain": here["preference"] - base["preference"],
        "utility_drop": base["utility"] - here["utility"],
        "accuracy_at_0": base["accuracy"] if "accuracy" in base else np.nan,
        "n_undefined_at_0": base["n_undefined"],
    }
    return {name: (float(value) if math.isfinite(value) else None) for name, value in numbers.items()}


def flattened(summary: pd.DataFrame) -> bool:
    """Have both tails of both curves flattened? Else the sweep is to be widened. Training items where they were measured.

    A tail is the outer 20% of one side (3 points at least); it is flat when it moves by less than 5% of the whole curve's range.
    A tail that ends in points that are not finite counts as flat: there is nothing more to measure. An empty side too.
    """
    have = set(summary["split"])
    rows = summary[summary["split"] == ("train" if "train" in have else next(iter(have), None))].sort_values("multiplier")
    m = rows["multiplier"].to_numpy(float)
    for name in ("preference", "utility"):
        y = rows[name].to_numpy(float)
        if not np.isfinite(y).any():
            continue
        span = float(np.nanmax(y) - np.nanmin(y))
        for sign in (1, -1):
            reach, curve = (m[m * sign >= 0] * sign)[::sign], y[m * sign >= 0][::sign]
            if len(reach) < 2 or not np.isfinite(curve[-1]):
                continue
            tail = curve[reach >= (1 - TAIL) * reach[-1] - 1e-9]
            tail = curve[-3:] if len(tail) < 3 else tail
            if np.nanmax(tail) - np.nanmin(tail) >= FLAT * span > 0:
                return False
    return True


def equal_preference(summaries: Mapping[str, pd.DataFrame], points: int = 41) -> pd.DataFrame:
    """How much utility each cell keeps at equal preference: one row per cell, best first.

    kept(p) = largest utility at any measured (or linearly interpolated) m with preference >= p. `utility`: mean of kept(p) over
    the preferences that all cells reach, from the largest of their preferences at m = 0 (`from`) to the smallest of their maxima (`to`);
    `margin`: to the next cell; `half_interval`: mean half width of the 95% interval of utility, to judge the margin by.
    Empty when fewer than two cells have m = 0 in common with a finite gain.
    """
    paths = {name: s[np.isfinite(s["preference"]) & np.isfinite(s["utility"])].sort_values("multiplier") for name, s in summaries.items()}
    paths = {name: s for name, s in paths.items() if (s["multiplier"] == 0).any()}
    columns = ["cell", "utility", "margin", "half_interval", "from", "to"]
    if len(paths) < 2:
        return pd.DataFrame(columns=columns)
    start = max(float(s.loc[s["multiplier"] == 0, "preference"].iloc[0]) for s in paths.values())
    end = min(float(s["preference"].max()) for s in paths.values())
    if not end > start:
        return pd.DataFrame(columns=columns)
    levels = np.linspace(start, end, points)
    rows = []
    for name, s in paths.items():
        m = s["multiplier"].to_numpy(float)
        fine = np.union1d(np.linspace(m[0], m[-1], 801), m)
        preference, utility = (np.interp(fine, m, s[key].to_numpy(float)) for key in ("preference", "utility"))
        kept = [float(utility[preference >= level - 1e-9].max()) for level in levels]
        half = (s["utility_high"] - s["utility_low"]).mean() / 2 if "utility_high" in s else np.nan
        rows.append({"cell": name, "utility": float(np.mean(kept)), "half_interval": float(half), "from": start, "to": end})
    table = pd.DataFrame(rows).sort_values("utility", ascending=False, ignore_index=True)
    table["margin"] = table["utility"] - table["utility"].shift(-1)
    return table[columns]
