"""Validation loss while an adapter is trained: the parameters with the least of it are kept, and training ends where it no longer falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spilt.data.chat import Encoded
from spilt.engine import whole


class Validation:
    """L = mean over held-out answers of -log p per token, every `every` steps and after the last one.

    The parameters with the least L are those that `best` puts back. ended: `patience` looks since then; 0: never.
    """

    def __init__(
        self, model: nn.Module, trained: nn.Module, sequences: Sequence[Encoded], pad_id: int, every: int, patience: int, rows: int = 8
    ) -> None:
        self.model, self.trained, self.sequences, self.pad_id = model, trained, list(sequences), pad_id
        self.every, self.patience, self.rows = every, patience, rows
        self.least, self.at, self.looks = math.inf, 0, 0
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def loss(self) -> float:
        total = 0.0
        self.trained.eval()
        for begin in range(0, len(self.sequences), self.rows):
            scored = whole.score(self.model, None, 0.0, self.sequences[begin : begin + self.rows], self.pad_id)
            total += float((-scored.total.double() / scored.tokens).sum())
        self.trained.train()
        return total / len(self.sequences)

    def after(self, step: int, steps: int) -> dict[str, float]:
        """The loss where it is looked at."""
        if step % self.every and step < steps:
            return {}
        found = self.loss()
        self.looks += 1
        if found < self.least:
            self.least, self.at, self.looks = found, step, 0
            self.kept = {name: value.detach().cpu().clone() for name, value in self.trained.state_dict().items()}
        return {"validation": found}

    @property
    def ended(self) -> bool:
        return bool(self.patience) and self.looks >= self.patience

    def best(self) -> None:
        """The parameters with the least loss, where there was any that is a number."""
        if self.kept:
            self.trained.load_state_dict(self.kept)

    def state(self) -> dict[str, Any]:
        return {"least": self.least, "at": self.at, "looks": self.looks, "kept": self.kept}

    def load(self, state: dict[str, Any]) -> None:
        self.least, self.at, self.looks, self.kept = state["least"], state["at"], state["looks"], state["kept"]
