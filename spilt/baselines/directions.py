"""Directions of the stream, of length 1, so that c is a length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.methods.caa import caa
from spilt.methods.mean_centred import mean_centred as less_neutral

if TYPE_CHECKING:
    from torch import Tensor


def mean_diff(matching: Tensor, not_matching: Tensor) -> dict[str, Tensor]:
    """v = (m+ - m-) / |m+ - m-|, m the means of H+ and H- [n, D] (CAA, arXiv 2312.06681)."""
    return _along(caa(matching, not_matching))


def mean_centred(matching: Tensor, neutral: Tensor) -> dict[str, Tensor]:
    """v = (m+ - m0) / |m+ - m0|, m0 the mean of ordinary text (arXiv 2312.03813). With the pairs' own mean as m0 it is mean_diff's."""
    return _along(less_neutral(matching, neutral))


def centred_pca(matching: Tensor, not_matching: Tensor) -> dict[str, Tensor]:
    """v: the first right singular vector of the rows of H+ - H- less their mean; up on most pairs (a tie: on the farthest one).

    Centring takes away just what mean_diff finds, and the sign is of what is left: `spilt.methods.pca` does not centre (arXiv 2310.01405).
    """
    import torch

    rows = (matching - not_matching).double()
    rows = rows - rows.mean(0)
    v = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    shown = rows @ v
    votes = shown.sign().sum() or shown[shown.abs().argmax()]
    return _along(v if votes >= 0 else -v)


def _along(v: Tensor) -> dict[str, Tensor]:
    import torch

    return {"direction": (v / v.norm()).float(), "gate": torch.zeros(())}
