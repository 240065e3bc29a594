"""A local model as judge: greedy replies by the batched decoder, without steering."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spilt.engine import choice, decode, sampling, whole
from spilt.errors import UserError
from spilt.judges.base import Judge, Messages, Reply
from spilt.model import host
from spilt.steering.steering import Steering

AT_ONCE = 16  # prompts read side by side
MAX_TOKENS = 512  # of a reply, where the rubric says nothing


class Local(Judge):
    """Loaded at the first question that has no reply yet."""

    def __init__(self, name: str, folder: Path, device: str, kept: Path | None = None, dtype: str = "float32") -> None:
        super().__init__(name, kept)
        self.folder, self.device, self.dtype = folder, device, dtype
        self.host: host.Host | None = None

    def _ask(self, prompts: Mapping[str, Messages], parameters: Mapping[str, Any]) -> Iterator[tuple[str, str | Reply]]:
        self.host = self.host or host.load(self.folder, self.dtype, self.device)
        model, tokenizer = self.host.model, self.host.tokenizer
        how = sampling.decoding({"do_sample": False, "max_new_tokens": int(parameters.get("max_tokens", MAX_TOKENS))}, model, tokenizer)
        nothing = Steering.nothing(model)
        keys, rows = [], []
        for key, messages in prompts.items():
            try:
                ids = self.host.chat(True, "").prompt_ids(tuple((turn["role"], turn["content"]) for turn in messages))
            except UserError:  # a template that refuses these turns
                yield key, Reply(None, "the judge's chat template refuses the prompt")
                continue
            keys.append(key)
            rows.append(decode.Row(tuple(ids), 0.0, ""))
        plain = choice.why_plain(nothing.places, "generate", family=str(model.config.model_type))  # type: ignore[union-attr]
        with torch.no_grad():
            made = whole.texts(model, nothing, rows, how) if plain else decode.generate(model, nothing, rows, how, AT_ONCE)
            for number, new in made if rows else ():
                said = tokenizer.decode(new, skip_special_tokens=True)
                ended = "stop" if new[-1] in how.eos else "length"
                usage = {"prompt_tokens": len(rows[number].prompt), "completion_tokens": len(new)}
                yield keys[number], json.dumps({"choices": [{"message": {"content": said}, "finish_reason": ended}], "usage": usage})
