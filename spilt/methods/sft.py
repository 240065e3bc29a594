"""sft: the winning answers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.methods.base import Scored
    from spilt.settings import FitSettings


def sft(scored: Scored, s: FitSettings) -> Tensor:
    """lambda_p L_p: the winning answer's loss alone, a token mean over the minibatch, scalar."""
    return s.pos_loss_weight * scored.winning.mean_loss()
