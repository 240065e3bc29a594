"""Host: the model and its tokenizer, loaded once per run. A record, not a wrapper."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spilt.data.chat import Chat
from spilt.errors import UserError, first_line
from spilt.memory import ran_out
from spilt.model import checkpoint, parts, template
from spilt.steering import anatomy

log = logging.getLogger("spilt")
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # that older files hold and the model computes
SLOW = 3  # times: what half as many bytes cannot make good
SMALL = 256  # hidden size below which one CPU thread is the fastest


class Host(NamedTuple):
    model: nn.Module
    tokenizer: Any
    path: Path

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    def chat(self, use_chat_template: bool, system_prompt: str) -> Chat:
        return _chat(self.tokenizer, use_chat_template, system_prompt, anatomy.vocabulary(self.model))

    def device(self, layer: int) -> torch.device:
        return anatomy.device_of(self.model, layer)


def pad_id(tokenizer: Any) -> int:
    """Any token serves: padding is masked. The tokenizer's own where it has one."""
    return next((int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


@cache
def _chat(tokenizer: Any, use_chat_template: bool, system_prompt: str, vocabulary: int) -> Chat:
    if use_chat_template and tokenizer.chat_template and template.check(tokenizer.chat_template, tokenizer.special_tokens_map):
        log.warning(
            "the chat template writes today's date into every prompt, so what is made on another day is another result and older ones "
            "count as stale; to keep them, write a fixed date in place of %s(...) in the model's chat template",
            template.CLOCK,
        )
    return replace(Chat.of(tokenizer, use_chat_template, system_prompt or None), vocabulary=vocabulary)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    file = checkpoint.gguf(path)
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **({"gguf_file": file.name} if file else {}))


def tokenizer_of(path: Path) -> Any:
    """The tokenizer alone. Raises UserError as `load` does."""
    try:
        checkpoint.check(path)
        return _tokenizer(path)
    except UserError:
        raise
    except Exception as error:  # as in load
        raise UserError(_why(path, "", "cpu", error)) from error


def load(path: Path, dtype: str, device: str, said: str = "", *, in_parts: bool = False) -> Host:
    """The checkpoint in evaluation mode with frozen weights; 'auto' places it by accelerate's device map. said: anatomy.find.

    in_parts: each process of a launcher holds a part of every matrix that the library's own tp_plan splits (parts.py).

    Local files only, no code from the checkpoint. Raises UserError for a folder that is no such checkpoint, for weights that are not
    those of its config.json, for too little memory, or a device that is not there.
    """
    from transformers import AutoModelForCausalLM

    _check_device(device)
    try:
        checkpoint.check(path)
        checkpoint.check_weights(path)
        config = configuration(path)
        if said or config.model_type not in anatomy.FAMILIES:
            anatomy.find(skeleton(config), said)  # where nothing can be found, nothing is loaded
        file = checkpoint.gguf(path)
        whole = {"gguf_file": file.name} if file else {}
        tokenizer = _tokenizer(path)
        # sdpa leaves out the soft cap on Gemma-2's attention scores
        eager = {"attn_implementation": "eager"} if getattr(config.get_text_config(), "attn_logit_softcapping", None) else {}
        if in_parts:
            parts.check_plan(config, skeleton(config), device)
        placed = parts.loading() if in_parts else {"device_map": "auto" if device == "auto" else {"": device}}
        given = {
            "config": config,
            "dtype": getattr(torch, dtype),
            "local_files_only": True,
            "trust_remote_code": False,
            **placed,
            **eager,
            **whole,
        }
        # with sizes ignored it tells which ones differ; nothing that it makes up is used
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **given, ignore_mismatched_sizes=True, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # whatever the library raises on a file that it does not understand
        raise UserError(_why(path, dtype, device, error)) from error
    model, found = loaded
    _check_keys(path, found, model)
    anatomy.declare(model, said)
    if in_parts:
        parts.check(model)
    if tokenizer.vocab_size > anatomy.vocabulary(model):
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, the model {anatomy.vocabulary(model)}; "
            "take the tokenizer that belongs to the model"
        )
    # handing work of this size to other threads costs more than it saves, and much more when other programs want the cores
    if device == "cpu" and config.get_text_config().hidden_size < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if device == "cpu" and (times := slower(given["dtype"])) > SLOW:
        log.warning("matrix products in %s take %.0f times as long as in float32 on this CPU; --dtype float32 is faster here", dtype, times)
    return Host(model.eval().requires_grad_(False), tokenizer, path)


