"""Prompts read at the start of decoding: up to the lowest steered block once, whatever the number of multipliers and responses.

block      prefix (the template)   rest of a prompt
> base     once per multiplier     once per row            steered
<= base    once                    once per prompt         not steered: recorded, the rows that want it take it from there

A long prefix is not copied into the rows: while decoding, attention reads it where it is, once for all rows of a multiplier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from spilt import memory
from spilt.data.batches import by_length
from spilt.data.chat import Encoded
from spilt.engine import attention, packing, suffix
from spilt.engine.activations import prefix_pairs
from spilt.steering import hooks

MakeSites = Callable[[Tensor], list[hooks.Applied]]  # multipliers [B, 1, 1] -> the sites that are attached for those rows


class Row(NamedTuple):
    """One text to make. multiplier 0: unsteered (Steering.identity). seed: decides its random numbers, whatever the batch."""

    prompt: tuple[int, ...]
    multiplier: float
    seed: str


class Started(NamedTuple):
    """Rows whose prompts have been read: right-padded to one length T."""

    rows: list[int]  # numbers in the request
    multiplier: Tensor  # [B, 1, 1]
    pairs: Iterable[tuple[Tensor, Tensor]]  # keys and values [B, H, T, d] of each layer, without a shared beginning; read once
    scores: Tensor  # [B, V] of the next token


def forward(
    model: nn.Module,
    sites: list[hooks.Applied],
    tokens: Tensor,
    lengths: list[int],
    cache: DynamicCache,
    begun: attention.Begun | None = None,
) -> Tensor:
    """Scores [B, V] of the token after tokens [B], which come behind `lengths` others each: into the cache's PreallocatedKV.

    begun: the first of those, where the cache does not hold them.
    """
    width, place = max(lengths) + 1, torch.tensor(lengths, device=tokens.device)[:, None]
    layers: list[Any] = cache.layers
    shared = begun.length if begun else 0
    if attention.products_win(layers[0].stores[0]) and layers[0].columns + shared <= 2 * width:
        width = layers[0].columns + shared  # stores as they lie: copying their first columns costs more than masking the others
    for layer in layers:
        layer.begin(place[:, 0] - shared, width - shared)
    with hooks.attach(model, sites), attention.next_token(model, begun):
        return next_scores(model, tokens, place, torch.arange(width, device=tokens.device), cache).to(tokens.device)


def next_scores(model: nn.Module, tokens: Tensor, place: Tensor, columns: Tensor, cache: DynamicCache) -> Tensor:
    """Scores [B, V] of the token after tokens [B] at place [B, 1], which see the columns (0, 1, ...) up to their own."""

    def visible(window: int | None) -> Tensor:
        seen = columns <= place
        return (seen if window is None else seen & (columns > place - window))[:, None]

    masks = packing.attention_masks(model, visible)
    out = model(
        input_ids=tokens[:, None], position_ids=place, attention_mask=masks, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1].float()


class Prompts:
    """Prompts up to the lowest steered block, run once whatever the number of multipliers and responses.

    What all prompts share (the template's beginning) is run once: below that block for all, above it once per multiplier.
    """

    def __init__(
        self, model: nn.Module, make_sites: MakeSites, rows: Sequence[Row], pad: int, device: torch.device, together: int = 0
    ) -> None:
        """together: rows that will be decoded at once, without a copy of the prefix in each if attention reads it faster (0: with one)."""
        self.model, self.make_sites, self.pad, self.device = model, make_sites, pad, device
        sites = make_sites(torch.zeros(1, 1, 1, device=device))
        self.base = min(hooks.base(site.layer, site.intervention) for site in sites)
        self.read_points = tuple({site.intervention.read_point for site in sites if self._on_stream(site) and site.intervention.read_point})
        self.left = Counter(row.prompt for row in rows)  # rows that still want the prompt
        self.kept: dict[tuple[int, ...], tuple[suffix.Recorded, packing.KeysValues]] = {}
        self.multipliers = list(dict.fromkeys(row.multiplier for row in rows))
        sequences = [Encoded(prompt, len(prompt), 0) for prompt in self.left]
        self.prefix = packing.prefix_length(sequences) if sequences and self.base >= 0 else 0
        self.heads: packing.KeysValues | None = None if self.prefix else {}  # above the base, [M, H, P, d] in the order of `multipliers`
        self.head: suffix.Recorded | None = None
        self.below: packing.KeysValues = {}
        if self.prefix:
            ids = torch.tensor([sequences[0].input_ids[: self.prefix]], device=device)
            cache = packing.cache_of({})
            self.head = suffix.record(model, self.base, ids, self.read_points, past_key_values=cache, use_cache=True)
            self.below = packing.pairs_of(cache)
        apart = self.prefix * together >= attention.MANY and attention.replaceable(model)
        self.shared = self.prefix if apart else 0  # tokens that no row holds

    def begun(self, rows: Sequence[Row]) -> attention.Begun | None:
        """What these rows begin with, where they do not hold it themselves."""
        if not self.shared:
            return None
        group = [self.multipliers.index(row.multiplier) for row in rows]
        groups, alike = (attention.Groups.of(g, n, self.device) for g, n in ((group, len(self.multipliers)), ([0] * len(rows), 1)))
        return attention.Begun(self.below | self._heads(), groups, alike)

    def _on_stream(self, site: hooks.Applied) -> bool:
        return site.layer == self.base and site.intervention.write_point == "block"

    def _rows(self, prompts: Sequence[tuple[int, ...]]) -> packing.Rows:
        packs = [packing.pack([Encoded(prompt, len(prompt) + 1, 0)], (0,), self.prefix) for prompt in prompts]
        return packing.Rows(*(t.to(self.device) for t in packing.pad_packs(packs, self.pad)))

    def _steered(self, seen: suffix.Recorded, multiplier: Tensor) -> tuple[Tensor, list[hooks.Applied]]:
        h, above = seen.h, []
        for site in self.make_sites(multiplier):
            if self._on_stream(site):
                h = hooks.steer(site, h, seen.x.get(site.intervention.read_point or ""))
            else:
                above.append(site)
        return h, above

    def _record(self, prompts: list[tuple[int, ...]]) -> None:
        """Blocks 0..base of prompts that are not there yet."""
        rows = self._rows(prompts)
        cache = packing.cache_of(packing.alike(self.below, len(prompts)))
        inputs = packing.attention_inputs(self.model, rows, self.prefix)
        seen = suffix.record(self.model, self.base, rows.input_ids, self.read_points, past_key_values=cache, **inputs)
        pairs = packing.pairs_of(cache)
        for b, prompt in enumerate(prompts):
            n = len(prompt) - self.prefix
            own = {layer: (k[b, :, self.prefix :][:, :n], v[b, :, self.prefix :][:, :n]) for layer, (k, v) in pairs.items()}
            self.kept[prompt] = suffix.Recorded(seen.h[b, :n], {name: x[b, :n] for name, x in seen.x.items()}), own

    def _heads(self) -> packing.KeysValues:
        """Keys and values of the shared beginning above the base, at every multiplier; computed once."""
        if self.heads is None:
            assert self.head is not None
            each: list[packing.KeysValues] = []
            for multiplier in self.multipliers:
                stream, above = self._steered(self.head, torch.full((1, 1, 1), multiplier, device=self.device))
                with hooks.attach(self.model, above):
                    each.append(prefix_pairs(self.model, self.base, stream, self.pad))
            self.heads = {}
            for layer in each[0]:
                keys, values = zip(*(one[layer] for one in each), strict=True)
                self.heads[layer] = torch.cat(keys), torch.cat(values)
        return self.heads

    def few_at_a_time(self, rows: Sequence[Row], numbers: Sequence[int]) -> Iterator[Started]:
        """`start` of all these, so many at once as a device reads well: what it needs for that does not grow with their number."""
        lengths = [len(rows[i].prompt) - self.prefix for i in numbers]
        for part in by_length(lengths, memory.max_tokens(self.device.type) // 2):  # what is read is held twice until it lies in its place
            yield self.start(rows, [numbers[i] for i in part])

    def start(self, rows: Sequence[Row], numbers: list[int]) -> Started:
        """These rows with their prompts read: cache and the next token's scores."""
        multiplier = torch.tensor([rows[i].multiplier for i in numbers], dtype=torch.float32, device=self.device)[:, None, None]
        prompts = [rows[i].prompt for i in numbers]
        if self.base < 0:  # the first block's inside is steered: nothing can be shared
            return self._whole(list(numbers), prompts, multiplier)
        if new := list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.kept)):
            self._record(new)
        seen, below = zip(*(self.kept[prompt] for prompt in prompts), strict=True)
        self._forget(prompts)
        scores, above = self._above(prompts, seen, multiplier, [rows[i].multiplier for i in numbers])

        def in_order() -> Iterator[tuple[Tensor, Tensor]]:
            """One layer at a time, so that no second copy of the whole cache is ever there."""
            for layer in below[0]:
                yield self._joined(layer, 0, below), self._joined(layer, 1, below)
            for layer in sorted(above):
                keys, values = above.pop(layer)
                yield keys[:, :, self.shared :], values[:, :, self.shared :]

        return Started(list(numbers), multiplier, in_order(), scores)

    def _whole(self, numbers: list[int], prompts: list[tuple[int, ...]], multiplier: Tensor) -> Started:
        """The plain way: whole prompts through the whole model."""
        rows, cache = self._rows(prompts), DynamicCache()
        inputs = packing.attention_inputs(self.model, rows, 0)
        with hooks.attach(self.model, self.make_sites(multiplier)), suffix.head_rows(self.model, _last(rows)):
            scores = self.model(input_ids=rows.input_ids, past_key_values=cache, **inputs).logits[0].float().to(self.device)
        return Started(numbers, multiplier, packing.pairs_of(cache).values(), scores)

    def _above(
        self, prompts: Sequence[tuple[int, ...]], recorded: Sequence[suffix.Recorded], multiplier: Tensor, strengths: Sequence[float]
    ) -> tuple[Tensor, packing.KeysValues]:
        """Scores [B, V] of the token after each prompt, and the keys and values of the blocks above the base."""
        seen = suffix.Recorded(
            pad_sequence([one.h for one in recorded], batch_first=True),
            {name: pad_sequence([one.x[name] for one in recorded], batch_first=True) for name in self.read_points},
        )
        stream, above = self._steered(seen, multiplier)
        rows = self._rows(prompts)
        which = torch.tensor([self.multipliers.index(m) for m in strengths], device=self.device)
        cache = packing.cache_of({layer: (k[which.to(k.device)], v[which.to(v.device)]) for layer, (k, v) in self._heads().items()})
        inputs = packing.attention_inputs(self.model, rows, self.prefix)
        with hooks.attach(self.model, above):
            scores = suffix.logits(self.model, self.base, stream, _last(rows), past_key_values=cache, **inputs).float().to(self.device)
        return scores, packing.pairs_of(cache)

    def _joined(self, layer: int, kv: int, below: Sequence[packing.KeysValues]) -> Tensor:
        """Keys (kv = 0) or values (1) of a layer up to the base, prefix (unless shared) and prompts, right-padded [B, H, T, d]."""
        rest = pad_sequence([pairs[layer][kv].transpose(0, 1) for pairs in below], batch_first=True).transpose(1, 2)
        begun = self.below.get(layer)
        return rest if begun is None or self.shared else torch.cat([begun[kv].expand(len(below), -1, -1, -1), rest], 2)

    def _forget(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """What no later row wants goes."""
        for prompt in prompts:
            self.left[prompt] -= 1
            if not self.left[prompt]:
                self.kept.pop(prompt, None)


def _last(rows: packing.Rows) -> Tensor:
    """[B, T] bool: the last token of each row."""
    lengths = (rows.branch != packing.PADDING).sum(1, keepdim=True)
    return torch.arange(rows.branch.shape[1], device=lengths.device) == lengths - 1
