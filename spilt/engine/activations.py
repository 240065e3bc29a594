"""Streams of many sequences at one layer, recorded once and read in any batch: the activation cache."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spilt import memory
from spilt.data.batches import Batch, by_length, pad
from spilt.data.chat import Encoded
from spilt.engine import packing, suffix
from spilt.engine.packing import Pack, Rows
from spilt.steering import anatomy

log = logging.getLogger("spilt")
QUESTIONS = 64  # whose streams at several blocks are held at once


@dataclass(frozen=True)
class Activations:
    """What leaves block `layer`, detached, in the model's dtype; x: what enters a read point there, by its name.

    Stored as it was computed: the tokens that all sequences share once, then those of each pack, then a row of zeros for padding.
    """

    layer: int
    sequences: list[Encoded]
    pad_id: int
    packs: list[Pack]
    prefix: int  # leading tokens shared by all
    h: Tensor  # [rows, D]
    x: dict[str | int, Tensor]  # [rows, F]; of a lower block by its number [rows, D]
    rows_of: list[Tensor]  # per pack: where its tokens lie

    def batch(self, indices: Sequence[int], read_point: str | None, device: torch.device, start: int = 0) -> tuple[Batch, suffix.Recorded]:
        """Sequences as they are, right-padded, from token `start` (at most `prefix`) on: ids and masks [B, T], streams [B, T, D]."""
        tokens = Batch(*(_sent(t[:, start:], device) for t in pad([self.sequences[i] for i in indices], self.pad_id)))
        return tokens, self._streams([self.places[i][start:] for i in indices], read_point, device)

    def rows(self, numbers: Sequence[int], read_point: str | None, device: torch.device) -> tuple[Rows, suffix.Recorded]:
        """Packs as they lie, right-padded: [B, T], streams [B, T, D]; the prefix comes in a cache."""
        tokens = Rows(*(_sent(t, device) for t in packing.pad_packs([self.packs[i] for i in numbers], self.pad_id)))
        return tokens, self._streams([self.rows_of[i] for i in numbers], read_point, device)

    def _streams(self, where: list[Tensor], read_point: str | None, device: torch.device) -> suffix.Recorded:
        index = pad_sequence(where, batch_first=True, padding_value=len(self.h) - 1)
        return suffix.Recorded(
            _picked(self.h, index, device), {} if read_point is None else {read_point: _picked(self.x[read_point], index, device)}
        )

    @cached_property
    def places(self) -> dict[int, Tensor]:
        """Sequence number -> where its tokens lie, the prefix's first."""
        shared = torch.arange(self.prefix)
        return {
            i: torch.cat([shared, rows[list(own)]])
            for pack, rows in zip(self.packs, self.rows_of, strict=True)
            for i, own in zip(pack.members, pack.places, strict=True)
        }

    def first(self, sequences: int) -> Activations:
        """The packs that lie wholly within the first so many sequences."""
        packs = [pack for pack in self.packs if max(pack.members) < sequences]
        return replace(self, sequences=self.sequences[:sequences], packs=packs, rows_of=self.rows_of[: len(packs)])

    def unshared(self) -> Activations:
        """The same streams, every sequence its own row and no prefix: for interventions that treat shared tokens differently."""
        every = range(len(self.sequences))
        packs = [packing.pack(self.sequences, (i,), 0) for i in every]
        return replace(self, packs=packs, prefix=0, rows_of=[self.places[i] for i in every])


