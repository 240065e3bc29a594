"""The report's tables, stored as CSV; templates/tables.html has how each is shown. Log-odds in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from spilt.analysis import paper
from spilt.analysis.curves import equal_preference
from spilt.analysis.curves.fitting import GOOD_R2
from spilt.report.cells import KINDS, Measured, label, name_of

Row = dict[str, Any]
NEAR_ZERO = 0.1  # of the sweep: a utility peak closer to 0 than this counts as near 0
MIRROR = 0.05  # of the curve's range: mean |P(m) + P(-m) - 2 P(0)| above it is no mirror image
OF_SPLITS = (
    *("preference_gain", "gain_low", "gain_high", "utility_drop", "drop_low", "drop_high"),
    *("preference", "utility", "accuracy_at_0", "accuracy", "n", "n_undefined"),
)
CONTROL = [
    *("method", "intervention", "draws", "slope", "slope_low", "slope_high", "slope_spread", "slope_of_the_vector", "no_slope"),
    *("utility_drop_at_ends", "ends"),
]


def records(frame: pd.DataFrame) -> list[Row]:
    """A table's rows with their cell, and its form, by the printed names."""
    out = []
    for row in frame.to_dict("records"):
        method, form = (row["method"], row["intervention"]) if "method" in row else row["cell"].split(" ", 1)
        out.append({**row, "cell": label(method, form), "form": label("", form)})
    return out


def recommendations(cells: Sequence[Measured]) -> pd.DataFrame:
    """One row per cell: the multiplier chosen on training items, its numbers there and on test items. Columns end in _train / _test."""
    rows = []
    for cell in cells:
        best = cell.best
        row = cell.names | {"multiplier": best["multiplier"]}
        for part, split in (("chosen", "train"), ("reported", "test")):
            row |= {f"{name}_{split}": (best[part] or {}).get(name) for name in OF_SPLITS}
        rows.append(row | {name: best[name] for name in ("chosen_on", "reported_on", "budget", "within_chance", "reason")})
    return pd.DataFrame(rows)


def fits(cells: Sequence[Measured], model: str, dataset: str) -> pd.DataFrame:
    """One row per cell, split and curve: R^2, held-out R^2, the paper's R^2 where it prints one, bound hits, warnings, parameters."""
    rows = []
    for cell in cells:
        reference = paper.r2(model, dataset, cell.place.method, cell.place.intervention) or (None, None)
        for split in cell.fit["splits"]:
            for kind, theirs in zip(KINDS, reference, strict=True):
                fit = cell.curve(split, kind)
                row = {"split": split, "curve": kind, "r2": fit.r2, "r2_held_out": fit.r2_held_out, "r2_paper": theirs}
                row |= {"n_points": fit.n_points, "bound_hits": " ".join(fit.bound_hits)}
                row |= {"warnings": " ".join(warned.name for warned in fit.warnings)}
                rows.append(cell.names | row | {name.removesuffix("_u"): value for name, value in (fit.parameters or {}).items()})
    return pd.DataFrame(rows)


def shortfalls(cells: Sequence[Measured], split: str) -> list[str]:
    """Curves of one split that were not fitted, or fell short, in words."""
    fitted = [(cell, kind, cell.curve(split, kind)) for cell in cells for kind in KINDS]
    minor = ("few_points", "no_held_out")
    return [f"{cell.label}, {kind}: {warned.text}" for cell, kind, fit in fitted for warned in fit.warnings if warned.name not in minor]


