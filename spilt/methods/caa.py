"""caa: the difference of means."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def caa(matching: Tensor, not_matching: Tensor) -> Tensor:
    """v = mean over pairs of [h(matching) - h(not_matching)], not normalised (CAA, arXiv 2312.06681).

    matching, not_matching: [n, D], each row the stream at block `layer` averaged over the answer's tokens
    (`multiple_choice`: the second-to-last token alone). -> [D]
    """
    return (matching - not_matching).mean(0)
