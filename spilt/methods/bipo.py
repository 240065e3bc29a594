"""bipo: preference optimisation of a vector in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.methods.base import Scored
    from spilt.settings import FitSettings


def bipo(scored: Scored, s: FitSettings) -> Tensor:
    """-log sigmoid(d beta [r(matching) - r(not_matching)]), mean over the pairs, scalar (BiPO, arXiv 2406.00045, eq. 2).

    r = log p(answer | m = d) - log p(answer | m = 0), summed over the answer's tokens; d = 1 or -1, drawn anew for each pair each time.
    With d = -1 the not-matching answer is the one that wins (orig_sub), so in terms of winning and losing d is 1.
    """
    from torch.nn.functional import logsigmoid

    assert scored.losing is not None and scored.ref_winning is not None and scored.ref_losing is not None
    r_w, r_l = scored.winning.total - scored.ref_winning.total, scored.losing.total - scored.ref_losing.total
    return -logsigmoid(s.beta * (r_w - r_l)).mean()
