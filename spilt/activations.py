"""Streams of many sequences at one layer, recorded once and read in any batch: the activation cache."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spilt import memory, suffix
from spilt.data.batches import Batch, by_length, pad
from spilt.data.chat import Sequence


class Activations(NamedTuple):
    """h[i] [T_i, D] and x[name][i] [T_i, F] for sequence i, in the model's dtype, detached."""

    sequences: list[Sequence]
    h: list[Tensor]
    x: dict[str, list[Tensor]]
    pad_id: int

    def batch(self, indices: Seq[int], component: str | None, device: torch.device) -> tuple[Batch, suffix.Recorded]:
        """Right-padded: token ids and masks [B, T], streams [B, T, D] (and the one read point that is needed)."""
        tokens = Batch(*(t.to(device) for t in pad([self.sequences[i] for i in indices], self.pad_id)))
        h = pad_sequence([self.h[i].to(device, non_blocking=True) for i in indices], batch_first=True)
        x = {} if component is None else {component: pad_sequence([self.x[component][i].to(device) for i in indices], batch_first=True)}
        return tokens, suffix.Recorded(h, x)


def max_tokens(device: torch.device) -> int:
    """Padded tokens per batch of recording and scoring: enough to fill the arithmetic units, small enough to stay in cache."""
    return 16384 if device.type == "cuda" else 2048


def record(
    model: nn.Module, layer: int, sequences: list[Sequence], components: Seq[str], pad_id: int, budget: int | None = None
) -> Activations:
    """One pass per sequence up to block `layer`, longest batches first (running out of memory comes at once)."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    h: dict[int, Tensor] = {}
    x: dict[str, dict[int, Tensor]] = {name: {} for name in components}
    lengths = [len(s.input_ids) for s in sequences]

    def some(indices: Seq[int]) -> None:
        batch = pad([sequences[i] for i in indices], pad_id)
        seen = suffix.record(model, layer, batch.input_ids.to(device), tuple(components))
        for row, i in enumerate(indices):
            h[i] = seen.h[row, : lengths[i]].clone()
            for name in components:
                x[name][i] = seen.x[name][row, : lengths[i]].clone()

    for indices in by_length(lengths, budget or max_tokens(device)):
        longest = lengths[indices[0]]
        smallest = f"one sequence of {longest} tokens does not fit in memory up to layer {layer}; lower output_length, or use --device auto"
        memory.halved(some, indices, f"recording layer {layer}, sequences of {longest} tokens", smallest)
    order = range(len(sequences))
    return Activations(sequences, [h[i] for i in order], {name: [kept[i] for i in order] for name, kept in x.items()}, pad_id)