def _picked(rows: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """rows[index] on `device`: gathered where the rows lie, and sent from pinned memory, which nobody waits for."""
    pinned = rows.device.type == "cpu" and device.type == "cuda"
    picked = torch.empty(*index.shape, rows.shape[1], dtype=rows.dtype, device=rows.device, pin_memory=pinned)
    torch.index_select(rows, 0, _sent(index.flatten(), rows.device), out=picked.view(-1, rows.shape[1]))
    return picked.to(device, non_blocking=True)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


SHARE_OF_DEVICE, SHARE_OF_HOST = 0.25, 0.5  # of the memory that is free now


def storage(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for [rows, width] in the smallest safe place: the device, pinned host memory, a memory-mapped temporary file."""
    size = rows * width * dtype.itemsize
    if device.type == "cuda":
        if size < SHARE_OF_DEVICE * memory.free(device):
            return torch.empty(rows, width, dtype=dtype, device=device)
        log.warning("%.1f GiB of activations do not fit beside the model: kept in host memory", size / 2**30)
    if size < SHARE_OF_HOST * memory.free():
        return torch.empty(rows, width, dtype=dtype, pin_memory=device.type == "cuda")
    log.warning("%.1f GiB of activations do not fit in memory: kept in a temporary file in %s", size / 2**30, tempfile.gettempdir())
    file = tempfile.NamedTemporaryFile(prefix="spilt-activations-")  # noqa: SIM115 - unlinked when closed; the mapping keeps its pages
    room = torch.from_file(file.name, shared=True, size=rows * width, dtype=dtype).view(rows, width)
    file.close()
    return room


def max_tokens(device: torch.device, backward: bool = False) -> int:
    """Padded tokens per batch: enough to fill the arithmetic units, few enough for the caches, or for what a backward pass keeps."""
    return memory.max_tokens(device.type, backward)


def record(
    model: nn.Module,
    layer: int,
    sequences: list[Encoded],
    read_points: Sequence[str | int],
    pad_id: int,
    together: int = 1,
    budget: int | None = None,
) -> Activations:
    """One pass up to block `layer`, what is shared only once, longest rows first (running out of memory comes at once).

    together: so many consecutive sequences are the answers of one question.
    """
    device = anatomy.input_device(model)
    prefix = packing.prefix_length(sequences)
    packs = [packing.pack(sequences, range(i, i + together), prefix) for i in range(0, len(sequences), together)]
    names = tuple(read_points)
    cache = packing.cache_of({})
    first = torch.tensor([sequences[0].input_ids[:prefix]], device=device)
    nothing = suffix.Recorded(torch.empty(1, 0, 1), {name: torch.empty(1, 0, 1) for name in names})
    head = suffix.record(model, layer, first, names, past_key_values=cache, use_cache=True) if prefix else nothing
    pairs = packing.pairs_of(cache)
    lengths = [len(p.ids) for p in packs]
    offsets = list(itertools.accumulate(lengths, initial=prefix))
    room: dict[str | int, Tensor] = {}  # stream or read point -> all rows [prefix + sum of lengths + 1, width]

    def some(numbers: Sequence[int]) -> None:
        rows = Rows(*(t.to(device) for t in packing.pad_packs([packs[i] for i in numbers], pad_id)))
        inputs = packing.attention_inputs(model, rows, prefix)
        shared = packing.given(pairs, len(numbers))
        seen = suffix.record(model, layer, rows.input_ids, names, past_key_values=shared, **inputs)
        for name, value in (("", seen.h), *seen.x.items()):
            if name not in room:
                room[name] = storage(offsets[-1] + 1, value.shape[-1], value.dtype, value.device)
                room[name][:prefix] = (head.h if name == "" else head.x[name])[0]
                room[name][-1] = 0
            for row, i in enumerate(numbers):
                room[name][offsets[i] : offsets[i + 1]] = value[row, : lengths[i]]

    for numbers in by_length(lengths, budget or max_tokens(device)):
        longest = prefix + lengths[numbers[0]]
        smallest = f"one question of {longest} tokens does not fit in memory up to layer {layer}; lower output_length, or use --device auto"
        memory.halved(some, numbers, f"recording layer {layer}, questions of {longest} tokens", smallest)
    rows_of = [torch.arange(start, start + length) for start, length in zip(offsets, lengths, strict=False)]
    return Activations(layer, sequences, pad_id, packs, prefix, room.pop(""), room, rows_of)


def prefix_pairs(model: nn.Module, layer: int, stream: Tensor, pad_id: int) -> packing.KeysValues:
    """Keys and values of the blocks after `layer` for leading tokens [B, prefix, D] that leave it as `stream`."""
    cache = packing.cache_of({})
    rows, prefix = stream.shape[:2]
    if prefix:
        positions = torch.arange(prefix, device=stream.device).expand(rows, -1)
        lone = Rows(torch.full_like(positions, pad_id), positions, torch.full_like(positions, packing.SHARED))
        inputs = packing.attention_inputs(model, lone, 0)
        suffix.logits(
            model, layer, stream, torch.zeros(rows, prefix, dtype=torch.bool, device=stream.device), past_key_values=cache, **inputs
        )
    return packing.pairs_of(cache)


def answer_means(
    model: nn.Module, layers: Collection[int], sequences: list[Encoded], multiple_choice: bool, pad_id: int, together: int = 2
) -> dict[int, Tensor]:
    """The stream at each of these blocks averaged over each sequence's answer tokens (or its second-to-last token), float32 [S, D].

    One pass up to the highest. sequences: so many of each question (`together`), one after the other.
    """
    *below, top = sorted(set(layers))
    means: dict[int, list[Tensor]] = {layer: [] for layer in (*below, top)}

    def add(sequence: Encoded, layer: int, stream: Tensor) -> None:
        h = stream.float()
        means[layer].append(h[-2] if multiple_choice else h[sequence.prompt_length :].mean(0))

    if anatomy.family(model).plain:  # nothing is shared between sequences
        device = anatomy.input_device(model)
        for sequence in sequences:
            seen = suffix.record(model, top, torch.tensor([sequence.input_ids], device=device), (*below,))
            for layer in means:
                add(sequence, layer, seen.h[0] if layer == top else seen.x[layer][0])
    else:
        for start in range(0, len(sequences), QUESTIONS * together):  # all blocks' streams of a few at a time
            some = sequences[start : start + QUESTIONS * together]
            cache = record(model, top, some, below, pad_id, together=together)
            for i, sequence in enumerate(some):
                for layer in means:
                    add(sequence, layer, (cache.h if layer == top else cache.x[layer])[cache.places[i].to(cache.h.device)])
    return {layer: torch.stack(found) for layer, found in means.items()}
