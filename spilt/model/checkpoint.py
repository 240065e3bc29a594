"""A checkpoint folder before anything of it is loaded: the files that the library reads, and what config.json says. No torch.

Links are followed, since a hub cache is made of them; a name that an index gives must stay inside the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from spilt.errors import UserError, first_line
from spilt.steering import anatomy

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates"
SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".tokenizer", ".spm", ".codes")  # of what is loaded from a folder
INDEX = ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")  # the library's order
PARTS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # of torch's distributed checkpoints: they go first
# of a GGUF file's header: the same in config.json
GGUF = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings", "expert_count": "num_local_experts",
}  # fmt: skip
# config.json -> what it may be called; each is a whole number above 0 where it is given
BLOCKS = ("num_hidden_layers", "n_layer")
SIZES = (
    *BLOCKS, "hidden_size", "n_embd", "intermediate_size", "n_inner", "num_attention_heads", "n_head", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "n_positions",
)  # fmt: skip


# ---------------------------------------------------------------- which files


def loaded_files(folder: Path) -> list[Path]:
    """Every file that decides what is loaded: those of known endings, named templates, and what indexes name in subfolders.

    Raises UserError for a name that leaves the folder.
    """
    top = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    top += [path] if (path := gguf(folder)) else []
    below = {*(folder / TEMPLATES).glob("*.jinja"), *(path for path, _ in _named(folder))} - set(top)
    return top + sorted(path for path in below if path.is_file())


def weights(folder: Path) -> list[Path]:
    """The weight files that the library takes, whether they are there or not; empty when it finds none."""
    if path := gguf(folder):
        return [path]
    said = optional_json(folder / CONFIG).get("transformers_weights")
    if isinstance(said, str):
        return _shards(folder, _inside(folder, said, folder / CONFIG))
    if parts := [path for path in sorted(folder.iterdir()) if PARTS.fullmatch(path.name)]:
        return parts
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    return [] if found is None else _shards(folder, found)


def _shards(folder: Path, path: Path) -> list[Path]:
    return sorted({shard for shard, _ in _of_index(folder, path)}) if path.name.endswith(INDEX) else [path]


def _named(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(file, the file that names it) of every name that the library would follow."""
    named = [(optional_json(folder / CONFIG).get("transformers_weights"), folder / CONFIG)]
    config = folder / "tokenizer_config.json"
    several = optional_json(config).get("fast_tokenizer_files")
    named += [(name, config) for name in (several if isinstance(several, list) else [])]
    found = [(_inside(folder, name, source), source) for name, source in named if isinstance(name, str)]
    yield from found
    for index in {*folder.glob(f"*{INDEX}"), *(path for path, _ in found if path.name.endswith(INDEX))}:
        yield from _of_index(folder, index)


def _of_index(folder: Path, index: Path) -> Iterator[tuple[Path, Path]]:
    shards = optional_json(index).get("weight_map")
    for name in sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else ():
        yield _inside(folder, name, index), index


def _inside(folder: Path, name: str, source: Path) -> Path:
    windows = PureWindowsPath(name)
    parts = {*PurePosixPath(name).parts, *windows.parts}
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in parts or not name or "\0" in name:
        raise UserError(
            f"{source}: names {name!r}, which is not a file inside the checkpoint's folder; put the file there and name it without '..'"
        )
    return folder / name


def optional_json(path: Path) -> dict[str, Any]:
    """An object, empty for what is none or not there: such a file names nothing. That it is broken is told by whoever loads it."""
    try:
        return read_json(path)
    except (UserError, OSError):
        return {}


# ---------------------------------------------------------------- whole or not


def check_weights(folder: Path) -> None:
    """Raises UserError for weights that are missing, cut off or no safetensors; looks at the head of each file only."""
    files = weights(folder)
    if not files:
        have = sorted(path.name for path in folder.iterdir() if path.suffix in (".gguf", ".pt", ".pth", ".h5", ".msgpack", ".npz"))
        others = f"; {', '.join(map(repr, have))} cannot be read" if have else ""
        raise UserError(f"{folder}: no weights: none of {', '.join(WEIGHTS)}{others}; download the checkpoint in the Hugging Face layout")
    if lacking := [path for path in files if not path.is_file()]:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"{folder}: weight file {str(lacking[0].relative_to(folder))!r}{more} is not there; download it again")
    for path in files:
        if path.suffix == ".safetensors":
            tensors(path)
    if (folder / "generation_config.json").is_file():  # the library passes over a broken one, and samples otherwise than it says
        read_json(folder / "generation_config.json")


