"""The recommended multiplier of a cell by a utility budget, how sure it is, and the choice among cells (design/analysis.md "Verdicts").

drop(m) = U(0) - U(m), gain(m) = P(m) - P(0), in nats, of the questions' mean curves, piecewise linear in m.
m* has the largest gain of all m that keep drop <= budget on the whole way from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from spilt.analysis.questions import Array, Questions, interpolate, on_shared
from spilt.errors import UserError

BUDGET = 0.5  # nats of utility that a recommendation may cost
NEAR = 0.02  # nats: a measured point whose drop is this near to the budget is the point where it is met

WIDER = 1.5  # times the last multiplier: the next one beyond it
SHARP = 0.01  # share of m: a measured point this near to the peak is the peak


def refuse_budget(budget: float) -> None:
    """Raises UserError for a budget of utility that is none."""
    if not 0 <= budget < math.inf:  # nan is not
        raise UserError(f"--budget {budget:g}: nats of utility to spend, 0 or more")


class Best(NamedTuple):
    """Per curve: m*, its gain, and between which m it may lie: where it is a measured point with lower ones on both sides, the peak of
    the parabola through the three; where it is the last within the budget, from its neighbour to where the budget is met."""

    multiplier: Array
    gain: Array
    low: Array
    high: Array


def best(m: Array, preference: Array, utility: Array, budget: float, usable: npt.ArrayLike = True) -> Best:
    """m* of many curves [draws, multiplier] at once. m holds 0; a way ends at the first multiplier that is not usable."""
    usable = np.broadcast_to(np.asarray(usable), m.shape)
    zero = int(np.flatnonzero(m == 0)[0])
    draws = np.arange(len(preference))
    found = Best(*np.zeros((4, len(preference))))
    for way in (np.arange(zero, len(m)), np.arange(zero, -1, -1)):
        way = way[: int(np.argmin(usable[way])) if not usable[way].all() else len(way)]
        if len(way) < 2:
            continue
        x, gain, drop = m[way], preference[:, way] - preference[:, [zero]], utility[:, [zero]] - utility[:, way]
        over = ~(drop <= budget) | ~np.isfinite(gain)
        over[:, 0] = False
        end = np.where(over.any(axis=1), over.argmax(axis=1), len(x))  # the first point beyond the budget
        inside = np.where(np.arange(len(x)) < end[:, None], gain, -np.inf)
        at = inside.argmax(axis=1)
        peak, before, after = inside[draws, at], x[np.maximum(at - 1, 0)], x[np.minimum(at + 1, len(x) - 1)]
        # where the drop meets the budget, between the last point within it and the first beyond
        b = np.minimum(end, len(x) - 1)
        a = b - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (budget - drop[draws, a]) / (drop[draws, b] - drop[draws, a])
            met = x[a] + share * (x[b] - x[a])
            there = np.where(end < len(x), gain[draws, a] + share * (gain[draws, b] - gain[draws, a]), -np.inf)
        on_the_way = there > peak
        after = np.where((end < len(x)) & (at == a) & np.isfinite(met), met, after)
        star = np.where(on_the_way, met, x[at])
        near, far = np.where(on_the_way, met, before), np.where(on_the_way, met, after)
        bends = ~on_the_way & (at > 0) & (at + 1 < end)
        vertex = _vertex(x, gain, np.clip(at, 1, max(len(x) - 2, 1))) if len(x) > 2 else star
        near, far = (np.where(star == 0, 0.0, np.where(bends, vertex, edge)) for edge in (near, far))
        side = Best(star, np.where(on_the_way, there, peak), np.minimum(near, far), np.maximum(near, far))
        better = side.gain > found.gain
        found = Best(*(np.where(better, new, old) for new, old in zip(side, found, strict=True)))
    return found


def _vertex(x: Array, y: Array, at: npt.NDArray[np.int64]) -> Array:
    """Where the parabola through three neighbouring points of each row [draws, x] peaks, the highest in the middle."""
    rows = np.arange(len(y))
    a, b, c = (x[at + k] for k in (-1, 0, 1))
    left, right = ((y[rows, at] - y[rows, at + k]) for k in (-1, 1))  # >= 0: how much lower the outer ones are
    with np.errstate(invalid="ignore", divide="ignore"):
        vertex = b - 0.5 * ((b - a) ** 2 * right - (b - c) ** 2 * left) / ((b - a) * right - (b - c) * left)
    return np.where(np.isfinite(vertex), np.clip(vertex, np.minimum(a, c), np.maximum(a, c)), b)


def split_of(frame: pd.DataFrame) -> str | None:
    """The split that a choice is made on: training items where they were measured."""
    have = [str(split) for split in frame["split"].unique()]
    return "train" if "train" in have else (have[0] if have else None)


def solve(frame: pd.DataFrame, budget: float = BUDGET) -> float | None:
    """m* of a frame of odds.collect or a summary; a measured point with the drop NEAR the budget stands for where it is met.

    None where m = 0 was not measured, or has no utility for most questions.
    """
    questions = Questions.of(frame[frame["split"] == split_of(frame)])
    if not _has_base(questions):
        return None
    m, utility = questions.multipliers, questions.mean("utility")
    star = float(best(m, questions.mean("preference"), utility, budget, questions.usable).multiplier[0])
    if star in m:
        return star
    right = int(np.searchsorted(m, star))
    off = np.abs(utility[0, questions.zero] - utility[0, right - 1 : right + 1] - budget)
    near = int(np.nanargmin(off))
    return float(m[right - 1 + near]) if off[near] <= NEAR and m[right - 1 + near] != 0 else star


def next_multiplier(frame: pd.DataFrame, budget: float = BUDGET, reach: float = 0.0) -> float | None:
    """Where to measure next, so that the recommendation is a measured one, or nearer to the peak; None when it is. 4 digits.

    Beyond the end of what was measured where the largest gain lies there and the budget is not used up: WIDER by WIDER up to |m| = reach.
    """
    star = solve(frame, budget)
    if star is None:
        return None
    questions = Questions.of(frame[frame["split"] == split_of(frame)])
    m = questions.multipliers
    if star in m:
        found = best(m, questions.mean("preference"), questions.mean("utility"), budget, questions.usable)
        if star and star in (m[0], m[-1]):
            wider = float(f"{WIDER * star:.4g}")
            return wider if abs(wider) <= reach else None
        star = float(found.low[0]) if found.low[0] == found.high[0] else star
        if np.abs(m - star).min() <= SHARP * abs(star):
            return None
    rounded = float(f"{star:.4g}")
    return None if star in m or rounded in m else rounded


def _has_base(questions: Questions) -> bool:
    return questions.zero >= 0 and bool(questions.usable[questions.zero])


def recommendation(frame: pd.DataFrame, budget: float = BUDGET, seed: int = 0, chance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is recommended for one cell, chosen on training items, reported on test items where two or more were measured.

    solved: m*, with its 95% interval low..high (m* solved again in every resample of the questions). multiplier: m*, 0 where no
    gain can be told from 0, None where nothing can be said or the cell is not beyond chance. usable: the m around m* at which the
    gain's interval (reported items) excludes 0 and the drop (chosen items) keeps the budget. `chance`: of chance.beyond_chance.
    """
    split = split_of(frame)
    out: dict[str, Any] = {"budget": budget, "multiplier": None, "solved": None, "low": None, "high": None, "usable": None}
    out |= {"chosen_on": split, "reported_on": None, "chosen": None, "reported": None, "left_out": [], "measured": True}
    out |= {"chance": dict(chance) if chance else None}
    questions = Questions.of(frame[frame["split"] == split])
    out["left_out"] = [float(m) for m in questions.multipliers[~questions.usable]]
    if questions.zero < 0:
        return {**out, "reason": "m = 0 was not measured: no gain or drop to compare; --mode loss --multipliers sweep measures it"}
    if not _has_base(questions):
        return {**out, "reason": "at m = 0 there is no preference, or no utility for most questions: no drop to compare"}
    star = solve(frame, budget)
    assert star is not None
    star = float(f"{star:.4g}") if star not in questions.multipliers else star
    weights = questions.resamples(seed)
    preference, utility = (questions.mean(name, weights) for name in ("preference", "utility"))
    drawn = best(questions.multipliers, preference, utility, budget, questions.usable)
    low, high = questions.interval(drawn.low)[0], questions.interval(drawn.high)[1]
    out |= {"solved": star, "low": _number(low), "high": _number(high), "measured": bool(np.isin(star, questions.multipliers))}
    test = Questions.of(frame[frame["split"] == "test"]) if split == "train" and "test" in set(frame["split"]) else None
    told = test if test is not None and _has_base(test) and test.multipliers[0] <= star <= test.multipliers[-1] else questions
    if told.freedom < 1 <= questions.freedom:  # one held-out question has no interval, and would pass for a gain whatever it says
        told = questions
    out["chosen"] = numbers(questions, star, weights)
    if told is test:
        out |= {"reported_on": "test", "reported": numbers(told, star, told.resamples(seed))}
    judged = out["reported"] or out["chosen"]
    within = judged["gain_low"] is not None and judged["gain_low"] <= 0
    if star == 0:
        return {**out, "multiplier": 0.0, "reason": f"no multiplier raises preference within a utility drop of {budget:g} nat"}
    if within:
        reason = f"no gain beyond chance: its 95% interval at m = {star:g} holds 0 ({out['reported_on'] or split} questions)"
        return {**out, "multiplier": 0.0, "reason": reason}
    out["usable"] = _usable(questions, told, star, budget, seed)
    if chance is not None and not chance["beyond"]:
        return {**out, "reason": chance["reason"]}
    reason = "largest preference gain within the budget"
    if star in (questions.multipliers[0], questions.multipliers[-1]):
        reason = "the largest gain within the budget lies at the end of the sweep: a wider sweep may find more"
    reason += "" if out["measured"] else "; between two measured multipliers: --mode loss measures it"
    reason += "; how sure that is is not known: one question, or stored means, have no interval" if judged["gain_low"] is None else ""
    return {**out, "multiplier": star, "reason": reason + ("" if chance else "; not tested against chance")}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def numbers(questions: Questions, m: float, weights: Array) -> dict[str, float | None]:
    """Means at m, their change from m = 0, and 95% intervals of the change, the same questions resampled at both."""
    grid, zero = questions.multipliers, questions.zero
    out: dict[str, float | None] = {}
    for name, change, sign in (("preference", "gain", 1.0), ("utility", "drop", -1.0)):
        mean, drawn = questions.mean(name), questions.mean(name, weights)
        at = float(interpolate(grid, mean, m)[0])
        low, high = questions.interval(sign * (interpolate(grid, drawn, m) - drawn[:, zero]))
        out |= {name: _number(at), f"{name}_{change}": _number(sign * (at - mean[0, zero]))}
        out |= {f"{change}_low": _number(low), f"{change}_high": _number(high)}
    accuracy, near = questions.mean("accuracy"), int(np.abs(grid - m).argmin())
    out |= {"accuracy": _number(float(interpolate(grid, accuracy, m)[0])), "accuracy_at_0": _number(float(accuracy[0, zero]))}
    return out | {"n": _number(questions.asked[near] or np.nan), "n_undefined": _number(questions.undefined[near])}


