"""A checkpoint with the Steering in its weights: W' = W + m (A B)^T, b' = b + m db, in float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spilt.errors import UserError
from spilt.export.folding import ANYTHING, VECTORS, Job, biases, factors, transposed
from spilt.model import host
from spilt.steering import anatomy

SWITCH = "mlp_bias"  # of config.json, where a family can have biases in its MLP (llama, granite, ...)
ABOUT = """An ordinary checkpoint folder, in float32: what it adds can no longer be taken away or scaled.

Stored in bfloat16 instead, {lost} of the added weights (root mean square) would be lost to rounding."""


def write(job: Job, folder: Path) -> str:
    """Changes the weights of the model in memory, and saves it."""
    pairs, constants = factors(job), biases(job, "down_proj")
    if constants:
        _make_biases(job.model, constants)
    wrong, whole = 0.0, 0.0
    with torch.no_grad():
        for layer in sorted({*pairs, *constants}):
            module: Any = anatomy.down_proj(job.model, layer)
            if not module.weight.is_floating_point():
                raise UserError(f"the weights of this model are {module.weight.dtype}, quantised: --format peft leaves them as they are")
            changes = []
            if layer in pairs:
                added = pairs[layer][0] @ pairs[layer][1]
                changes.append((module.weight, added if transposed(module) else added.T))
            if layer in constants:
                changes.append((module.bias, constants[layer]))
            for parameter, change in changes:
                before = parameter.detach().clone()
                parameter.add_(change.to(parameter.device, parameter.dtype))
                kept = parameter.bfloat16().double() - before.bfloat16().double()
                wrong += float((kept - change.double().to(kept.device)).square().sum())
                whole += float(change.double().square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's, about names of its own
        job.model.save_pretrained(folder)  # type: ignore[operator]
    job.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return ABOUT.format(lost=f"{(wrong / whole) ** 0.5:.1%}" if whole else "nothing")


def _make_biases(model: nn.Module, layers: Any) -> None:
    """Zero biases for all linear maps of the MLPs, where the family has a switch for them; nothing where there are some already."""
    down: list[Any] = [anatomy.down_proj(model, layer) for layer in layers]
    if all(module.bias is not None for module in down):
        return
    config: Any = model.config
    if getattr(config, SWITCH, None) is not False:
        raise UserError(
            f"the constant part of this Steering wants a bias at the down projection, which {config.model_type} has not and cannot have; "
            f"--format peft adds one beside the weights, {VECTORS}, {ANYTHING}"
        )
    setattr(config, SWITCH, True)
    for block, parts in zip(anatomy.blocks(model), anatomy.of(model).parts, strict=True):
        for module in block.get_submodule(parts.mlp or "").modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)


@contextmanager
def reload(job: Job, folder: Path) -> Iterator[nn.Module]:
    """The checkpoint, as any other is loaded."""
    yield host.load(folder, "float32", str(anatomy.device_of(job.model, 0))).model
