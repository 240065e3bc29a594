"""One loop: batches of cached activations -> suffix -> the method's loss -> optimizer."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spilt import in_step, memory
from spilt.data.batches import position_mask
from spilt.data.chat import Encoded
from spilt.engine import prepacked, score
from spilt.engine.activations import Activations, max_tokens, prefix_pairs
from spilt.engine.passes import Cut, ForwardInput, forward_backward
from spilt.errors import NotFinite, UserError
from spilt.methods import Method, Scored
from spilt.methods.scoring import AnswerLogProbs
from spilt.settings.fields import FitSettings
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import INTERVENTIONS, Intervention, Multiplier, Vector
from spilt.steering.steering import Steering

log = logging.getLogger("spilt")


class Entry(NamedTuple):
    """One pair in one direction: sequence numbers, and the sign of its factor. sign 0: the vector's component is removed."""

    winning: int
    losing: int
    sign: int


def entries(row: int, settings: FitSettings) -> list[Entry]:
    """The directions in which a pair is shown. Sequence 2 row is its matching answer, 2 row + 1 the not-matching one.

    orig_add: (matching, not_matching) at +s. orig_sub: roles swapped, at -s (`normal`) or with the component removed.
    """
    matching, not_matching = 2 * row, 2 * row + 1
    away = 0 if settings.substraction_type == "null_it_out" else -1
    sides = {"orig_add": Entry(matching, not_matching, 1), "orig_sub": Entry(not_matching, matching, away)}
    return [sides[name] for name in settings.preference_pairs]


class Rows(NamedTuple):
    """Sequences to be scored: numbers [B], multipliers [B], and whether the vector's component is removed instead [B] bool."""

    indices: list[int]
    multiplier: Tensor
    removed: Tensor

    def part(self, rows: slice) -> Rows:
        return Rows(self.indices[rows], self.multiplier[rows], self.removed[rows])


class Mixed(Intervention):
    """The intervention as a minibatch meets it: rows `removed` [B] lose what points along the vector instead of being steered."""

    def __init__(self, intervention: Intervention, removed: Tensor) -> None:
        super().__init__(intervention.read_point, intervention.write_point, 0.0)
        self.intervention, self.removed = intervention, removed

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        if not self.removed.any():
            return self.intervention(h, x, multiplier)
        assert isinstance(self.intervention, Vector)
        return self.intervention.steered_or_removed(h, multiplier, self.removed)


NO_EFFECT = 1e-6  # norm of an update: the stream's is 1 and more, so this is below what its own rounding changes


def check_usable(intervention: Intervention, what: str) -> None:
    """Nothing useless is stored or handed over: NotFinite for NaN and infinity, UserError for an update of norm 0."""
    norm = intervention.norm()
    if not math.isfinite(norm) or not all(torch.isfinite(value).all() for value in intervention.state_dict().values()):
        raise NotFinite(
            f"{what}: the fitted {intervention.form} came out with NaN or infinite values; "
            "use another --dtype (bfloat16, float32), or a smaller lr"
        )
    if norm < NO_EFFECT:
        raise UserError(
            f"{what}: the fitted {intervention.form} is zero (norm {norm:.3g}), so it changes nothing at any multiplier; "
            "do the two answers of the pairs differ, and is lr large enough?"
        )


def new_intervention(model: nn.Module, layer: int, settings: FitSettings) -> Intervention:
    """A fresh intervention of the settings' form on the block's device; the same seed gives the same start."""
    kind: Any = INTERVENTIONS[settings.intervention_method]
    read_point = settings.intervention_components if kind.reads else None
    width = anatomy.read_width(model, layer, read_point) if read_point else 0
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        made = kind(
            anatomy.hidden_size(model),
            width,
            read_point=read_point,
            write_point=settings.site,
            dropout=settings.dropout,
            rank=settings.rank,
            **{"alpha": settings.lora_alpha, **{name: getattr(settings, name) for name in kind.named}},
        )
    return made.to(anatomy.device_of(model, layer))


