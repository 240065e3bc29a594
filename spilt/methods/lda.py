"""lda: the whitened difference of means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.errors import UserError
from spilt.methods.direction import along

if TYPE_CHECKING:
    from torch import Tensor


def lda(matching: Tensor, not_matching: Tensor) -> Tensor:
    """w = (S + lambda I)^-1 d, v = (d . w) w / |w|^2: linear discriminant analysis (Fisher 1936), with a ridge (Friedman 1989).

    d: the difference of means; S: the covariance within the matching and within the other answers, pooled; lambda = tr(S) / D, the mean
    variance: S alone has no inverse with fewer answers than coordinates. Scaled as `along` says.
    """
    import torch

    d = (matching - not_matching).mean(0).double()
    x = torch.cat([h - h.mean(0) for h in (matching.double(), not_matching.double())])
    S = x.T @ x / len(x)
    ridge = S.trace() / len(S)
    if not ridge > 0:
        raise UserError("lda needs answers that differ, to know how they vary; give two pairs or more")
    return along(torch.linalg.solve(S + ridge * torch.eye(len(S), dtype=S.dtype, device=S.device), d), matching, not_matching)
