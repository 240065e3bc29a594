"""Where things are in a model: one row per family. Returns modules, never wraps the model. Imports no torch: a dry run asks here too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from spilt.errors import UserError, unknown
from spilt.settings.fields import POINTS

if TYPE_CHECKING:
    import torch
    from torch import nn


class Family(NamedTuple):
    """Attribute paths of one `config.model_type`; block-relative but for `blocks`."""

    model_type: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    down_proj: str = "mlp.down_proj"
    norm_after_mlp: bool = False  # then adding at the block's output is not the same as adding to down_proj's
    absolute_positions: bool = False  # a learned table of positions: what is longer than the table cannot be run


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("gemma2", norm_after_mlp=True),
        Family("gemma3_text", norm_after_mlp=True),
        Family("gpt2", blocks="transformer.h", attention="attn", down_proj="mlp.c_proj", absolute_positions=True),
    )
}

# read points of lora and local_weight (the input of the module), by their YAML names
COMPONENTS = POINTS


def family(model: nn.Module) -> Family:
    """The family's row, or a UserError that lists the known ones."""
    return family_of(getattr(model.config, "model_type", None))


def family_of(model_type: Any) -> Family:
    """The row of a `config.model_type`, or a UserError that lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unknown("model family (config.json: model_type)", str(model_type), FAMILIES)
    return FAMILIES[model_type]


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order."""
    path = family(model).blocks
    try:
        return cast("nn.ModuleList", model.get_submodule(path))
    except AttributeError:
        fact = f"{type(model).__name__} has no {path}, where the decoder blocks of this family are"
        raise UserError(f"{fact}; load a language model with its head, such as AutoModelForCausalLM gives") from None


def block(model: nn.Module, layer: int) -> nn.Module:
    """Decoder block `layer` (0-based)."""
    found = blocks(model)
    check_layer(layer, len(found))
    return found[layer]


def check_layer(layer: int, count: int) -> None:
    """Raises UserError for a layer that a model of `count` blocks does not have."""
    if not 0 <= layer < count:
        raise UserError(f"layer {layer} does not exist: the model has {count} blocks, 0 to {count - 1}; set `layers` in the YAML")


def read_point(model: nn.Module, layer: int, component: str) -> nn.Module:
    """The module whose input is read: the down projection ('mlp_mid'), the MLP, the attention, the block, or a linear by its path."""
    row, at = family(model), block(model, layer)
    paths = {"mlp_mid": row.down_proj, "mlp": row.mlp, "attn": row.attention, "block": ""}
    if component not in paths:
        return _linear(at, component)
    return at.get_submodule(paths[component])


def write_point(model: nn.Module, layer: int, name: str) -> nn.Module:
    """The module whose output is written: the block, its down projection ('down_proj'), or a linear by its path."""
    at = block(model, layer)
    return at if name == "block" else down_proj(model, layer) if name == "down_proj" else _linear(at, name)


def _linear(at: nn.Module, path: str) -> nn.Module:
    """A linear map inside a block, such as self_attn.q_proj, as adapters of other programs name them."""
    found = {name: module for name, module in at.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2}
    if path not in found:
        raise unknown("place in a block", path, (*COMPONENTS, *found))
    return found[path]


def down_proj(model: nn.Module, layer: int) -> nn.Module:
    """The MLP's output projection of block `layer`."""
    return read_point(model, layer, "mlp_mid")


def device_of(model: nn.Module, layer: int) -> torch.device:
    """Where block `layer` computes (several devices: accelerate's map, which keeps offloaded weights on 'meta')."""
    import torch

    at = block(model, layer)
    placed = getattr(getattr(at, "_hf_hook", None), "execution_device", None)
    return next(at.parameters()).device if placed is None else torch.device(placed)


def hidden_size(model: nn.Module) -> int:
    """D, the width of the residual stream."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def vocabulary(model: nn.Module) -> int:
    """How many token ids the model has an embedding for."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def context(model: nn.Module) -> int | None:
    """How many positions the model was made for (config.json: max_position_embeddings); None when it does not say."""
    config: Any = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def read_width(model: nn.Module, layer: int, component: str) -> int:
    """F, the width of the read point: MLP intermediate size for 'mlp_mid', that of a linear, else D."""
    return hidden_size(model) if component in ("mlp", "attn", "block") else _widths(read_point(model, layer, component))[0]


def write_width(model: nn.Module, layer: int, name: str) -> int:
    """D, or the width of what a linear gives."""
    at = write_point(model, layer, name)
    return hidden_size(model) if name == "block" else _widths(at)[1]


def _widths(linear: Any) -> tuple[int, int]:
    """In, out. GPT-2's Conv1D keeps its weight transposed and has no in_features."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)
    return int(linear.weight.shape[0]), int(linear.weight.shape[1])
