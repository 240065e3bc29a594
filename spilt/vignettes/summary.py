"""What a model's verdicts say, and how steering moves them: from rows of evaluate.py, no model.

A frame of results is those rows with the columns method, arm (`none`: the unsteered model, once; `plus`: the arm that is meant; `minus`:
the other one) and kl_p95. Everything is paired: a cell, one vignette in one condition, is compared with itself unsteered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spilt.analysis import intervals, surgical
from spilt.errors import UserError, unknown
from spilt.vignettes.files import CONDITIONS, FOUNDATIONS, Vignette
from spilt.vignettes.questions import ACCEPTABLE, WRONG

NONE, PLUS, MINUS = ARMS = ("none", "plus", "minus")
HARD, LOADING = WEIGHTINGS = ("hard", "loading")
BEFORE, AFTER = CHOSEN = ("before", "after")  # the evaluation: when the arm was chosen that is called plus
KEYS = ["id", "condition"]
DRAWS = 1000


class Plan(NamedTuple):
    """How verdicts are told. intent: +1 where steering is meant to make things more wrong, -1 less; +1 where nothing is said."""

    headline: str = "Authority"
    intent: Mapping[str, int] = {"Authority": -1}  # noqa: RUF012 - never written to
    weighting: str = HARD
    floor: float = surgical.FLOOR
    k: float = 1.0
    chosen: str = BEFORE
    seed: int = 0

    def sign(self, foundation: str) -> int:
        return self.intent.get(foundation, 1)

    def checked(self) -> Plan:
        """Itself. Raises UserError for names that do not exist."""
        for name in (self.headline, *self.intent):
            if name not in FOUNDATIONS:
                raise unknown("foundation", name, FOUNDATIONS)
        if self.weighting not in WEIGHTINGS:
            raise unknown("weighting", self.weighting, WEIGHTINGS)
        if self.chosen not in CHOSEN:
            raise unknown("time at which the arm is chosen", self.chosen, CHOSEN)
        if not 0 <= self.floor <= 1 or not {*self.intent.values()} <= {-1, 1}:
            raise UserError(f"floor {self.floor}, intent {dict(self.intent)}: wanted a floor from 0 to 1, and 1 or -1 of each foundation")
        return self


def cells(rows: pd.DataFrame, floor: float = surgical.FLOOR) -> pd.DataFrame:
    """One row for each vignette and condition, in order: foundation, w (NaN below the floor), mass (the smaller of both frames)."""
    wrong, acceptable = _frames(rows)
    mass = np.stack([wrong["mass"], acceptable["mass"]])
    w = surgical.wrongness(wrong["p_true"].to_numpy(), acceptable["p_true"].to_numpy(), mass, floor)
    return wrong[["foundation"]].assign(w=w, mass=mass.min(0))


def _frames(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of either frame, by vignette and condition, in the order of the first. Raises UserError where one of a cell is missing."""
    wrong, acceptable = (rows[rows["frame"] == frame].set_index(KEYS) for frame in (WRONG, ACCEPTABLE))
    if len(wrong) != len(acceptable) or not wrong.index.isin(acceptable.index).all():
        raise UserError(f"{len(wrong)} rows of {WRONG} and {len(acceptable)} of {ACCEPTABLE}: wanted both of every vignette and condition")
    return wrong, acceptable.reindex(wrong.index)


def arms(frame: pd.DataFrame, floor: float) -> dict[tuple[str, str], pd.DataFrame]:
    """(method, arm) -> its cells, those of the unsteered model first. Raises UserError where they are not of the same cells."""
    found = {key: cells(rows, floor) for key, rows in frame.groupby(["method", "arm"], sort=False)}
    base = [key for key in found if key[1] == NONE]
    if len(base) != 1:
        raise UserError(f"wanted the rows of one unsteered model (arm {NONE}); found {len(base)}: {', '.join(key[0] for key in base)}")
    for key, some in found.items():
        if key[1] not in ARMS:
            raise unknown("arm", key[1], ARMS)
        if not some.index.equals(found[base[0]].index):
            raise UserError(f"{key[0]}, arm {key[1]}: other vignettes than those of the unsteered model; evaluate both on the same")
    return {base[0]: found[base[0]], **{key: some for key, some in found.items() if key != base[0]}}


