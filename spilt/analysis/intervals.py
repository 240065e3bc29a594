"""95% intervals for small samples of prompts: shares, changes of a share on the same prompts, means, agreement of two judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054  # scipy.special.ndtri(0.975)
DRAWS = 1000


class Estimate(NamedTuple):
    """A number with its interval and what it is a number of; nan where there is none."""

    value: float
    low: float
    high: float
    n: int


NONE = Estimate(math.nan, math.nan, math.nan, 0)


def share(hits: Sequence[bool]) -> Estimate:
    """k / n, Wilson's interval (1927)."""
    n = len(hits)
    if not n:
        return NONE
    p, square = sum(hits) / n, Z * Z / n
    middle, half = (p + square / 2) / (1 + square), Z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    return Estimate(p, max(0.0, middle - half) if p else 0.0, min(1.0, middle + half) if p < 1 else 1.0, n)


def change(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
    """share(after) - share(before) on the same prompts, from both Wilson intervals and the correlation (Newcombe 1998, method 10)."""
    n = len(before)
    if not n:
        return NONE
    both = sum(x and y for x, y in zip(after, before, strict=True))
    a, b = sum(after), sum(before)
    neither = n - a - b + both
    cross = float(both * neither - (a - both) * (b - both))
    cross = max(cross - n / 2, 0.0) if cross > 0 else cross
    outer = a * (n - a) * b * (n - b)
    phi = cross / math.sqrt(outer) if outer else 0.0
    (p, p_low, p_high, _), (q, q_low, q_high, _) = share(after), share(before)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return Estimate(p - q, p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low), n)


def pooled(
    groups: Sequence[npt.ArrayLike],
    statistic: Callable[[npt.NDArray[np.float64]], float] = np.mean,
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """A statistic of all values of all groups (the tokens of each prompt); whole groups are resampled, percentiles. Of one group: nan."""
    values = [np.asarray(group, dtype=float).ravel() for group in groups]
    values = [group for group in values if len(group)]
    if not values:
        return NONE
    found, n = float(statistic(np.concatenate(values))), len(values)
    if n == 1 or not math.isfinite(found):
        return Estimate(found, math.nan, math.nan, n)
    rng = np.random.default_rng(seed)
    drawn = [statistic(np.concatenate([values[i] for i in rng.integers(n, size=n)])) for _ in range(draws)]
    low, high = np.percentile(drawn, tails(n))
    return Estimate(found, float(low), float(high), n)


def tails(n: float) -> list[float]:
    """Percentiles of a bootstrap of n groups, two or more: those that Student's t asks for, which are wider for few (Hesterberg 2015)."""
    from scipy import special  # a run that only measures does without

    tail = 100 * special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, 0.025))
    return [tail, 100 - tail]


def kappa(ours: Sequence[str], theirs: Sequence[str]) -> Estimate:
    """(p_o - p_e) / (1 - p_e): agreement beyond what the two's own shares of each word would give (Cohen 1960).

    Interval: Wilson's for p_o, at this p_e. nan where both say one word throughout, so that chance agrees too.
    """
    n = len(ours)
    chance = sum((ours.count(word) / n) * (theirs.count(word) / n) for word in {*ours, *theirs}) if n else 1.0
    if chance >= 1:
        return NONE._replace(n=n)
    agreed = share([x == y for x, y in zip(ours, theirs, strict=True)])
    value, low, high = ((p - chance) / (1 - chance) for p in agreed[:3])
    return Estimate(value, low, high, n)
