"""Host: the model and its tokenizer, loaded once per run. A record, not a wrapper."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spilt import anatomy
from spilt.data.chat import Chat
from spilt.errors import UserError, first_line

SMALL = 256  # hidden size below which one CPU thread is the fastest


class Host(NamedTuple):
    model: nn.Module
    tokenizer: Any
    path: Path

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    def chat(self, use_chat_template: bool, system_prompt: str) -> Chat:
        return _chat(self.tokenizer, use_chat_template, system_prompt)

    def device(self, layer: int) -> torch.device:
        return anatomy.device_of(self.model, layer)


def pad_id(tokenizer: Any) -> int:
    """Any token serves: padding is masked. The tokenizer's own where it has one."""
    return next((int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


@cache
def _chat(tokenizer: Any, use_chat_template: bool, system_prompt: str) -> Chat:
    return Chat.of(tokenizer, use_chat_template, system_prompt or None)


def load(path: Path, dtype: str, device: str) -> Host:
    """The checkpoint in evaluation mode with frozen weights; 'auto' places it by accelerate's device map.

    Local files only, no code from the checkpoint. Raises UserError for a folder that is no such checkpoint or a device that is not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _check_device(device)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # sdpa leaves out the soft cap on Gemma-2's attention scores
        eager = {"attn_implementation": "eager"} if getattr(config.get_text_config(), "attn_logit_softcapping", None) else {}
        placed = {"device_map": "auto"} if device == "auto" else {"device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, **placed, **eager
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{path}: cannot be loaded as a Hugging Face checkpoint: {first_line(error)}") from error
    # handing work of this size to other threads costs more than it saves, and much more when other programs want the cores
    if device == "cpu" and config.get_text_config().hidden_size < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    anatomy.family(model)  # an unknown family is told now
    return Host(model.eval().requires_grad_(False), tokenizer, path)


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"--device {device} is not here ({first_line(error)}); have: {', '.join(have)}; try --device {have[-1]}") from None
