"""Where things are in a model, found by structure; what is known of a family. Returns modules, never wraps the model.

Imports no torch: a dry run asks here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from spilt.errors import UserError, unknown
from spilt.settings.fields import ANATOMY, POINTS, WRITE_POINTS

if TYPE_CHECKING:
    import torch
    from torch import nn

RECURRENT = "linear attention or state-space blocks: they keep a state that rows cannot share"


class Family(NamedTuple):
    """What is peculiar about a `config.model_type`: where modules are is found in the model itself."""

    model_type: str
    # then adding at the block's output is not the same as adding to down_proj's; a factor does it too (Granite)
    norm_after_mlp: bool = False
    plain: str = ""  # why the fast engine does not run it; '' where it is tested equal to the plain one


# those that tests/families.py makes and the contract matrix holds; the README lists them
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        *map(Family, ("llama", "mistral", "qwen2", "qwen3")),
        *(Family(name, norm_after_mlp=True) for name in ("gemma2", "gemma3_text", "gemma3")),
        *map(Family, ("gpt2", "phi3", "gpt_neox", "cohere2", "stablelm")),
        *(Family(name, norm_after_mlp=True) for name in ("olmo2", "granite")),
        *map(Family, ("mixtral", "qwen3_moe", "gpt_oss")),
        *(Family(name, plain=RECURRENT) for name in ("qwen3_next", "qwen3_5_text", "bamba", "falcon_h1")),
        Family("granitemoehybrid", norm_after_mlp=True, plain=RECURRENT),
    )
}

# read points of lora and local_weight (the input of the module), by their YAML names
COMPONENTS = POINTS
MIXES = {"attention_mask", "past_key_values", "past_key_value", "layer_past", "cache_params", "position_embeddings", "alibi"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # config.json: how many MLPs a block chooses from
WAY_OUT = "; `spilt anatomy MODEL` shows what there is, --anatomy blocks=PATH,attn=PATH,mlp=PATH,mlp_mid=PATH says where it is"


class Parts(NamedTuple):
    """Of one block: paths within it; None where it has no such part."""

    attn: str | None
    mlp: str | None
    mlp_mid: str | None  # the down projection, whose input is read
    why: str = ""  # there is none


class Anatomy(NamedTuple):
    """Where the decoder blocks of a model are, and what is in each of them."""

    blocks: str
    parts: tuple[Parts, ...]
    absolute_positions: bool  # a learned table of positions: what is longer than the table cannot be run


_found: WeakKeyDictionary[Any, Anatomy] = WeakKeyDictionary()


def of(model: nn.Module) -> Anatomy:
    """The model's anatomy, found once. Raises UserError where no structure tells it."""
    if model not in _found:
        _found[model] = find(model)
    return _found[model]


def family(model: nn.Module) -> Family:
    """What is known of the model's family."""
    return family_of(getattr(model.config, "model_type", None))


def family_of(model_type: Any) -> Family:
    """What is known of a `config.model_type`; of one that no row names the safe assumptions."""
    why = f"the family {model_type!r} is not one of those that the fast engine is tested with"
    return FAMILIES.get(str(model_type)) or Family(str(model_type), norm_after_mlp=True, plain=why)


# ---------------------------------------------------------------- the finder


def declare(model: nn.Module, said: str) -> Anatomy:
    """From now on the model's anatomy is what is found with these paths given, as in `blocks=model.layers,mlp=mlp`."""
    _found[model] = find(model, said)
    return _found[model]


def find(model: nn.Module, said: str = "") -> Anatomy:
    """The list of blocks nearest to the input embeddings, as long as config.json says; in each block what mixes tokens, and the MLP.

    said: paths that are not to be looked for. Needs no weights: a model on the meta device serves.
    """
    given = parse(said)
    path = given.get("blocks") or _blocks(model)
    inside = {name: value for name, value in given.items() if name != "blocks"}
    try:
        blocks = cast("nn.ModuleList", model.get_submodule(path))
        blocks[0]
    except (AttributeError, TypeError, IndexError, KeyError):
        raise UserError(f"{type(model).__name__} has no list of blocks {path!r}{WAY_OUT}") from None
    parts = tuple(_parts(block, hidden_size(model), inside) for block in blocks)
    for name, value in inside.items():
        if not any(_has(block, value) for block in blocks):
            raise UserError(f"no block of {path} has {value!r}, which --anatomy calls {name}{WAY_OUT}")
        if name == "mlp_mid" and not all(_widths(at.get_submodule(value))[0] for at in blocks if _has(at, value)):
            raise UserError(f"{value!r}, which --anatomy calls mlp_mid, is no projection, whose width would be known{WAY_OUT}")
    return Anatomy(path, parts, _absolute_positions(model, path))


