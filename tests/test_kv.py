"""Keys and values with room for more: whatever comes and goes, each row's own tokens stay what they were."""

from __future__ import annotations

import random

import pytest
import torch

from spilt.engine.kv import FREE, PreallocatedKV

HEADS, WIDTH = 2, 3  # of keys and values


def column(seed: int) -> torch.Tensor:
    """Keys (or values) of one token [H, d]."""
    return torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))


def padded(tokens: list[int], width: int, sign: int) -> torch.Tensor:
    """A row [H, width, d] that ends in these tokens."""
    row = torch.zeros(HEADS, width, WIDTH)
    for at, token in enumerate(tokens, width - len(tokens)):
        row[:, at] = sign * column(token)
    return row


@pytest.mark.parametrize("seed", range(20))
def test_rows_come_and_go(seed: int) -> None:
    """Against a list of token lists: rows join with prompts of any length, get tokens, end, and leave their place."""
    draw, room, fresh = random.Random(seed), PreallocatedKV(5), iter(range(10**6))
    rows: list[list[int]] = []
    for _ in range(3 * FREE):
        free = room.capacity - len(rows)
        if free and (not rows or draw.random() < 0.2):
            new = [[next(fresh) for _ in range(draw.randint(1, 40))] for _ in range(draw.randint(1, free))]
            longest = max(map(len, new))
            width = max(longest, room.end - room.first)
            room.join(*(torch.stack([padded(row, longest, sign) for row in new]) for sign in (1, -1)), width)  # type: ignore[arg-type]
            rows += new
        tokens = [next(fresh) for _ in rows]
        keys, values = room.update(*(torch.stack([sign * column(token) for token in tokens])[:, :, None] for sign in (1, -1)))  # type: ignore[arg-type]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        assert room.get_seq_length() == keys.shape[2] >= max(map(len, rows)) and torch.isfinite(keys).all()
        for b, row in enumerate(rows):
            for kind, sign in ((keys, 1), (values, -1)):
                assert torch.equal(kind[b, :, -len(row) :], padded(row, len(row), sign))
        keep = [b for b in range(len(rows)) if draw.random() < 0.9]
        if keep and len(keep) < len(rows):
            holes, movers = sorted(set(range(len(keep))) - set(keep)), [b for b in keep if b >= len(keep)]
            order = list(range(len(keep)))
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
            rows = [rows[b] for b in order]
            dropped = room.end - room.first - max(map(len, rows))
            room.keep(torch.tensor(holes, dtype=torch.long), torch.tensor(movers, dtype=torch.long), len(keep), dropped)


def test_a_token_does_not_move_the_others() -> None:
    """Columns are copied once in FREE tokens, not at each."""
    room, places = PreallocatedKV(2), set()
    room.join(torch.zeros(2, HEADS, 7, WIDTH), torch.zeros(2, HEADS, 7, WIDTH), 7)
    for _ in range(2 * FREE):
        keys, _ = room.update(torch.zeros(2, HEADS, 1, WIDTH), torch.zeros(2, HEADS, 1, WIDTH))
        places.add(keys.untyped_storage().data_ptr())
    assert len(places) == 2
