"""layer_{id}.pt: one fitted intervention, or one for each concept, in the released formats (contract.md, section 5)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt.cell import FORMS
from spilt.errors import UserError, first_line

if TYPE_CHECKING:
    from spilt.steering.interventions import Intervention

LINEARS = "linears"  # key of a file with changes at several linear maps of its block
LINEAR = re.compile(r"[a-z]\w{0,50}(\.\w{1,50}){0,5}", re.ASCII)  # the path of one


def dump(intervention: Intervention, concept: int | None) -> bytes:
    """The bytes of layer_{id}.pt for one concept; equal parameters give equal bytes."""
    state = intervention.state()
    if isinstance(state, dict):
        state["concept_id"] = 0 if concept is None else concept
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def metadata_line(parts: Sequence[Intervention], concept: int | None, text: str | None) -> str:
    """metadata_layer_{id}.jsonl: one object per concept; of several linear maps with their names."""
    several = {LINEARS: [one.write_point for one in parts], "intervention_components": None} if len(parts) > 1 else {}
    fields = {"concept_id": 0 if concept is None else concept, "concept": text, **parts[0].describe(), "ref": None, **several}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def dump_linears(parts: Sequence[Intervention], concept: int | None) -> bytes:
    """The bytes of layer_{id}.pt of a block with changes at several linear maps: write point -> what `dump` would hold."""
    import torch

    buffer = io.BytesIO()
    torch.save({LINEARS: {one.write_point: one.state() for one in parts}, "concept_id": 0 if concept is None else concept}, buffer)
    return buffer.getvalue()


def has_linears(stored: Any) -> bool:
    return isinstance(stored, dict) and isinstance(stored.get(LINEARS), dict)


def linears(stored: Any, path: Path, form: str) -> list[Intervention]:
    """The changes of a block's linear maps, each a form with shapes that go together. Raises UserError."""
    from spilt.steering.interventions import INTERVENTIONS

    if not has_linears(stored) or not stored[LINEARS]:
        raise UserError(f"{path}: holds {described(stored, path)}; wanted changes of several linear maps, under {LINEARS!r}")
    found = []
    for name, state in stored[LINEARS].items():
        if FORMS[form].bare or not isinstance(state, dict) or not LINEAR.fullmatch(str(name)):
            raise UserError(f"{path}: {LINEARS} has {str(name)[:60]!r}, which is no {form} at the path of a linear map")
        sizes: dict[str, int] = {}
        for tensor, axes in FORMS[form].tensors.items():
            sizes.update(zip(axes, getattr(state.get(tensor), "shape", ()), strict=False))
        check_shapes(state, path, form, sizes.get("D", 0), sizes.get("F", 0), None)
        read_point = str(state.get("intervention_components"))
        if not LINEAR.fullmatch(read_point):
            raise UserError(f"{path}: {name} is read at {read_point[:60]!r}, which is no path of a linear map")
        found.append(INTERVENTIONS[form].from_state(state, read_point=read_point, write_point=str(name)).eval().requires_grad_(False))
    return found


def load(
    path: Path, form: str, concept: int | None, hidden: int, widths: dict[str, int], default_component: str, site: str
) -> Intervention:
    """One concept's intervention from a stored file, checked against the model.

    hidden: D of the model. widths: read point name -> F. default_component: for files that do not name one.
    Raises UserError naming the file, what was found and what was wanted; a pickle that needs code is refused.
    """
    from spilt.steering.interventions import INTERVENTIONS

    state = one_concept(read(path), path, form, concept)
    read_point = None
    if FORMS[form].reads:
        read_point = str((not FORMS[form].bare and state.get("intervention_components")) or default_component)
        if read_point not in widths:
            raise UserError(f"{path}: intervention_components {read_point!r} is not one of {', '.join(widths)}")
    check_shapes(state, path, form, hidden, widths.get(read_point, hidden) if read_point else hidden, read_point)
    try:
        made = INTERVENTIONS[form].from_state(state, read_point=read_point, write_point=site)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return made.eval().requires_grad_(False)


MADE_ELSEWHERE = (".safetensors", ".gguf", ".npz", ".npy", ".bin", ".pth", ".pt", ".ckpt", ".pkl")
MAGIC = {
    b"GGUF": "a GGUF file, as llama.cpp has it",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself: fetch it with git lfs pull",
}
BY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before it wrote zip archives
WAY_OUT = "wanted a file that torch.save wrote of a tensor [D] or of a dict of tensors"