def parse(said: str) -> dict[str, str]:
    """name -> path of `blocks=model.layers,mlp=mlp`. Raises UserError for a name that is none."""
    given = {}
    for word in filter(None, (part.strip() for part in said.split(","))):
        name, _, path = word.partition("=")
        if name not in ANATOMY:
            raise unknown("part of the anatomy", name, ANATOMY)
        if not path:
            raise UserError(f"anatomy: {word!r} names no module; wanted {name}=PATH{WAY_OUT}")
        given[name] = path
    return given


def _blocks(model: nn.Module) -> str:
    from torch import nn

    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    at = next((name for name, module in model.named_modules() if module is table), "")
    while at:
        at = at.rpartition(".")[0]
        lists = [
            f"{at}.{name}".lstrip(".")
            for name, module in model.get_submodule(at).named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module.parameters())
        ]
        top = [name for name in lists if name.count(".") == min(map(lambda other: other.count("."), lists))]
        if len(top) > 1:
            raise UserError(f"{type(model).__name__}: {', '.join(top)} are lists of {count} blocks each{WAY_OUT}")
        if top:
            return top[0]
    raise UserError(f"{type(model).__name__}: no list of {count} blocks (config.json: num_hidden_layers) beside its embeddings{WAY_OUT}")


def _parts(block: nn.Module, hidden: int, given: Mapping[str, str]) -> Parts:
    """Attention is called with a mask or a cache, an MLP with the stream alone; its down projection is what ends in the stream's width."""
    children = {name: child for name, child in block.named_children() if _matrices(child)}
    mixers = [name for name, child in children.items() if MIXES & _arguments(child)]
    whole = [name for name in children if name not in mixers and len(_matrices(children[name])) > 1]
    single = [name for name in children if name not in (*mixers, *whole)]  # fc1, fc2 beside attention (OPT)
    keep = [name for name in mixers if "cache_params" not in _arguments(children[name])]  # attention before a state space beside it
    named = {name: path for name, path in given.items() if _has(block, path)}
    attn = named.get("attn") or next(iter([*keep, *mixers]), None)
    mlp = named.get("mlp") or max(whole, key=lambda name: (_experts(children[name]), _size(children[name])), default=None)
    down, why = named.get("mlp_mid"), ""
    if down is None and mlp is not None:
        at = block.get_submodule(mlp)
        ends = [name for name, module in at.named_modules() if _widths(module)[1] == hidden]
        if _experts(at):
            why = "its MLP is a mixture of experts"
        elif len(ends) == 1:
            down = f"{mlp}.{ends[0]}".rstrip(".")
        else:
            why = f"{len(ends)} projections of its MLP end in the stream's width: {', '.join(ends) or 'none'}"
    elif down is None and len(single) > 1 and _widths(children[single[-1]])[1] == hidden:
        mlp, down = single[0], single[-1]
    return Parts(attn, mlp, down, why if mlp else "it has no MLP")


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)


def _matrices(module: nn.Module) -> list[nn.Module]:
    """Its modules with weights of two dimensions or more: projections, not norms."""
    return [at for at in module.modules() if any(p.ndim > 1 for p in at.parameters(recurse=False)) or _widths(at)[0]]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _experts(module: nn.Module) -> bool:
    from torch import nn

    return any(isinstance(at, nn.ModuleList) for at in module.modules()) or any(p.ndim > 2 for p in module.parameters())


def _widths(module: Any) -> tuple[int, int]:
    """(in, out) of a projection; zeros for what is none. GPT-2's Conv1D has nx and nf; quantised ones keep the names of Linear."""
    found = getattr(module, "in_features", getattr(module, "nx", 0)), getattr(module, "out_features", getattr(module, "nf", 0))
    return found if all(isinstance(n, int) for n in found) else (0, 0)


def _absolute_positions(model: nn.Module, blocks: str) -> bool:
    """A table beside the blocks with as many rows as the context (OPT: two more), besides that of the tokens."""
    from torch import nn

    beside, count = model.get_submodule(blocks.rpartition(".")[0]), context(model) or 0
    tables = [at for at in beside.children() if isinstance(at, nn.Embedding) and at is not model.get_input_embeddings()]  # type: ignore[operator]
    return any(0 < count <= at.num_embeddings <= count + 2 for at in tables)


def refuse_no_down_proj(config: Mapping[str, Any], layer: int) -> None:
    """Raises UserError where config.json says that block `layer` has experts, so nothing has to be loaded to see it."""
    dense = config.get("mlp_only_layers") or ()
    many = next((n for n in (config.get(name) for name in EXPERTS) if isinstance(n, int) and n > 0), 0)
    if many and layer not in dense and layer >= (config.get("first_k_dense_replace") or 0):
        raise UserError(f"block {layer} {NO_DOWN.format('its MLP is a mixture of ' + str(many) + ' experts')}")


