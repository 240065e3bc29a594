"""An arm: one method as it is compared, dW or a vector at a multiplier, or a persona as system prompt. All arms go one way.

What can be weights is put into the weights (in_place), so that answers are decoded side by side; the rest acts by hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from spilt import api
from spilt.data.chat import Encoded
from spilt.engine import choice, divergence, sampling, whole
from spilt.engine.prompts import Row
from spilt.errors import UserError
from spilt.model.host import Host
from spilt.settings.fields import WRITE_POINTS
from spilt.steering import anatomy
from spilt.steering.inplace import by_place, in_place
from spilt.steering.interventions import INTERVENTIONS
from spilt.steering.steering import Steering
from spilt.weight_steering.stage import Context, frozen


def nothing(host: Host) -> Steering:
    """What rows without steering go through the decoder with."""
    vector: Any = INTERVENTIONS["vector"]
    last = len(anatomy.blocks(host.model)) - 1
    with torch.random.fork_rng(devices=[]):
        return Steering.of({last: vector(anatomy.hidden_size(host.model)).eval().requires_grad_(False)})


def tokens(
    host: Host, rows: Sequence[Row], how: sampling.Decoding, batch_size: int | None, steering: Steering | None = None
) -> Iterator[tuple[int, list[int]]]:
    """(row, new tokens) as texts are finished."""
    placed = (steering or nothing(host)).to(host.model)
    yield from api.token_stream(host.model, placed, rows, how, choice.FAST, batch_size)


class Arm:
    """A method that has a strength. name: that of its file; label: as tables say it."""

    def __init__(self, run: Context, name: str, steering: Steering) -> None:
        self.run, self.name, self.steering = run, name, steering.to(run.host.model)
        self.inside = any(site.write_point not in WRITE_POINTS for site, _ in steering)

    @contextmanager
    def applied(self, m: float) -> Iterator[None]:
        """Inside, every forward of the model is steered at multiplier m."""
        model = self.run.host.model
        if m == 0 and self.steering.identity:
            yield
        elif self.weights:
            with in_place(model, self.steering, m):
                yield
        else:
            with whole.steer(model, self.steering, m):
                yield

    @property
    def weights(self) -> bool:
        """Whether it is put into the weights: changes of maps inside blocks, of a float32 model."""
        model = self.run.host.model
        if not self.inside or next(model.parameters()).dtype != torch.float32:
            return False
        try:
            by_place(model, self.steering)
            for _, made in self.steering:
                made.folded()
        except UserError:  # quantised, not linear, or no weights: hooks do it, slower
            return False
        return True

    def answers(self, prompts: Sequence[tuple[int, ...]], m: float, new: int) -> list[list[int]]:
        """Greedy, of at most `new` tokens each."""
        host = self.run.host
        how = sampling.decoding({"do_sample": False, "max_new_tokens": new}, host.model, host.tokenizer)
        at = 0.0 if self.weights else m
        rows = [Row(prompt, at, "") for prompt in prompts]
        with self.applied(m) if self.weights else self.applied(0.0):
            found = dict(tokens(host, rows, how, self.run.words["batch_size"], None if self.weights else self.steering))
        return [found[i] for i in range(len(rows))]

    def divergence(self, prompts: Sequence[tuple[int, ...]], m: float, new: int) -> pd.DataFrame:
        """KL(steered || base) along its own greedy answers: a row as of spilt.divergence."""
        made = self.answers(prompts, m, new)
        texts = [Encoded((*prompt, *more), len(prompt), 0) for prompt, more in zip(prompts, made, strict=True)]
        return kl_row(self.run.host, lambda _: self.applied(m), texts, texts, m)

    def losses(self, texts: Sequence[Encoded], m: float) -> np.ndarray:
        """-log p per token of each answer, nats [n]."""
        with self.applied(m):
            return unsteered_losses(self.run, texts)


def kl_row(host: Host, steered: Any, texts: Sequence[Encoded], base_texts: Sequence[Encoded], m: float) -> pd.DataFrame:
    """Mean, 95th percentile and maximum over all tokens of all texts, pooled."""
    with frozen(host.model):
        kl = torch.cat([one.kl for one in divergence.compared(host.model, steered, texts, base_texts, host.pad_id)]).numpy()
    row = (m, len(kl), float(kl.mean()), float(np.quantile(kl, api.WORST)), float(kl.max()))
    return pd.DataFrame([row], columns=["multiplier", "tokens", "kl_mean", "kl_p95", "kl_max"])


def unsteered_losses(run: Context, texts: Sequence[Encoded]) -> np.ndarray:
    """-log p per token of each answer as the model is now, nats [n]; texts of like length share a batch."""
    host, out = run.host, np.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].input_ids))
    with frozen(host.model):
        for begin in range(0, len(order), 8):
            part = order[begin : begin + 8]
            scored = whole.score(host.model, None, 0.0, [texts[i] for i in part], host.pad_id)
            out[part] = (-scored.total.double() / scored.tokens).cpu().numpy()
    return out


def stored(run: Context, name: str) -> Arm:
    """An arm of the folder."""
    return Arm(run, name, Steering.load(run.use(run.folder.arm(name))))


def label(name: str, about: Mapping[str, Any]) -> str:
    """dW:lora, caa, prompt."""
    return f"dW:{name}" if about.get("kind") == "dW" else name


def rendered(run: Context, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The prompts of questions, without a persona."""
    return [tuple(run.chat.prompt_ids(text)) for text in texts]