def beside(path: Path) -> str:
    """For the message that a vector file is missing: what lies there under other names. '' when nothing does."""
    try:
        names = sorted(found.name for found in path.parent.iterdir() if found.suffix in MADE_ELSEWHERE and "unfinished" not in found.name)
    except OSError:
        return ""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f" (there: {shown}; only a {path.name} that torch.save wrote is read)" if names else ""


def _container(path: Path) -> str | None:
    """What kind of file it is when torch.save did not write it; None when it may have."""
    import zipfile

    with open(path, "rb") as file:
        head = file.read(64)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return "a NumPy archive (.npz)"
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript program"
        return None if any(name.endswith("data.pkl") for name in names) else "a zip archive without tensors"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "a safetensors file"
    if head[:1] == b"\x80" and not head.startswith(BY_TORCH):
        return "a pickle, which can run code when it is read"
    return None


LARGEST_PICKLE, LONGEST_NAME = 2**24, 1000  # bytes; a vector file's pickle has some hundred, its names at most 40


def _check_names(path: Path, data: bytes, pickles: int) -> None:
    """Raises UserError for a pickle with a name of great length: torch's message about it takes time that grows with the square."""
    import pickletools

    stream, at, longest = io.BytesIO(data), 0, 0
    try:
        for _ in range(pickles):
            begun = stream.tell()
            for code, value, place in pickletools.genops(stream):
                at = begun + (place or 0)
                longest = max(longest, len(str(value)) if code.name == "GLOBAL" else 0)
    except (ValueError, EOFError):  # cut off, or no pickle, which torch says; unless a name runs on to the end
        longest = max(longest, *map(len, data[at:].split(b"\n")))
    if longest > LONGEST_NAME:
        raise UserError(f"{path}: is damaged, or no vector file: a name in it runs on for {longest} characters; {WAY_OUT}")


def read(path: Path) -> Any:
    import pickle
    import struct
    import zipfile
    import zlib

    import torch

    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no plain file; {WAY_OUT}")
        if (what := _container(path)) is not None:
            raise UserError(f"{path}: is {what}; {WAY_OUT}")
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise UserError(f"{path}: is damaged: the checksum of {damaged} is wrong; make it again with --mode generate --force")
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        _check_names(path, archive.read(name), 1)
        else:
            with path.open("rb") as file:
                _check_names(path, file.read(LARGEST_PICKLE), 5)  # magic, version, byte order, content, keys; then the numbers
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such vector file{beside(path)}; make it with --mode generate") from None
    except pickle.UnpicklingError as error:  # its text tells how to read the file unsafely: only the name in it is of use
        named = re.search(r"GLOBAL ([A-Za-z_][\w.]{0,100})", str(error))
        what = f"a whole model or other Python objects ({named[1]})" if named else "something that could run code"
        raise UserError(
            f"{path}: refused: it is not a plain tensor file, it holds {what}; where you trust it, open it yourself and save its tensors "
            f"alone: {WAY_OUT}"
        ) from None
    except (
        RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, OSError, AssertionError, ArithmeticError, MemoryError,
        ImportError, struct.error, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        said = "" if re.search(r"weights_only|torch\.load|unsafe", str(error)) else f": {first_line(error)}"
        raise UserError(f"{path}: cannot be read as a vector file ({type(error).__name__}{said}); {WAY_OUT}") from None


def form_of(stored: Any) -> str:
    """The form of what a layer_{id}.pt holds, by its content."""
    if not isinstance(stored, dict):
        return next(name for name, form in FORMS.items() if form.bare)
    stored = stored[LINEARS] if has_linears(stored) else stored
    first = next(iter(stored.values()), None)
    keys = first.keys() if isinstance(first, dict) else stored.keys()
    named = [name for name, form in FORMS.items() if not form.bare]
    return max(named, key=lambda name: len(FORMS[name].tensors.keys() & keys))


def one_concept(stored: Any, path: Path, form: str, concept: int | None) -> Any:
    """The row or the entry of one concept; a file of one concept serves whatever the id."""
    import torch

    if FORMS[form].bare:
        if not isinstance(stored, torch.Tensor):
            raise UserError(f"{path}: holds {described(stored, path)}; a {form} is a tensor [D] (several concepts: [n, D])")
        if stored.ndim == 2 and len(stored) > 1:
            if concept is None or not 0 <= concept < len(stored):
                raise _which_concept(path, concept, list(range(len(stored))))
            return stored[concept]
        return stored[0] if stored.ndim == 2 and len(stored) else stored
    keys_of = set(FORMS[form].tensors)
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"{path}: holds {described(stored, path)}; {form} is a dict of tensors")
    if keys_of.isdisjoint(stored) and any(isinstance(value, torch.Tensor) for value in stored.values()):
        raise UserError(f"{path}: holds {described(stored, path)}; {form} is a dict with {' and '.join(sorted(keys_of))}")
    if not all(isinstance(value, dict) for value in stored.values()):
        return stored
    keys = {str(key): key for key in stored}
    if concept is None and len(keys) == 1:
        return next(iter(stored.values()))
    if str(concept) not in keys:
        raise _which_concept(path, concept, list(keys))
    return stored[keys[str(concept)]]


