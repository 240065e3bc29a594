"""Text from a steered model: one stream of rows, each with its own prompt, multiplier and seed.

Rows of any prompt and multiplier share a batch. A finished row leaves, waiting rows take its place (their keys and values
go to free places beside the running ones, padded on the left), so the batch stays full until the stream ends. What a row gets does not
depend on its company: left padding is masked, positions count real tokens, random numbers belong to the row.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig
from transformers.generation import logits_process as lp

from spilt import memory
from spilt.data.chat import Encoded
from spilt.engine import packing, suffix
from spilt.engine.activations import prefix_pairs
from spilt.engine.kv import PreallocatedKV
from spilt.errors import NotFinite
from spilt.steering import hooks
from spilt.steering.steering import Steering

log = logging.getLogger("spilt")

MakeSites = Callable[[Tensor], list[hooks.Applied]]  # multipliers [B, 1, 1] -> the sites that are attached for those rows


class Row(NamedTuple):
    """One text to make. multiplier 0: unsteered. seed: decides its random numbers, whatever the batch."""

    prompt: tuple[int, ...]
    multiplier: float
    seed: str


class Decoding(NamedTuple):
    """How the next token is chosen. processors see (ids so far [1, t], scores [1, V]); warpers only scores [B, V]."""

    max_new_tokens: int
    sample: bool
    eos: tuple[int, ...]
    pad: int
    processors: list[Any]
    warpers: list[Any]


def decoding(params: dict[str, Any], model: nn.Module, tokenizer: Any) -> Decoding:
    """The request's parameters over the checkpoint's generation_config, over the library's defaults, as `generate` does."""
    own: GenerationConfig = getattr(model, "generation_config", None) or GenerationConfig()

    def value(name: str, default: Any) -> Any:
        given = params.get(name)
        given = getattr(own, name, None) if given is None else given
        return default if given is None else given

    sample = bool(params.get("do_sample", own.do_sample or False))
    processors: list[Any] = []
    if value("repetition_penalty", 1.0) != 1.0:
        processors.append(lp.RepetitionPenaltyLogitsProcessor(float(value("repetition_penalty", 1.0))))
    if value("no_repeat_ngram_size", 0) > 0:
        processors.append(lp.NoRepeatNGramLogitsProcessor(int(value("no_repeat_ngram_size", 0))))
    warpers: list[Any] = []
    if sample:
        if value("temperature", 1.0) != 1.0:
            warpers.append(lp.TemperatureLogitsWarper(float(value("temperature", 1.0))))
        if value("top_k", 50) > 0:  # 50 is what `generate` takes when nobody says otherwise
            warpers.append(lp.TopKLogitsWarper(int(value("top_k", 50))))
        if value("top_p", 1.0) < 1.0:
            warpers.append(lp.TopPLogitsWarper(float(value("top_p", 1.0))))
        if value("min_p", 0.0) > 0.0:
            warpers.append(lp.MinPLogitsWarper(float(value("min_p", 0.0))))
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    return Decoding(int(value("max_new_tokens", 128)), sample, ends, int(pad), processors, warpers)


class _Started(NamedTuple):
    """Rows whose prompts have been read: left-padded to one length T."""

    rows: list[int]  # numbers in the request
    multiplier: Tensor  # [B, 1, 1]
    mask: Tensor  # [B, T] long, 1 = real token
    pairs: Iterable[tuple[Tensor, Tensor]]  # keys and values [B, H, T, d] of each layer, read once
    scores: Tensor  # [B, V] of the next token


class _Active:
    """The rows that are being decoded: their tokens, cache and masks."""

    def __init__(self, started: _Started, capacity: int) -> None:
        self.rows, self.multiplier, self.mask, self.scores = started.rows, started.multiplier, started.mask, started.scores
        self.rooms: list[PreallocatedKV] = []
        for keys, values in started.pairs:
            room = PreallocatedKV(capacity)
            room.join(keys, values, keys.shape[2])
            self.rooms.append(room)
        self.cache = DynamicCache()
        self.cache.layers = list(self.rooms)  # every layer keeps all positions: windows are masks

    def select(self, keep: list[int]) -> Tensor:
        """Only these rows stay, the last ones in the places of those that go: returns their order.

        Columns on the left that no row needs any more go.
        """
        order = list(range(len(keep)))
        holes = sorted(set(order) - set(keep))
        movers = [row for row in keep if row >= len(keep)]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        index = torch.tensor(order, device=self.mask.device)
        self.rows = [self.rows[i] for i in order]
        self.multiplier, self.mask, self.scores = self.multiplier[index], self.mask[index], self.scores[index]
        dropped = int(self.mask.any(0).int().argmax())
        self.mask = self.mask[:, dropped:]
        for room in self.rooms:
            room.keep(torch.tensor(holes, device=index.device), torch.tensor(movers, device=index.device), len(keep), dropped)
        return index

    def join(self, started: _Started) -> None:
        """Others come in; whose mask is shorter is padded on the left."""
        width = max(self.mask.shape[1], started.mask.shape[1])
        for room, (keys, values) in zip(self.rooms, started.pairs, strict=True):
            room.join(keys, values, width)
        self.mask = torch.cat([functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, started.mask)])
        self.multiplier, self.scores = torch.cat([self.multiplier, started.multiplier]), torch.cat([self.scores, started.scores])
        self.rows = self.rows + started.rows


