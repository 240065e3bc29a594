"""Closed forms that find a direction of the stream: what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def along(direction: Tensor, matching: Tensor, not_matching: Tensor) -> Tensor:
    """v = (d . r) r with r = direction / |direction| and d the difference of means -> [D], float32.

    So matching is up, whichever way the direction points, and m = 1 is as far as the two means lie apart along it.
    """
    r = direction / direction.norm()
    return (((matching - not_matching).mean(0).to(r) @ r) * r).float()