class Job:
    """A fit under way, as the loop `fit` sees it: which sequences a minibatch shows, at which strengths, and its loss.

    The fast path (`Fit`) and the plain one (engine.whole.Fit) say how the gradients of a minibatch are found.
    """

    intervention: nn.Module  # whose parameters are found
    sequences: Sequence[Encoded]  # 2 i: matching answer of row i, 2 i + 1: not-matching
    device: torch.device
    model: nn.Module

    def __init__(self, settings: FitSettings, method: Method) -> None:
        self.settings, self.method = settings, method
        self.draw = random.Random(settings.seed)
        self.reference: AnswerLogProbs | None = None  # of every sequence, unsteered, where the method needs it

    def gradients(self, minibatch: list[Entry], share: int) -> tuple[float, list[Tensor]]:
        """(loss / share, its gradients by the parameters)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how gradients are found")

    def entries(self, row: int) -> list[Entry]:
        """The directions in which a pair is shown this time."""
        sides = entries(row, self.settings)
        return [self.draw.choice(sides)] if self.method.one_side else sides

    def draw_rows(self, minibatch: list[Entry]) -> Rows:
        """Winning sequences, then (where the method needs them) losing ones, each with its factor."""
        both = self.method.needs_losing(self.settings)
        n = len(minibatch)
        indices = [e.winning for e in minibatch] + ([e.losing for e in minibatch] if both else [])
        signs = torch.tensor([e.sign for e in minibatch] * (2 if both else 1), device=self.device)
        # drawn for winning and losing even when the losing side is not scored: the same seed gives the same factors
        factors = [self.draw.choice(self.settings.steering_factors) for _ in range(2 * n)]
        if self.settings.shared_factor:
            factors[n:] = factors[:n]
        multiplier = torch.tensor(factors[: len(indices)], dtype=torch.float32, device=self.device) * signs
        return Rows(indices, multiplier, signs == 0)

    def loss(self, minibatch: list[Entry], scored: AnswerLogProbs) -> Tensor:
        """The method's loss of a minibatch from its scored rows."""
        n = len(minibatch)

        def side(values: AnswerLogProbs, rows: Any) -> AnswerLogProbs:
            return AnswerLogProbs(*(column[rows] for column in values))

        reference: list[AnswerLogProbs | None] = [None, None]
        if self.reference is not None:
            picked = ([e.winning for e in minibatch], [e.losing for e in minibatch])
            reference = [side(self.reference, rows) for rows in picked]
        losing = side(scored, slice(n, None)) if self.method.needs_losing(self.settings) else None
        assert self.method.loss is not None
        return self.method.loss(Scored(side(scored, slice(0, n)), losing, *reference), self.settings)


