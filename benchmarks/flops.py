"""Counted arithmetic: floating-point operations of forwards, of suffix passes and of their shared form. 2 per multiply-add.

Counted are matrix products only (projections, attention scores and sums, output head); norms, rotary embedding, softmax
and activation functions are left out. Attention is causal: token t sees t + 1 tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any


def linear_per_token(c: dict[str, Any]) -> int:
    """Projections of one block for one token: q, o, k, v, gate, up, down."""
    d, f, heads, kv = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or d // heads
    return 2 * (2 * d * heads * size + 2 * d * kv * size + 3 * d * f)


def attention_per_pair(c: dict[str, Any]) -> int:
    """Scores and weighted sum of one block for one (query, key) pair, all heads."""
    heads = c["num_attention_heads"]
    return 4 * heads * (c.get("head_dim") or c["hidden_size"] // heads)


def head_per_token(c: dict[str, Any]) -> int:
    """Output head for one position."""
    return 2 * c["hidden_size"] * c["vocab_size"]


def causal_pairs(tokens: int, before: int = 0) -> int:
    """(query, key) pairs of `tokens` new tokens after `before` known ones."""
    return tokens * before + tokens * (tokens + 1) // 2


def blocks(c: dict[str, Any], n: int, tokens: int, pairs: int) -> int:
    """n blocks over `tokens` tokens with `pairs` attended pairs."""
    return n * (tokens * linear_per_token(c) + pairs * attention_per_pair(c))


def full(c: dict[str, Any], lengths: Iterable[int], scored: int | None = None) -> int:
    """Forwards through all blocks; the head at `scored` positions in all, None = at every one."""
    lengths = list(lengths)
    body = sum(blocks(c, c["num_hidden_layers"], t, causal_pairs(t)) for t in lengths)
    return body + (sum(lengths) if scored is None else scored) * head_per_token(c)


def prefix(c: dict[str, Any], layer: int, lengths: Iterable[int]) -> int:
    """Recording: blocks 0..layer."""
    return sum(blocks(c, layer + 1, t, causal_pairs(t)) for t in lengths)


def suffix(c: dict[str, Any], layer: int, lengths: Iterable[int], scored: int) -> int:
    """Blocks after `layer` over whole sequences, the head at `scored` positions in all."""
    after = c["num_hidden_layers"] - layer - 1
    return sum(blocks(c, after, t, causal_pairs(t)) for t in lengths) + scored * head_per_token(c)


def shared_suffix(
    c: dict[str, Any], layer: int, template: int, prompts: Sequence[int], answers: Sequence[Sequence[int]], scored: int
) -> int:
    """The same with nothing twice: the template's `template` leading tokens once, each prompt once, then its answers' tokens.

    prompts: tokens of each whole prompt; answers: tokens of each answer to it.
    """
    after = c["num_hidden_layers"] - layer - 1
    total = blocks(c, after, template, causal_pairs(template))
    for prompt, lengths in zip(prompts, answers, strict=True):
        total += blocks(c, after, prompt - template, causal_pairs(prompt - template, template))
        total += sum(blocks(c, after, t, causal_pairs(t, prompt)) for t in lengths)
    return total + scored * head_per_token(c)


def form_per_token(c: dict[str, Any], form: str, rank: int = 4) -> int:
    """What an intervention itself costs for one token."""
    d, f = c["hidden_size"], c["intermediate_size"]
    return {"vector": 0, "lora": 2 * rank * (f + d), "local_weight": 2 * f * d}[form]


def matrix_rate(c: dict[str, Any], tokens: int = 2048, dtype: str = "float32", device: str = "cpu", seconds: float = 1.0) -> float:
    """Measured FLOP/s of the matrix products of one block (their shapes, weighted by their work) over `tokens` tokens."""
    import torch

    d, f, heads, kv = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or d // heads
    shapes = [(d, heads * size), (d, kv * size), (d, kv * size), (heads * size, d), (d, f), (d, f), (f, d)]
    kind = getattr(torch, dtype)
    pairs = [(torch.randn(tokens, a, dtype=kind, device=device), torch.randn(b, a, dtype=kind, device=device)) for a, b in shapes]
    work = sum(2 * tokens * a * b for a, b in shapes)
    cuda = device.startswith("cuda")

    def once() -> None:
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        if cuda:
            torch.cuda.synchronize()

    once()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.perf_counter()
        once()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return work / best


def fit(c: dict[str, Any], layer: int, lengths: Iterable[int], scored: int, form: str) -> int:
    """One pass of fit over these sequences from what was recorded: suffix forward, and backward down to block layer + 1.

    Base weights are frozen: backward costs a projection's forward once more (gradient of its input only) and attention's
    twice. Of the intervention: its forward and the gradient of its parameters; what it reads needs none.
    """
    lengths = list(lengths)
    after = c["num_hidden_layers"] - layer - 1
    forward = suffix(c, layer, lengths, scored)
    more_attention = after * sum(causal_pairs(t) for t in lengths) * attention_per_pair(c)
    return 2 * forward + more_attention + 2 * form_per_token(c, form) * sum(lengths)
