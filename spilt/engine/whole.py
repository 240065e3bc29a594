"""The plain engine: hooks on every site, the library's own forward, ordinary autograd, `model.generate`.

Short and obviously right, for any decoder and any steering. It is the spec: every fast path is tested equal to it; and it
is what runs where the fast path does not apply.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spilt import in_step
from spilt.data.batches import pad, position_mask
from spilt.data.chat import Encoded
from spilt.engine import decode, sampling, scopes
from spilt.engine import score as scoring
from spilt.engine import train as training
from spilt.engine.decode import Row
from spilt.engine.sampling import Decoding
from spilt.methods import Method
from spilt.methods.scoring import AnswerLogProbs, answer_logprobs, scored_positions
from spilt.settings.fields import FitSettings
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import Multiplier
from spilt.steering.steering import Steering, per_row

TOGETHER = 16  # texts side by side where only the last token is steered


@contextmanager
def steer(model: nn.Module, steering: Steering, multiplier: Multiplier, where: Tensor | None = None) -> Iterator[nn.Module]:
    """h <- h + delta(h, x, m) at every site of every forward inside the `with`; the model is as before after it.

    multiplier: a number, or a tensor [B] with one for each row of the batch. where: which tokens, [B, T] bool; None = all.
    Yields the model.
    """
    strength = per_row(multiplier)
    with hooks.attach(model, steering.at(strength, where)):
        yield model


def acts(sequences: Sequence[Encoded], positions: str, prefix: int) -> Tensor | None:
    """[B, T] bool, the tokens that are steered; None = all of them."""
    return None if positions == "all" else position_mask(list(sequences), positions, prefix)


def score(
    model: nn.Module,
    steering: Steering | None,
    multiplier: Multiplier,
    sequences: Sequence[Encoded],
    pad_id: int,
    where: Tensor | None = None,
    last: bool = False,
) -> AnswerLogProbs:
    """log p of each sequence's answer, summed over its tokens [B], with its graph down to the steering's parameters.

    steering None: the unsteered model. multiplier: a number or [B]. last: of each logit the own token is steered, and no other.
    """
    return scores(model, steering, multiplier, sequences, pad_id, where, last)[0]


def scores(
    model: nn.Module,
    steering: Steering | None,
    multiplier: Multiplier,
    sequences: Sequence[Encoded],
    pad_id: int,
    where: Tensor | None = None,
    last: bool = False,
    texts: bool = False,
) -> list[AnswerLogProbs]:
    """[`score`], and with `texts` that of the answers without the template's suffix, from the same logits."""
    batch = pad(list(sequences), pad_id)
    device = anatomy.input_device(model)
    ids, mask, answer, text = (t.to(device) for t in batch)
    length, keep = torch.tensor([len(s.input_ids) for s in sequences], device=device), scored_positions(answer)
    if last and steering is not None:
        logits = scopes.last_logits(model, steering, multiplier, ids, mask, keep)
    else:
        with steer(model, steering, multiplier, where) if steering is not None else hooks.attach(model, []):
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[keep]
    found = [answer_logprobs(logits, ids, answer, length)]
    return [*found, answer_logprobs(logits[scored_positions(text)[keep]], ids, text, length)] if texts else found


class Scorer(scoring.Scorer):
    """The plain way: one forward through the whole model for `rows` sequences at a time, in their order."""

    def __init__(
        self,
        model: nn.Module,
        steering: Steering | None,
        sequences: Sequence[Encoded],
        pad_id: int,
        positions: str = "all",
        prefix: int = 0,
        rows: int = 16,
    ) -> None:
        self.model, self.steering, self.sequences, self.pad_id = model, steering, sequences, pad_id
        self.positions, self.prefix = positions, prefix
        self.batches = [range(i, min(i + rows, len(sequences))) for i in range(0, len(sequences), rows)]

    def smallest(self, numbers: Sequence[int]) -> tuple[str, str]:
        longest = max(len(self.sequences[i].input_ids) for i in numbers)
        return (
            f"losses, sequences of {longest} tokens",
            f"one sequence of {longest} tokens does not fit in memory; lower output_length, or use --device auto",
        )

    @torch.no_grad()
    def score(self, multiplier: float, numbers: Sequence[int]) -> np.ndarray:
        part = [self.sequences[i] for i in numbers]
        last, used = self.positions == scopes.LAST, self.steering if multiplier else None
        where = None if last else acts(part, self.positions, self.prefix)
        found = scores(self.model, used, multiplier, part, self.pad_id, where, last, texts=True)
        return np.stack([-scored.total.double().cpu().numpy() for scored in found])


def losses(
    model: nn.Module, steering: Steering, multipliers: Sequence[float], sequences: Sequence[Encoded], pad_id: int, *where: Any
) -> Tensor:
    """-log p of each sequence's label tokens, summed, nats [K, S], float64. where: positions, prefix, rows as in Scorer."""
    scorer = Scorer(model, steering, sequences, pad_id, *where)
    return torch.tensor(np.stack([np.concatenate([scorer.score(m, numbers)[0] for numbers in scorer.batches]) for m in multipliers]))