def described(stored: Any, path: Path) -> str:
    """What a file holds that is not what was wanted, and what to do with it."""
    import torch

    if isinstance(stored, torch.Tensor):
        return f"a tensor of shape {list(stored.shape)}, as the form vector has it: --intervention_method vector"
    if isinstance(stored, list | tuple):
        return f"a {type(stored).__name__} of {len(stored)}; save the tensor of one layer alone: torch.save(found[{_layer_of(path)}], path)"
    if not isinstance(stored, dict):
        return f"a {type(stored).__name__}"
    names = [str(name) for name in stored]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if {"lora_A", "lora_B"} <= stored.keys():
        return "a dict with lora_A and lora_B: --intervention_method lora"
    if {"weight", "bias"} <= stored.keys() and getattr(stored["weight"], "ndim", 0) == 2:
        return "a dict with weight and bias: --intervention_method local_weight"
    if any(re.search(r"\blayer\d{1,5}_(block|attn|mlp)\b", name) for name in names):
        return "adapters of the public post-block code, which say neither activation nor scope: spilt.read_post_block takes both"
    if any(re.search(r"\blora_(A|B|embedding)", name) for name in names):
        return f"the adapter of another library, PEFT ({shown}), which changes many modules; fit one here: --intervention_method lora"
    if all(isinstance(value, torch.Tensor) for value in stored.values()) and names:
        if all(re.fullmatch(r"(layers?[._])?[0-9]{1,4}", name) for name in names):
            return f"a dict of tensors by layer ({shown}); save the one of this layer alone: torch.save(found[{_layer_of(path)}], path)"
        if any("." in name for name in names):
            return f"the parameters of a whole model, a state dict of {len(names)} tensors ({shown}); save the steering vector alone"
    return f"a dict ({shown})" if names else "an empty dict"


def _layer_of(path: Path) -> str:
    found = re.fullmatch(r"layer_(\d+)\.pt", path.name)
    return found[1] if found else "layer"


def _which_concept(path: Path, concept: int | None, have: list[Any]) -> UserError:
    asked = "and none was asked for" if concept is None else f"not concept_id {concept}"
    shown = ", ".join(map(str, have[:20])) + (", ..." if len(have) > 20 else "")
    return UserError(f"{path}: has {len(have)} concepts ({shown}), {asked}; choose one: --set concept_id=N, or in the YAML file")


def check_shapes(state: Any, path: Path, form: str, hidden: int, width: int, read_point: str | None) -> None:
    """Every tensor there, of the model's shape, floating and finite."""
    import torch

    row = FORMS[form]
    found = dict.fromkeys(row.tensors, state) if row.bare else state
    ranked = next(((name, axes.index("r")) for name, axes in row.tensors.items() if "r" in axes), None)
    rank = None
    if ranked is not None:
        name, axis = ranked
        shape: tuple[int, ...] = tuple(getattr(state.get(name), "shape", ()))
        rank = int(shape[axis]) if len(shape) == len(row.tensors[name]) else None
        if rank is None or rank < 1:
            raise UserError(f"{path}: {name} has shape {list(shape)}; wanted [{', '.join(row.tensors[name])}], where F is {width}")
        for key in ("r", "alpha"):
            if not isinstance(state.get(key), int | float | None) or not abs(state.get(key) or 0) < float("inf"):
                raise UserError(f"{path}: {key} is a {type(state[key]).__name__}; wanted a finite number")
        if state.get("r") not in (None, rank):
            raise UserError(f"{path}: says r = {state['r']}, but {name} has shape {list(shape)}")
    for name, size in row.shapes(hidden, width, rank).items():
        value = found.get(name)
        label = f"the {form}" if row.bare else name
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {label} is missing; wanted a tensor of shape {list(size)}; found: {', '.join(map(str, found))}")
        if tuple(value.shape) != size:
            at = f" (read at {read_point!r})" if read_point else ""
            raise UserError(f"{path}: {label} has shape {list(value.shape)}; this model wants {list(size)}{at}")
        if not value.is_floating_point():
            raise UserError(f"{path}: {label} has dtype {value.dtype}; wanted floating point")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{path}: {label} is a {value.layout} tensor on {value.device}; wanted a plain one on the CPU")
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {label} holds NaN or infinite values; fit it again")
