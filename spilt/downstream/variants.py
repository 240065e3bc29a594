"""What is learned on a task, each a kind of words.KINDS: post-block adapters, vectors, LoRA, LoReFT, all weights; and base, which learns nothing.

All but full are a Steering over the chosen layers, trained jointly from an exact no-op (LoReFT: h + R^T (W h + b - R h) begins at W = R).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spilt.downstream.words import KINDS, Variant
from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.steering.interventions import INTERVENTIONS, Intervention
from spilt.steering.steering import Site, Steering
from spilt.weights import adapters

Make = Callable[[nn.Module, int, Variant], list[tuple[Site, Intervention]]]


def _form(name: str) -> Make:
    """A form at each of the sites."""

    def make(model: nn.Module, layer: int, v: Variant) -> list[tuple[Site, Intervention]]:
        made = []
        for site in v.sites:
            words = {"rank": v.rank, "alpha": v.alpha, "nonlinearity": v.nonlinearity}
            one: Any = INTERVENTIONS[name](anatomy.hidden_size(model), 0, write_point=site, dropout=0.0, **words)
            if name == "vector":
                nn.init.zeros_(one.v)
            made.append((Site(layer, None, site), one))
        return made

    return make


def _lora(model: nn.Module, layer: int, v: Variant) -> list[tuple[Site, Intervention]]:
    """x W + x A B at every linear map of the block: scale 1 (alpha = r), A uniform in +-1/sqrt(F) as in peft, B zero."""
    made, parts = [], anatomy.of(model).parts[layer]
    for number, path in adapters.maps(model, [layer]):
        read, write = ("mlp_mid", "down_proj") if path == parts[number].mlp_mid else (path, path)  # type: ignore[index]
        width = anatomy.read_width(model, layer, read)
        one: Any = INTERVENTIONS["lora"](
            anatomy.write_width(model, layer, write), width, read_point=read, write_point=write, dropout=0.0, rank=v.rank, alpha=v.rank
        )
        nn.init.uniform_(one.lora_A, -1 / math.sqrt(width), 1 / math.sqrt(width))
        made.append((Site(layer, read, write), one))
    return made


# the interventions of one layer, fresh; what is no Steering has none
MAKERS: dict[str, Make | None] = {
    "post_block": _form("post_block"),
    "vector": _form("vector"),
    "loreft": _form("loreft"),
    "lora": _lora,
    "full": None,
    "base": None,
}
assert list(MAKERS) == list(KINDS)


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
        entries = [entry for layer in layers_of(model, v.layers) for entry in maker(model, layer, v)]
    return Steering((site, one.to(anatomy.device_of(model, site.layer))) for site, one in entries)


def nothing(model: nn.Module) -> Steering:
    """What acts nowhere, for the base model on the same path: a vector of zeros."""
    return make(model, replace(Variant("vector"), layers=(len(anatomy.blocks(model)) - 1,)), 0)


def learned(v: Variant, steering: Steering | None, model: nn.Module) -> tuple[int, float]:
    """(numbers that are learned, their share of the model's own)."""
    own = sum(parameter.numel() for parameter in model.parameters())
    count = own if v.kind == "full" else sum(parameter.numel() for parameter in steering.parameters()) if steering else 0
    return count, count / own