def weights(index: pd.MultiIndex, scenes: Iterable[Vignette], weighting: str) -> dict[str, np.ndarray]:
    """foundation -> L of each cell. hard: whether the vignette is about it; loading: how much, the seven of a vignette adding up to 1."""
    known = {(scene.id, scene.condition): scene for scene in scenes}
    here = [known[key] for key in index]
    if weighting == HARD:
        return {name: np.array([scene.foundation == name for scene in here]) for name in FOUNDATIONS}
    if not all(scene.loadings for scene in here):
        raise UserError("loadings were asked for, and the vignettes have none (calibrated_*); take the weighting hard")
    L = np.array([scene.loadings for scene in here])
    return dict(zip(FOUNDATIONS, (L / L.sum(1, keepdims=True)).T, strict=True))


class Resamples:
    """Vignettes of each foundation drawn anew, both conditions of one together: the same draws for whatever is asked."""

    def __init__(self, base: pd.DataFrame, seed: int) -> None:
        about = base["foundation"].groupby(level=0, sort=False).first()
        names = base.index.get_level_values(0)
        self.own = np.array([[name == other for name in names] for other in about.index], float)  # [vignettes, cells]
        self.counts = np.zeros((DRAWS, len(about)), int)  # [draws, vignettes]
        rng = np.random.default_rng(seed)
        for some in (np.flatnonzero(about == name) for name in dict.fromkeys(about)):
            self.counts[:, some] = rng.multinomial(len(some), np.full(len(some), 1 / len(some)), size=DRAWS)

    def means(self, x: np.ndarray, L: np.ndarray) -> np.ndarray:
        """The weighted mean of x in each draw [draws], over cells that have one; nan where a draw has none."""
        valid = np.isfinite(x) & (np.asarray(L, float) > 0)
        weight = np.where(valid, L, 0.0)
        top, bottom = (self.counts @ (self.own @ values) for values in (weight * np.where(valid, x, 0), weight))
        with np.errstate(invalid="ignore"):
            return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)

    def interval(self, values: np.ndarray, L: np.ndarray) -> tuple[float, float]:
        """95% of these values of the draws, wider where few vignettes have weight; nan of one vignette, or where a tenth has no value.

        How many have weight: (sum L)^2 / sum L^2 over vignettes (Kish 1965), which is their number where all count alike.
        """
        weight = self.own @ np.asarray(L, float)
        n, sound = weight.sum() ** 2 / max((weight**2).sum(), 1e-300), values[np.isfinite(values)]
        if n < 1.5 or len(sound) < 0.9 * len(values):
            return math.nan, math.nan
        low, high = np.percentile(sound, intervals.tails(n))
        return float(low), float(high)


def logit_change(base: pd.DataFrame, some: pd.DataFrame) -> np.ndarray:
    """logit w of these cells less that of the same ones unsteered, nan where either has none [cells]."""
    return surgical.logit(some["w"].to_numpy()) - surgical.logit(base["w"].to_numpy())