def _usable(chosen: Questions, told: Questions, star: float, budget: float, seed: int) -> list[float] | None:
    """Around m*, out to where the drop meets the budget or the gain's lower limit meets 0; by interpolation."""
    drawn = told.mean("preference", told.resamples(seed))
    low = told.interval(drawn - drawn[:, [told.zero]])[0]
    known = np.isfinite(low)
    if not known.any():  # stored averages
        return None
    side = np.abs(np.linspace(0, np.abs(chosen.multipliers).max(), 2001)) * np.sign(star)
    side = np.union1d(side, [star])[:: int(np.sign(star))]
    side = side[(side >= chosen.multipliers[0]) & (side <= chosen.multipliers[-1])]
    rows = len(side)
    utility = np.repeat(np.where(chosen.usable, chosen.mean("utility"), np.nan), rows, axis=0)
    drop = utility[0, chosen.zero] - interpolate(chosen.multipliers, utility, side)
    at = int(np.flatnonzero(side == star)[0])
    good = (drop <= max(budget, drop[at])) & (np.interp(side, told.multipliers[known], low[known], np.nan, np.nan) > 0)
    if not good[at]:
        return None
    bad = np.flatnonzero(~good)
    first, last = (bad[bad < at].max() + 1 if (bad < at).any() else 0), (bad[bad > at].min() - 1 if (bad > at).any() else rows - 1)
    ends = (side[0 if first == 1 else first], side[last])
    return sorted(float(f"{end:.4g}") + 0.0 for end in ends)


