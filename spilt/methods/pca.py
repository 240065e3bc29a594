"""pca: the principal direction of pair differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.methods.direction import along

if TYPE_CHECKING:
    from torch import Tensor


def pca(matching: Tensor, not_matching: Tensor) -> Tensor:
    """r = argmax over |r| = 1 of sum over pairs of (r . [h(matching) - h(not_matching)])^2, v = (d . r) r (RepE, arXiv 2310.01405).

    The differences are not centred: RepE shuffles the two sides of a pair, so that their mean is 0 with both signs, and what is
    common to all pairs counts; centred differences would lose just that. Signed and scaled as `along` says.
    """
    import torch

    return along(torch.linalg.svd((matching - not_matching).double(), full_matrices=False).Vh[0], matching, not_matching)