class Fit(Job):
    """The fast path: one intervention on recorded streams, only the blocks above it."""

    intervention: Intervention

    def __init__(
        self,
        model: nn.Module,
        steering: Steering,
        cache: Activations,
        settings: FitSettings,
        method: Method,
        prefix: int,
    ) -> None:
        super().__init__(settings, method)
        ((site, intervention),) = steering
        layer = site.layer
        self.model, self.layer, self.intervention, self.cache, self.prefix = model, layer, intervention, cache, prefix
        self.steering = steering
        self.sequences = cache.sequences
        self.device = next(intervention.parameters()).device
        self.at_once = 1 << 30  # rows of a minibatch that are scored together; fewer once memory has run out
        self.checkpointed = False  # blocks are run again in the backward pass: once a single row was too large
        self.on_stream = hooks.base(layer, intervention) == layer
        # a vector leaves the template's tokens alone: their keys and values never change while it is fitted
        own = {sequence.prefix(prefix) for sequence in cache.sequences}
        self.frozen_prefix = min(cache.prefix, *own) if settings.fitted_positions != "all" else 0
        with torch.no_grad():
            self.prefix_kv = prefix_pairs(model, cache.layer, cache.h[None, : self.frozen_prefix].to(self.device), cache.pad_id)
        self.reference = self._reference() if method.needs_reference(settings) else None

    def forward_input(self, rows: Rows) -> ForwardInput:
        """The sequences [B], steered with their multipliers, ready for the suffix."""
        start = self.frozen_prefix
        on_stream = self.intervention.read_point if self.on_stream else None
        tokens, seen = self.cache.batch(rows.indices, on_stream, self.device, start)
        sequences = [self.cache.sequences[i] for i in rows.indices]
        positions, where = None, self.settings.fitted_positions
        if where != "all":
            positions = position_mask(sequences, where, self.prefix)[:, start:].to(self.device)
        mixed = Mixed(self.intervention, rows.removed)
        site = hooks.Applied(self.layer, mixed if self.on_stream else Cut(mixed), rows.multiplier[:, None, None], positions)
        stream = hooks.steer(site, seen.h, seen.x.get(on_stream or "")) if self.on_stream else seen.h
        length = torch.tensor([len(s.input_ids) for s in sequences], device=self.device)
        inside = None if self.on_stream else site
        return ForwardInput(self.model, self.cache.layer, tokens, length, stream, inside, start, self.prefix_kv, self.checkpointed)

    def _reference(self) -> AnswerLogProbs:
        """Every sequence without intervention, once [n]: the reference model is the base model."""
        scorer = score.Recorded(self.model, self.steering, self.cache, self.settings.fitted_positions, self.prefix)
        found = score.losses(scorer, [0.0])
        total = torch.tensor(-found.total[0], dtype=torch.float32, device=self.device)
        length = torch.tensor([len(s.input_ids) for s in self.cache.sequences], device=self.device)
        return AnswerLogProbs(total, torch.tensor(found.tokens, device=self.device), length)

    def rows_at_once(self, indices: list[int]) -> int:
        """How many rows of a minibatch go through the suffix together."""
        longest = max(len(self.cache.sequences[i].input_ids) for i in indices) - self.frozen_prefix
        return max(1, min(self.at_once, len(indices), max_tokens(self.device, backward=True) // max(1, longest)))

    def gradients(self, minibatch: list[Entry], share: int) -> tuple[float, list[Tensor]]:
        """Out of memory: half as many rows at a time, from then on for all of the fit."""
        while True:
            before = _get_random(self)
            try:
                return self._gradients(minibatch, share)
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error):
                    raise
                rows = [i for entry in minibatch for i in entry[:2]]
                longest, at_once = max(len(self.sequences[i].input_ids) for i in rows), self.rows_at_once(rows)
                if at_once == 1 and (self.checkpointed or not self.on_stream):  # inside a block the intervention would run twice too
                    raise memory.OutOfMemory(
                        f"one sequence of {longest} tokens does not fit in memory while fitting layer {self.layer}; "
                        "lower output_length, or use --device auto or a smaller --dtype"
                    ) from error
            self.at_once, self.checkpointed = math.ceil(at_once / 2), at_once == 1
            going_on = "running each block twice" if self.checkpointed else f"in parts of {self.at_once}"
            what = f"fitting layer {self.layer}, batch_size {self.settings.batch_size}, sequences of up to {longest} tokens"
            log.warning("out of memory: %s; going on %s (from the start: --set batch_size=N)", what, going_on)
            _set_random(before, self)

    def _gradients(self, minibatch: list[Entry], share: int) -> tuple[float, list[Tensor]]:
        """Rows do not know of each other, so d loss / d h'_b = (d loss / d log p_b) (d log p_b / d h'_b).

        The second factor needs no other row: rows go through the suffix and back, with weight 1, a part at a time, and their
        graphs are forgotten. The first is known when all are scored; then the product goes through the intervention alone.
        """
        drawn = self.draw_rows(minibatch)
        size = self.rows_at_once(drawn.indices)
        start = _get_random(self)
        results = []
        for first in range(0, len(drawn.indices), size):
            if self.intervention.one_mask:
                _set_random(start, self)  # its dropout mask is one for all rows
            results.append(forward_backward(self.forward_input(drawn.part(slice(first, first + size)))))
        whole = AnswerLogProbs(*(torch.cat(column) for column in zip(*(result.scored for result in results), strict=True)))
        whole = whole._replace(total=whole.total.requires_grad_())
        loss = self.loss(minibatch, whole) / share
        (weight,) = torch.autograd.grad(loss, [whole.total])
        weighted = zip(results, weight.split(size), strict=True)
        products = [result.slope * rows.to(result.slope)[:, None, None] for result, rows in weighted]
        steered = [result.steered for result in results]
        return loss.item(), list(torch.autograd.grad(steered, list(self.intervention.parameters()), products))


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """The rows in the order of this epoch; depends on seed and epoch alone, so that a resumed fit continues it."""
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**64)  # torch takes no larger one
    return torch.randperm(rows, generator=generator).tolist()


