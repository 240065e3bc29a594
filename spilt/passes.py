"""Steered rows through the suffix and back: of one fit, or of several side by side.

Rows of a batch do not know of each other, so rows of other fits (another method, form, concept) may share it. A fit is
therefore written as a generator: it yields rows that it wants scored and is sent what came of them (`Work`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from spilt import hooks, memory, packing, suffix
from spilt.data.batches import Batch
from spilt.interventions import Intervention, Multiplier
from spilt.scoring import AnswerLogProbs, answer_logprobs, scored_positions


class Shown(NamedTuple):
    """Rows [B, T] of one fit, ready for the blocks after `layer`."""

    model: nn.Module
    layer: int  # the recorded one
    tokens: Batch
    length: Tensor  # [B] real tokens of the whole sequence
    stream: Tensor  # [B, T, D] that leaves block `layer`; steered, with its graph, unless `inside`
    inside: hooks.Site | None  # steered inside a later block: its intervention is a Cut
    start: int  # place of the first column in its sequence
    head: packing.KeysValues  # of the `start` tokens before
    twice: bool = False  # each block runs again in the backward pass, since memory is short


class Passed(NamedTuple):
    """What came of them: log p without graph; the steered stream with its graph; d log p_b / d steered_b."""

    scored: AnswerLogProbs
    steered: Tensor
    slope: Tensor


class Cut(Intervention):
    """An intervention whose graph ends behind it: the model goes on with `leaf`, which holds the values of `steered`."""

    def __init__(self, inner: Intervention) -> None:
        super().__init__(inner.component, inner.site, 0.0)
        self.inner = inner
        self.steered = self.leaf = torch.empty(0)

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        self.steered = self.inner(h, x, multiplier)
        self.leaf = self.steered.detach().requires_grad_()
        return self.leaf


# what an activation function returned is not kept for the backward pass: it is computed again from its input, which is
RECOMPUTED: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(node._saved_self, approximate=node._saved_approximate),
}


def lean() -> AbstractContextManager[Any]:
    """Inside: the graph keeps two of the three middles of a gated MLP, act(g) u; the same gradients, bit for bit."""

    def pack(kept: Tensor) -> Any:
        node = kept.grad_fn
        return node if type(node).__name__ in RECOMPUTED else kept

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else RECOMPUTED[type(kept).__name__](kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def through(parts: Sequence[Shown]) -> list[Passed]:
    """All rows in one batch through the suffix, and back with weight 1 for each: log p_b depends on row b alone.

    The parts have the same model, layer and start; a part that is steered inside is alone.
    """
    first, device = parts[0], parts[0].stream.device
    width = max(part.stream.shape[1] for part in parts)
    tokens = Batch(*(torch.cat([_widened(t, width) for t in column]) for column in zip(*(part.tokens for part in parts), strict=True)))
    stream = torch.cat([_widened(part.stream.detach(), width) for part in parts])
    inputs: dict[str, Any] = {}
    if first.start:
        place = torch.arange(first.start, first.start + width, device=device).expand(len(stream), -1)
        branch = torch.where(tokens.attention_mask, packing.SHARED, packing.PADDING)
        inputs = packing.attention_inputs(first.model, packing.Rows(tokens.input_ids, place, branch), first.start)
        rows = torch.cat([torch.full((len(part.stream),), i, device=device) for i, part in enumerate(parts)])
        heads = {layer: tuple(torch.cat([part.head[layer][kv] for part in parts]) for kv in (0, 1)) for layer in first.head}
        inputs["past_key_values"] = packing.given(heads, rows)  # type: ignore[arg-type]
    leaf = stream.requires_grad_(first.inside is None)
    saving = suffix.checkpointed(first.model, first.layer) if any(part.twice for part in parts) else lean()
    with saving, hooks.attach(first.model, [] if first.inside is None else [first.inside]):
        logits = suffix.logits(first.model, first.layer, stream, scored_positions(tokens.answer_mask), **inputs)
    length = torch.cat([part.length for part in parts]).to(logits.device)
    scored = answer_logprobs(logits, tokens.input_ids, tokens.answer_mask, length)
    steered = [part.stream for part in parts]
    if first.inside is not None:
        cut = first.inside.intervention
        assert isinstance(cut, Cut) and len(parts) == 1
        leaf, steered = cut.leaf, [cut.steered]
    (slope,) = torch.autograd.grad(scored.total.sum(), [leaf])
    sizes = [len(part.stream) for part in parts]
    columns = zip(*(column.detach().split(sizes) for column in scored), strict=True)
    rows_of = zip(columns, steered, slope.split(sizes), strict=True)
    return [Passed(AnswerLogProbs(*own), stream, back[:, : stream.shape[1]]) for own, stream, back in rows_of]


def _widened(t: Tensor, width: int) -> Tensor:
    """[B, T] or [B, T, D] with zeros (False) up to `width` columns: padding on the right."""
    short = width - t.shape[1]
    return functional.pad(t, (0, 0, 0, short) if t.dim() == 3 else (0, short)) if short else t


# ---------------------------------------------------------------- work that takes turns

Result = TypeVar("Result")
Work = Generator[Shown, Passed, Result]


def alone(work: Work[Result]) -> Result:
    """One work to its end."""
    return together([work], 1)[0]


def together(works: Sequence[Work[Result]], at_once: int) -> list[Result]:
    """All works to their ends, up to `at_once` side by side: what they yield at the same time shares a batch where it can.

    Equal to one after the other up to rounding, which depends on the company. An exception of a work is raised.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # works that overlap cannot give the generator back in order
        return _in_turns(works, at_once)


def _in_turns(works: Sequence[Work[Result]], at_once: int) -> list[Result]:
    results: dict[int, Result] = {}
    waiting, asked = deque(enumerate(works)), dict[int, Shown]()

    def turn(number: int, go_on: Callable[[], Shown]) -> None:
        try:
            asked[number] = go_on()
        except StopIteration as end:
            results[number] = end.value

    while waiting or asked:
        while waiting and len(asked) < at_once:
            number, work = waiting.popleft()
            turn(number, lambda work=work: next(work))  # type: ignore[misc]
        groups: dict[Any, list[int]] = {}
        for number, shown in asked.items():
            key = (id(shown.model), shown.layer, shown.start, shown.stream.device, None if shown.inside is None else number)
            groups.setdefault(key, []).append(number)
        for numbers in groups.values():
            for number, passed in _answers(numbers, [asked.pop(number) for number in numbers]):
                work = works[number]
                if isinstance(passed, Passed):
                    turn(number, lambda work=work, passed=passed: work.send(passed))  # type: ignore[misc]
                else:
                    turn(number, lambda work=work, passed=passed: work.throw(passed))  # type: ignore[misc]
    return [results[number] for number in range(len(works))]


def _answers(numbers: list[int], parts: list[Shown]) -> list[tuple[int, Passed | Exception]]:
    """What came of each part. An error side by side may be one part's, or out of memory: each alone; alone: the error is its own."""
    try:
        return list(zip(numbers, through(parts), strict=True))
    except Exception as error:  # noqa: BLE001 - raised in the work whose part it is
        if len(parts) == 1:
            return [(numbers[0], error)]
        memory.ran_out(error)  # gives cached blocks back
    return [answer for number, part in zip(numbers, parts, strict=True) for answer in _answers([number], [part])]
