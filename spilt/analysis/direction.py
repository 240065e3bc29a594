"""Is there a direction at all? How far the pair differences d_i = h(matching_i) - h(not_matching_i) of one block agree, before any fit.

cosine = mean_i cos(d_i, v_i),  v_i = mean of the other differences;  held_out = share of pairs with d_i . v_i > 0;
auc = P(h_i . v_i of a matching answer > that of a not-matching one), questions not paired.
p: |sum_i s_i d_i| with every s_i = 1 among 1000 with random signs: exact where the two answers of a pair could be exchanged.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

FLIPS = 1000
LEVEL = 0.05
LEAST = 4  # pairs: with fewer no signs are rarer than the level


class Direction(NamedTuple):
    """Numbers of one block; n pairs."""

    n: int
    cosine: float
    held_out: float
    auc: float
    p: float

    @property
    def told(self) -> str:
        """One line for a person."""
        return (
            f"pair differences agree with the others' mean: cosine {self.cosine:.2f}, {self.held_out:.0%} of {self.n} on the right "
            f"side, AUC {self.auc:.2f}, p = {self.p:.3f}"
        )

    @property
    def doubt(self) -> str:
        """What speaks against a direction; '' where nothing does."""
        if self.n < LEAST:
            return f"{self.n} pairs are too few to tell whether there is a direction"
        if self.p > LEVEL:
            return (
                f"no direction to be seen: the differences of {self.n} pairs agree no more than with random signs (p = {self.p:.2f}, "
                f"cosine {self.cosine:.2f}); do the answers differ in one trait, and is this the layer?"
            )
        return ""


def screen(matching: Any, not_matching: Any, seed: int = 0) -> Direction:
    """matching, not_matching: [n, D], as the closed forms are handed them."""
    a, b = np.asarray(matching, dtype=float), np.asarray(not_matching, dtype=float)
    d, n = a - b, len(a)
    if n < 2 or not np.isfinite(d).all():
        return Direction(n, math.nan, math.nan, math.nan, 1.0)
    others = (d.sum(0) - d) / (n - 1)
    others /= np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-30)
    along = (d * others).sum(1)
    cosine = along / np.maximum(np.linalg.norm(d, axis=1), 1e-30)
    high, low = (a * others).sum(1), (b * others).sum(1)
    above = np.sign(high[:, None] - low)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, n))
    gram = d @ d.T
    flipped = ((signs @ gram) * signs).sum(1)
    p = (1 + int((flipped >= gram.sum() * (1 - 1e-9)).sum())) / (1 + FLIPS)
    return Direction(n, float(cosine.mean()), float((along > 0).mean()), float((above.mean() + 1) / 2), p)
