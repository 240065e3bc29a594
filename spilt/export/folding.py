"""What an export writes: a Steering at one strength as factors and biases of linear maps (steering/folding.py says what can be that)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.settings.fields import WRITE_POINTS
from spilt.steering import anatomy
from spilt.steering.folding import ANYTHING, Place, down, place
from spilt.steering.steering import Steering

Factors = dict[Place, tuple[Tensor, Tensor]]  # A [F, r], B [r, D]
Biases = dict[Place, Tensor]  # [D]


class Job(NamedTuple):
    """What is exported: a Steering at one strength on a loaded model (float32)."""

    model: nn.Module
    tokenizer: object
    steering: Steering
    multiplier: float
    base: str  # path or name of the model, as the exported files give it
    place: Path  # where the files will lie
    checkpoint: Path  # the model's folder


def factors(job: Job) -> Factors:
    """The low-rank parts, times m, all of one rank (filled up with zeros); several of one map side by side."""
    found: dict[Place, list[tuple[Tensor, Tensor]]] = {}
    for site, made in job.steering:
        if (pair := made.folded()[0]) is not None:
            found.setdefault(place(job.model, site, made), []).append((pair[0], job.multiplier * pair[1]))
    rank = max((sum(a.shape[1] for a, _ in pairs) for pairs in found.values()), default=0)
    return {where: _side_by_side(pairs, rank) for where, pairs in sorted(found.items())}


def _side_by_side(pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    a, b = (torch.cat(parts, axis) for axis, parts in zip((1, 0), zip(*pairs, strict=True), strict=True))
    missing = rank - a.shape[1]
    return nn.functional.pad(a, (0, missing)).float().cpu(), nn.functional.pad(b, (0, 0, 0, missing)).float().cpu()


def biases(job: Job) -> Biases:
    """The constant parts, times m, as something that linear maps add; what is added at a block's output is its down projection's."""
    found: Biases = {}
    for site, made in job.steering:
        if (bias := made.folded()[1]) is not None and bias.any():
            where = place(job.model, site, made)
            found[where] = found.get(where, 0) + job.multiplier * bias.float().cpu()
    return dict(sorted(found.items()))


def at_blocks(job: Job) -> dict[int, Tensor]:
    """The constant parts, times m, as something added at the blocks' outputs: layer -> [D]."""
    found: dict[int, Tensor] = {}
    for site, made in job.steering:
        if (bias := made.folded()[1]) is not None and bias.any():
            if site.write_point not in WRITE_POINTS:
                raise UserError(f"the {made.form} of layer {site.layer} is added inside the block, at {site.write_point}; {ANYTHING}")
            down(job.model, site, made.form, "block")
            found[site.layer] = found.get(site.layer, 0) + job.multiplier * bias.float().cpu()
    return dict(sorted(found.items()))


def name_of(model: nn.Module, where: Place) -> str:
    """The dotted name of a linear map in the model."""
    return f"{anatomy.of(model).blocks}.{where[0]}.{where[1]}"