def _forward(model: nn.Module, sites: list[hooks.Applied], ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Scores [B, V] of the token after ids [B, t]; the cache grows by t."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with hooks.attach(model, sites):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].float().to(ids.device)


class _Prompts:
    """Prompts up to the lowest steered block, run once whatever the number of multipliers and responses.

    What all prompts share (the template's beginning) is run once: below that block for all, above it once per multiplier.
    """

    def __init__(self, model: nn.Module, make_sites: MakeSites, rows: Sequence[Row], pad: int, device: torch.device) -> None:
        self.model, self.make_sites, self.pad, self.device = model, make_sites, pad, device
        sites = make_sites(torch.zeros(1, 1, 1, device=device))
        self.base = min(hooks.base(site.layer, site.intervention) for site in sites)
        self.read_points = tuple({site.intervention.read_point for site in sites if self._on_stream(site) and site.intervention.read_point})
        self.left = Counter(row.prompt for row in rows)  # rows that still want the prompt
        self.kept: dict[tuple[int, ...], tuple[suffix.Recorded, packing.KeysValues]] = {}
        self.heads: dict[float, packing.KeysValues] = {}
        sequences = [Encoded(prompt, len(prompt), 0) for prompt in self.left]
        self.prefix = packing.prefix_length(sequences) if sequences and self.base >= 0 else 0
        self.head: suffix.Recorded | None = None
        self.below: packing.KeysValues = {}
        if self.prefix:
            ids = torch.tensor([sequences[0].input_ids[: self.prefix]], device=device)
            cache = packing.cache_of({})
            self.head = suffix.record(model, self.base, ids, self.read_points, past_key_values=cache, use_cache=True)
            self.below = packing.pairs_of(cache)

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
        cache = packing.cache_of(self.below, torch.zeros(len(prompts), dtype=torch.long, device=self.device))
        inputs = packing.attention_inputs(self.model, rows, self.prefix)
        seen = suffix.record(self.model, self.base, rows.input_ids, self.read_points, past_key_values=cache, **inputs)
        pairs = packing.pairs_of(cache)
        for b, prompt in enumerate(prompts):
            n = len(prompt) - self.prefix
            own = {layer: (k[b, :, self.prefix :][:, :n], v[b, :, self.prefix :][:, :n]) for layer, (k, v) in pairs.items()}
            self.kept[prompt] = suffix.Recorded(seen.h[b, :n], {name: x[b, :n] for name, x in seen.x.items()}), own

    def _head(self, multiplier: float) -> packing.KeysValues:
        """Keys and values of the shared beginning above the base, at one multiplier."""
        if multiplier not in self.heads and self.head is not None:
            stream, above = self._steered(self.head, torch.full((1, 1, 1), multiplier, device=self.device))
            with hooks.attach(self.model, above):
                self.heads[multiplier] = prefix_pairs(self.model, self.base, stream, self.pad)
        return self.heads.get(multiplier, {})

    def start(self, rows: Sequence[Row], numbers: list[int]) -> _Started:
        """These rows with their prompts read: cache and the next token's scores."""
        multiplier = torch.tensor([rows[i].multiplier for i in numbers], dtype=torch.float32, device=self.device)[:, None, None]
        prompts = [rows[i].prompt for i in numbers]
        if self.base < 0:  # the first block's inside is steered: nothing can be shared
            return _prefill(self.model, self.make_sites(multiplier), prompts, list(numbers), multiplier, self.pad, self.device)
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.kept))
        if new:
            self._record(new)
        kept = [self.kept[prompt] for prompt in prompts]
        names = self.read_points
        seen = suffix.Recorded(
            pad_sequence([k[0].h for k in kept], batch_first=True),
            {n: pad_sequence([k[0].x[n] for k in kept], batch_first=True) for n in names},
        )
        stream, above = self._steered(seen, multiplier)
        own = self._rows(prompts)
        real = own.branch != packing.PADDING
        lengths = real.sum(1)
        last = torch.arange(real.shape[1], device=self.device) == (lengths - 1)[:, None]
        heads = [self._head(rows[i].multiplier) for i in numbers]
        upper = {layer: tuple(torch.cat([head[layer][kv] for head in heads]) for kv in (0, 1)) for layer in heads[0]}
        cache = packing.cache_of(upper)  # type: ignore[arg-type]
        inputs = packing.attention_inputs(self.model, own, self.prefix)
        with hooks.attach(self.model, above):
            scores = suffix.logits(self.model, self.base, stream, last, past_key_values=cache, **inputs).float().to(self.device)
        pairs = packing.pairs_of(cache)

        def of_prompts(layer: int, kv: int) -> Tensor:
            """Keys or values of a layer up to the base, [B, H, width, d]."""
            rest = pad_sequence([k[1][layer][kv].transpose(0, 1) for k in kept], batch_first=True).transpose(1, 2)
            begun = self.below.get(layer)
            return rest if begun is None else torch.cat([begun[kv].expand(len(kept), -1, -1, -1), rest], 2)

        # from right to left padding: row b moves right by what it is shorter
        width = self.prefix + real.shape[1]
        place = torch.arange(width, device=self.device) - (real.shape[1] - lengths)[:, None]
        mask = (place >= 0).long()

        def moved(t: Tensor) -> Tensor:
            return t.gather(2, place.clamp(min=0).to(t.device)[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))

        for prompt in prompts:
            self.left[prompt] -= 1
            if not self.left[prompt]:
                self.kept.pop(prompt, None)

        def in_order() -> Iterator[tuple[Tensor, Tensor]]:
            """One layer at a time, so that no second copy of the whole cache is ever there."""
            for layer in kept[0][1]:
                yield moved(of_prompts(layer, 0)), moved(of_prompts(layer, 1))
            for layer in sorted(pairs):
                keys, values = pairs.pop(layer)
                yield moved(keys), moved(values)

        return _Started(list(numbers), multiplier, mask, in_order(), scores)


