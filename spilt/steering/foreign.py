"""Vectors and adapters that other programs wrote, read as (block, intervention) pairs. Tensors only: nothing that could run code is opened.

What a file means is said by its content, not its name:
- GGUF control vector (llama.cpp, repeng.ControlVector.export_gguf): `direction.{block}`, added to that block's output; GGUF LoRA of
  llama.cpp.
- {block: [D]}: a dict of tensors or lists, .npz, .safetensors; keys such as 14, "14", "layer_14"; also under `layer_activations` (the
  fields of steering_vectors.SteeringVector) or `directions` (those of repeng.ControlVector).
- [D], in .pt, .npy or JSON: the block is asked for, unless a .json beside it has `layer_index` (rotalabs_steer.SteeringVector.save).
- [n_layers, D] (hidden_directions and many others): row `layer` is taken. Also {"dir": [D]} of vLLM-Hook.
- a PEFT folder with LoRA on linear maps of blocks: W + s B A, s = alpha / r, or alpha / sqrt(r) where it says use_rslora.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spilt.errors import UserError, first_line
from spilt.steering import layer_file
from spilt.steering.interventions import Intervention, LoRA, Vector

Found = list[tuple[int, Intervention]]
ADAPTER = "adapter_config.json"
KEEPS_WEIGHTS = ("gaussian", "eva", "mica", "orthogonal")  # words of init_lora_weights; others put something else in place of W
NO_UPDATE = {  # entries of a LoRA's configuration with which it is no change of the model's weights, read in any way
    "alora_invocation_tokens": "it acts after its invocation tokens alone (aLoRA), and a Steering at every token",
    "layer_replication": "it makes other blocks than the model has (layer_replication)",
}
# switches and tables of a LoRA's configuration with which it is still W + s B A; those of a later kind are not among them
STILL_A_SUM = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "bias", "lora_bias", "fan_in_fan_out"),
    *("inference_mode", "auto_mapping", "megatron_config", "runtime_config", "ensure_weight_tying", "trainable_token_indices"),
    "target_parameters",
)
INSIDE = ("layer_activations", "directions")  # where libraries keep {block: vector}
PART = re.compile(r"(?:.{0,200}\.)?(?:layers|h|blk)\.(\d{1,9})\.((?:\w{1,50}\.){1,5})lora_([ab])(?:\.(weight|bias))?", re.I)
TOWER = re.compile(r"(?:.*\.)?(?:[av]|\w*(?:vision|visual|image|audio|speech|tower)\w*)\.(?:\w+\.)*?(?:layers|h|blk)\.\d.*", re.I)
DOWN = ("ffn_down.weight", "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2")  # down projections, by their names
LAYER_KEY = re.compile(r"(?:layers?|blocks?|direction|v)?[._ ]?(\d{1,9})")
WANTED = re.compile(r"direction\.|.*\.lora_[ab]$")  # tensors of a GGUF file
LARGEST = 2**31  # bytes of a vector file; a checkpoint's are as large, and would be read whole to be refused
KINDS = "wanted a stored Steering, layer_{id}.pt, a GGUF control vector or LoRA, a PEFT folder, or tensors [D], [layers, D] or {layer: [D]}"


def read(path: Path, layer: int | None) -> Found:
    """What a file or folder holds. layer: the block of a vector that does not say it, or the one to take of several. Raises UserError."""
    if path.is_dir():
        return _peft(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {KINDS}")
    held, bare = _content(path), layer is None
    if isinstance(held, list) and held and isinstance(held[0], tuple):  # a LoRA, which says where it is
        return held
    if bare and isinstance(held, Tensor) and held.squeeze().ndim == 1:
        layer = _beside(path)
    return [(number, Vector.from_state(vector)) for number, vector in sorted(_vectors(held, path, layer).items())]


def _content(path: Path) -> Any:
    """A tensor, {name: tensor}, or a list of (block, LoRA)."""
    if (size := path.stat().st_size) > LARGEST and path.suffix != ".gguf":
        raise UserError(f"{path}: has {size / 2**30:.1f} GiB, which is no vector; {KINDS}")
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"GGUF"):
        return _gguf(path)
    try:
        if head.startswith(b"\x93NUMPY") or path.suffix == ".npz":
            import numpy as np

            found = np.load(path, allow_pickle=False)
            return torch.from_numpy(found) if isinstance(found, np.ndarray) else {name: torch.from_numpy(found[name]) for name in found}
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 - of any kind: the file is junk
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)}); {KINDS}") from None
    return layer_file.read(path)


def _vectors(held: Any, path: Path, layer: int | None) -> dict[int, Tensor]:
    """block -> [D]."""
    if isinstance(held, list):
        try:
            held = torch.tensor(held, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError):
            raise UserError(f"{path}: holds a list that is no vector; {KINDS}") from None
    if isinstance(held, Mapping):
        for name in (*INSIDE, "dir"):
            if name in held:
                return _vectors(held[name], path, layer)
        hits = {key: LAYER_KEY.fullmatch(str(key)) for key in held}
        if held and all(hits.values()):
            found = {int(hit[1]): _one(held[key], path, f"layer {hit[1]}") for key, hit in hits.items() if hit}
            if layer is None:
                return found
            if layer not in found:
                raise UserError(f"{path}: has the layers {', '.join(map(str, sorted(found)))}, not {layer}")
            return {layer: found[layer]}
        if len(held) == 1:
            return _vectors(next(iter(held.values())), path, layer)
        raise UserError(f"{path}: holds {layer_file.described(held, path)}; {KINDS}")
    if not isinstance(held, Tensor):
        raise UserError(f"{path}: holds a {type(held).__name__}; {KINDS}")
    held = held.squeeze() if held.numel() > 1 else held.reshape(-1)
    if layer is None:
        shape = list(held.shape)
        what = "a vector, which does not say where it acts" if held.ndim == 1 else f"a tensor {shape}, one row for each layer"
        raise UserError(f"{path}: holds {what}; give the layer, the 0-based block whose output it is added to (--layers N)")
    if held.ndim == 2:
        if not 0 <= layer < len(held):
            raise UserError(f"{path}: holds a tensor {list(held.shape)}: rows 0 to {len(held) - 1}, not {layer}")
        held = held[layer]
    return {layer: _one(held, path, "it")}


def _one(value: Any, path: Path, what: str) -> Tensor:
    """[D], finite, on the CPU."""
    try:
        vector = torch.as_tensor(value).squeeze()
    except (ValueError, TypeError, RuntimeError):
        raise UserError(f"{path}: {what} is a {type(value).__name__}; wanted a vector [D]") from None
    if vector.ndim != 1 or vector.is_complex() or vector.dtype == torch.bool or vector.layout != torch.strided:
        raise UserError(f"{path}: {what} is a tensor {list(vector.shape)} of {vector.dtype}; wanted a vector [D] of floating point")
    vector = vector.detach().float().cpu()
    if not torch.isfinite(vector).all():
        raise UserError(f"{path}: {what} holds NaN or infinite values")
    return vector


def _beside(path: Path) -> int | None:
    """The layer that the .json of the same name says."""
    try:
        said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["layer_index"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return said if isinstance(said, int) and said >= 0 else None


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: a GGUF file, which the gguf package reads: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        small = [tensor for tensor in reader.tensors if WANTED.match(tensor.name)]  # not a whole model
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in small}
    except Exception as error:  # noqa: BLE001 - of any kind: the file is junk
        raise UserError(f"{path}: cannot be read as GGUF ({type(error).__name__}: {first_line(error)})") from None
    if fields.get("adapter.type") == "lora":
        return _pairs(path, tensors, lambda _, rank: float(fields.get("adapter.lora.alpha") or rank) / rank)
    directions = {name: value for name, value in tensors.items() if name.startswith("direction.")}
    if not directions:
        what = fields.get("general.architecture")
        raise UserError(f"{path}: a GGUF file of {what!r} with {len(reader.tensors)} tensors, no control vector or LoRA")
    return directions


def peft_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder. Raises UserError."""
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        config["peft_type"].lower()
        return dict(config)
    except FileNotFoundError:
        raise UserError(f"{folder}: holds neither layer_{{id}}.pt nor {ADAPTER}; {KINDS}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / ADAPTER}: is no PEFT configuration ({type(error).__name__}: {first_line(error)})") from None


