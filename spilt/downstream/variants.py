"""What is learned on a task, each a kind of words.KINDS, as a Steering to be trained; `full` and `base` are none.

All of its layers are trained jointly, from what changes nothing (LoReFT, h + R^T (W h + b - R h), begins at W = R).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spilt.downstream.loreft import LoReFT
from spilt.downstream.words import KINDS, PARTS, PROJECTIONS, Variant
from spilt.errors import UserError
from spilt.steering import anatomy, joint, post_block
from spilt.steering.interventions import Intervention
from spilt.steering.steering import SCOPE, Site, Steering

Make = Callable[[nn.Module, Variant, int], Steering]


def _placed(model: nn.Module, v: Variant, seed: int) -> Steering:
    kind = "vector" if v.kind == "vector" else "adapter"
    how: dict[str, Any] = {"rank": v.rank, "nonlinearity": v.nonlinearity, "alpha": v.alpha, "scope": v.scope, "seed": seed}
    return post_block.build(model, layers_of(model, v.layers), v.sites, kind=kind, **how)


def _loreft(model: nn.Module, v: Variant, seed: int) -> Steering:
    entries = [
        (Site(layer, None, site), LoReFT(anatomy.write_width(model, layer, site), v.rank, site).to(anatomy.device_of(model, layer)))
        for layer in layers_of(model, v.layers)
        for site in v.sites
    ]
    return Steering(entries, {} if v.scope == "all" else {SCOPE: v.scope})


def _lora(model: nn.Module, v: Variant, seed: int) -> Steering:
    return joint.lora(model, layers_of(model, v.layers), rank=v.rank, seed=seed)


def _joint(model: nn.Module, v: Variant, seed: int) -> Steering:
    return joint.both(joint.lora(model, layers_of(model, v.layers), rank=v.lora_rank, seed=seed), _placed(model, v, seed))


# fresh, to be trained; what is no Steering has none
MAKERS: dict[str, Make | None] = {
    "post_block": _placed,
    "vector": _placed,
    "loreft": _loreft,
    "lora": _lora,
    "joint": _joint,
    "full": None,
    "base": None,
}
assert list(MAKERS) == list(KINDS) and joint.PROJECTIONS == PROJECTIONS and tuple(joint.MODES) == PARTS


def layers_of(model: nn.Module, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Those asked for, or all. Raises UserError for one that the model does not have, or that is asked for twice."""
    count = len(anatomy.blocks(model))
    if layers is None:
        return tuple(range(count))
    for layer in layers:
        anatomy.check_layer(layer, count)
    if len(set(layers)) < len(layers):
        raise UserError(f"--layers {' '.join(map(str, layers))}: a layer is named twice")
    return tuple(sorted(layers))


def make(model: nn.Module, v: Variant, seed: int) -> Steering:
    """A fresh Steering, the same for the same seed. Raises UserError for a variant that is none."""
    maker = MAKERS[v.kind]
    if maker is None:
        raise UserError(f"{v.kind} is no Steering: {KINDS[v.kind].says}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return maker(model, v, seed)


def stored(steering: Steering, about: Mapping[str, Any]) -> Steering:
    """What a file has of it: LoReFT as the linear adapter and the vector that it is."""
    entries: list[tuple[Site, Intervention]] = []
    for site, made in steering:
        entries += [(site, one) for one in made.stored()] if isinstance(made, LoReFT) else [(site, made)]
    return Steering(entries, about)


def nothing(model: nn.Module) -> Steering:
    """What acts nowhere, for the base model on the same path: a vector of zeros."""
    return post_block.build(model, [len(anatomy.blocks(model)) - 1], kind="vector")
