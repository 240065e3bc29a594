"""What of a Steering can be weights of the model: W' = W + m (A B)^T and b' = b + m db at a down projection, or m db at a block's output.

Exact where x, which the intervention reads, is what the down projection reads, and nothing stands between what the projection
gives and the stream (arXiv 2602.02343, eq. 3). Everything else is refused, with what is exact instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.settings.fields import WRITE_POINTS
from spilt.steering import anatomy
from spilt.steering.steering import Site, Steering

Factors = dict[int, tuple[Tensor, Tensor]]  # layer -> A [F, r], B [r, D]
Biases = dict[int, Tensor]  # layer -> [D]
VECTORS = "--format gguf or vllm-hook holds vectors at the block's output"
ANYTHING = "--format safetensors holds any Steering"


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
    """The low-rank parts, times m, all of one rank (filled up with zeros); several of one layer side by side."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for site, made in job.steering:
        if (pair := made.folded()[0]) is None:
            continue
        if site.read_point != "mlp_mid":
            raise UserError(
                f"the {made.form} of layer {site.layer} reads at {site.read_point!r}, and no weight of the model goes from there to the "
                f"stream; {ANYTHING}, and a fit with --set intervention_components=mlp_mid can be weights"
            )
        _same_place(job.model, site, made.form, "down_proj")
        found.setdefault(site.layer, []).append((pair[0], job.multiplier * pair[1]))
    rank = max((sum(a.shape[1] for a, _ in pairs) for pairs in found.values()), default=0)
    return {layer: _side_by_side(pairs, rank) for layer, pairs in sorted(found.items())}


def _side_by_side(pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    a, b = (torch.cat(parts, axis) for axis, parts in zip((1, 0), zip(*pairs, strict=True), strict=True))
    missing = rank - a.shape[1]
    return nn.functional.pad(a, (0, missing)).float().cpu(), nn.functional.pad(b, (0, 0, 0, missing)).float().cpu()


def biases(job: Job, at: str) -> Biases:
    """The constant parts, times m, as something added at 'down_proj' or at the 'block' output."""
    found: Biases = {}
    for site, made in job.steering:
        if (bias := made.folded()[1]) is not None and bias.any():
            if site.write_point not in WRITE_POINTS:
                raise UserError(f"the {made.form} of layer {site.layer} is added inside the block, at {site.write_point}; {ANYTHING}")
            _same_place(job.model, site, made.form, at)
            found[site.layer] = found.get(site.layer, 0) + job.multiplier * bias.float().cpu()
    return dict(sorted(found.items()))


def _same_place(model: nn.Module, site: Site, form: str, at: str) -> None:
    """Raises UserError where a norm stands between the place that the Steering writes to and `at`, or `at` is not there (experts)."""
    row, parts = anatomy.family(model), anatomy.of(model).parts[site.layer]
    if at == "down_proj" and parts.mlp_mid is None:
        instead = f"{VECTORS}, {ANYTHING}" if form == "vector" else ANYTHING
        raise UserError(f"block {site.layer} has no down projection that the {form} could become a part of: {parts.why}; {instead}")
    if site.write_point == at or not row.norm_after_mlp:
        return
    if at == "block":
        instead = f"{ANYTHING}, --format peft or merged what is added at the down projection"
    else:
        others = f"{VECTORS}, " if form == "vector" else ""
        instead = f"{others}{ANYTHING}, and a fit with --set site=down_proj can be weights"
    raise UserError(
        f"the {form} of layer {site.layer} is added at {_words(site.write_point)}, and in {row.model_type} a norm follows the down "
        f"projection: the same at {_words(at)} is something else; {instead}"
    )


def _words(write_point: str) -> str:
    return {"block": "the block's output", "down_proj": "the down projection"}[write_point]


def down_proj_name(model: nn.Module, layer: int) -> str:
    """Its dotted name in the model."""
    wanted = anatomy.down_proj(model, layer)
    return next(name for name, module in model.named_modules() if module is wanted)


def transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"