def no_update(config: Mapping[str, Any]) -> str:
    """Why a PEFT adapter is no change of the model's weights, which its library could merge; '' where it may be."""
    return next((why for name, why in NO_UPDATE.items() if config.get(name)), "")


def refuses(config: Mapping[str, Any]) -> str:
    """Why a PEFT adapter is not the sum W + s B A with the published W; '' where it is."""
    kind, start = config["peft_type"], config.get("init_lora_weights")
    if kind != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        what = "DoRA" if config.get("use_dora") else "with whole modules" if config.get("modules_to_save") else kind
        return f"a PEFT adapter of another kind ({what}); only LoRA is linear in its strength"
    if isinstance(start, str) and start.lower() not in KEEPS_WEIGHTS:
        return f"a LoRA that begins with {start!r}, which changes the weights that it is added to"
    for name, value in config.items():
        if name not in STILL_A_SUM and (value is True or (isinstance(value, list | dict) and value)):
            return f"a LoRA with {name}, which makes it another sum than W + s B A"
    return ""


def _peft(folder: Path) -> Found:
    config = peft_config(folder)
    try:
        alphas = {**(config.get("alpha_pattern") or {}), "": config["lora_alpha"]} if config["peft_type"] == "LORA" else {}
        numbers = {str(key): float(value) for key, value in alphas.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER}: is no PEFT configuration ({type(error).__name__}: {first_line(error)})") from None
    if not all(re.fullmatch(r"[\w.]*", key) for key in numbers):
        raise UserError(f"{folder}: alpha_pattern has regular expressions, which are not followed; write names of modules")
    if why := no_update(config):
        raise UserError(f"{folder}: {why}")
    if why := refuses(config):
        raise UserError(f"{folder}: {why}; spilt.read_adapter(model, folder) reads it as a change of its base model's weights")
    file = next((path for name in ("adapter_model.safetensors", "adapter_model.bin") if (path := folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: has {ADAPTER} but no adapter_model.safetensors")
    held = _content(file)

    def scale(name: str, rank: int) -> float:
        module = f".{name}".split(".lora_B")[0]
        own = [value for key, value in numbers.items() if key and module.endswith(f".{key}")]
        return (own or [numbers[""]])[0] / (rank**0.5 if config.get("use_rslora") else rank)

    return _pairs(file, held, scale)


def _pairs(path: Path, tensors: Mapping[str, Tensor], scale: Any) -> Found:
    """LoRA of linear maps: a [r, F], b [D, r], and a bias of b as a vector."""
    places: dict[tuple[int, str], dict[str, str]] = {}
    others = []
    for name in tensors:
        hit = PART.fullmatch(name)
        where = hit[2].removesuffix(".") if hit else ""
        elsewhere = where.endswith(".weight") and where not in DOWN  # GGUF has rows of q and k in another order
        if hit is None or TOWER.fullmatch(name) or ".experts." in name or elsewhere:
            others.append(name)
        else:
            held, part = places.setdefault((int(hit[1]), where), {}), hit[3].lower() + (hit[4] or "weight")
            if part in held:
                raise UserError(f"{path}: two places are called block {hit[1]}, {where}: {held[part]} and {name}")
            held[part] = name
    if others or not places:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "") or "none"
        raise UserError(f"{path}: adapts places that a Steering can't: {shown}; wanted LoRA of linear maps inside the decoder blocks")
    found: Found = []
    for (layer, where), names in sorted(places.items()):
        a, b = (tensors.get(names.get(f"{side}weight", "")) for side in "ab")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
            shapes = {name: list(tensors[name].shape) for name in names.values()}
            raise UserError(f"{path}: the LoRA of block {layer} is not whole: {shapes}; wanted a [r, F] and b [D, r]")
        read, write = ("mlp_mid", "down_proj") if where in DOWN else (where, where)
        strength = scale(names["bweight"], len(a))
        if not all(value.is_floating_point() and torch.isfinite(value.float()).all() for value in (a, b)):
            raise UserError(f"{path}: the LoRA of block {layer} holds what is no finite number")
        state = {"lora_A": a.float().T.contiguous(), "lora_B": strength * b.float().T.contiguous()}
        found.append((layer, LoRA.from_state(state, read_point=read, write_point=write)))
        if "bbias" in names:
            bias = strength * _one(tensors[names["bbias"]], path, "the bias")
            found.append((layer, Vector.from_state(bias, write_point=write)))
    return found
