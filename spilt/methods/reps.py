"""reps: preference losses, scaled by a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spilt.errors import unknown
from spilt.settings.fields import LOSSES as LOSS_TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.methods.base import Scored
    from spilt.settings import FitSettings


def reps(scored: Scored, s: FitSettings) -> Tensor:
    """Preference losses by `loss_type`, averaged over the pairs (RePS, arXiv 2505.20809), scalar.

    scaled_simpo  -log sigmoid(max(R, 1)/|w| log p(w) - 1/|l| log p(l)),  R = simpo_scaler (log p_ref(l) - log p_ref(w))
    simpo         -log sigmoid(beta (1/|w| log p(w) - 1/|l| log p(l)) - gemma)                     (arXiv 2405.14734)
    dpo           -(1 - e) log sigmoid(D) - e log sigmoid(-D),  D = beta (r_w - r_l),  e = label_smoothing  (arXiv 2305.18290)
    ipo           (r_w - r_l - 1/(2 beta))^2                                                       (arXiv 2310.12036)
    apo_zero      log sigmoid(beta r_l) - log sigmoid(beta r_w)                                    (after arXiv 2408.06266)
    with r = log p - log p_ref. |w|, |l| count all real tokens of a sequence, prompt included. All as the released code
    computes them: scaled_simpo has no beta or gemma, only dpo smooths labels, and apo_zero is in logs.
    """
    from torch.nn.functional import logsigmoid

    assert scored.losing is not None
    w, l = scored.winning.total, scored.losing.total  # noqa: E741 - the letters of the equation
    mean_w, mean_l = w / scored.winning.length, l / scored.losing.length
    if s.loss_type == "simpo":
        return -logsigmoid(s.beta * (mean_w - mean_l) - s.gemma).mean()
    assert scored.ref_winning is not None and scored.ref_losing is not None
    ref_w, ref_l = scored.ref_winning.total, scored.ref_losing.total
    if s.loss_type == "scaled_simpo":
        return -logsigmoid((s.simpo_scaler * (ref_l - ref_w)).clamp(min=1) * mean_w - mean_l).mean()
    r_w, r_l = w - ref_w, l - ref_l
    if s.loss_type == "dpo":
        d = s.beta * (r_w - r_l)
        return -(logsigmoid(d) * (1 - s.label_smoothing) + logsigmoid(-d) * s.label_smoothing).mean()
    if s.loss_type == "ipo":
        return (r_w - r_l - 1 / (2 * s.beta)).pow(2).mean()
    if s.loss_type == "apo_zero":
        return (logsigmoid(s.beta * r_l) - logsigmoid(s.beta * r_w)).mean()
    raise unknown("loss_type", s.loss_type, LOSS_TYPES)
