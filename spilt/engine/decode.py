"""Text from a steered model: one stream of rows, each with its own prompt, multiplier and seed.

Rows of any prompt and multiplier share a batch. A finished row leaves, waiting rows take its place (their keys and values
go to free places beside the running ones), so the batch stays full until the stream ends. What a row gets does not
depend on its company: what lies right of its tokens is masked, positions count its own tokens, random numbers belong to the row.
The step itself is prompts.forward, or by `--decode_step` that of static.py, whose shapes stay.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spilt import in_step, memory
from spilt.engine.choice import PLAIN_STEP
from spilt.engine.kv import PreallocatedKV
from spilt.engine.prompts import MakeSites, Prompts, Row, Started, forward
from spilt.engine.sampling import Decoding, choose
from spilt.engine.static import StaticStep
from spilt.errors import NotFinite
from spilt.steering import anatomy
from spilt.steering.steering import Steering

log = logging.getLogger("spilt")


class Active:
    """The rows that are being decoded, their cache, and the scores of their next tokens."""

    def __init__(self, capacity: int, columns: int) -> None:
        self.rows: list[int] = []
        self.multiplier, self.scores = torch.zeros(0, 1, 1), torch.zeros(0, 0)
        self.places = capacity, columns
        self.layers: list[PreallocatedKV] = []
        self.cache = DynamicCache()

    def select(self, keep: list[int], width: int) -> Tensor:
        """Only these rows stay, the last ones in the places of those that go: returns their order."""
        order = list(range(len(keep)))
        holes = sorted(set(order) - set(keep))
        movers = [row for row in keep if row >= len(keep)]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        index = torch.tensor(order, device=self.multiplier.device)
        self.rows, self.multiplier = [self.rows[i] for i in order], self.multiplier[index]
        for layer in self.layers if holes else []:
            layer.keep(torch.tensor(holes), torch.tensor(movers), width)
        return index

    def clear(self) -> None:
        """All have gone; their places stay."""
        self.rows, self.multiplier, self.scores = [], self.multiplier[:0], self.scores[:0]

    def join(self, started: Started) -> None:
        """Others come in, after those that are there."""
        for number, (keys, values) in enumerate(started.pairs):
            if number == len(self.layers):
                self.layers.append(PreallocatedKV(*self.places))
            self.layers[number].join(keys, values, len(self.rows))
        self.cache.layers = list(self.layers)  # every layer keeps all positions: windows are masks
        before = [(self.multiplier, self.scores)] if self.rows else []
        both = zip(*before, (started.multiplier, started.scores), strict=True)
        self.multiplier, self.scores = map(torch.cat, both)
        self.rows = self.rows + started.rows


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

    def __init__(self, model: nn.Module, make_sites: MakeSites, rows: Sequence[Row], how: Decoding, batch_size: int, step: str) -> None:
        self.model, self.make_sites, self.rows, self.how, self.batch_size, self.step = model, make_sites, rows, how, batch_size, step
        self.device = anatomy.input_device(model)
        self.new: dict[int, list[int]] = {i: [] for i in range(len(rows))}  # of rows that are not finished
        self.draws: dict[int, random.Random] = {}
        self.active: Active | None = None
        self.static: StaticStep | None = None
        self.finished: list[tuple[int, list[int]]] = []
        self.columns = max((len(row.prompt) for row in rows), default=0) + how.max_new_tokens
        self.wait(range(len(rows)))
        self.prompts = self._prompts(rows)

    def _prompts(self, rows: Sequence[Row]) -> Prompts:
        together = min(self.batch_size, len(rows)) if self.step == PLAIN_STEP else 0
        return Prompts(self.model, self.make_sites, rows, self.how.pad, self.device, together)

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
        uniform = None if draws is None else torch.tensor(draws, dtype=torch.float64)
        ids = [[*self.rows[i].prompt, *self.new[i]] for i in active.rows] if self.how.processors else []
        tokens = in_step.same(self.model, choose(active.scores, self.how, uniform, ids))
        keep = []
        for place, (i, token) in enumerate(zip(active.rows, tokens.tolist(), strict=True)):
            self.new[i].append(token)
            if token in self.how.eos or len(self.new[i]) >= self.how.max_new_tokens:
                self.finished.append((i, self.new.pop(i)))
            else:
                keep.append(place)
        if not keep:
            active.clear()
            return
        if len(keep) < len(active.rows):
            tokens = tokens[active.select(keep, max(self._held(active.rows[place]) for place in keep) - self.prompts.shared)]
        active.scores = self._step(active, tokens, [self._held(i) for i in active.rows])

    def _step(self, active: Active, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Scores [B, V] of the tokens after these, each behind as many of its row."""
        if self.step == PLAIN_STEP:
            begun = self.prompts.begun([self.rows[i] for i in active.rows])
            return forward(self.model, self.make_sites(active.multiplier), tokens, lengths, active.cache, begun)
        if self.static is None:
            self.static = StaticStep(self.model, self.make_sites, active.cache, *active.places, self.step)
        return self.static(active.multiplier, tokens, lengths)

    def _held(self, i: int) -> int:
        """Tokens of a row whose keys and values are there: all but the last."""
        return len(self.rows[i].prompt) + len(self.new[i]) - 1

    def _fill(self) -> None:
        free = self.batch_size - (len(self.active.rows) if self.active else 0)
        # joining copies the cache, so it waits until a quarter of the batch is free
        if not self.waiting or (self.active is not None and free * 4 < self.batch_size):
            return
        fresh = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        if self.how.sample:
            self.draws.update({i: random.Random(self.rows[i].seed) for i in fresh})
        if self.active is None:
            self.active = Active(min(self.batch_size, len(self.rows)), self.columns - self.prompts.shared)
        for started in self.prompts.few_at_a_time(self.rows, fresh):
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
        self.active = self.static = None
        self.new = {i: [] for i in self.new}
        self.wait(self.new)
        self.prompts = self._prompts([self.rows[i] for i in self.new])


@torch.no_grad()
def generate(
    model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, batch_size: int, *, step: str = PLAIN_STEP
) -> Iterator[tuple[int, list[int]]]:
    """Yields (row number, new token ids) as rows finish: at an end token (kept) or after max_new_tokens.

    step: of choice.STEPS. Out of memory: the rows under way begin again in batches half as large.
    """
    stream = _Stream(model, steering.at, rows, how, batch_size, step)
    while stream.new:
        try:
            stream.advance()
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            stream.halve(error)
        yield from stream.finished
        stream.finished.clear()
