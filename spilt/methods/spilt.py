"""spilt: preference and utility with a hinge, the paper's own objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.methods.base import Scored
    from spilt.settings import FitSettings


def spilt(scored: Scored, s: FitSettings) -> Tensor:
    """lambda_p L_p + lambda_n L_n + gamma relu(theta - (L_n - L_p)) (arXiv 2602.02343, section 5), scalar.

    Released (`hinge: batch`): L_p, L_n are token means over the minibatch and the hinge acts on them. `hinge: pair`:
    the paper's formula, one hinge per pair. `ref_loss_weight` adds [relu(L_p - L_p_ref) + relu(L_n - L_n_ref)].
    """
    winning, losing = scored.winning, scored.losing
    assert losing is not None
    l_p, l_n = winning.mean_loss(), losing.mean_loss()
    loss = s.pos_loss_weight * l_p + s.neg_loss_weight * l_n
    gap = l_n - l_p if s.hinge == "batch" else losing.losses() - winning.losses()
    loss = loss + s.margin_penalty_weight * (s.margin_threshold - gap).relu().mean()
    if s.ref_loss_weight:
        assert scored.ref_winning is not None and scored.ref_losing is not None
        worse = (l_p - scored.ref_winning.mean_loss()).relu() + (l_n - scored.ref_losing.mean_loss()).relu()
        loss = loss + s.ref_loss_weight * worse
    return loss
