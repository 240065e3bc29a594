"""mean_centred: the mean of the behaviour less that of ordinary text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mean_centred(matching: Tensor, neutral: Tensor) -> Tensor:
    """v = mean over answers of h(matching) - mean over texts of h(neutral), not normalised (arXiv 2312.03813).

    matching: [n, D], as of caa; neutral: [k, D], ordinary text, each row averaged over a text's tokens. What is subtracted must not be
    the pairs' own mean: with that, v is caa's divided by 2.
    """
    return matching.mean(0) - neutral.mean(0)
