"""Streams of many sequences at one layer, recorded once and read in any batch: the activation cache."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Activations:
    """What leaves block `layer`, detached, in the model's dtype; x: what enters a read point there, by its name.

    Stored as it was computed: the tokens that all sequences share once, then one row per pack.
    """

    layer: int
    sequences: list[Encoded]
    pad_id: int
    packs: list[Pack]
    prefix: int  # leading tokens shared by all
    prefix_h: Tensor  # [prefix, D]
    prefix_x: dict[str, Tensor]  # [prefix, F]
    h: list[Tensor]  # per pack [n, D]
    x: dict[str, list[Tensor]]  # per pack [n, F]

    def batch(self, indices: Sequence[int], read_point: str | None, device: torch.device, start: int = 0) -> tuple[Batch, suffix.Recorded]:
        """Sequences as they are, right-padded, from token `start` (at most `prefix`) on: ids and masks [B, T], streams [B, T, D]."""
        tokens = Batch(*(t[:, start:].to(device) for t in pad([self.sequences[i] for i in indices], self.pad_id)))
        h = self._sequences(self.prefix_h, self.h, indices, start, device)
        x = (
            {}
            if read_point is None
            else {read_point: self._sequences(self.prefix_x[read_point], self.x[read_point], indices, start, device)}
        )
        return tokens, suffix.Recorded(h, x)

    def _sequences(self, prefix: Tensor, rows: list[Tensor], indices: Sequence[int], start: int, device: torch.device) -> Tensor:
        whole = []
        for i in indices:
            row, place = self.place[i]
            whole.append(torch.cat([prefix[start:], rows[row][list(self.packs[row].places[place])]]).to(device, non_blocking=True))
        return pad_sequence(whole, batch_first=True)

    @property
    def place(self) -> dict[int, tuple[int, int]]:
        """Sequence number -> its pack, and which member it is there."""
        found = self.__dict__.get("_place")
        if found is None:
            found = {i: (row, k) for row, pack in enumerate(self.packs) for k, i in enumerate(pack.members)}
            object.__setattr__(self, "_place", found)
        return found

    def rows(self, numbers: Sequence[int], read_point: str | None, device: torch.device) -> tuple[Rows, suffix.Recorded]:
        """Packs as they lie, right-padded: [B, T], streams [B, T, D]; the prefix comes in a cache."""
        tokens = Rows(*(t.to(device) for t in packing.pad_packs([self.packs[i] for i in numbers], self.pad_id)))
        h = pad_sequence([self.h[i].to(device, non_blocking=True) for i in numbers], batch_first=True)
        x = {} if read_point is None else {read_point: pad_sequence([self.x[read_point][i].to(device) for i in numbers], batch_first=True)}
        return tokens, suffix.Recorded(h, x)

    def first(self, sequences: int) -> Activations:
        """The packs that lie wholly within the first so many sequences."""
        packs = [p for p in self.packs if max(p.members) < sequences]
        kept = (self.layer, self.sequences[:sequences], self.pad_id, packs, self.prefix, self.prefix_h, self.prefix_x)
        return Activations(*kept, self.h[: len(packs)], {name: rows[: len(packs)] for name, rows in self.x.items()})

    def unshared(self) -> Activations:
        """The same streams, every sequence its own row and no prefix: for interventions that treat shared tokens differently."""
        every = range(len(self.sequences))
        packs = [packing.pack(self.sequences, (i,), 0) for i in every]
        device = self.prefix_h.device

        def whole(prefix: Tensor, rows: list[Tensor]) -> list[Tensor]:
            return [self._sequences(prefix, rows, [i], 0, device)[0] for i in every]

        x = {name: whole(self.prefix_x[name], rows) for name, rows in self.x.items()}
        nothing = {name: value[:0] for name, value in self.prefix_x.items()}
        h = whole(self.prefix_h, self.h)
        return Activations(self.layer, self.sequences, self.pad_id, packs, 0, self.prefix_h[:0], nothing, h, x)


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
    read_points: Sequence[str],
    pad_id: int,
    together: int = 1,
    budget: int | None = None,
) -> Activations:
    """One pass up to block `layer`, what is shared only once, longest rows first (running out of memory comes at once).

    together: so many consecutive sequences are the answers of one question.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    prefix = packing.prefix_length(sequences)
    packs = [packing.pack(sequences, range(i, i + together), prefix) for i in range(0, len(sequences), together)]
    names = tuple(read_points)
    cache = packing.cache_of({})
    first = torch.tensor([sequences[0].input_ids[:prefix]], device=device)
    nothing = suffix.Recorded(torch.empty(1, 0, _width(model)), {name: torch.empty(1, 0, 0) for name in names})
    head = suffix.record(model, layer, first, names, past_key_values=cache, use_cache=True) if prefix else nothing
    pairs = packing.pairs_of(cache)
    lengths = [len(p.ids) for p in packs]
    offsets = [0, *itertools.accumulate(lengths)]
    room: dict[str, Tensor] = {}  # stream or read point -> all rows [sum of lengths, width]

    def some(numbers: Sequence[int]) -> None:
        rows = Rows(*(t.to(device) for t in packing.pad_packs([packs[i] for i in numbers], pad_id)))
        inputs = packing.attention_inputs(model, rows, prefix)
        shared = packing.cache_of(pairs, torch.zeros(len(numbers), dtype=torch.long, device=device))
        seen = suffix.record(model, layer, rows.input_ids, names, past_key_values=shared, **inputs)
        for name, value in (("", seen.h), *seen.x.items()):
            if name not in room:
                room[name] = storage(offsets[-1], value.shape[-1], value.dtype, value.device)
            for row, i in enumerate(numbers):
                room[name][offsets[i] : offsets[i + 1]] = value[row, : lengths[i]]

    for numbers in by_length(lengths, budget or max_tokens(device)):
        longest = prefix + lengths[numbers[0]]
        smallest = f"one question of {longest} tokens does not fit in memory up to layer {layer}; lower output_length, or use --device auto"
        memory.halved(some, numbers, f"recording layer {layer}, questions of {longest} tokens", smallest)
    place = room[""].device
    split = {name: list(value.split(lengths)) for name, value in room.items()}
    prefix_x = {name: head.x[name][0].to(place).reshape(prefix, room[name].shape[1]) for name in names}
    prefix_h = head.h[0].to(place, room[""].dtype)
    return Activations(layer, sequences, pad_id, packs, prefix, prefix_h, prefix_x, split[""], {name: split[name] for name in names})


def _width(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[-1])  # type: ignore[operator]


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


def answer_means(model: nn.Module, layer: int, sequences: list[Encoded], multiple_choice: bool, pad_id: int) -> Tensor:
    """The stream at block `layer` averaged over each sequence's answer tokens (or its second-to-last token), float32 [S, D].

    sequences: two answers of each question, one after the other.
    """
    if anatomy.family(model).plain:  # nothing is shared between sequences
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        streams = (suffix.record(model, layer, torch.tensor([s.input_ids], device=device)).h[0] for s in sequences)
    else:
        cache = record(model, layer, sequences, (), pad_id, together=2)
        streams = (cache.batch([i], None, cache.prefix_h.device)[1].h[0] for i in range(len(sequences)))
    means = []
    for sequence, stream in zip(sequences, streams, strict=True):
        h = stream.float()
        means.append(h[-2] if multiple_choice else h[sequence.prompt_length :].mean(0))
    return torch.stack(means)