@torch.no_grad()
def generate(
    model: nn.Module, steering: Steering, multipliers: Sequence[float], prompts: Sequence[Sequence[int]], pad_id: int, **how: Any
) -> list[list[int]]:
    """New token ids of each (prompt, multiplier), side by side in one batch by the library's own `generate`.

    how: its keyword arguments. Rows end with their first end-of-sequence token.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = anatomy.input_device(model)
    strength = torch.tensor(multipliers, dtype=torch.float32, device=device)
    with steer(model, steering, strength):
        made = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad_id, **how
        )
    own: Any = getattr(model, "generation_config", None)
    ends = how.get("eos_token_id", getattr(own, "eos_token_id", None))
    stop = set(ends) if isinstance(ends, list | tuple) else {ends}
    return [_until(row, stop) for row in made[:, width:].tolist()]


def _until(row: list[int], stop: set[Any]) -> list[int]:
    return next((row[: i + 1] for i, token in enumerate(row) if token in stop), row)


@torch.no_grad()
def texts(
    model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, positions: str = "all", prefixes: Sequence[int] = ()
) -> Iterator[tuple[int, list[int]]]:
    """Yields (row number, new token ids), one row after the other: the model's own forward and cache, a token at a time.

    The next token is chosen as sampling.choose says, by the row's own random numbers. m = 0: none but what is not the identity there runs.
    positions: which tokens are steered (`steer_positions`); prefixes: of each row, tokens of the template before the prompt; left out: 0.
    """
    if positions == scopes.LAST:
        yield from scopes.generate(model, steering, rows, how, TOGETHER, positions)
        return
    device, takes = anatomy.input_device(model), inspect.signature(type(model).forward).parameters
    for number, row in enumerate(rows):
        draw, cache, new, ids = random.Random(row.seed), None, list[int](), list(row.prompt)
        while len(new) < how.max_new_tokens and not (new and new[-1] in how.eos):
            where = acts([Encoded((*row.prompt, *new), len(row.prompt), 0)], positions, prefixes[number] if prefixes else 0)
            where = where if where is None else where[:, -len(ids) :]
            so_far = torch.arange(len(row.prompt) + len(new), device=device)
            at = {"position_ids": so_far[None, -len(ids) :], "cache_position": so_far[-len(ids) :]}  # a hybrid's cache counts otherwise
            at = {name: value for name, value in at.items() if name in takes}
            acting = row.multiplier or not steering.identity
            with steer(model, steering, row.multiplier, where) if acting else hooks.attach(model, []):
                out = model(
                    input_ids=torch.tensor([ids], device=device),
                    attention_mask=torch.ones_like(so_far)[None],
                    past_key_values=cache,
                    use_cache=True,
                    **at,
                )
            cache, scores = out.past_key_values, out.logits[:, -1].float()
            decode.refuse_not_finite(scores, [row])
            uniform = torch.tensor([draw.random()], dtype=torch.float64) if how.sample else None
            new += in_step.same(model, sampling.choose(scores, how, uniform, [[*row.prompt, *new]])).tolist()
            ids = [*row.prompt, *new] if cache is None else new[-1:]  # state-space hybrids of transformers 4 make no cache by themselves
        yield number, new


class Fit(training.Job):
    """A fit by ordinary autograd through the whole model: any steering, several sites jointly. The loop is `training.fit`."""

    def __init__(
        self,
        model: nn.Module,
        steering: Steering,
        sequences: list[Encoded],
        settings: FitSettings,
        method: Method,
        prefix: int,
        pad_id: int,
    ) -> None:
        super().__init__(settings, method)
        self.model, self.steering, self.sequences, self.prefix, self.pad_id = model, steering, sequences, prefix, pad_id
        self.intervention = nn.ModuleList([made for _, made in steering])
        self.device = next(self.intervention.parameters()).device
        if method.needs_reference(settings):
            with torch.no_grad():
                every = [score(model, None, 0.0, [sequence], pad_id) for sequence in sequences]
            self.reference = AnswerLogProbs(*(torch.cat(column) for column in zip(*every, strict=True)))

    def gradients(self, minibatch: list[training.Entry], share: int) -> tuple[float, list[Tensor]]:
        drawn = self.draw_rows(minibatch)
        shown = [self.sequences[i] for i in drawn.indices]
        last = self.settings.fitted_positions == scopes.LAST
        where = None if last else acts(shown, self.settings.fitted_positions, self.prefix)
        mixed = Steering((site, training.Mixed(made, drawn.removed)) for site, made in self.steering)
        scored = score(self.model, mixed, drawn.multiplier, shown, self.pad_id, where, last=last)
        loss = self.loss(minibatch, scored) / share
        return loss.item(), list(torch.autograd.grad(loss, list(self.intervention.parameters())))
