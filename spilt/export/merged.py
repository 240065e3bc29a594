"""A checkpoint with the Steering in its weights: W' = W + m (A B)^T, b' = b + m db, in float32."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spilt.errors import UserError
from spilt.export.folding import Job, biases, factors
from spilt.model import checkpoint, host
from spilt.steering import anatomy
from spilt.steering.folding import ANYTHING, VECTORS, Place, linear, transposed
from spilt.steering.inplace import lost

SWITCH = "mlp_bias"  # of config.json, where a family can have biases in its MLP (llama, granite, ...)
ABOUT = """An ordinary checkpoint folder, in float32: what it adds can no longer be taken away or scaled.

Stored in bfloat16 instead, {lost} of the added weights (root mean square) would be lost to rounding."""


def write(job: Job, folder: Path) -> str:
    """Changes the weights of the model in memory, and saves it."""
    pairs, constants = factors(job), biases(job)
    if constants:
        _make_biases(job.model, constants)
    wrong, whole = 0.0, 0.0
    with torch.no_grad():
        for where in sorted({*pairs, *constants}):
            module = linear(job.model, where)
            if not module.weight.is_floating_point():
                raise UserError(f"the weights of this model are {module.weight.dtype}, quantised: --format peft leaves them as they are")
            changes = []
            if where in pairs:
                added = pairs[where][0] @ pairs[where][1]
                changes.append((module.weight, added if transposed(module) else added.T))
            if where in constants:
                changes.append((module.bias, constants[where]))
            for parameter, change in changes:
                part = lost(parameter, change, torch.bfloat16)
                wrong, whole = wrong + part[0], whole + part[1]
                parameter.add_(change.to(parameter.device, parameter.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's, about names of its own
        job.model.save_pretrained(folder)  # type: ignore[operator]
    if checkpoint.gguf(job.checkpoint):
        job.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    else:
        _keep_files(job.checkpoint, folder)
    return ABOUT.format(lost=f"{(wrong / whole) ** 0.5:.1%}" if whole else "nothing")


def _keep_files(base: Path, folder: Path) -> None:
    """Everything but the weights as it was published: 4.57 and other engines read otherwise what transformers 5 would write."""
    written = checkpoint.read_json(folder / checkpoint.CONFIG)
    for path in checkpoint.loaded_files(base):
        if path.suffix in (".safetensors", ".bin") or path.name.endswith(checkpoint.INDEX) or path.name == checkpoint.CONFIG:
            continue
        place = folder / path.relative_to(base)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    changed = {SWITCH: written.get(SWITCH)} if SWITCH in written else {}
    config = _in_float32(checkpoint.read_json(base / checkpoint.CONFIG)) | changed
    (folder / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _in_float32(value: Any) -> Any:
    """config.json, with every data type that it names (of its parts too) float32."""
    if not isinstance(value, dict):
        return value
    return {key: "float32" if key in ("dtype", "torch_dtype") else _in_float32(part) for key, part in value.items()}


def _make_biases(model: nn.Module, places: Iterable[Place]) -> None:
    """Zero biases for all linear maps of the MLPs, where the family has a switch for them; nothing where there are some already."""
    missing = [(layer, path) for layer, path in places if linear(model, (layer, path)).bias is None]
    if not missing:
        return
    config: Any = model.config
    parts = anatomy.of(model).parts
    outside = next((path for layer, path in missing if not path.startswith(f"{parts[layer].mlp}.")), "")
    if outside or getattr(config, SWITCH, None) is not False:
        at = outside or "the down projection"
        raise UserError(
            f"the constant part of this Steering wants a bias at {at}, which {config.model_type} has not and cannot have; "
            f"--format peft adds one beside the weights, {VECTORS}, {ANYTHING}"
        )
    setattr(config, SWITCH, True)
    for block, part in zip(anatomy.blocks(model), parts, strict=True):
        for module in block.get_submodule(part.mlp or "").modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)


def reload(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    """The checkpoint, as any other is loaded."""
    return nullcontext(host.load(folder, "float32", str(anatomy.device_of(job.model, 0))).model)