def _prefill(
    model: nn.Module,
    sites: list[hooks.Applied],
    prompts: list[tuple[int, ...]],
    numbers: list[int],
    multiplier: Tensor,
    pad: int,
    device: torch.device,
) -> _Started:
    """The plain way: whole prompts through the whole model."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache()
    scores = _forward(model, sites, ids, mask, cache)
    return _Started(numbers, multiplier, mask, packing.pairs_of(cache).values(), scores)


def choose(scores: Tensor, how: Decoding, uniform: Tensor | None, ids: list[list[int]]) -> Tensor:
    """The next token of each row [B]: the likeliest, or the inverse of the cumulative distribution at the row's own number."""
    if how.processors:
        rows = []
        for row, so_far in zip(scores.split(1), ids, strict=True):  # one by one: the library would count the padding as text
            context = torch.tensor([so_far], device=scores.device)
            for process in how.processors:
                row = process(context, row)
            rows.append(row)
        scores = torch.cat(rows)
    if uniform is None:
        return scores.argmax(-1)
    for warp in how.warpers:
        scores = warp(None, scores)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    picked = torch.searchsorted(cumulative, (uniform[:, None] * cumulative[:, -1:]), right=True)[:, 0]
    return picked.clamp(max=scores.shape[-1] - 1)


def refuse_not_finite(scores: Tensor, rows: Sequence[Row]) -> None:
    """Raises NotFinite unless the largest score of each row is a number: NaN goes through max, among infinite ones none is likeliest."""
    good = torch.isfinite(scores.amax(-1))
    if good.all():
        return
    row = rows[int((~good).nonzero()[0, 0])]
    way_out = f"at multiplier {row.multiplier:g}; use a smaller multiplier or another --dtype (bfloat16, float32)"
    raise NotFinite(
        "the model's scores of the next token are NaN or infinite "
        + (way_out if row.multiplier else "without any steering; use another --dtype (bfloat16, float32)")
    )


