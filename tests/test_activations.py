"""Recorded streams come out as the model computed them, to the bit: gathered by one index, whatever shares a row; one store for all."""

from __future__ import annotations

import random

import pytest
import torch
from families import build
from torch.nn.utils.rnn import pad_sequence

from spilt.data.chat import Encoded
from spilt.engine import activations

CPU, LAYER = torch.device("cpu"), 1


@pytest.fixture(scope="module")
def cache() -> activations.Activations:
    draw = random.Random(0)
    ids = [draw.randrange(5, 60) for _ in range(400)]
    sequences = []
    for i in range(9):
        question = (*ids[:6], *ids[10 * i : 10 * i + 3 + i])
        sequences += [Encoded((*question, *ids[200 + 7 * i + k : 203 + 8 * i + 2 * k]), len(question), 1) for k in range(2)]
    return activations.record(build("qwen2").eval(), LAYER, sequences, ("mlp_mid", "attn"), 0, together=2)


def stored(cache: activations.Activations, rows: torch.Tensor, i: int) -> torch.Tensor:
    """A sequence put together by hand: the prefix, then its places in its pack."""
    number = next(n for n, pack in enumerate(cache.packs) if i in pack.members)
    pack, before = cache.packs[number], cache.prefix + sum(len(other.ids) for other in cache.packs[:number])
    own = rows[before : before + len(pack.ids)]
    return torch.cat([rows[: cache.prefix], own[list(pack.places[pack.members.index(i)])]])


@pytest.mark.parametrize("start", [0, 3])
def test_a_batch_is_its_sequences_padded_with_zeros(cache: activations.Activations, start: int) -> None:
    assert cache.prefix == 6 and len(cache.packs) == 9
    tokens, seen = cache.batch([3, 17, 0, 3], "mlp_mid", CPU, start)
    for found, rows in ((seen.h, cache.h), (seen.x["mlp_mid"], cache.x["mlp_mid"])):
        wanted = [stored(cache, rows, i)[start:] for i in (3, 17, 0, 3)]
        assert torch.equal(found, pad_sequence(wanted, batch_first=True))
        assert not found[~tokens.attention_mask].any() and found[tokens.attention_mask].any(-1).all()


def test_packs_and_parts_read_the_same_store(cache: activations.Activations) -> None:
    tokens, seen = cache.rows([2, 8], "attn", CPU)
    assert seen.h.shape[:2] == tokens.input_ids.shape == (2, max(len(cache.packs[i].ids) for i in (2, 8)))
    some, alone = cache.first(5), cache.unshared()
    assert some.h is cache.h and alone.x["attn"] is cache.x["attn"]
    assert len(some.packs) == 2 and len(alone.packs) == 18 and alone.prefix == 0
    for other in (some, alone):
        assert torch.equal(other.batch([3, 1], None, CPU)[1].h, cache.batch([3, 1], None, CPU)[1].h)
    assert torch.equal(alone.rows([7], None, CPU)[1].h, cache.batch([7], None, CPU)[1].h)
    first = {id(index) for index in cache.places.values()}
    cache.batch([1, 2], None, CPU)
    assert {id(index) for index in cache.places.values()} == first  # made once
