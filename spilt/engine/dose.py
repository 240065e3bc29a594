"""How large an intervention is beside what it is added to: the dose |delta(h, x, m)| / |h| of the steered blocks' tokens.

A multiplier means another thing in each layer and form; a dose does not. delta is linear in m, so the dose of m is |m| times that of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spilt.data.batches import pad
from spilt.data.chat import Encoded
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import Intervention, Multiplier
from spilt.steering.steering import Steering

SEQUENCES = 16  # on which doses are measured: their spread over tokens is larger than that over texts


class Seen(NamedTuple):
    """What an unsteered model shows at one site: h [1, n, D] at the write point, x [1, n, F] at the read point, of n tokens."""

    h: Tensor
    x: Tensor | None


class _Watch(Intervention):
    """Leaves the stream as it is and keeps what it saw."""

    def __init__(self, like: Intervention) -> None:
        super().__init__(like.read_point, like.write_point, 0.0)
        self.seen: tuple[Tensor, Tensor | None] | None = None

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        self.seen = (h, x)
        return h


@torch.no_grad()
def streams(model: nn.Module, steering: Steering, sequences: Sequence[Encoded], pad_id: int) -> list[Seen]:
    """The streams at every site of a steering, unsteered, over the tokens of the first sequences."""
    batch = pad(list(sequences[:SEQUENCES]), pad_id)
    watches = [(site, _Watch(made)) for site, made in steering]
    with hooks.attach(model, [hooks.Applied(site.layer, watch, 1.0) for site, watch in watches]):
        model(**batch.inputs(anatomy.input_device(model)))
    real = batch.attention_mask
    found = []
    for _, watch in watches:
        assert watch.seen is not None
        h, x = watch.seen
        found.append(Seen(h[real.to(h.device)][None], None if x is None else x[real.to(x.device)][None]))
    return found


@torch.no_grad()
def of(steering: Steering, seen: Sequence[Seen]) -> float:
    """The dose at multiplier 1: mean over sites and tokens of |delta| / |h|."""
    ratios = []
    for (_, made), (h, x) in zip(steering, seen, strict=True):
        delta = made.delta(h, x, 1.0).float().norm(dim=-1)
        ratios.append((delta / h.float().norm(dim=-1)).mean().item())
    return sum(ratios) / len(ratios)