@cache
def slower(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product takes on this CPU, the best of four of each: many have no arithmetic for others."""

    def seconds(a: torch.Tensor) -> float:
        start = time.perf_counter()
        nn.functional.linear(a, a)
        return time.perf_counter() - start

    own, plain = (min(map(seconds, [torch.ones(384, 384, dtype=kind)] * 4)) for kind in (dtype, torch.float32))
    return own / plain


def configuration(path: Path) -> Any:
    """The library's reading of config.json. Raises UserError for a family that it does not know."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    file, name = checkpoint.gguf(path), checkpoint.config(path).get("model_type")
    if not file and name not in CONFIG_MAPPING:
        way_out = "a newer transformers may have it; a checkpoint's own code is never run"
        raise UserError(f"{path / checkpoint.CONFIG}: transformers {__version__} has no model family {name!r}; {way_out}")
    try:
        found = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **({"gguf_file": file.name} if file else {})
        )
    except Exception as error:  # whatever the library raises on a configuration that it does not understand
        raise UserError(_why(path, "", "", error)) from error
    if int(__version__.split(".")[0]) < 5:
        _rope_of_5(path, found)
    return found


def _rope_of_5(path: Path, config: Any) -> None:
    """transformers 5 writes the rotary settings as `rope_parameters`, which 4.57 passes over, to take its defaults. Changes `config`.

    Raises UserError for settings per kind of layer, or of a family that has other names for them.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        said = dict(getattr(part, "rope_parameters", None) or {})
        kind = said.pop("rope_type", "default")
        plain = {name: said.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in said}
        if all(getattr(part, name, None) == value for name, value in plain.items()) and not said and kind == "default":
            continue
        if any(isinstance(value, dict) for value in said.values()) or not all(hasattr(part, name) for name in plain):
            raise UserError(
                f"{path / checkpoint.CONFIG}: written by transformers 5: its rope_parameters are not read by transformers 4; "
                "pip install 'transformers>=5', or take the config.json that the model was published with"
            )
        part.update({**plain, "rope_scaling": {"rope_type": kind, **said} if kind != "default" else None})


def skeleton(config: Any) -> nn.Module:
    """The model that a configuration speaks of, without weights. Raises UserError for one that makes no text."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the library raises on a configuration that it does not understand
        why = first_line(error, 200)
        raise UserError(f"model family {config.model_type!r}: transformers makes no language model of its config.json: {why}") from None


def _check_keys(path: Path, found: Mapping[str, Any], model: nn.Module) -> None:
    """What the library reports on loading: it fills what is missing with random numbers and drops what it does not know."""
    said = []
    for name, what in (("missing_keys", "missing"), ("unexpected_keys", "unknown to the model"), ("mismatched_keys", "of another size")):
        keys = sorted(_key(entry, model, name) for entry in found.get(name) or ())
        keys = [key for key in keys if name != "unexpected_keys" or not key.endswith(BUFFERS)]
        if keys:
            said.append(f"{len(keys)} {what}: {_some(keys)}")
    said += [first_line(UserError(text)) for text in found.get("error_msgs") or ()]
    if said:
        raise UserError(
            f"{path}: its weights are not those of its config.json: {'; '.join(said)}; "
            "download the checkpoint again, or take the config.json that belongs to the weights"
        )


def _key(entry: Any, model: nn.Module, kind: str) -> str:
    """A name; of another size: with the sizes (transformers 5 gives name, the file's size and the model's, 4 the name alone)."""
    if isinstance(entry, str):
        own = model.state_dict().get(entry) if kind == "mismatched_keys" else None
        return entry if own is None else f"{entry}, wanted {list(own.shape)}"
    name, stored, wanted = entry
    return f"{name} {list(stored)}, wanted {list(wanted)}"


def _some(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _why(path: Path, dtype: str, device: str, error: Exception) -> str:
    """What kept a checkpoint from loading, in one sentence with the way out; never a library's advice to load unsafely."""
    files = [file for file in checkpoint.weights(path) if file.is_file()] if path.is_dir() else []
    if ran_out(error) or "Cannot allocate memory" in str(error):
        size = sum(file.stat().st_size for file in files) / 2**30
        return (
            f"{path}: not enough memory to load it as {dtype} on {device} (its weight files have {size:.2f} GiB); "
            "--dtype bfloat16, --device auto, or a smaller model"
        )
    if "trust_remote_code" in str(error):
        return f"{path}: needs code of its own, which is never run; a checkpoint of a family that transformers itself has can be used"
    pickled = [file for file in files if file.suffix == ".bin"]
    if pickled and not isinstance(error, ImportError) and ("weights_only" in str(error) or not _plain(pickled)):
        return (
            f"{pickled[0]}: holds more than tensors, or is damaged, and a pickle that may run code is not opened; "
            "take the checkpoint's .safetensors files, or save it as such where you trust it"
        )
    said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:300]  # a second line has the reason of a wrong value
    what = f"cannot be loaded as a Hugging Face checkpoint: {type(error).__name__}: {said or 'no reason given'}"
    return f"{path}: {what}; take the files as they were published, config.json too"


def _plain(files: Iterable[Path]) -> bool:
    """Whether pickled weights are tensors alone."""
    try:
        for file in files:
            torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # noqa: BLE001 - of any kind: the file is junk
        return False
    return True


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"--device {device} is not here ({first_line(error)}); have: {', '.join(have)}; try --device {have[-1]}") from None
