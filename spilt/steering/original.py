"""Checkpoints of the public post-block code (arXiv 2603.00425): `pytorch_model.bin`, and `adapter_steerer.pt` of its joint training.

    adapters.layer{i}_{site}.{down,up}.weight, deltas.layer{i}_{site}      beside the whole frozen base as base_model.*

Such a file says neither the activation nor the scope, and its own evaluation takes silu whatever was trained: a linear adapter is then
another one in silence. So both are asked for. Its site `attn` is a hook on `post_attention_layernorm`: the input of the MLP where that
norm feeds the MLP (Llama, Qwen), and nothing that has a name here where it follows the attention (Gemma 2 and 3, OLMo 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spilt.cell import NONLINEARITIES
from spilt.errors import UserError, unknown
from spilt.settings.values import SCOPES
from spilt.steering import anatomy, layer_file
from spilt.steering.interventions import Intervention, PostBlock, Vector
from spilt.steering.steering import SCOPE, Site, Steering

BASE = "base_model."
KEY = re.compile(r"(?:adapters\.|deltas\.)?layer(\d{1,5})_(block|attn|mlp)(?:\.(down|up)\.weight)?", re.ASCII)
AFTER_ATTENTION = "post_feedforward_layernorm"  # a block that has it puts its post_attention_layernorm behind the attention


def read(path: Path, model: nn.Module, *, nonlinearity: str | None = None, scope: str | None = None, alpha: float = 1.0) -> Steering:
    """The adapters or fixed vectors of such a file as a Steering for this model.

    nonlinearity: of NONLINEARITIES, of its training (--nonlinearity, silu where nothing was said; --linear: linear); a file of vectors
    has none. scope: of SCOPES (--intervene-last: last, else all). Raises UserError where one is missing, or the file is not of this kind.
    """
    held = layer_file.read(path)
    found = _parts(held, path)
    adapters = any("down" in part for part in found.values())
    if adapters and nonlinearity is None:
        raise UserError(
            f"{path}: holds adapters and does not say their activation; say how it was trained: nonlinearity= one of "
            f"{', '.join(NONLINEARITIES)} (--linear: linear; else --nonlinearity, by default silu); as another one it gives other answers"
        )
    if scope is None:
        raise UserError(f"{path}: does not say which tokens it steers; say how it was trained: scope='all', or 'last' (--intervene-last)")
    for kind, word, words in (("nonlinearity", nonlinearity, NONLINEARITIES), ("scope", scope, SCOPES)):
        if word is not None and word not in words:
            raise unknown(kind, word, words)
    if not adapters and nonlinearity is not None:
        raise UserError(f"{path}: holds fixed vectors, which have no activation: leave nonlinearity={nonlinearity!r} out")
    entries: list[tuple[Site, Intervention]] = []
    for (layer, site), part in sorted(found.items()):
        place = _place(model, layer, site, path)
        made: Intervention
        if "down" in part:
            made = PostBlock.of_parameters(part, write_point=place, alpha=alpha, nonlinearity=nonlinearity)
        else:
            made = Vector.from_state(part["v"], write_point=place)
        entries.append((Site(layer, None, place), made.eval().requires_grad_(False)))
    steering = Steering(entries, {"source": path.name, **({SCOPE: scope} if scope != "all" else {})})
    steering.check(model)
    return steering


def _parts(held: Any, path: Path) -> dict[tuple[int, str], dict[str, Tensor]]:
    """(layer, site) -> down [r, D] and up [D, r], or v [D]."""
    if not isinstance(held, Mapping):
        raise UserError(f"{path}: holds a {type(held).__name__}; wanted a state dict with adapters.layer0_block.down.weight or the like")
    own = {str(name): value for name, value in held.items() if not str(name).startswith(BASE)}
    others = [name for name in own if not KEY.fullmatch(name)]
    if others or not own:
        shown = ", ".join(others[:3]) or "none"
        raise UserError(
            f"{path}: of its {len(held)} tensors these are no adapters of the post-block code: {shown}; wanted "
            "adapters.layer{i}_{block, attn, mlp}.{down, up}.weight or deltas.layer{i}_{site}"
        )
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, value in own.items():
        hit = KEY.fullmatch(name)
        assert hit is not None
        if not isinstance(value, Tensor) or not value.is_floating_point() or not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name} holds what is no finite number")
        found.setdefault((int(hit[1]), hit[2]), {})[hit[3] or "v"] = value.detach().float()
    for (layer, site), part in found.items():
        shapes = {name: list(value.shape) for name, value in part.items()}
        whole = part.keys() == {"down", "up"} and shapes["down"] == shapes["up"][::-1] and part["down"].ndim == 2
        if not whole and not (part.keys() == {"v"} and part["v"].ndim == 1):
            raise UserError(f"{path}: layer {layer}, {site} is not whole: {shapes}; wanted down [r, D] and up [D, r], or one vector [D]")
    if len({"v" in part for part in found.values()}) > 1:
        raise UserError(f"{path}: holds adapters and fixed vectors, which that code does not write")
    return found


def _place(model: nn.Module, layer: int, site: str, path: Path) -> str:
    """The write point that the original's site is in this model."""
    if site != "attn":
        return site
    at = anatomy.block(model, layer)
    if not hasattr(at, "post_attention_layernorm") or hasattr(at, AFTER_ATTENTION):
        kind = getattr(model.config, "model_type", None)
        raise UserError(
            f"{path}: layer {layer} is steered at `attn`, by which that code means the output of post_attention_layernorm; in {kind} that "
            "is not the MLP's input, and no site here"
        )
    return "mlp_input"
