"""PEFT adapters of every kind as weight updates: tau = theta_merged - theta_base of each linear map, in float32.

LoRA is read as its factors, tau = s B A, exactly. Every other kind is merged by its own library, one map at a time into a float32 copy,
and the base weight, kept from before the wrapping, is subtracted: PiSSA changes the base when it is wrapped, so a wrapped model is
never compared with itself. The model is borrowed: after it, it is as before, also after an error.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt.engine import prepacked
from spilt.errors import NotFinite, UserError, first_line, unknown
from spilt.settings.fields import ADAPTERS
from spilt.steering import anatomy, foreign
from spilt.steering.folding import DOWN, Place, linear, transposed
from spilt.steering.interventions import Intervention, LocalWeight, LoRA
from spilt.steering.steering import Site, Steering

WEIGHTS = "adapter_model.safetensors"
SCALED = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")  # by ia3, beside the down projection


class Sizes(NamedTuple):
    """How large an adapter is. rank and alpha of those with factors (scale alpha / rank), block_size of oft and boft."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    block_size: int = 8


class Kind(NamedTuple):
    """A kind of adapter: the name of its configuration in peft, and what of it is ours."""

    config: str
    own: Callable[[Sizes], dict[str, Any]]


def _lora(**more: Any) -> Callable[[Sizes], dict[str, Any]]:
    return lambda s: {"r": s.rank, "lora_alpha": s.alpha, "lora_dropout": s.dropout, **more}


KINDS: dict[str, Kind] = {
    "lora": Kind("LoraConfig", _lora()),
    "dora": Kind("LoraConfig", _lora(use_dora=True)),
    "pissa": Kind("LoraConfig", _lora(init_lora_weights="pissa")),
    "delora": Kind("DeloraConfig", lambda s: {"r": s.rank}),
    "oft": Kind("OFTConfig", lambda s: {"oft_block_size": s.block_size, "module_dropout": s.dropout}),
    "boft": Kind("BOFTConfig", lambda s: {"boft_block_size": s.block_size, "boft_dropout": s.dropout}),
    "ia3": Kind("IA3Config", lambda s: {}),
}
assert tuple(KINDS) == ADAPTERS
FACTORS = "lora"  # the kind that is its factors


def maps(model: nn.Module, layers: Collection[int], modules: Collection[str] = (), kind: str = FACTORS) -> list[Place]:
    """The linear maps of these blocks; modules: those with these names alone, such as q_proj. Experts are left out.

    Of ia3, where no names are given, keys, values and the down projection (arXiv 2205.05638).
    """
    found = [
        (layer, path)
        for layer in sorted(layers)
        for path, module in anatomy.block(model, layer).named_modules()
        if (isinstance(module, nn.Linear) or transposed(module)) and "experts." not in path
    ]
    for name in modules:
        if not any(_named(path, name) for _, path in found):
            raise unknown("linear map", name, dict.fromkeys(path for _, path in found))
    parts = anatomy.of(model).parts
    if kind == "ia3" and not modules:
        kept = [(n, path) for n, path in found if path == parts[n].mlp_mid or any(_named(path, name) for name in SCALED)]
    else:
        kept = [(n, path) for n, path in found if not modules or any(_named(path, name) for name in modules)]
    if set(layers) - {layer for layer, _ in kept}:
        have = ", ".join(dict.fromkeys(path for _, path in found)) or "none"
        lacking = ", ".join(str(layer) for layer in sorted(set(layers) - {layer for layer, _ in kept}))
        raise UserError(f"no linear map for {kind} in layer {lacking}; there are: {have}")
    return kept


def _named(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def config(model: nn.Module, kind: str, places: Sequence[Place], sizes: Sizes) -> Any:
    """peft's configuration of a kind at these maps. Raises UserError where this peft has no such kind."""
    import peft

    if kind not in KINDS:
        raise unknown("adapter", kind, KINDS)
    made = getattr(peft, KINDS[kind].config, None)
    if made is None:
        raise UserError(f"peft {peft.__version__} has no {KINDS[kind].config}, which {kind} needs; pip install -U peft, or another adapter")
    path = anatomy.of(model).blocks
    names = [f"{path}.{layer}.{name}" for layer, name in places]
    more: dict[str, Any] = {"fan_in_fan_out": True} if any(transposed(linear(model, where)) for where in places) else {}
    if kind == "ia3":
        parts = anatomy.of(model).parts
        more["feedforward_modules"] = [name for name, (n, at) in zip(names, places, strict=True) if at == parts[n].mlp_mid]
    try:
        return made(target_modules=names, **KINDS[kind].own(sizes), **more)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind}: {first_line(error)}") from None


