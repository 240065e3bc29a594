"""Attention by two matrix products: softmax(cap(q K^T s) + mask) V.

Keys and values stay as few as the model has: the G query heads of each are rows of one product, where the library repeats them
(its eager attention, and sdpa until transformers 5). Of the next token of each row, what rows begin with (a long template) is read once
for all rows of a multiplier, not once for each row:

    K = [K_m, K_b]     K_m [H, P, d] of the rows of multiplier m,   K_b [H, T, d] of row b alone

Of whole sequences it is the library's sdpa but in bfloat16 on a CPU that has its arithmetic, where the products take a half to a
quarter of sdpa's time (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spilt.engine.packing import KeysValues

NAME = "spilt_next_token"
LONGEST = 256  # keys up to which whole sequences are attended by products: their scores [queries, keys] are kept for the backward pass
MANY = 1024  # shared tokens times rows from which reading them once is no slower: 0.9 of the time (benchmarks/RESULTS.md)
ARGUMENTS = ("gemma2", "gpt_oss")  # their own attention is sdpa with a soft cap or sinks, which they hand over


def replaceable(model: nn.Module) -> bool:
    """Whether the model's attention is the library's interface, and sdpa but for what it is given."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if not getattr(model, "_supports_attention_backend", False):
        return False
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return text._attn_implementation == "eager" if text.model_type in ARGUMENTS else text._attn_implementation == "sdpa" and not capped


def products_win(like: Tensor) -> bool:
    """Whether two products of such tensors are faster than sdpa, as long as the scores between them are few."""
    return like.dtype == torch.bfloat16 and like.device.type == "cpu" and has_bfloat16()


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has the arithmetic of bfloat16, by the library that torch's products are from; some builds are without."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    """Queries [B, H G, Q, d], keys and values [B, H, T, d], mask [B, 1, Q, P + T]: [B, Q, H G, d], as the library wants it.

    begun: of one query per row alone. s_aux: scores of a key without a value (sinks).
    """
    rows, heads, own = key.shape[:3]
    count = query.shape[2]
    products = products_win(query) and (count == 1 or own <= LONGEST)
    if begun is None and softcap is None and s_aux is None and not products:
        q = query.reshape(rows, heads, -1, query.shape[-1]) if count == 1 else query
        out = functional.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=q.shape[1] > heads)
        return _by_token(out, count), None
    q = query.reshape(rows, heads, -1, query.shape[-1])  # G queries of the first token, or of all tokens G times
    scores = q @ (key.contiguous() if products else key).mT  # products in bfloat16 copy what is not, and transposed, which is slow
    if begun is not None:
        keys, values = begun.pairs[module.layer_idx]  # type: ignore[index]
        groups = begun.all if len(keys) == 1 else begun.groups
        scores = torch.cat([groups.product(q, keys.mT), scores], -1)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores.unflatten(2, (-1, count)) + attention_mask[:, :, None]).flatten(2, 3)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, heads, -1, 1, 1).expand(rows, -1, -1, count, 1).flatten(2, 3)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    begins = attention_mask.shape[-1] - own
    out = weights[..., begins : begins + own] @ value
    if begun is not None:
        out = out + groups.product(weights[..., :begins], values)
    return _by_token(out, count), None


def _by_token(out: Tensor, count: int) -> Tensor:
    """[B, H, G Q, d] as [B, Q, H G, d]."""
    return out.reshape(len(out), -1, count, out.shape[-1]).transpose(1, 2).contiguous()


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


def sequences(model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Inside: attention of whole sequences is `attend` where that can be faster, else the model's own.

    inputs: of the library's forward; without a mask that is written out, it is the library that knows who sees whom.
    """
    able = inputs.get("attention_mask") is not None and products_win(next(model.parameters()))
    return next_token(model, None) if able else nullcontext()
