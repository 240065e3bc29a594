"""Coordinates of a weight's singular vectors (S-space), and directions in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from spilt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-4  # of a singular value, beside the largest: the square root of a smaller one is no divisor


class Basis(NamedTuple):
    """Orthonormal columns [D, r], singular values [r], and what is subtracted first [D]."""

    U: Tensor
    S: Tensor
    bias: Tensor


def matrix(module: Any) -> Tensor:
    """W [out, in] of a linear map, double; GPT-2's Conv1D holds it the other way round."""
    weight = module.weight.detach().double()
    return weight.T if hasattr(module, "nf") else weight


def of_linear(module: Any) -> Basis:
    """W = U S V^T."""
    import torch

    W = matrix(module)
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    return Basis(U, S, W.new_zeros(len(W)) if module.bias is None else module.bias.detach().double())


def of_stream(linears: Iterable[Any], width: int) -> Basis:
    """G = sum of W W^T over maps that write the stream + sum of W^T W over those that read it = U S^2 U^T.

    Square maps are left out: their shape does not say which they are. G is that of all these matrices beside each other.
    """
    import torch

    G, count = None, 0
    for module in linears:
        W = matrix(module)
        if W.shape[0] == W.shape[1] or width not in W.shape:
            continue
        part = W @ W.T if W.shape[0] == width else W.T @ W
        G, count = part if G is None else G + part.to(G), count + 1
    if G is None:
        raise UserError(f"super_sspace: the blocks have no linear map between the stream ({width}) and another width")
    values, vectors = torch.linalg.eigh(G)
    return Basis(vectors.flip(1), values.clamp(min=0).sqrt().flip(0), G.new_zeros(width))


def sspace(matching: Tensor, not_matching: Tensor, basis: Basis, r: int | None = None) -> dict[str, Tensor]:
    """d = mean z+ - mean z-, z = (y - bias) U / sqrt(S) [n, r]; of the r coordinates with the largest |d| (None: all), then of length 1.

    The signs of U's columns do not matter: a column that is turned turns its coordinate of d, and the product stays.
    """
    U, S = basis.U, basis.S
    root = S.clamp(min=FLOOR * float(S.max())).sqrt()
    z = [(y.to(U) - basis.bias) @ U / root for y in (matching, not_matching)]
    d = z[0].mean(0) - z[1].mean(0)
    keep = d.abs().topk(min(r or len(d), len(d))).indices.sort().values
    d = d[keep] / d[keep].norm()
    return {"basis": U[:, keep].float(), "root": root[keep].float(), "direction": d.float(), "bias": basis.bias.float()}