class Wrapped(NamedTuple):
    """A model with an adapter in it: peft's model, the adapted maps, and their weight and bias without it."""

    model: Any
    maps: dict[Place, Any]
    before: dict[Place, tuple[Tensor, Tensor | None]]

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@contextmanager
def _environment() -> Iterator[None]:
    """Variables as they were afterwards: boft's CUDA extension, where it cannot be built, leaves CXX=gcc, with which nothing else links."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def wrapped(model: nn.Module, make: Callable[[], Any], *, written: bool = False) -> Iterator[Wrapped]:
    """make() puts an adapter into the model and returns peft's. After the `with` the model is as before, weights and modules.

    written: peft may write into the weights themselves, as olora does; they are copied meanwhile.
    """
    blocks = anatomy.of(model).blocks  # before anything is in the way
    names = {id(module): name for name, module in model.named_modules()}
    # a new tensor takes the place of a weight; biases are written into
    kept = [(one, one.data, one.data.clone() if written or one.ndim < 2 else one.data, one.requires_grad) for one in model.parameters()]
    mine = ExitStack()
    mine.enter_context(prepacked.without(model))
    try:
        try:
            with warnings.catch_warnings(), _environment():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft asks for it
                adapted = make()
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"peft cannot put this adapter into the model: {first_line(error)}") from None
        data = {id(parameter): before for parameter, _, before, _ in kept}
        found, before, mapped = dict[Place, Any](), dict[Place, tuple[Tensor, Tensor | None]](), set[int]()
        for module in _adapted(model).values():
            base = module.get_base_layer()
            name = names[id(base)]
            number, _, path = name.removeprefix(f"{blocks}.").partition(".")
            if not name.startswith(f"{blocks}.") or not number.isdigit():
                raise UserError(f"the adapter is also at {name}, outside the decoder blocks, where a Steering does not act")
            found[int(number), path] = module
            before[int(number), path] = data[id(base.weight)], None if base.bias is None else data[id(base.bias)]
            mapped.add(id(base.bias))
        if any(not torch.equal(parameter.data, was) for parameter, _, was, _ in kept if parameter.ndim < 2 and id(parameter) not in mapped):
            raise UserError("the adapter also changes what is no linear map of a block, such as the bias of a norm")
        yield Wrapped(adapted, found, before)
    finally:
        for name, module in _adapted(model).items():
            above, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(above), leaf, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, own, data_before, wanted in kept:
            parameter.data = own if own is data_before else own.copy_(data_before)
            parameter.requires_grad_(wanted)
        mine.close()


def _adapted(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def update(model: nn.Module, held: Wrapped, kind: str = "") -> Steering:
    """tau of the adapter as it is now: factors of FACTORS, dense of every other kind."""
    parts, entries = anatomy.of(model).parts, []
    with torch.random.fork_rng(devices=[]):  # an intervention draws its first values, whatever is put in their place
        for (layer, path), module in sorted(held.maps.items()):
            site = Site(layer, *(DOWN if path == parts[layer].mlp_mid else (path, path)))
            made = _factors(module, site) if kind == FACTORS else _merged(module, *held.before[layer, path], site)
            entries.append((site, made.eval().requires_grad_(False)))
    return Steering(entries)


def _factors(module: Any, site: Site) -> Intervention:
    """x W + s x A B: peft keeps A as [r, F] and B as [D, r]."""
    a, b = (getattr(module, f"lora_{side}")["default"].weight.detach().float() for side in "AB")
    state = {"lora_A": a.T.contiguous(), "lora_B": module.scaling["default"] * b.T.contiguous()}
    return LoRA.from_state(state, read_point=site.read_point, write_point=site.write_point)


def _merged(module: Any, weight: Tensor, bias: Tensor | None, site: Site) -> Intervention:
    base = module.get_base_layer()
    wrapped_weight, wrapped_bias = base.weight.data, None if base.bias is None else base.bias.data
    if not wrapped_weight.is_floating_point():
        raise UserError(f"{site.write_point} of block {site.layer} is {wrapped_weight.dtype}, quantised: merge into the model as published")
    try:
        base.weight.data = wrapped_weight.float().clone()
        if wrapped_bias is not None:
            base.bias.data = wrapped_bias.float().clone()
        module.merge(safe_merge=True)
        added = base.weight.data - weight.float()
        constant = added.new_zeros(added.shape[1 if transposed(base) else 0])
        if bias is not None:
            constant = base.bias.data - bias.float()
    except ValueError as error:  # not finite
        raise NotFinite(f"{site.write_point} of block {site.layer}: {first_line(error)}") from None
    finally:
        base.weight.data = wrapped_weight
        if wrapped_bias is not None:
            base.bias.data = wrapped_bias
    state = {"weight": (added if transposed(base) else added.T).contiguous(), "bias": constant}
    return LocalWeight.from_state(state, read_point=site.read_point, write_point=site.write_point)


def read(model: nn.Module, folder: str | Path) -> Steering:
    """tau of a stored adapter on its base model, in float32 whatever the model's dtype. Raises UserError for what it cannot be."""
    import peft

    folder = Path(folder)
    said = foreign.peft_config(folder)
    about = {"adapter": folder.name, "kind": said["peft_type"].lower()}
    if why := foreign.no_update(said):
        raise UserError(f"{folder}: {why}")
    if not foreign.refuses(said) and said.get("bias", "none") == "none":
        return Steering(Steering.load(folder).entries, about)
    if said.get("modules_to_save") or said.get("trainable_token_indices"):
        raise UserError(f"{folder}: the adapter has whole modules or tokens of its own ({_shown(said)}), no linear maps of blocks")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: has {foreign.ADAPTER} but no {WEIGHTS}")
    starts = said.get("init_lora_weights")
    written = isinstance(starts, str) and starts.lower() not in foreign.KEEPS_WEIGHTS

    def make() -> Any:
        return peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")  # type: ignore[arg-type]

    # peft draws what it then replaces
    with torch.random.fork_rng(devices=[]), wrapped(model, make, written=written) as held:
        if not held.maps:
            raise UserError(
                f"{folder}: an adapter of kind {about['kind']} changes no linear map of a block; wanted one such as {', '.join(KINDS)}"
            )
        return Steering(update(model, held).entries, about)


def _shown(said: Mapping[str, Any]) -> str:
    return json.dumps([said.get("modules_to_save"), said.get("trainable_token_indices")])[:80]
