"""Attention of the next token of each row: softmax(cap(q K^T s) + mask) V over what the row begins with and its own tokens.

Keys and values stay as few as the model has: the G query heads of each are rows of one product, where the library repeats them
(its eager attention, and sdpa until transformers 5). What rows begin with (a long template) is read once for all rows of a
multiplier, not once for each row:

    K = [K_m, K_b]     K_m [H, P, d] of the rows of multiplier m,   K_b [H, T, d] of row b alone
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spilt.engine.packing import KeysValues

NAME = "spilt_next_token"
MANY = 1024  # shared tokens times rows from which reading them once is no slower: 0.9 of the time (benchmarks/RESULTS.md)
ARGUMENTS = ("gemma2", "gpt_oss")  # their own attention is sdpa with a soft cap or sinks, which they hand over


def replaceable(model: nn.Module) -> bool:
    """Whether the model's attention is the library's interface, and sdpa but for what it is given."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if not getattr(model, "_supports_attention_backend", False):
        return False
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return text._attn_implementation == "eager" if text.model_type in ARGUMENTS else text._attn_implementation == "sdpa" and not capped


class Groups(NamedTuple):
    """Rows by what they begin with."""

    members: Tensor  # [M, R] numbers of rows, filled up with row 0
    place: Tensor  # [B] where each row is among those, flat

    @classmethod
    def of(cls, group: Sequence[int], count: int, device: torch.device) -> Groups:
        rows: list[list[int]] = [[b for b, k in enumerate(group) if k == one] for one in range(count)]
        size = max(map(len, rows))
        place = {b: k * size + i for k, row in enumerate(rows) for i, b in enumerate(row)}
        members = torch.tensor([row + [0] * (size - len(row)) for row in rows], device=device)
        return cls(members, torch.tensor([place[b] for b in range(len(group))], device=device))

    def product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """rows [B, H, G, n] times their group's matrix [M, H, n, p]: [B, H, G, p]."""
        together = rows[self.members.to(rows.device)].transpose(1, 2)  # [M, H, R, G, n]
        found = (together.flatten(2, 3) @ matrix).unflatten(2, together.shape[2:4])
        return found.transpose(1, 2).flatten(0, 1)[self.place.to(rows.device)]


class Begun(NamedTuple):
    """What the rows of a step begin with. pairs: [M, H, P, d] of each layer, or [1, H, P, d] where all rows begin alike."""

    pairs: KeysValues
    groups: Groups
    all: Groups

    @property
    def length(self) -> int:
        return next(iter(self.pairs.values()))[0].shape[2]


def attend(
    begun: Begun | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query per row [B, H G, 1, d], keys and values [B, H, T, d], mask [B, 1, 1, P + T]: [B, 1, H G, d], as the library wants it.

    s_aux: scores of a key without a value (sinks).
    """
    rows, heads, own = key.shape[:3]
    q = query.reshape(rows, heads, -1, query.shape[-1])
    if begun is None and softcap is None and s_aux is None:
        out = functional.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(rows, 1, -1, value.shape[-1]), None
    scores = q @ key.mT
    if begun is not None:
        keys, values = begun.pairs[module.layer_idx]  # type: ignore[index]
        groups = begun.all if len(keys) == 1 else begun.groups
        scores = torch.cat([groups.product(q, keys.mT), scores], -1)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, heads, -1, 1).expand(*q.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    begins = attention_mask.shape[-1] - own
    out = weights[..., begins : begins + own] @ value
    if begun is not None:
        out = out + groups.product(weights[..., :begins], values)
    return out.reshape(rows, 1, -1, value.shape[-1]), None


OWN = partial(attend, None)  # rows hold all that they see; one object, so that a compiled step knows it again


@contextmanager
def next_token(model: nn.Module, begun: Begun | None) -> Iterator[None]:
    """Inside: the model's attention is `attend`."""
    if not replaceable(model):
        yield
        return
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    own = text._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = OWN if begun is None else partial(attend, begun)
    text._attn_implementation = NAME
    try:
        yield
    finally:
        text._attn_implementation = own
        del ALL_ATTENTION_FUNCTIONS[NAME]
