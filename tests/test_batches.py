"""Padding, position masks and batches by length, for any lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import message

from spilt.data import Encoded
from spilt.data.batches import by_length, pad, position_mask
from spilt.settings.values import STEERED


@st.composite
def sequence_lists(draw) -> tuple[list[Encoded], int]:
    prefix = draw(st.integers(0, 3))
    sequences = []
    for _ in range(draw(st.integers(1, 4))):
        prompt, text, suffix = prefix + draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(0, 2))
        own = draw(st.none() | st.integers(0, prompt))  # of a row with a system prompt of its own
        sequences.append(Encoded(tuple(range(10, 10 + prompt + text + suffix)), prompt, suffix, own))
    return sequences, prefix


def test_pad_is_the_docstrings_example():
    batch = pad([Encoded((5, 6, 7, 8), 2, 1), Encoded((5, 6), 1, 0)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch.text_mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch.input_ids.dtype == torch.long and batch.answer_mask.dtype == torch.bool
    left = pad([Encoded((5, 6, 7, 8), 2, 1), Encoded((5, 6), 1, 0)], pad_id=0, side="left")
    assert left.input_ids.tolist()[1] == [0, 0, 5, 6] and left.answer_mask.int().tolist()[1] == [0, 0, 0, 1]
    with pytest.raises(ValueError):
        pad([], 0)
    with pytest.raises(ValueError):
        pad([Encoded((1,), 0, 0)], 0, "up")


@given(sequence_lists(), st.sampled_from(["right", "left"]))
@settings(deadline=None)
def test_padding_keeps_every_token_and_only_adds_pads(made, side):
    sequences, _ = made
    batch = pad(sequences, pad_id=1, side=side)
    for i, (ids, prompt, suffix, _) in enumerate(sequences):
        real_tokens = batch.attention_mask[i]
        assert batch.input_ids[i][real_tokens].tolist() == list(ids)
        assert (batch.input_ids[i][~real_tokens] == 1).all()
        assert real_tokens[0 if side == "right" else -1]
        assert batch.input_ids[i][batch.answer_mask[i]].tolist() == list(ids[prompt:])
        assert batch.input_ids[i][batch.text_mask[i]].tolist() == list(ids[prompt : len(ids) - suffix])


@given(sequence_lists(), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_position_masks_are_what_their_names_say(made, n, k):
    sequences, prefix = made
    width = max(len(sequence.input_ids) for sequence in sequences)
    names = ("all", "skip_prefix", "all_prompt", "all_generation", f"f{n}", f"l{k}", f"f{n}+l{k}")
    masks = {name: position_mask(sequences, name, prefix) for name in names}
    for i, (ids, prompt, _, own) in enumerate(sequences):
        start = prefix if own is None else own
        places = {name: set(mask[i].nonzero()[:, 0].tolist()) for name, mask in masks.items()}
        assert all(mask.shape == (len(sequences), width) and mask.dtype == torch.bool for mask in masks.values())
        assert places["all"] == set(range(len(ids)))
        assert places["skip_prefix"] == set(range(start, len(ids)))
        assert places["all_prompt"] == set(range(start, prompt))
        assert places["all_generation"] == set(range(prompt, len(ids)))
        assert places[f"f{n}"] == set(list(range(start, prompt))[:n])
        assert places[f"l{k}"] == set(list(range(start, prompt))[-k:])
        assert places[f"f{n}+l{k}"] == places[f"f{n}"] | places[f"l{k}"]


@pytest.mark.parametrize(
    "positions", ["", "+", "f", "f0", "l-1", "f1+", "+l1", "f1l1", "l1+f1", "All", "f1+l1 ", "prompts", "f9999999999999999999"]
)
def test_unknown_positions_list_the_forms(positions):
    said = message(position_mask, [Encoded((1, 2), 1, 0)], positions, 0)
    assert f"unknown steer_positions {positions!r}" in said and f"wanted {', '.join(STEERED)}, f{{n}}" in said


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200), st.none() | st.integers(1, 8))
def test_batches_by_length(lengths, max_tokens, max_rows):
    batches = by_length(lengths, max_tokens, max_rows)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for n, batch in enumerate(batches):
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert max_rows is None or len(batch) <= max_rows
        if n + 1 < len(batches):  # no batch could have taken one more
            assert (len(batch) + 1) * longest > max_tokens or len(batch) == max_rows
    assert batches == by_length(list(lengths), max_tokens, max_rows)


def test_batches_of_equal_lengths_keep_their_order():
    assert by_length([3, 5, 3, 5], 10) == [[1, 3], [0, 2]]
    with pytest.raises(ValueError):
        by_length([1], 1, 0)