def readings(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """One row per cell: what is read off the curves of one split."""
    rows = []
    for cell in cells:
        stored = cell.stored(split)
        found, peak, drops, undefined = stored["regions"] or {}, stored["utility_peak"] or {}, stored["utility_drops"], stored["undefined"]
        linear, converged = found.get("linear", [None, None]), found.get("convergence", [])
        inner = [edge for span in [linear, *found.get("transitional", [])] for edge in span]
        row = {"split": cell.split_for(split), "linear_from": linear[0], "linear_to": linear[1]}
        row |= {"slope": found.get("slope"), "r2_linear": found.get("r2_linear")}
        # converged from where the inner regions end, unless the sweep ends there too
        row |= {"converged_below": next((b for _, b in converged if b == min(inner)), None)}
        row |= {"converged_above": next((a for a, _ in converged if a == max(inner)), None)}
        row |= {"utility_peak_at": peak.get("multiplier"), "utility_peak": peak.get("utility")}
        row |= {"drop": drops["drop"], "drop_at_minus": drops["minus"], "drop_at_plus": drops["plus"], "read_from": drops["source"]}
        rows.append(cell.names | row | {"n_undefined": undefined["total"], "n_scored": undefined["scored"]})
    return pd.DataFrame(rows)


def control(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """One row per cell with random directions: mean preference slope over draws with its 95% interval, and the utility drop at the ends.

    Slope per draw: least squares over all multipliers, nats per unit of m; interval: mean +- 1.96 sd / sqrt(draws).
    `no_slope`: the interval holds 0, or the slope is under 5% of the stored vector's own.
    """
    rows = []
    for cell in cells:
        table = cell.random(split)
        if table is None:
            continue
        finite = table.pivot_table(index="multiplier", columns="draw", values="preference").dropna(axis=1)
        m, draws = finite.index.to_numpy(float), finite.shape[1]
        if len(m) < 2 or not draws:
            continue
        slopes = np.polyfit(m, finite.to_numpy(float), 1)[0]
        mean, half = float(slopes.mean()), float(1.96 * slopes.std(ddof=1) / np.sqrt(draws)) if draws > 1 else np.nan
        measured = cell.rows(split).dropna(subset=["preference"])
        own = float(np.polyfit(measured["multiplier"], measured["preference"], 1)[0]) if len(measured) > 1 else np.nan
        utility = table.groupby("multiplier")["utility"].mean().dropna()
        drop = float(utility.loc[0.0] - utility.iloc[[0, -1]].mean()) if 0.0 in utility.index else np.nan
        row = {"draws": draws, "slope": mean, "slope_low": mean - half, "slope_high": mean + half, "slope_spread": float(np.ptp(slopes))}
        row |= {"slope_of_the_vector": own, "no_slope": bool(abs(mean) <= half or abs(mean) < 0.05 * abs(own))}
        rows.append(cell.names | row | {"utility_drop_at_ends": drop, "ends": float(np.abs(m).max())})
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
        table = equal_preference({cell.name: cell.rows(split) for cell in some})
        parts.append(table.assign(among=among)[["among", *table.columns]])
    return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)


def claims(cells: Sequence[Measured], split: str, trade: pd.DataFrame) -> pd.DataFrame:
    """The paper's claims on these cells: in how many each holds, and where it does not. A cell that cannot be judged is not counted."""
    judges = {
        "preference is monotone around 0 (linear region, beyond the intervals)": _monotone,
        f"utility peaks near 0 (within {NEAR_ZERO:.0%} of the sweep) and is lower at both ends": _peaks,
        f"both fits reach R² {GOOD_R2:g}": _fits_well,
        "+m and −m are not mirror images": _lopsided,
    }
    verdicts = {claim: {cell.name: judge(cell, split) for cell in cells} for claim, judge in judges.items()}
    kept: dict[str, bool | None] = {}
    for among, part in trade[trade["among"] != "all"].groupby("among", sort=False):
        utility = part.set_index("cell")["utility"]
        if {f"spilt {among}", f"sft {among}"} <= set(utility.index):
            kept[str(among)] = bool(utility[f"spilt {among}"] > utility[f"sft {among}"])
    verdicts["at equal preference spilt keeps more utility than sft (per form)"] = kept
    rows = []
    for claim, found in verdicts.items():
        judged = {name: holds for name, holds in found.items() if holds is not None}
        against = [name for name, holds in judged.items() if not holds]
        rows.append({"claim": claim, "holds": len(judged) - len(against), "judged": len(judged), "exceptions": ", ".join(against)})
    return pd.DataFrame(rows)


def judged(frame: pd.DataFrame) -> list[Row]:
    """The claims with their verdicts, and the cells against them by their printed names."""
    out = []
    for row in frame.to_dict("records"):
        verdict = f"{row['holds']} of {row['judged']}" if row["judged"] else "not judged"
        against = ", ".join(name_of(name) for name in row["exceptions"].split(", ") if name)
        out.append({"claim": row["claim"], "verdict": verdict, "exceptions": against})
    return out


def _monotone(cell: Measured, split: str) -> bool | None:
    found = cell.stored(split)["regions"]
    if not found:
        return None
    rows = cell.rows(split)
    rows = rows[rows["multiplier"].between(*found["linear"]) & np.isfinite(rows["preference"])]
    if len(rows) < 3:
        return None
    steps = np.diff(rows["preference"].to_numpy(float))
    half = ((rows["preference_high"] - rows["preference_low"]) / 2).fillna(0).to_numpy(float)
    return bool((steps * np.sign(steps.sum()) > -np.maximum(half[1:], half[:-1])).all())


def _peaks(cell: Measured, split: str) -> bool | None:
    peak = cell.stored(split)["utility_peak"]
    rows = cell.rows(split)
    rows = rows[np.isfinite(rows["utility"])]
    zero = rows.loc[rows["multiplier"] == 0, "utility"]
    if not peak or zero.empty or len(rows) < 3:
        return None
    near = abs(peak["multiplier"]) <= NEAR_ZERO * rows["multiplier"].abs().max()
    return bool(near and (rows["utility"].iloc[[0, -1]] < zero.iloc[0]).all())


def _fits_well(cell: Measured, split: str) -> bool | None:
    values = [cell.curve(split, kind).r2 for kind in KINDS]
    return None if None in values else all(value >= GOOD_R2 for value in values if value is not None)


def _lopsided(cell: Measured, split: str) -> bool | None:
    preference = cell.rows(split).set_index("multiplier")["preference"].dropna()
    both = [m for m in preference.index if m > 0 and -m in preference.index]
    if 0.0 not in preference.index or len(both) < 3:
        return None
    sums = [preference[m] + preference[-m] - 2 * preference[0.0] for m in both]
    return bool(np.mean(np.abs(sums)) > MIRROR * np.ptp(preference.to_numpy()))
