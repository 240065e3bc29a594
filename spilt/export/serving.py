"""Texts by vLLM (`--engine vllm`): one engine for all strengths, each of them a LoRA as `--format vllm` writes it.

By its documented interface (vllm.LLM, SamplingParams, LoRARequest) and against a stand-in of it: not run on a GPU by us.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation import logits_process as lp

from spilt.engine.prompts import Row
from spilt.engine.sampling import Decoding
from spilt.errors import UserError
from spilt.export.folding import Job
from spilt.export.vllm import RANKS, adapter
from spilt.model.host import Host
from spilt.steering import anatomy
from spilt.steering.steering import Steering

TOGETHER = 512  # texts asked for in one call: what a killed run loses at most
MOST = 8  # adapters in one batch of the engine
SHORTEST = 2048  # tokens of a text that the engine makes room for
# the library's processors -> (attribute, name in SamplingParams)
SAMPLING = {
    lp.RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    lp.TemperatureLogitsWarper: ("temperature", "temperature"),
    lp.TopKLogitsWarper: ("top_k", "top_k"),
    lp.TopPLogitsWarper: ("top_p", "top_p"),
    lp.MinPLogitsWarper: ("min_p", "min_p"),
}
_numbers = itertools.count(1)  # an adapter's is its own for as long as the engine runs
_engines: dict[tuple[Any, ...], Any] = {}


def texts(host: Host, steering: Steering, rows: Sequence[Row], how: Decoding, dtype: str, cards: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (row number, new token ids), as engine.decode.generate does; drawn with random numbers of vLLM's own."""
    known = _sampling(how)
    with tempfile.TemporaryDirectory(prefix="spilt-vllm-") as place:
        loras = {m: _adapter(host, steering, m, Path(place) / str(n)) for n, m in enumerate(sorted({row.multiplier for row in rows})) if m}
        longest = max((len(row.prompt) for row in rows), default=0) + how.max_new_tokens
        engine = _engine(host, dtype, cards, longest, [rank for _, rank in loras.values()])
        from vllm import SamplingParams

        for steered in (False, True):  # a list of adapters has none for unsteered texts
            numbers = [i for i, row in enumerate(rows) if bool(row.multiplier) == steered]
            for start in range(0, len(numbers), TOGETHER):
                some = numbers[start : start + TOGETHER]
                params = [SamplingParams(seed=random.Random(rows[i].seed).getrandbits(31), **known) for i in some]
                prompts = [{"prompt_token_ids": list(rows[i].prompt)} for i in some]
                lora = [loras[rows[i].multiplier][0] for i in some] if steered else None
                made = engine.generate(prompts, params, use_tqdm=False, lora_request=lora)
                for i, one in zip(some, made, strict=True):
                    yield i, list(one.outputs[0].token_ids)


def _adapter(host: Host, steering: Steering, multiplier: float, folder: Path) -> tuple[Any, int]:
    """The request for the Steering at one strength, and the rank that it needs. Raises UserError where the export does."""
    from vllm.lora.request import LoRARequest

    rank = adapter(Job(host.model, host.tokenizer, steering, multiplier, str(host.path), folder, host.path), folder)
    number = next(_numbers)
    return LoRARequest(f"m{multiplier:g}-{number}", number, str(folder)), rank


def _engine(host: Host, dtype: str, cards: int, longest: int, ranks: Sequence[int]) -> Any:
    """One for all cells and strengths; another one only for a longer text or a larger rank."""
    length = max(SHORTEST, 1 << (longest - 1).bit_length())
    context = anatomy.context(host.model)
    rank = max(ranks, default=RANKS[0])
    key = (host.path, dtype, cards, length if context is None else min(length, context), rank)
    if key not in _engines:
        from vllm import LLM

        _engines.clear()  # the one before gives its memory back
        _engines[key] = LLM(
            model=str(host.path), dtype=dtype, tensor_parallel_size=cards, max_model_len=key[3],
            enable_lora=True, max_lora_rank=rank, max_loras=MOST,
        )  # fmt: skip
    return _engines[key]


def _sampling(how: Decoding) -> dict[str, Any]:
    """The same choice of tokens in vLLM's words. Raises UserError for what it does not have."""
    known: dict[str, Any] = {"temperature": 1.0 if how.sample else 0.0}
    for process in (*how.processors, *how.warpers):
        kind = next((kind for kind in SAMPLING if isinstance(process, kind)), None)
        if kind is None:
            raise UserError(f"--engine vllm has no {type(process).__name__}: leave that generation parameter out, or --engine")
        own, name = SAMPLING[kind]
        known[name] = getattr(process, own)
    # the end tokens are ours alone, and stay at the end as with the other engines
    return {**known, "max_tokens": how.max_new_tokens, "ignore_eos": True, "stop_token_ids": list(how.eos), "detokenize": False}


def cards(device: str) -> int:
    """How many the engine is spread over."""
    return max(1, torch.cuda.device_count()) if device == "auto" else 1
