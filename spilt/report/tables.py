"""The report's tables and sentences, as data: no HTML here. Log-odds in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from spilt.analysis import paper
from spilt.analysis.curves import equal_preference
from spilt.analysis.curves.fit import GOOD_R2
from spilt.report.cells import Measured
from spilt.report.figures import control_spread, form_name

NEAR_ZERO = 0.1  # of the sweep: a utility peak closer to 0 than this counts as near 0
CONTROL = [
    *("method", "intervention", "draws", "slope", "slope_low", "slope_high", "slope_spread", "slope_of_the_vector", "no_slope"),
    *("utility_drop_at_ends", "ends"),
]
MIRROR = 0.05  # of the curve's range: mean |P(m) + P(-m) - 2 P(0)| above it is no mirror image


def recommendations(cells: Sequence[Measured]) -> pd.DataFrame:
    """One row per cell: the multiplier chosen on training items, its numbers there and on test items. Columns end in _train / _test."""
    rows = []
    for cell in cells:
        best = cell.best
        row: dict[str, Any] = {"method": cell.place.method, "intervention": cell.place.intervention, "multiplier": best["multiplier"]}
        for part, suffix in (("chosen", "train"), ("reported", "test")):
            numbers = best[part] or {}
            wanted = (
                "preference_gain",
                "gain_low",
                "gain_high",
                "utility_drop",
                "drop_low",
                "drop_high",
                "preference",
                "utility",
                "accuracy_at_0",
                "accuracy",
                "n",
                "n_undefined",
            )
            row |= {f"{name}_{suffix}": numbers.get(name) for name in wanted}
        row |= {
            "chosen_on": best["chosen_on"],
            "reported_on": best["reported_on"],
            "budget": best["budget"],
            "within_chance": best["within_chance"],
            "reason": best["reason"],
        }
        rows.append(row)
    return pd.DataFrame(rows)


def fits(cells: Sequence[Measured], model: str, dataset: str) -> pd.DataFrame:
    """One row per cell, split and curve: R^2, held-out R^2, the paper's R^2 where it prints one, bound hits, warnings, parameters."""
    rows = []
    for cell in cells:
        reference = paper.r2(model, dataset, cell.place.method, cell.place.intervention)
        for split in cell.fit["splits"]:
            for at, kind in enumerate(("preference", "utility")):
                fit = cell.curve(split, kind)
                rows.append(
                    {
                        **{"method": cell.place.method, "intervention": cell.place.intervention, "split": split, "curve": kind},
                        **{"r2": fit.r2, "r2_held_out": fit.r2_held_out, "r2_paper": reference[at] if reference else None},
                        **{
                            "n_points": fit.n_points,
                            "bound_hits": " ".join(fit.bound_hits),
                            "warnings": " ".join(w.name for w in fit.warnings),
                        },
                        **{name.removesuffix("_u"): value for name, value in (fit.parameters or {}).items()},
                    }
                )
    return pd.DataFrame(rows)


