"""How an intervention's parameters are found: one small function per method, docstring = equation and source.

Torch is imported where it is used: the table at the bottom also serves the command line's choices and dry runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from spilt.cell import FORMS
from spilt.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.hparams import FitSettings
    from spilt.scoring import AnswerLogProbs


class Scored(NamedTuple):
    """A minibatch of n pairs: the two answers steered, and (where the method needs it) unsteered. losing may be unused."""

    winning: AnswerLogProbs
    losing: AnswerLogProbs | None
    ref_winning: AnswerLogProbs | None = None
    ref_losing: AnswerLogProbs | None = None


def caa(matching: Tensor, not_matching: Tensor) -> Tensor:
    """v = mean over pairs of [h(matching) - h(not_matching)], not normalised (CAA, arXiv 2312.06681).

    matching, not_matching: [n, D], each row the stream at block `layer` averaged over the answer's tokens
    (`multiple_choice`: the second-to-last token alone). -> [D]
    """
    return (matching - not_matching).mean(0)


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


def sft(scored: Scored, s: FitSettings) -> Tensor:
    """lambda_p L_p: the winning answer's loss alone, a token mean over the minibatch, scalar."""
    return s.pos_loss_weight * scored.winning.mean_loss()


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


LOSS_TYPES: tuple[str, ...] = ("scaled_simpo", "simpo", "dpo", "ipo", "apo_zero")


def _always(_: FitSettings) -> bool:
    return True


def _never(_: FitSettings) -> bool:
    return False


class Method(NamedTuple):
    """A row of the table: what the method needs, and which forms it can find."""

    name: str
    loss: Callable[[Scored, Any], Tensor] | None  # None: closed form (caa)
    summary: str
    forms: tuple[str, ...] = FORMS
    why: str = ""  # why the other forms are left out
    needs_losing: Callable[[FitSettings], bool] = _always
    needs_reference: Callable[[FitSettings], bool] = _never


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "caa",
            None,
            "difference of means",
            forms=("vector",),
            why="caa is a mean of activation differences, which is a vector and nothing else",
        ),
        Method("reps", reps, "reference-scaled preference", needs_reference=lambda s: s.loss_type != "simpo"),
        Method("sft", sft, "winning answers only", needs_losing=_never),
        Method("spilt", spilt, "preference and utility with a hinge", needs_reference=lambda s: bool(s.ref_loss_weight)),
    )
}