class _Stream:
    """All rows of a request on their way: waiting, active, finished."""

    def __init__(self, model: nn.Module, make_sites: MakeSites, rows: Sequence[Row], how: Decoding, batch_size: int) -> None:
        self.model, self.make_sites, self.rows, self.how, self.batch_size = model, make_sites, rows, how, batch_size
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.new: dict[int, list[int]] = {i: [] for i in range(len(rows))}  # of rows that are not finished
        self.draws: dict[int, random.Random] = {}
        self.active: _Active | None = None
        self.finished: list[tuple[int, list[int]]] = []
        self.wait(range(len(rows)))
        self.prompts = _Prompts(model, make_sites, rows, how.pad, self.device)

    def wait(self, numbers: Iterable[int]) -> None:
        """Taken from the end: longest prompts first, all rows of a prompt beside each other."""
        self.waiting = sorted(numbers, key=lambda i: (len(self.rows[i].prompt), self.rows[i].prompt, -i))

    def advance(self) -> None:
        """Waiting rows take the free places, and every active row gets one token."""
        self._fill()
        active = self.active
        assert active is not None
        refuse_not_finite(active.scores, [self.rows[i] for i in active.rows])
        draws = [self.draws[i].random() for i in active.rows] if self.how.sample else None
        uniform = None if draws is None else torch.tensor(draws, dtype=torch.float64, device=self.device)
        ids = [[*self.rows[i].prompt, *self.new[i]] for i in active.rows] if self.how.processors else []
        tokens = choose(active.scores, self.how, uniform, ids)
        keep = []
        for place, (i, token) in enumerate(zip(active.rows, tokens.tolist(), strict=True)):
            self.new[i].append(token)
            if token in self.how.eos or len(self.new[i]) >= self.how.max_new_tokens:
                self.finished.append((i, self.new.pop(i)))
            else:
                keep.append(place)
        if not keep:
            self.active = None
            return
        if len(keep) < len(active.rows):
            tokens = tokens[active.select(keep)]
        active.mask = torch.cat([active.mask, active.mask.new_ones(len(keep), 1)], 1)
        active.scores = _forward(self.model, self.make_sites(active.multiplier), tokens[:, None], active.mask, active.cache)

    def _fill(self) -> None:
        free = self.batch_size - (len(self.active.rows) if self.active else 0)
        # joining copies the cache, so it waits until a quarter of the batch is free
        if not self.waiting or (self.active is not None and free * 4 < self.batch_size):
            return
        fresh = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        if self.how.sample:
            self.draws.update({i: random.Random(self.rows[i].seed) for i in fresh})
        started = self.prompts.start(self.rows, fresh)
        if self.active is None:
            self.active = _Active(started, min(self.batch_size, len(self.rows)))
        else:
            self.active.join(started)

    def halve(self, error: Exception) -> None:
        """Out of memory: the rows under way begin again, half as many at once."""
        under_way = len(self.new) - len(self.waiting)
        if self.batch_size == 1:
            tokens = max(len(self.rows[i].prompt) for i in self.new)
            raise memory.OutOfMemory(
                f"one prompt of up to {tokens} tokens with {self.how.max_new_tokens} new ones does not fit in memory, "
                f"steered at layer {', '.join(str(site.layer) for site in self.make_sites(torch.zeros(1, 1, 1)))}; "
                "lower generation_params.max_new_tokens, or use --device auto or a smaller --dtype"
            ) from error
        self.batch_size = max(1, min(self.batch_size, under_way) // 2)
        layers = ", ".join(str(site.layer) for site in self.make_sites(torch.zeros(1, 1, 1)))
        tokens = max(len(self.rows[i].prompt) + len(self.new[i]) for i in self.new)
        log.warning(
            "out of memory: text from %d prompts at once of up to %d tokens, steered at layer %s; going on with --batch_size %d",
            under_way, tokens, layers, self.batch_size,
        )  # fmt: skip
        self.active = None
        self.new = {i: [] for i in self.new}
        self.wait(self.new)
        self.prompts = _Prompts(self.model, self.make_sites, [self.rows[i] for i in self.new], self.how.pad, self.device)


@torch.no_grad()
def generate(model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (row number, new token ids) as rows finish: at an end token (kept) or after max_new_tokens.

    Out of memory: the rows under way begin again in batches half as large.
    """

    def sites(multiplier: Tensor) -> list[hooks.Applied]:
        return [hooks.Applied(site.layer, made, multiplier) for site, made in steering]

    stream = _Stream(model, sites, rows, how, batch_size)
    while stream.new:
        try:
            stream.advance()
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            stream.halve(error)
        yield from stream.finished
        stream.finished.clear()
