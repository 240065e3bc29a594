"""Sequences -> padded tensors and masks, and which sequences share a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spilt.data.chat import Encoded
from spilt.errors import UserError
from spilt.settings.values import STEERED, Bad, ends


class Batch(NamedTuple):
    """Padded sequences. The causal shift is not done here but in scoring: masks are about the tokens themselves."""

    input_ids: Tensor  # [B, T] long
    attention_mask: Tensor  # [B, T] bool, True = real token
    answer_mask: Tensor  # [B, T] bool, True = scored token: answer and template suffix
    text_mask: Tensor  # [B, T] bool, True = answer token without the template suffix

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The arguments of one whole forward of a library model."""
        return {"input_ids": self.input_ids.to(device), "attention_mask": self.attention_mask.long().to(device), "use_cache": False}


def pad(sequences: list[Encoded], pad_id: int, side: str = "right") -> Batch:
    """Pad to the longest sequence: on the right for fitting and scoring, on the left for generation.

    pad([Encoded((5, 6, 7, 8), 2, 1), Encoded((5, 6), 1, 0)], pad_id=0)
    input_ids    5 6 7 8    attention_mask 1 1 1 1    answer_mask 0 0 1 1    text_mask 0 0 1 0
                 5 6 0 0                   1 1 0 0                0 1 0 0              0 1 0 0
    """
    if side not in ("right", "left"):
        raise ValueError(f"side {side!r}: right or left")
    lengths = torch.tensor([len(sequence.input_ids) for sequence in sequences])
    width = _width(sequences)
    start = torch.zeros_like(lengths) if side == "right" else width - lengths
    index = torch.arange(width) - start[:, None]  # [B, T] place in the unpadded sequence, < 0 or >= length on padding
    real = (index >= 0) & (index < lengths[:, None])
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    input_ids[real] = torch.tensor([token for sequence in sequences for token in sequence.input_ids], dtype=torch.long)
    prompt = torch.tensor([sequence.prompt_length for sequence in sequences])
    suffix = torch.tensor([sequence.suffix_length for sequence in sequences])
    answer = real & (index >= prompt[:, None])
    return Batch(input_ids, real, answer, answer & (index < (lengths - suffix)[:, None]))


def position_mask(sequences: list[Encoded], positions: str, prefix_length: int) -> Tensor:
    """[B, T] bool, right-padded: which tokens are steered (`steer_positions`). False on padding.

    all: every token. skip_prefix: from the template prefix's end on. all_prompt: the prompt's part of that. all_generation: from
    the answer on, as generated. prompt: all of it, with the template's prefix. last_cached: from the last prompt token on.
    f{n}+l{n}, f{n}, l{n}: the first n / last n prompt tokens after the prefix; in a short prompt they overlap (pyreft's convention).
    Raises UserError for any other string, and for `last`, which no mask of one forward can be: engine/scopes.py does it.
    """
    if positions == "last":
        raise UserError("steer_positions = last: the steered token is another one for each logit, so no mask says it; it is not done here")
    try:
        first, last = ends(positions, STEERED) or (0, 0)
    except Bad as error:
        raise UserError(f"unknown steer_positions {positions!r}: {str(error).removeprefix('is unknown; ')}") from None
    index = torch.arange(_width(sequences))
    rows = []
    for sequence in sequences:
        ids, prompt_length, start = sequence.input_ids, sequence.prompt_length, sequence.prefix(prefix_length)
        real = index < len(ids)
        prompt = real & (index >= start) & (index < prompt_length)
        if positions == "all":
            rows.append(real)
        elif positions == "skip_prefix":
            rows.append(real & (index >= start))
        elif positions == "all_prompt":
            rows.append(prompt)
        elif positions == "prompt":
            rows.append(real & (index < prompt_length))
        elif positions == "last_cached":
            rows.append(real & (index >= prompt_length - 1))
        elif positions in ("all_generation", "generated"):
            rows.append(real & (index >= prompt_length))
        else:
            rows.append(prompt & ((index < start + first) | (index >= prompt_length - last)))
    return torch.stack(rows)


def by_length(lengths: list[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Indices in batches, longest first (out of memory comes at once), rows x longest <= `max_tokens` each.

    A sequence longer than `max_tokens` is a batch of its own. Equal lengths keep their order, so the result depends on the input only.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows {max_rows}: at least 1")
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < 1:
            batches.append([])
            room = max(1, max_tokens // max(1, lengths[i]))
            room = room if max_rows is None else min(room, max_rows)
        batches[-1].append(i)
        room -= 1
    return batches


def _width(sequences: list[Encoded]) -> int:
    if not sequences:
        raise ValueError("no sequences to pad")
    return max(len(sequence.input_ids) for sequence in sequences)