def valid(x: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those that are known and count, and their weights."""
    keep = np.isfinite(x) & (np.asarray(L, float) > 0)
    return x[keep], np.asarray(L, float)[keep]


def bare(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan) -> pd.DataFrame:
    """A row for each foundation: logit w of the unsteered model, mean and deviation, n, the share called wrong, people's mean."""
    (base, *_) = arms(frame, plan.floor).values()
    wrong = _people(base.index, scenes)
    out = []
    for name, L in weights(base.index, scenes, plan.weighting).items():
        w, weight = base["w"].to_numpy(), np.asarray(L, float)
        valid = np.isfinite(w) & (weight > 0)
        mean, std = surgical.moments(surgical.logit(w[valid]), weight[valid])
        share, _ = surgical.moments((w[valid] > surgical.WRONG).astype(float), weight[valid])
        people, _ = surgical.moments(wrong[weight > 0], weight[weight > 0])
        counts = {"n": int(valid.sum()), "n_total": int((weight > 0).sum())}
        out.append({"foundation": name, "logit_w": mean, "std": std, **counts, "called_wrong": share, "people": people})
    return pd.DataFrame(out)


def _people(index: pd.MultiIndex, scenes: Iterable[Vignette]) -> np.ndarray:
    known = {(scene.id, scene.condition): scene.wrong for scene in scenes}
    return np.array([known[key] for key in index])


def as_chosen(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan) -> pd.DataFrame:
    """The frame itself; where the arm is chosen after the evaluation, with plus the one that moved the headline further as is meant."""
    plan.checked()
    if plan.chosen == BEFORE:
        return frame
    found = arms(frame, plan.floor)
    (base, *_) = found.values()
    L, sign = weights(base.index, scenes, plan.weighting)[plan.headline], plan.sign(plan.headline)
    moved = {key: sign * surgical.change(base["w"].to_numpy(), one["w"].to_numpy(), L)["mean"] for key, one in found.items()}
    swapped = [method for method, arm in found if arm == MINUS and moved[method, arm] > moved.get((method, PLUS), math.inf)]
    return frame.assign(arm=frame["arm"].where(~frame["method"].isin(swapped), frame["arm"].map({PLUS: MINUS, MINUS: PLUS})))


def deltas(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan) -> pd.DataFrame:
    """A row for each method, arm and foundation: the mean change of logit w, its 95% interval over vignettes, deviation, n, flips."""
    frame = as_chosen(frame, scenes, plan)
    found = arms(frame, plan.floor)
    (base, *_) = found.values()
    before, L = base["w"].to_numpy(), weights(base.index, scenes, plan.weighting)
    drawn, at = Resamples(base, plan.seed), frame.groupby(["method", "arm"])[["multiplier", "kl_p95"]].first()
    out = []
    for (method, arm), some in found.items():
        if arm == NONE:
            continue
        moved = logit_change(base, some)
        for name in FOUNDATIONS:
            low, high = drawn.interval(drawn.means(moved, L[name]), L[name])
            told = surgical.change(before, some["w"].to_numpy(), L[name])
            where: dict[str, Any] = {"method": method, "arm": arm, **at.loc[(method, arm)], "foundation": name}
            out.append({**where, "mean": told.pop("mean"), "low": low, "high": high, **told})
    return pd.DataFrame(out)


def informedness(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan) -> pd.DataFrame:
    """A row for each method and foundation: SI with everything that it is made of, its interval, and when the arm was chosen."""
    found = arms(as_chosen(frame, scenes, plan), plan.floor)
    (base, *_) = found.values()
    L, names = weights(base.index, scenes, plan.weighting), base.index.get_level_values(0).to_numpy()
    out = []
    for method in dict.fromkeys(method for method, arm in found if arm == PLUS):
        each = [found[method, arm] for arm in (PLUS, MINUS) if (method, arm) in found]
        mass = tuple(float(one["mass"].mean()) for one in each)
        w = [one["w"].to_numpy() for one in each]
        for name in FOUNDATIONS:
            how: dict[str, Any] = {"intent": plan.sign(name), "weights": np.asarray(L[name], float), "k": plan.k, "mass": mass}
            told = surgical.informedness(base["w"].to_numpy(), *w, **how)._asdict()
            low, high, share = surgical.interval(names, base["w"].to_numpy(), *w, seed=plan.seed, draws=DRAWS, **how)
            where = {"method": method, "foundation": name, "intent": plan.sign(name), "si": told.pop("si"), "low": low, "high": high}
            arms_of = {"draws_with_si": share, "arms": len(each), "arm_chosen": plan.chosen, "k": plan.k}
            out.append({**where, **told, **arms_of})
    return pd.DataFrame(out)


def overall(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan) -> pd.DataFrame:
    """A row for each method and arm: valid cells, mass, how s = 2 w - 1 differs between the conditions, and how the verdicts agree with
    people's (r), and both frames with each other (r of p_true and 1 - p_true)."""
    out, frame = [], as_chosen(frame, scenes, plan)
    for (method, arm), some in arms(frame, plan.floor).items():
        w, s = some["w"].to_numpy(), 2 * some["w"].to_numpy() - 1
        condition = some.index.get_level_values(1)
        other, own = (_mean(s[condition == name]) for name in CONDITIONS)
        at = _frames(frame[(frame["method"] == method) & (frame["arm"] == arm)])
        frames = _r(at[0]["p_true"].to_numpy(), 1 - at[1]["p_true"].to_numpy())
        counts: dict[str, Any] = {"n": int(np.isfinite(w).sum()), "n_total": len(w)}
        counts |= {"mass": float(some["mass"].mean()), "mass_min": float(some["mass"].min())}
        told = {"called_wrong": _mean((w > surgical.WRONG)[np.isfinite(w)].astype(float)), "s": _mean(s), "gap": other - own}
        out.append({"method": method, "arm": arm, **counts, **told, "r_people": _r(w, _people(some.index, scenes)), "r_frames": frames})
    return pd.DataFrame(out)


def _mean(values: np.ndarray) -> float:
    sound = values[np.isfinite(values)]
    return float(sound.mean()) if len(sound) else math.nan


def _r(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation where both are known; nan of fewer than three, or of a constant."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 1e-12 and y.std() > 1e-12 else math.nan
