"""Mean curves over questions and their bootstrap: the same resampled questions at every multiplier, and in every cell compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

DRAWS = 1000
LEFT_OUT = ("utility", "dose")  # a value that is not finite leaves its question out of this mean; elsewhere it shows


@dataclass(frozen=True)
class Questions:
    """values: name -> [question, multiplier]; here: which were measured; concept: [question], means are within concepts first.

    asked, undefined: [multiplier] questions scored, and those without a utility. Stored averages are one question without a spread.
    """

    multipliers: Array
    values: dict[str, Array]
    here: Mask
    concept: npt.NDArray[np.int64]
    keys: pd.MultiIndex
    asked: Array
    undefined: Array

    @staticmethod
    def of(frame: pd.DataFrame, keys: pd.MultiIndex | None = None) -> Questions:
        """A frame of odds.collect (one split), or rows of a summary; of these questions alone where `keys` are given."""
        frame = frame.assign(**{name: 0 for name in ("concept", "example") if name not in frame})
        if "accuracy" not in frame:
            frame = frame.assign(accuracy=(frame["preference"] > 0).astype(float))
        if "n" not in frame:
            frame = frame.assign(n=1.0, n_undefined=frame["utility"].isna().astype(float))
        index = ["concept", "example"]
        names = [name for name in frame if pd.api.types.is_numeric_dtype(frame[name]) and name not in (*index, "multiplier")]
        wide = frame.assign(here=1.0).pivot(index=index, columns="multiplier", values=[*names, "here"]).sort_index()
        wide = wide if keys is None else wide.loc[keys]
        m = np.sort(frame["multiplier"].unique()).astype(float)
        values: dict[str, Array] = {str(name): wide[name].reindex(columns=m).to_numpy(float) for name in names}
        concept = pd.factorize(wide.index.get_level_values("concept"))[0]
        here = wide["here"].reindex(columns=m).notna().to_numpy(bool)
        return Questions(m, values, here, concept, wide.index, np.nansum(values["n"], 0), np.nansum(values["n_undefined"], 0))

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
        number = pd.Series(self.concept).groupby(self.concept).cumcount().to_numpy()
        keep = number < n
        values = {name: value[keep] for name, value in self.values.items()}
        counts = (np.nansum(values[name], 0) for name in ("n", "n_undefined"))
        return Questions(self.multipliers, values, self.here[keep], self.concept[keep], self.keys[keep], *counts)

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
                there = used[own].any(axis=0)
                sums, n = weights[:, own] @ np.where(used[own], values[own], 0.0), weights[:, own] @ used[own].astype(float)
                total += np.where(there, sums / n, 0.0)
                counted += there
            return np.asarray(total / counted)

    def spread(self, drawn: Array) -> Array:
        """Standard error from resampled estimates [draws, ...]; the factor makes up for resampling n questions with variance (n - 1) / n."""
        if self.freedom < 1:
            return np.full(drawn.shape[1:], np.nan)
        return np.asarray(drawn.std(axis=0) * np.sqrt(len(self.concept) / self.freedom))

    def interval(self, drawn: Array) -> Array:
        """[draws, ...] -> [2, ...], 95% percentiles, expanded to what Student's t asks for with few questions (Hesterberg 2015).

        A draw that holds no question with a value has no mean; at least 9 of 10 draws must have one. Of one question: nan.
        """
        out = np.full((2, *drawn.shape[1:]), np.nan)
        enough = np.isfinite(drawn).mean(axis=0) >= 0.9
        if self.freedom >= 1 and enough.any():
            tail = 100 * stats.norm.cdf(np.sqrt(len(self.concept) / self.freedom) * stats.t.ppf(0.025, self.freedom))
            out[:, enough] = np.nanpercentile(drawn[:, enough], [tail, 100 - tail], axis=0) + 0.0  # -0.0 is 0.0
        return out


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
