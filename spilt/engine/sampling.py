"""The next token of each row: the library's own logits processors, then the largest score or a draw by the row's own random number.

After top_k nobody looks at the whole vocabulary again: everything that could be left is picked once, and the rest (top_p, min_p, the
draw) sees those few alone. So nothing is sorted or summed up over 150,000 scores for a draw among 50.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import logits_process as lp

BLOCK = 128  # neighbouring scores of which the largest is looked up first
SPARE = 16  # scores beyond top_k that are looked at: so many may equal the smallest (rounded to bfloat16, some do)


def _ascending(scores: Tensor) -> Tensor:
    """Sorted values: on a CPU by numpy, ten times faster than torch, which sorts their places too."""
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)) if scores.device.type == "cpu" else scores.sort(dim=-1).values


class StableTopPLogitsWarper(lp.TopPLogitsWarper):  # type: ignore[misc]
    """The least likely tokens go while their probabilities together are at most 1 - p; among equal ones the smaller ids first.

    The library's sort leaves the order of equal ones open, so that which of them stay would depend on how many scores are looked at.
    """

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        values = _ascending(scores)
        goes = values.softmax(-1).cumsum(-1) <= 1 - self.top_p
        goes[:, -self.min_tokens_to_keep :] = False
        count = goes.sum(-1, keepdim=True)
        least = values.gather(-1, count)  # that stays; of the equal ones as many go as are needed
        smaller, equal = scores < least, scores == least
        goes = smaller | (equal & (equal.cumsum(-1) <= count - smaller.sum(-1, keepdim=True)))
        return scores.masked_fill(goes, self.filter_value)


class Decoding(NamedTuple):
    """How the next token is chosen. processors see (ids so far [1, t], scores [1, V]); warpers only scores [B, n]."""

    max_new_tokens: int
    sample: bool
    eos: tuple[int, ...]
    pad: int
    processors: list[Any]
    warpers: list[Any]


def decoding(params: dict[str, Any], model: nn.Module, tokenizer: Any) -> Decoding:
    """The request's parameters over the checkpoint's generation_config, over the library's defaults, as `generate` does."""
    own: GenerationConfig = getattr(model, "generation_config", None) or GenerationConfig()

    def value(name: str, default: Any) -> Any:
        given = params.get(name)
        given = getattr(own, name, None) if given is None else given
        return default if given is None else given

    sample = bool(params.get("do_sample", own.do_sample or False))
    processors: list[Any] = []
    if value("repetition_penalty", 1.0) != 1.0:
        processors.append(lp.RepetitionPenaltyLogitsProcessor(float(value("repetition_penalty", 1.0))))
    if value("no_repeat_ngram_size", 0) > 0:
        processors.append(lp.NoRepeatNGramLogitsProcessor(int(value("no_repeat_ngram_size", 0))))
    warpers: list[Any] = []
    if sample:
        if value("temperature", 1.0) != 1.0:
            warpers.append(lp.TemperatureLogitsWarper(float(value("temperature", 1.0))))
        if value("top_k", 50) > 0:  # 50 is what `generate` takes when nobody says otherwise
            warpers.append(lp.TopKLogitsWarper(int(value("top_k", 50))))
        if value("top_p", 1.0) < 1.0:
            warpers.append(StableTopPLogitsWarper(float(value("top_p", 1.0))))
        if value("min_p", 0.0) > 0.0:
            warpers.append(lp.MinPLogitsWarper(float(value("min_p", 0.0))))
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    return Decoding(int(value("max_new_tokens", 128)), sample, ends, int(pad), processors, warpers)


def choose(scores: Tensor, how: Decoding, uniform: Tensor | None, ids: list[list[int]]) -> Tensor:
    """The next token of each row [B]: the likeliest, or the inverse of the cumulative distribution at the row's own number."""
    for process in how.processors:
        if isinstance(process, lp.RepetitionPenaltyLogitsProcessor):  # all rows at once; a head may be shorter than the vocabulary
            pairs = [(row, token) for row, so_far in enumerate(ids) for token in set(so_far) if token < scores.shape[1]]
            rows, tokens = torch.tensor(pairs, device=scores.device).reshape(-1, 2).unbind(1)
            seen = scores[rows, tokens]
            scores = scores.index_put((rows, tokens), torch.where(seen < 0, seen * process.penalty, seen / process.penalty))
        else:  # one by one: the library would count the padding as text
            each = zip(ids, scores.split(1), strict=True)
            scores = torch.cat([process(torch.tensor([so_far], device=row.device), row) for so_far, row in each])
    if uniform is None:
        return scores.argmax(-1)
    few = _candidates(scores, how.warpers)
    left = scores if few is None else scores.gather(1, few)
    if few is not None or torch.are_deterministic_algorithms_enabled():  # few; and a card's cumsum is not deterministic
        left = left.cpu()
    for warp in how.warpers:
        left = warp(None, left)
    cumulative = left.double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.to(left.device)[:, None] * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=left.shape[1] - 1).to(scores.device)
    return (drawn if few is None else few.gather(1, drawn)).squeeze(1)


def _candidates(scores: Tensor, warpers: list[Any]) -> Tensor | None:
    """Tokens [B, n], ascending, that hold all that top_k leaves of scores [B, V]; None: look at all of them.

    The n largest lie in the n blocks with the largest maxima. top_k keeps all that equal its smallest, so more are taken while
    it drops none of them.
    """
    vocabulary, until = scores.shape[1], next((i for i, warp in enumerate(warpers, 1) if isinstance(warp, lp.TopKLogitsWarper)), 0)
    size = warpers[until - 1].top_k + SPARE if until else vocabulary
    if size >= vocabulary:
        return None
    ids = torch.arange(vocabulary, device=scores.device)
    whole = vocabulary - vocabulary % BLOCK
    maxima = scores[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1)
    while size < vocabulary:
        blocks = maxima.topk(min(size, maxima.shape[1])).indices
        inside = (blocks[..., None] * BLOCK + ids[:BLOCK]).flatten(1)
        maybe = torch.cat([inside, ids[whole:].expand(len(scores), -1)], 1)
        tokens = maybe.gather(1, scores.gather(1, maybe).topk(size).indices).sort(-1).values
        left = scores.gather(1, tokens)
        for warp in warpers[:until]:
            left = warp(None, left)
        if left.amin(-1).isneginf().all():
            return tokens
        size *= 2
    return None