def chunks(items: list[Any], size: int) -> list[list[Any]]:
    """Consecutive parts of at most `size`; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Watch(Protocol):
    """Looks at what is trained after each step, and may end it (validation.py)."""

    def after(self, step: int, steps: int) -> dict[str, float]:
        """More columns of the step's row."""

    @property
    def ended(self) -> bool: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def fit(
    job: Job,
    *,
    order: Callable[[int, int, int], list[int]] = epoch_order,
    resume: dict[str, Any] | None = None,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    most: int | None = None,
    watch: Watch | None = None,
) -> list[dict[str, float]]:
    """Train job.intervention in place; returns one row per optimizer step: epoch, step, loss, lr, grad_norm.

    AdamW, linear decay (after `warmup`, if any) over the optimizer steps really taken, gradient norm clipped. A batch of
    `batch_size` pairs expands to |preference_pairs| entries each, cut into minibatches of `batch_size`; each
    minibatch's loss is divided by (minibatches x batches accumulated).
    `checkpoint` is given a function that returns the whole state, after each step; `resume` continues from such a state to the same result.
    most: of the steps, over which lr decays then. watch: its state is kept with the fit's.
    """
    s, intervention = job.settings, job.intervention
    rows = len(job.sequences) // 2
    per_epoch = math.ceil(math.ceil(rows / s.batch_size) / s.gradient_accumulation_steps)
    steps = min(per_epoch * s.n_epochs, most or per_epoch * s.n_epochs)
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    rising = min(s.warmup or 0, steps // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: (k + 1) / rising if k < rising else max(0.0, 1 - (k - rising) / (steps - rising))
    )
    rows_of_log: list[dict[str, float]] = []

    def state() -> dict[str, Any]:
        kept = {"intervention": intervention.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        return {"log": rows_of_log, "random": _get_random(job), **kept, **({"watch": watch.state()} if watch else {})}

    devices = [job.device] if job.device.type == "cuda" else []
    with prepacked.learning(job.model), torch.random.fork_rng(devices):  # dropout draws from the global generator: give it back as it was
        torch.manual_seed(s.seed)
        if resume is not None:
            rows_of_log = list(resume["log"])
            intervention.load_state_dict(resume["intervention"])
            optimizer.load_state_dict(resume["optimizer"])
            schedule.load_state_dict(resume["schedule"])
            _set_random(resume["random"], job)
            if watch is not None:
                watch.load(resume["watch"])
        intervention.train()
        for step in range(len(rows_of_log), steps):
            if watch is not None and watch.ended:
                break
            epoch, place = divmod(step, per_epoch)
            groups = chunks(chunks(order(rows, s.seed, epoch), s.batch_size), s.gradient_accumulation_steps)
            total = 0.0
            for batch in groups[place]:
                minibatches = chunks([entry for row in batch for entry in job.entries(row)], s.batch_size)
                for minibatch in minibatches:
                    loss, grads = job.gradients(minibatch, len(minibatches) * len(groups[place]))
                    total += loss
                    grads = [in_step.same(job.model, grad) for grad in grads]
                    for parameter, grad in zip(intervention.parameters(), grads, strict=True):
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            norm = nn.utils.clip_grad_norm_(intervention.parameters(), s.max_grad_norm).item()
            if not math.isfinite(norm):
                raise NotFinite(
                    f"the gradient is {norm} at epoch {epoch}, step {step} (loss {total}); lower lr or steering_factors, or another --dtype"
                )
            lr = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rows_of_log.append({"epoch": epoch, "step": step, "loss": total, "lr": lr, "grad_norm": norm})
            if watch is not None:
                rows_of_log[-1] |= watch.after(step + 1, steps)
            if progress is not None:
                progress(step + 1, steps, total)
            if checkpoint is not None and step + 1 < steps:
                checkpoint(state)
        intervention.eval()
    return rows_of_log


def _get_random(job: Job) -> dict[str, Any]:
    version, internal, gauss = job.draw.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "factors": [version, list(internal), gauss]}
    if job.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(job.device)
    return state


def _set_random(state: dict[str, Any], job: Job) -> None:
    version, internal, gauss = state["factors"]
    job.draw.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if job.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], job.device)
