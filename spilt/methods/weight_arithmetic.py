"""weight_arithmetic: the difference of two adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.methods.base import Scored
    from spilt.settings import FitSettings


def weight_arithmetic(scored: Scored, s: FitSettings) -> Tensor:
    """dW = theta_pos - theta_neg of two adapters, each trained on one side's answers alone (arXiv 2511.05408); this is the loss of each:

    -sum over the minibatch's answer tokens of log p / their number, scalar. weights/training.py trains both and makes dW.
    """
    return scored.winning.mean_loss()
