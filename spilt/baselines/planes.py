"""A plane of the stream, in which it is turned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def angular(matching: Tensor, not_matching: Tensor) -> dict[str, Tensor]:
    """b1 = mean(D) / |mean(D)|, D = H+ - H- [n, D]; b2: the first right singular vector of D's rows, each of length 1, less their mean;
    of that what is orthogonal to b1, normalised (arXiv 2510.26243). A pair with the same answers has no say in b2."""
    import torch

    rows = (matching - not_matching).double()
    first = rows.mean(0) / rows.mean(0).norm()
    rows = rows[rows.norm(dim=1) > 0]
    if len(rows) < 3:
        raise UserError(f"angular_steering: {len(rows)} pairs with answers that differ span no plane; give three or more")
    directions = rows / rows.norm(dim=1, keepdim=True)
    second = torch.linalg.svd(directions - directions.mean(0), full_matrices=False).Vh[0]
    second = second - (second @ first) * first
    return {"first": first.float(), "second": (second / second.norm()).float()}