def choice(frames: Mapping[str, pd.DataFrame], budget: float = BUDGET, seed: int = 0) -> pd.DataFrame:
    """Among cells, on the questions that all were measured on (the same resamples for all): index cell, columns gain, share, tied.

    share: of resamples in which the cell has the largest gain within the budget, solved again in each. tied: it cannot be told
    from the best: no other cell is ahead of it by more than the 95% simultaneous limit of all paired differences (Tukey).
    """
    table = pd.DataFrame({"gain": np.nan, "share": np.nan, "tied": False}, index=list(frames))
    each = [Questions.of(frame[frame["split"] == split_of(frame)]) for frame in frames.values()]
    cells = on_shared(each) if each else ()
    if not cells or len(cells[0].keys) < 2:
        return table
    weights = cells[0].resamples(seed)

    def gains(w: Array | None) -> Array:
        each = [best(c.multipliers, c.mean("preference", w), c.mean("utility", w), budget, c.usable).gain for c in cells if _has_base(c)]
        return np.asarray(each)

    judged = [name for name, c in zip(frames, cells, strict=True) if _has_base(c)]
    if not judged:
        return table
    drawn, gain = gains(weights), gains(None)[:, 0]
    table.loc[judged, "gain"] = gain
    table.loc[judged, "share"] = np.bincount(drawn.argmax(axis=0), minlength=len(judged)) / drawn.shape[1]
    table.loc[judged, "tied"] = with_the_best(cells[0], gain, drawn) & (len(judged) > 1)
    return table


def with_the_best(questions: Questions, value: Array, drawn: Array) -> npt.NDArray[np.bool_]:
    """Which of the cells cannot be told from the best: value [cell], drawn [cell, draws]. The best itself is among them when it ties."""
    from scipy import special  # a run that only measures does without

    ahead, noise = value[None] - value[:, None], drawn[None] - drawn[:, None]  # [cell, other, ...]: the other's lead
    spread = questions.spread(np.moveaxis(noise, -1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        pivots = np.nan_to_num((noise - ahead[..., None]) / noise.std(axis=-1, keepdims=True))
    # few questions: as much wider as Student's t is
    limit = np.quantile(pivots.max(axis=(0, 1)), 0.95) * special.stdtrit(questions.freedom, 0.975) / special.ndtri(0.975)
    out = np.asarray((ahead <= limit * spread).all(axis=1))
    return out if out.sum() > 1 else np.zeros_like(out)  # it stands alone
