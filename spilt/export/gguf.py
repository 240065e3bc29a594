"""GGUF files for llama.cpp: a control vector for what is constant, a LoRA for what is low-rank; both together are one Steering.

Control vector, as `common_control_vector_load` reads it (llama.cpp, common/common.cpp) and repeng writes it: tensors
`direction.{block}` [D], float32, added to the output of that block (0-based; block 0 cannot be steered) at every position.
LoRA, as convert_lora_to_gguf.py writes it: `general.type` adapter, `adapter.type` lora, `adapter.lora.alpha`, and
`{weight}.lora_a` [r, F], `{weight}.lora_b` [D, r] with W + alpha / r (b a).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from spilt.engine import whole
from spilt.errors import UserError
from spilt.export.folding import Job, at_blocks, factors, name_of
from spilt.steering import anatomy
from spilt.steering.folding import ANYTHING
from spilt.steering.steering import Steering

VECTOR, LORA = "control_vector.gguf", "lora.gguf"
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}  # where the names differ from config.json's
ABOUT = """```sh
llama-cli -m model.gguf {flags} -p "..."
```

`model.gguf` is the base model, converted with llama.cpp's convert_hf_to_gguf.py. The multiplier is in the numbers: scale 1."""


def write(job: Job, folder: Path) -> str:
    library = _library()
    pairs, constants = factors(job), at_blocks(job)
    model_type = anatomy.family(job.model).model_type
    flags = []
    if constants:
        if 0 in constants:
            raise UserError(f"llama.cpp does not steer block 0; fit at block 1 or above, --format peft or merged, or {ANYTHING}")
        writer = library.GGUFWriter(folder / VECTOR, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(constants))
        _save(writer, {f"direction.{layer}": value for layer, value in constants.items()})
        flags.append(f"--control-vector {VECTOR}")
    if pairs:
        architecture = ARCHITECTURES.get(model_type, model_type.replace("_", ""))
        known = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}
        if architecture not in known:
            raise UserError(f"the gguf package knows no architecture {architecture!r} for {model_type}; --format peft, or {ANYTHING}")
        names = library.get_tensor_name_map(known[architecture], len(anatomy.blocks(job.model)))
        tensors: dict[str, Any] = {}
        for (layer, path), (a, b) in pairs.items():
            if path != anatomy.of(job.model).parts[layer].mlp_mid:  # llama.cpp has the rows of queries and keys in another order
                raise UserError(f"a lora.gguf of ours adapts down projections, and this acts at {path} of block {layer} too; --format peft")
            name = f"{names.get_name(name_of(job.model, (layer, path)))}.weight"
            tensors |= {f"{name}.lora_a": a.T, f"{name}.lora_b": b.T}
        writer = library.GGUFWriter(folder / LORA, architecture)
        writer.add_type(library.GGUFType.ADAPTER)
        writer.add_string(library.Keys.Adapter.TYPE, "lora")
        writer.add_float32(library.Keys.Adapter.LORA_ALPHA, float(next(iter(pairs.values()))[0].shape[1]))
        _save(writer, tensors)
        flags.append(f"--lora {LORA}")
    return ABOUT.format(flags=" ".join(flags))


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files are written by the gguf package: pip install gguf") from None
    return gguf


def _save(writer: Any, tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reload(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    """The model in memory, with what the gguf package reads from the files, at strength 1."""
    parts = [Steering.load(path) for path in (folder / VECTOR, folder / LORA) if path.exists()]
    return whole.steer(job.model, Steering(entry for part in parts for entry in part).to(job.model), 1.0)
