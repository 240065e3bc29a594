"""Keys and values in places of their own: whatever comes and goes, each row's tokens stay what they were, where they were."""

from __future__ import annotations

import random

import pytest
import torch

from spilt.engine.kv import PreallocatedKV

HEADS, WIDTH, LONGEST, NEW = 2, 3, 40, 12  # of keys and values; of prompts; tokens that a row gets


def column(seed: int) -> torch.Tensor:
    """Keys (or values) of one token [H, d]."""
    return torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))


def padded(tokens: list[int], width: int, sign: int) -> torch.Tensor:
    """A row [H, width, d] that begins with these tokens."""
    row = torch.zeros(HEADS, width, WIDTH)
    for at, token in enumerate(tokens):
        row[:, at] = sign * column(token)
    return row


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.few(3)
def test_rows_come_and_go(seed: int) -> None:
    """Against a list of token lists: rows of any length join, get tokens, end, leave their place; the stores stay where they are."""
    draw, layer, fresh = random.Random(seed), PreallocatedKV(5, LONGEST + NEW), iter(range(10**6))
    rows: list[list[int]] = []
    left: list[int] = []  # tokens that each row may still get
    stores = set()
    for _ in range(4 * NEW):
        free = layer.capacity - len(rows)
        if free and (not rows or draw.random() < 0.3):
            new = [[next(fresh) for _ in range(draw.randint(1, LONGEST))] for _ in range(draw.randint(1, free))]
            longest = max(map(len, new))
            keys, values = (torch.stack([padded(row, longest, sign) for row in new]) for sign in (1, -1))
            layer.join(keys, values, len(rows))
            rows, left = rows + new, left + [NEW] * len(new)
        tokens = [next(fresh) for _ in rows]
        layer.begin(torch.tensor([len(row) for row in rows]), max(map(len, rows)) + 1)
        keys, values = (torch.stack([sign * column(token) for token in tokens])[:, :, None] for sign in (1, -1))
        keys, values = layer.update(keys, values)
        rows, left = [[*row, token] for row, token in zip(rows, tokens, strict=True)], [n - 1 for n in left]
        assert layer.get_seq_length() == keys.shape[2] == max(map(len, rows)) and torch.isfinite(keys).all()
        stores.add(tuple(store.data_ptr() for store in layer.stores))
        for b, row in enumerate(rows):
            for kind, sign in ((keys, 1), (values, -1)):
                assert torch.equal(kind[b, :, : len(row)], padded(row, len(row), sign))
        keep = [b for b in range(len(rows)) if left[b] and draw.random() < 0.9]
        if len(keep) < len(rows):
            holes, movers = sorted(set(range(len(keep))) - set(keep)), [b for b in keep if b >= len(keep)]
            order = list(range(len(keep)))
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
            rows, left = [rows[b] for b in order], [left[b] for b in order]
            if rows:
                layer.keep(torch.tensor(holes, dtype=torch.long), torch.tensor(movers, dtype=torch.long), max(map(len, rows)))
    assert len(stores) == 1