def readings(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """One row per cell: what is read off the curves of one split."""
    rows = []
    for cell in cells:
        stored = cell.fit["splits"][cell.split_for(split)]
        found, peak, drops = stored["regions"] or {}, stored["utility_peak"] or {}, stored["utility_drops"]
        transitional = [edge for span in found.get("transitional", []) for edge in span] + found.get("linear", [])
        linear = found.get("linear", [None, None])
        rows.append(
            {
                **{"method": cell.place.method, "intervention": cell.place.intervention, "split": cell.split_for(split)},
                **{"linear_from": linear[0], "linear_to": linear[1], "slope": found.get("slope"), "r2_linear": found.get("r2_linear")},
                **{"converged_below": min(transitional, default=None), "converged_above": max(transitional, default=None)},
                **{"utility_peak_at": peak.get("multiplier"), "utility_peak": peak.get("utility")},
                **{"drop": drops["drop"], "drop_at_minus": drops["minus"], "drop_at_plus": drops["plus"], "read_from": drops["source"]},
                **{"n_undefined": stored["undefined"]["total"], "n_scored": stored["undefined"]["scored"]},
            }
        )
        for side, at in (("converged_below", 0), ("converged_above", 1)):
            spans = found.get("convergence", [])
            if not any(span[1 - at] == rows[-1][side] for span in spans):
                rows[-1][side] = None
    return pd.DataFrame(rows)


def control(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """One row per cell with random directions: mean preference slope over draws with its 95% interval, and the utility drop at the ends.

    Slope per draw: least squares over all multipliers, nats per unit of m; interval: mean +- 1.96 sd / sqrt(draws).
    `no_slope`: the interval holds 0, or the slope is under 5% of the stored vector's own.
    """
    rows = []
    for cell in cells:
        if cell.control is None:
            continue
        table = cell.control[cell.control["split"] == split]
        table = table if len(table) else cell.control
        wide = table.pivot_table(index="multiplier", columns="draw", values="preference")
        finite = wide.dropna(axis=1)
        m = finite.index.to_numpy(float)
        if len(m) < 2 or not finite.shape[1]:
            continue
        slopes = np.polyfit(m, finite.to_numpy(float), 1)[0]
        mean, half = float(slopes.mean()), float(1.96 * slopes.std(ddof=1) / np.sqrt(len(slopes))) if len(slopes) > 1 else np.nan
        own_rows = cell.rows(split).dropna(subset=["preference"])
        own = float(np.polyfit(own_rows["multiplier"], own_rows["preference"], 1)[0]) if len(own_rows) > 1 else np.nan
        utility = control_spread(cell, split, "utility")["mean"].dropna()
        drop = float(utility.loc[0.0] - utility.iloc[[0, -1]].mean()) if 0.0 in utility.index else np.nan
        rows.append(
            {
                **{"method": cell.place.method, "intervention": cell.place.intervention, "draws": finite.shape[1]},
                **{"slope": mean, "slope_low": mean - half, "slope_high": mean + half, "slope_spread": float(np.ptp(slopes))},
                **{"slope_of_the_vector": own, "no_slope": bool(abs(mean) <= half or abs(mean) < 0.05 * abs(own))},
                **{"utility_drop_at_ends": drop, "ends": float(np.abs(m).max())},
            }
        )
    return pd.DataFrame(rows, columns=CONTROL)


def trade_off(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """equal_preference per form, and over all cells (`among` = all)."""
    groups: dict[str, list[Measured]] = {}
    for cell in cells:
        groups.setdefault(cell.place.intervention, []).append(cell)
    if len(groups) > 1:
        groups["all"] = list(cells)
    parts = []
    for among, some in groups.items():
        table = equal_preference({c.name: c.rows(split) for c in some})
        parts.append(table.assign(among=among)[["among", *table.columns]])
    return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True) if parts else pd.DataFrame()


def claims(cells: Sequence[Measured], split: str, trade: pd.DataFrame) -> pd.DataFrame:
    """The paper's claims on these cells: in how many each holds, and where it does not. A cell that cannot be judged is not counted."""
    verdicts: dict[str, dict[str, bool | None]] = {
        "preference is monotone around 0 (linear region, beyond the intervals)": {c.name: _monotone(c, split) for c in cells},
        f"utility peaks near 0 (within {NEAR_ZERO:.0%} of the sweep) and is lower at both ends": {c.name: _peaks(c, split) for c in cells},
        f"both fits reach R² {GOOD_R2:g}": {c.name: _fits_well(c, split) for c in cells},
        "+m and −m are not mirror images": {c.name: _lopsided(c, split) for c in cells},
    }
    kept: dict[str, bool | None] = {}
    for among, part in trade[trade["among"] != "all"].groupby("among", sort=False) if len(trade) else ():
        utility = part.set_index("cell")["utility"]
        if {f"spilt {among}", f"sft {among}"} <= set(utility.index):
            kept[f"{among}"] = bool(utility[f"spilt {among}"] > utility[f"sft {among}"])
    verdicts["at equal preference spilt keeps more utility than sft (per form)"] = kept
    rows = []
    for claim, found in verdicts.items():
        judged = {name: holds for name, holds in found.items() if holds is not None}
        against = [name for name, holds in judged.items() if not holds]
        rows.append({"claim": claim, "holds": len(judged) - len(against), "judged": len(judged), "exceptions": ", ".join(against)})
    return pd.DataFrame(rows)


def _monotone(cell: Measured, split: str) -> bool | None:
    found = cell.fit["splits"][cell.split_for(split)]["regions"]
    if not found:
        return None
    rows = cell.rows(split)
    rows = rows[rows["multiplier"].between(*found["linear"]) & np.isfinite(rows["preference"])]
    if len(rows) < 3:
        return None
    steps = np.diff(rows["preference"].to_numpy(float))
    half = ((rows["preference_high"] - rows["preference_low"]) / 2).fillna(0).to_numpy(float)
    sign = np.sign(steps.sum())
    return bool((steps * sign > -np.maximum(half[1:], half[:-1])).all())


def _peaks(cell: Measured, split: str) -> bool | None:
    peak = cell.fit["splits"][cell.split_for(split)]["utility_peak"]
    rows = cell.rows(split)
    rows = rows[np.isfinite(rows["utility"])]
    zero = rows.loc[rows["multiplier"] == 0, "utility"]
    if not peak or zero.empty or len(rows) < 3:
        return None
    near = abs(peak["multiplier"]) <= NEAR_ZERO * rows["multiplier"].abs().max()
    return bool(near and (rows["utility"].iloc[[0, -1]] < zero.iloc[0]).all())


def _fits_well(cell: Measured, split: str) -> bool | None:
    values = [cell.curve(split, kind).r2 for kind in ("preference", "utility")]
    return None if None in values else all(value >= GOOD_R2 for value in values if value is not None)


def _lopsided(cell: Measured, split: str) -> bool | None:
    preference = cell.rows(split).set_index("multiplier")["preference"].dropna()
    both = [m for m in preference.index if m > 0 and -m in preference.index]
    if 0.0 not in preference.index or len(both) < 3:
        return None
    sums = [preference[m] + preference[-m] - 2 * preference[0.0] for m in both]
    return bool(np.mean(np.abs(sums)) > MIRROR * np.ptp(preference.to_numpy()))


def shortfalls(cells: Sequence[Measured], split: str) -> list[str]:
    """Curves of one split that were not fitted, or fell short, in words."""
    out = []
    for cell in cells:
        for kind in ("preference", "utility"):
            fit = cell.curve(split, kind)
            serious = [w for w in fit.warnings if w.name not in ("few_points", "no_held_out")]
            out += [f"{cell.place.method} {form_name(cell.place.intervention)}, {kind}: {w.text}" for w in serious]
    return out


def undefined(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """Cells of one split with questions that have no utility: how many of all scored, and where it is worst."""
    rows = []
    for cell in cells:
        stored = cell.fit["splits"][cell.split_for(split)]["undefined"]
        if stored["total"]:
            rows.append({"cell": cell.name, "total": stored["total"], "scored": stored["scored"], **stored["worst"]})
    return pd.DataFrame(rows, columns=["cell", "total", "scored", "multiplier", "n_undefined", "n"])