def tensors(path: Path) -> dict[str, tuple[int, int]]:
    """name -> (first byte in the file, end) of a safetensors file's tensors. Raises UserError when the file is not whole."""
    size = path.stat().st_size
    again = "; download it again"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: is no safetensors file, or cut off within its header ({size} bytes){again}")
        head = file.read(length)
    try:
        stored = {name: entry["data_offsets"] for name, entry in json.loads(head).items() if name != "__metadata__"}
        found = {name: (8 + length + int(start), 8 + length + int(end)) for name, (start, end) in stored.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: is no safetensors file: its header cannot be read{again}") from None
    wanted = max((end for _, end in found.values()), default=8 + length)
    if wanted != size:
        raise UserError(f"{path}: has {size} bytes where its header speaks of {wanted}: cut off or damaged{again}")
    return found


# ---------------------------------------------------------------- config.json, or a GGUF file in its place


def there(folder: Path) -> bool:
    """Whether a folder is a checkpoint's."""
    return (folder / CONFIG).is_file() or gguf(folder) is not None


def gguf(folder: Path) -> Path | None:
    """The one GGUF file of a folder without config.json: it holds weights, configuration and tokenizer."""
    files = [] if (folder / CONFIG).is_file() or not folder.is_dir() else sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def config(folder: Path) -> dict[str, Any]:
    """What is said of the model, under the names of config.json; empty where there is none."""
    if path := gguf(folder):
        stat = path.stat()
        return _read_gguf(path, stat.st_size, stat.st_mtime_ns)
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


@lru_cache(maxsize=16)
def _read_gguf(path: Path, size: int, mtime_ns: int) -> dict[str, Any]:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: a GGUF file is read by the package gguf, which is not installed here: pip install gguf") from None
    try:
        fields = GGUFReader(path).fields
        kind = str(fields["general.architecture"].contents())
        found = {key: fields[f"{kind}.{name}"].contents() for name, key in GGUF.items() if f"{kind}.{name}" in fields}
        return {"model_type": kind, **found, "vocab_size": len(fields["tokenizer.ggml.tokens"].data)}
    except Exception as error:  # whatever the package raises on a file that it does not understand
        raise UserError(f"{path}: cannot be read as GGUF: {type(error).__name__}: {first_line(error)}; download it again") from None


def family(folder: Path) -> str:
    """`model_type`; '' where nothing says it. That a file is broken is told by whoever loads it."""
    try:
        return str(config(folder).get("model_type") or "")
    except (UserError, OSError):
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, not to be changed. Raises UserError when there is none, OSError when there is no file."""
    stat = path.stat()
    return _read_json(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _read_json(path: Path, size: int, mtime_ns: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be loaded: not readable as JSON ({first_line(error)}); download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: cannot be loaded: holds a {type(found).__name__}, wanted an object; download it again")
    return found


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model: of models that also see or hear, their `text_config`."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def blocks(config: dict[str, Any]) -> int | None:
    """How many decoder blocks config.json says; None when it leaves that to the library."""
    return next((n for n in (text_config(config).get(name) for name in BLOCKS) if isinstance(n, int)), None)


def check(folder: Path, layers: Iterable[int] = (), down: Iterable[int] = ()) -> None:
    """Refuse what config.json already shows cannot run: no family, an odd size, a layer that is not there, an adapter.

    down: the layers whose down projection is read or written, which a mixture of experts does not have.

    A folder without config.json passes: a dry run calls it missing.
    """
    path = gguf(folder) or folder / CONFIG
    if not path.is_file():
        return
    said = config(folder)
    if said.get("model_type") is None:
        raise UserError(f"{path}: no model_type, so its family is not known; take the checkpoint's own config.json")
    if not isinstance(said["model_type"], str):
        raise UserError(f"{path}: model_type = {json.dumps(said['model_type'])[:80]} is no name; take the checkpoint's own config.json")
    for name in SIZES:
        value = text_config(said).get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{path}: {name} = {json.dumps(value)[:80]} is no whole number above 0; take the checkpoint's own config.json")
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder / ADAPTER}: an adapter on top of the checkpoint, which would be loaded unseen; merge it into the weights "
            "(peft: merge_and_unload, save_pretrained) or move it out of the folder"
        )
    count = blocks(said)
    if count is not None:
        for layer in sorted(layers):
            anatomy.check_layer(layer, count)
    for layer in sorted(down):
        anatomy.refuse_no_down_proj(text_config(said), layer)
