"""Mean curves over questions and their bootstrap: the same resampled questions at every multiplier, and in every cell compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

DRAWS = 1000
NO_VALUES = ("split", "concept", "example", "multiplier")
LEFT_OUT = ("utility", "dose", "moved_wrong", "value")  # what is not finite leaves its question out of this mean; elsewhere it shows
# read_csv: every digit counts; pandas from 3.1 on reads so unasked, and will refuse to be asked
EXACT: dict[str, Any] = {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}


@dataclass(frozen=True)
class Questions:
    """values: name -> [question, multiplier]; here: which were measured; concept: [question], means are within concepts first.

    Stored averages are one question without a spread.
    """

    multipliers: Array
    values: dict[str, Array]
    here: Mask
    concept: npt.NDArray[np.int64]
    keys: pd.MultiIndex

    @staticmethod
    def of(frame: pd.DataFrame) -> Questions:
        """A frame of odds.collect (one split), or rows of a summary."""
        index = [frame[name].to_numpy() if name in frame else np.zeros(len(frame), dtype=int) for name in ("concept", "example")]
        every = pd.MultiIndex.from_arrays(index, names=["concept", "example"])
        keys = every.unique().sort_values()
        row = keys.get_indexer(every)
        m, column = np.unique(frame["multiplier"].to_numpy(float), return_inverse=True)

        def table(value: npt.ArrayLike) -> Array:
            out = np.full((len(keys), len(m)), np.nan)
            out[row, column] = np.asarray(value, dtype=float)
            return out

        numeric = [name for name in frame if name not in NO_VALUES and frame[name].dtype.kind in "fiub"]
        values = {str(name): table(frame[name]) for name in numeric}
        here = np.isfinite(table(np.ones(len(frame))))
        values.setdefault("n", np.where(here, 1.0, np.nan))
        if "preference" in values:
            values.setdefault("accuracy", np.where(here, values["preference"] > 0, np.nan))
            values.setdefault("n_undefined", np.where(here, np.isnan(values["utility"]), np.nan))
        concept = pd.factorize(keys.get_level_values("concept"))[0]
        return Questions(m, values, here, concept, keys)

    @property
    def asked(self) -> Array:
        """Questions scored at each multiplier."""
        return np.asarray(np.nansum(self.values["n"], 0))

    @property
    def undefined(self) -> Array:
        """Those of them without a utility."""
        return np.asarray(np.nansum(self.values["n_undefined"], 0))

    @property
    def freedom(self) -> int:
        """Degrees of freedom: questions less concepts, whose means are not resampled."""
        return len(self.concept) - len(np.unique(self.concept))

    @property
    def zero(self) -> int:
        """Column of m = 0; -1 where it was not measured."""
        return int(np.argmax(self.multipliers == 0)) if (self.multipliers == 0).any() else -1

    @property
    def usable(self) -> Mask:
        """Multipliers with both means, and a utility for half of the questions at least (unknown counts: usable)."""
        known = np.isfinite(self.mean("preference")[0]) & np.isfinite(self.mean("utility")[0])
        return np.asarray(known & ~(self.undefined > self.asked / 2))

    def first(self, n: int) -> Questions:
        """The first n questions of each concept."""
        return self._at(pd.Series(self.concept).groupby(self.concept).cumcount().to_numpy() < n)

    def only(self, keys: pd.MultiIndex) -> Questions:
        """These questions, in this order; all of them are here."""
        return self._at(self.keys.get_indexer(keys))

    def _at(self, rows: npt.NDArray[Any]) -> Questions:
        values = {name: value[rows] for name, value in self.values.items()}
        return Questions(self.multipliers, values, self.here[rows], self.concept[rows], self.keys[rows])

    def resamples(self, seed: int = 0, draws: int = DRAWS) -> Array:
        """How often each question is drawn [draws, question]: within its concept, with replacement."""
        rng = np.random.default_rng(seed)
        out = np.empty((draws, len(self.concept)))
        for concept in np.unique(self.concept):
            own = self.concept == concept
            out[:, own] = rng.multinomial(own.sum(), np.full(own.sum(), 1 / own.sum()), size=draws)
        return out

    def mean(self, name: str, weights: Array | None = None) -> Array:
        """Weighted means [draws, multiplier] over the questions that have a value; within concepts, then over those that have any."""
        values = self.values[name]
        used = self.here & np.isfinite(values) if name in LEFT_OUT else self.here
        weights = np.ones((1, len(values))) if weights is None else weights
        total, counted = np.zeros((len(weights), len(self.multipliers))), np.zeros(len(self.multipliers))
        with np.errstate(invalid="ignore", divide="ignore"):
            for concept in np.unique(self.concept):
                own = self.concept == concept
                drawn, has = weights[:, own], used[own]
                there = has.any(axis=0)
                n = drawn.sum(1, keepdims=True) if has.all() else drawn @ has.astype(float)
                total += np.where(there, drawn @ np.where(has, values[own], 0.0) / n, 0.0)
                counted += there
            return np.asarray(total / counted) + 0.0  # -0.0 is 0.0

    def spread(self, drawn: Array) -> Array:
        """Standard error from resampled estimates [draws, ...]; the factor makes up for the resamples' variance of (n - 1) / n."""
        if self.freedom < 1:
            return np.full(drawn.shape[1:], np.nan)
        return np.asarray(drawn.std(axis=0) * np.sqrt(len(self.concept) / self.freedom))

    def interval(self, drawn: Array) -> Array:
        """[draws, ...] -> [2, ...], 95% percentiles, expanded to what Student's t asks for with few questions (Hesterberg 2015).

        A draw that holds no question with a value has no mean; at least 9 of 10 draws must have one. Of one question: nan.
        """
        from scipy import special  # a run that only measures does without

        out = np.full((2, *drawn.shape[1:]), np.nan)
        enough = np.isfinite(drawn).mean(axis=0) >= 0.9
        if self.freedom >= 1 and enough.any():
            tail = 100 * special.ndtr(np.sqrt(len(self.concept) / self.freedom) * special.stdtrit(self.freedom, 0.025))
            out[:, enough] = np.nanpercentile(drawn[:, enough], [tail, 100 - tail], axis=0) + 0.0  # -0.0 is 0.0
        return out


def on_shared(several: Sequence[Questions]) -> tuple[Questions, ...]:
    """Each on the questions that all of them were asked, in one order."""
    keys = reduce(lambda some, other: some.intersection(other), [questions.keys for questions in several]).sort_values()
    return tuple(questions.only(keys) for questions in several)


def interpolate(grid: Array, curves: Array, at: npt.ArrayLike) -> Array:
    """Piecewise linear [draws, multiplier] -> [draws] at one place per draw (or one for all)."""
    x = np.broadcast_to(np.asarray(at, dtype=float), len(curves))
    if len(grid) < 2:
        return np.asarray(curves[:, 0])
    right = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    share = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
    rows = np.arange(len(curves))
    left, far = curves[rows, right - 1], curves[rows, right]
    # at a measured point only that point counts: beside it there may be no value
    return np.asarray(np.where(share == 0, left, np.where(share == 1, far, left + share * (far - left))))
