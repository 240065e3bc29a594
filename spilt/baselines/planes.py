"""A plane of the stream, in which it is turned."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def angular(matching: Tensor, not_matching: Tensor) -> dict[str, Tensor]:
    """b1 = mean(D) / |mean(D)|, D = H+ - H- [n, D]; b2: the first right singular vector of D's rows, each of length 1, less their mean;
    of that what is orthogonal to b1, normalised (arXiv 2510.26243)."""
    import torch

    rows = (matching - not_matching).double()
    first = rows.mean(0) / rows.mean(0).norm()
    directions = rows / rows.norm(dim=1, keepdim=True)
    second = torch.linalg.svd(directions - directions.mean(0), full_matrices=False).Vh[0]
    second = second - (second @ first) * first
    return {"first": first.float(), "second": (second / second.norm()).float()}
