"""LoReFT (arXiv 2404.03592): h + R^T (W h + b - R h), R [r, D] orthonormal; and what it is once it is learned.

delta = R^T (W - R) h + R^T b: a linear post-block adapter with D = W - R and U = R^T, and the vector R^T b. So it is stored as these two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.steering.interventions import Intervention, Multiplier, PostBlock, Vector


class LoReFT(Intervention):
    """delta = m R^T (W h + b - R h) while it is trained. It begins at W = R, b = 0: delta is 0 up to rounding, exactly the base model's."""

    def __init__(self, hidden: int, rank: int, write_point: str) -> None:
        super().__init__(None, write_point, 0.0)
        if rank > hidden:
            raise UserError(f"loreft of rank {rank} (--adapter-rank): R has orthonormal rows, at most {hidden} of {hidden} numbers")
        self.free = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, hidden)))
        self.weight = nn.Parameter(self.rotation().detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def rotation(self) -> Tensor:
        """R [r, D]: `free` made orthonormal, R R^T = 1; of QR's signs those with a positive diagonal, so that it does not jump."""
        q, triangle = torch.linalg.qr(self.free.T)
        return (q * triangle.diagonal().sign()).T

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        R = self.rotation()
        return multiplier * ((h.float() @ (self.weight - R).T + self.bias) @ R)

    @torch.no_grad()
    def stored(self) -> tuple[PostBlock, Vector]:
        """The same delta by forms that a file has."""
        R = self.rotation()
        parameters = {"down": self.weight - R, "up": R.T}
        adapter = PostBlock.of_parameters(parameters, write_point=self.write_point, nonlinearity="linear", alpha=1.0)
        return adapter, Vector.from_state(self.bias @ R, write_point=self.write_point)
