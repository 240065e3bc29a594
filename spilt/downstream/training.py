"""Supervised training on a task: L = -sum of log p over all supervised tokens of a window / their number, and AdamW on it.

A window is one optimizer step: `grad_accum` batches of `bs` rows. Its tokens are counted before its first batch runs, so that 1 x 16 rows
and 2 x 8 rows give the same gradient. What is learned is float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spilt.data.batches import pad
from spilt.data.chat import Encoded
from spilt.downstream.words import SCHEDULERS, TrainSettings
from spilt.engine import scopes, whole
from spilt.engine.train import chunks, epoch_order
from spilt.errors import NotFinite, UserError
from spilt.methods.scoring import answer_logprobs, scored_positions
from spilt.steering import joint
from spilt.steering.steering import Steering


class Learner:
    """What is learned, and how log p of completions depends on it. `module` holds the parameters, and nothing else that is saved."""

    module: nn.Module

    def score(self, sequences: Sequence[Encoded]) -> Tensor:
        """log p of each sequence's completion, summed over its tokens [B], with its graph."""
        raise NotImplementedError(f"{type(self).__name__} does not say how completions are scored")

    def after_gradient(self) -> None:
        """Before the gradient's norm is clipped: a place for projections."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """After the optimizer's step, too. Returns what the log is told."""
        return {}

    def ready(self) -> AbstractContextManager[None]:
        """Around the whole training: what is learned takes gradients, and afterwards nothing does."""
        return learning(self.module)


class Steered(Learner):
    """A Steering on a frozen model, on the tokens of its scope: trained as it is decoded."""

    def __init__(self, model: nn.Module, steering: Steering, pad_id: int) -> None:
        self.model, self.steering, self.pad_id = model, steering, pad_id
        self.module = nn.ModuleList([made for _, made in steering])

    def score(self, sequences: Sequence[Encoded]) -> Tensor:
        batch, device = pad([*sequences], self.pad_id), next(self.module.parameters()).device
        ids, mask, answer = (tensor.to(device) for tensor in (batch.input_ids, batch.attention_mask, batch.answer_mask))
        prompt, length = (
            torch.tensor(n, device=device) for n in zip(*((s.prompt_length, len(s.input_ids)) for s in sequences), strict=True)
        )
        logits = scopes.logits(self.model, self.steering, 1.0, ids, mask, prompt, scored_positions(answer))
        return answer_logprobs(logits, ids, answer, length).total


class Joint(Steered):
    """LoRA and adapters together, the adapters kept off what the LoRA writes; the log is told how much they overlap."""

    def __init__(self, model: nn.Module, steering: Steering, pad_id: int, projection: str) -> None:
        super().__init__(model, steering, pad_id)
        self.apart = joint.Apart(model, steering, projection)

    def after_gradient(self) -> None:
        self.apart.gradients()

    def after_step(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        self.apart.parameters(optimizer)
        found = self.apart.overlaps().values()
        return {f"overlap_{name}": sum(getattr(one, name) for one in found) / len(found) for name in ("read", "write")} if found else {}


class Full(Learner):
    """All weights of the model itself. Raises UserError where they are not float32: small updates would be lost."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        if other := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
            raise UserError(f"full fine-tuning of weights in {other.pop()}: small updates are lost; use --dtype float32")
        self.model, self.pad_id, self.module = model, pad_id, model

    def score(self, sequences: Sequence[Encoded]) -> Tensor:
        return whole.score(self.model, None, 0.0, sequences, self.pad_id).total


@contextmanager
def learning(module: nn.Module) -> Iterator[None]:
    """Inside: its parameters take gradients and its dropout acts. After it neither."""
    try:
        module.requires_grad_(True)
        module.train()
        yield
    finally:
        module.requires_grad_(False)
        module.eval()


def supervised(sequences: Sequence[Encoded]) -> int:
    """How many tokens are scored."""
    return sum(len(sequence.input_ids) - sequence.prompt_length for sequence in sequences)


def accumulate(learner: Learner, batches: Sequence[Sequence[Encoded]]) -> float:
    """Adds d loss / d parameter of a window to `.grad`; returns the loss, nats per supervised token."""
    tokens, total = supervised([sequence for batch in batches for sequence in batch]), 0.0
    for batch in batches:
        loss = -learner.score(batch).sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def rate(step: int, steps: int, s: TrainSettings) -> float:
    """Share of lr at an optimizer step (0-based): rising over ceil(warmup_ratio steps), then the scheduler's fall to 0."""
    warm = math.ceil(s.warmup_ratio * steps)
    return step / warm if step < warm else SCHEDULERS[s.scheduler]((step - warm) / max(1, steps - warm))


def train(
    learner: Learner,
    sequences: Sequence[Encoded],
    s: TrainSettings,
    *,
    resume: dict[str, Any] | None = None,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Train learner.module in place; returns a row of the log for each optimizer step: epoch, step, loss, lr, grad_norm, tokens.

    `checkpoint` is given a function that returns the whole state, after each step but the last; `resume` goes on from such a state to the
    same result. Raises NotFinite for a gradient that is none, UserError where no step would have a rate above 0.
    """
    module = learner.module
    device = next(module.parameters()).device
    per_epoch = math.ceil(len(sequences) / (s.bs * s.grad_accum))
    steps, log = per_epoch * s.epochs, list[dict[str, float]]()
    if not any(rate(step, steps, s) for step in range(steps)):
        raise UserError(
            f"{len(sequences)} rows are {steps} optimizer step, and the first is at rate 0, since it warms up: nothing would be learned; "
            "give more rows or --epochs, a smaller --bs or --grad-accum, or --warmup-ratio 0"
        )
    with learner.ready(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(s.seed)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, s))

        def state() -> dict[str, Any]:
            random = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
            parts = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            return {"log": log, "random": random, **parts}

        if resume is not None:
            log = list(resume["log"])
            for name, part in (("module", module), ("optimizer", optimizer), ("schedule", schedule)):
                part.load_state_dict(resume[name])  # type: ignore[attr-defined]
            torch.set_rng_state(resume["random"]["cpu"])
            if "cuda" in resume["random"]:
                torch.cuda.set_rng_state(resume["random"]["cuda"], device)
        for step in range(len(log), steps):
            epoch, place = divmod(step, per_epoch)
            order = epoch_order(len(sequences), s.seed, epoch)
            window = [sequences[i] for i in chunks(order, s.bs * s.grad_accum)[place]]
            loss = accumulate(learner, chunks(window, s.bs))
            learner.after_gradient()
            norm = nn.utils.clip_grad_norm_(parameters, s.max_grad_norm).item()
            if not math.isfinite(norm):
                raise NotFinite(f"the gradient is {norm} at step {step} (loss {loss}); lower --lr, or another --dtype (bfloat16, float32)")
            lr = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            more = learner.after_step(optimizer)
            log.append({"epoch": epoch, "step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": supervised(window), **more})
            if progress is not None:
                progress(step + 1, steps, loss)
            if checkpoint is not None and step + 1 < steps:
                checkpoint(state)
    return log
