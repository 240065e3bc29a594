"""probe: the direction of a linear probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.methods.direction import along

if TYPE_CHECKING:
    from torch import Tensor


def probe(matching: Tensor, not_matching: Tensor) -> Tensor:
    """w, b = argmin of sum over the 2 n answers of log(1 + exp(-y (w . x + b))) + |w|^2 / 2, v = (d . w) w / |w|^2 (ITI, arXiv 2306.03341).

    Logistic regression: y = 1 of matching answers, -1 of the others; x = (h - mean) / s, s the root of the mean variance of h's
    coordinates, so that the penalty has no unit. Signed and scaled as `along` says.
    """
    import torch
    from torch.nn.functional import softplus

    h = torch.cat([matching, not_matching]).double()
    x = (h - h.mean(0)) / h.var(0, correction=0).mean().sqrt().clamp(min=torch.finfo(h.dtype).tiny)
    y = torch.ones_like(h[:, 0])
    y[len(matching) :] = -1
    with torch.enable_grad():
        w, b = (torch.zeros(size, dtype=h.dtype, device=h.device, requires_grad=True) for size in (x.shape[1], 1))
        optimizer = torch.optim.LBFGS(
            [w, b], max_iter=2000, history_size=20, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = softplus(-y * (x @ w + b)).sum() + w @ w / 2
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
    return along(w.detach(), matching, not_matching)