NO_DOWN = "has no down projection to read ('mlp_mid'): {}; set intervention_components to mlp, attn or block, or use a vector"


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order."""
    return cast("nn.ModuleList", model.get_submodule(of(model).blocks))


def block(model: nn.Module, layer: int) -> nn.Module:
    """Decoder block `layer` (0-based)."""
    found = blocks(model)
    check_layer(layer, len(found))
    return found[layer]


def check_layer(layer: int, count: int) -> None:
    """Raises UserError for a layer that a model of `count` blocks does not have."""
    if not 0 <= layer < count:
        raise UserError(
            f"layer {layer} does not exist: the model has {count} blocks, 0 to {count - 1}; choose one of these (--layers N, "
            "or `layers` in the YAML)"
        )


def read_point(model: nn.Module, layer: int, component: str) -> nn.Module:
    """The module whose input is read: the down projection ('mlp_mid'), the MLP, the attention, the block, or a linear by its path."""
    at, parts = block(model, layer), of(model).parts[layer]
    if component not in COMPONENTS:
        return _linear(at, component)
    path = "" if component == "block" else getattr(parts, component)
    if path is None:
        none = f"has no {component} to read"
        raise UserError(f"block {layer} {NO_DOWN.format(parts.why) if component == 'mlp_mid' else none + WAY_OUT}")
    return at.get_submodule(path)


def write_point(model: nn.Module, layer: int, name: str) -> nn.Module:
    """The module whose output is written: the block, its down projection ('down_proj'), MLP, attention, or a linear by its path.

    'mlp_input': the MLP, whose input is written (`writes_input`).
    """
    at, parts = block(model, layer), of(model).parts[layer]
    if name not in WRITE_POINTS:
        return _linear(at, name)
    inside = f"{parts.mlp}."
    last = parts.mlp_mid if parts.mlp_mid and not parts.mlp_mid.startswith(inside) else parts.mlp  # fc1, fc2 beside attention (OPT)
    path = {"block": "", "down_proj": parts.mlp_mid, "mlp": last, "attn": parts.attn, "mlp_input": parts.mlp}[name]
    if path is None:
        missing = NO_DOWN.format(parts.why) if name == "down_proj" else f"has no {name} to write{WAY_OUT}"
        raise UserError(f"block {layer} {missing}")
    return at.get_submodule(path) if path else at


def writes_input(name: str) -> bool:
    """Whether a write point is what its module is given, not what it gives."""
    return name == "mlp_input"


def _linear(at: nn.Module, path: str) -> nn.Module:
    """A linear map inside a block, such as self_attn.q_proj, as adapters of other programs name them."""
    found = {name: module for name, module in at.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2}
    if path not in found:
        raise unknown("place in a block", path, (*COMPONENTS, *found))
    return found[path]


def linears(model: nn.Module, layer: int) -> list[str]:
    """Paths of the linear maps inside block `layer`: those that have a width in and one out."""
    return [name for name, module in block(model, layer).named_modules() if all(_widths(module))]


def down_proj(model: nn.Module, layer: int) -> nn.Module:
    """The MLP's output projection of block `layer`."""
    return read_point(model, layer, "mlp_mid")


def device_of(model: nn.Module, layer: int) -> torch.device:
    """Where block `layer` computes (several devices: accelerate's map, which keeps offloaded weights on 'meta')."""
    import torch

    at = block(model, layer)
    placed = getattr(getattr(at, "_hf_hook", None), "execution_device", None)
    return next(at.parameters()).device if placed is None else torch.device(placed)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids are looked up: the device of a forward's input."""
    table: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator, assignment]
    return table.weight.device


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
    """F, the width of the read point: what a projection takes in (MLP intermediate size for 'mlp_mid'), else D."""
    at = read_point(model, layer, component)
    _refuse_split(at, 1, f"{component} of block {layer} is read")
    return _widths(at)[0] or hidden_size(model)


def read_widths(model: nn.Module, layer: int) -> dict[str, int]:
    """F of every read point that block `layer` has, also of one that no process has whole."""
    parts = of(model).parts[layer]
    there = [name for name in COMPONENTS if name == "block" or getattr(parts, name) is not None]
    return {name: _widths(read_point(model, layer, name))[0] or hidden_size(model) for name in there}


def write_width(model: nn.Module, layer: int, name: str) -> int:
    """D, or the width of what a linear gives."""
    at = write_point(model, layer, name)
    _refuse_split(at, 0, f"{name} of block {layer} is written")
    return _widths(at)[1] if name == "down_proj" or name not in WRITE_POINTS else hidden_size(model)


def _refuse_split(module: nn.Module, axis: int, what: str) -> None:
    """Raises UserError where tensor parallel (the library's tp_plan) has split a weight [out, in] along this axis: each process has but a
    part of what goes in (1) or comes out (0)."""
    if any(placement.is_shard(axis) for placement in getattr(getattr(module, "weight", None), "placements", ())):
        raise UserError(
            f"{what}, and in a model loaded with tp_plan each process holds a part of it; intervention_components mlp, attn or block are "
            "whole everywhere, or load it with device_map='auto'"
        )
