"""Transport of one cloud of streams to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-6  # of a coordinate's variance, beside the mean of all: below it there is no slope
EPSILON, SWEEPS, CLOSE = 0.1, 1000, 1e-9  # of the transport: its entropy beside the mean cost, at most so many sweeps, until masses fit


def linear_act(matching: Tensor, not_matching: Tensor) -> dict[str, Tensor]:
    """omega = sum a~ b~ / sum a~^2, beta = mean b - omega mean a: least squares between sorted samples, coordinate by coordinate.

    a, b: the values of H- and H+ [n, D], each sorted on its own, a~, b~ less their means (Linear-AcT, arXiv 2410.23054). sum a~^2 has a
    floor: a coordinate that does not vary gets no slope, and goes to the mean of b.
    """
    if len(matching) != len(not_matching) or len(matching) < 2:
        raise UserError(f"linear_act wants as many answers on either side, two or more; got {len(matching)} and {len(not_matching)}")
    a, b = (side.double().sort(0).values for side in (not_matching, matching))
    own, other = a - a.mean(0), b - b.mean(0)
    spread = own.pow(2).sum(0)
    omega = (own * other).sum(0) / spread.clamp(min=FLOOR * float(spread.mean()) or 1.0)
    return {"slope": omega.float(), "shift": (b.mean(0) - omega * a.mean(0)).float()}


def sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """P = argmin <P, C> - eps H(P) with row sums `rows` [k] and column sums `columns` [l]; cost [k, l] -> P (Cuturi 2013).

    In logarithms, and eps is 0.1 of the mean cost, so that no unit of the stream makes exp(-C / eps) vanish. The last step fits the rows;
    it ends where the columns fit.
    """
    import torch

    kernel = -cost / (EPSILON * cost.mean()).clamp(min=torch.finfo(cost.dtype).tiny)
    u, v = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(SWEEPS):
        v = columns.log() - (kernel + u[:, None]).logsumexp(0)
        u = rows.log() - (kernel + v).logsumexp(1)
        plan = (kernel + u[:, None] + v).exp()
        if (plan.sum(0) - columns).abs().max() < CLOSE:
            break
    return plan
