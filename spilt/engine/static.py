"""A decoding step of fixed shapes: the same kernels on the same tensors at every token, which is what a compiler or a CUDA graph takes.

The plain step (prompts.forward) sees the rows that run, as wide as the longest. This one sees all places and all columns:

    tokens [B], lengths [B], multipliers [B, 1, 1]: copied into tensors that stay

    row 0   |-- its keys and values --|x........|      x: the next token, written behind its own and seen from then on
    row 1   |-- ... --|x........................|      .: masked
    free    |x..................................|      computed, and not looked at
            0                             columns

Prompts, refill (in the same stores) and the choice of the token stay outside, so rows get the same tokens as by the plain step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spilt import memory
from spilt.engine import attention, choice, prompts
from spilt.errors import UserError, first_line
from spilt.steering import anatomy, hooks

log = logging.getLogger("spilt")
WARM = 3  # runs before a capture, in which libraries choose their kernels and take their memory
Scores = Callable[[], Tensor]  # [B, V] of the next token, from the tensors that stay


class StaticStep:
    """One decoding step of `capacity` rows, over a cache whose stores are there."""

    def __init__(self, model: nn.Module, make_sites: prompts.MakeSites, cache: DynamicCache, capacity: int, columns: int, how: str) -> None:
        """how: of choice.STEPS, but the plain one."""
        device = anatomy.input_device(model)
        layers: list[Any] = cache.layers
        if {layer.stores[0].device for layer in layers} != {device} or getattr(model, "tp_size", None):
            raise UserError(f"--decode_step {how}: it is for a model that is whole on one device; leave it out")
        self.model, self.how = model, how
        self.tokens, self.lengths = (torch.zeros(capacity, dtype=torch.long, device=device) for _ in range(2))
        self.multiplier = torch.zeros(capacity, 1, 1, device=device)
        self.sites = make_sites(self.multiplier)
        for layer in layers:
            layer.begin(self.lengths, columns)
        # it does not hold this object: who drops the step has its stores back at once
        places = self.tokens, self.lengths[:, None], torch.arange(columns, device=device)
        self.run, self.ran = RUN[how](lambda: prompts.next_scores(model, *places, cache), device), False
        log.info("decoding step, %s: %d texts of up to %d tokens; its first run takes longer", how, capacity, columns)

    def __call__(self, multiplier: Tensor, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Scores [rows, V] of the token after tokens [rows], behind `lengths` others each: a view, until the next call.

        Raises UserError where the model's step cannot be compiled or captured.
        """
        rows = len(tokens)
        self.tokens[:rows], self.multiplier[:rows] = tokens, multiplier
        self.lengths.copy_(torch.tensor(lengths + [0] * (len(self.lengths) - rows)))
        try:
            with hooks.attach(self.model, self.sites), attention.next_token(self.model, None):
                found = self.run()[:rows]
        except RuntimeError as error:
            if self.ran or self.how == choice.STATIC or memory.ran_out(error):
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"this model's decoding step cannot be {self.how} here: {why}; leave --decode_step out") from error
        self.ran = True
        return found


def static(scores: Scores, device: torch.device) -> Scores:
    """As it is: to see what the shapes alone change."""
    return scores


def compiled(scores: Scores, device: torch.device, backend: Any = "inductor") -> Scores:
    """By torch.compile, in one graph, for these shapes alone. backend: as torch.compile takes it."""

    def step() -> Tensor:
        return scores()

    # code of its own: what was compiled for another steering is never taken for this one's, as hooks are not looked at again
    own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
    made: Scores = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
    return made


def captured(scores: Scores, device: torch.device) -> Scores:
    """As a CUDA graph: its kernels are started together, on the tensors that they were captured with."""
    if device.type != "cuda":
        raise UserError(f"a CUDA graph runs on a CUDA device, and the model is on {device}; --decode_step compiled, or leave it out")
    graph, out = torch.cuda.CUDAGraph(), list[Tensor]()

    def capture() -> Tensor:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):  # each writes the same keys and values to the same places
                scores()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            return scores()

    def step() -> Tensor:
        with torch.cuda.device(device):
            if not out:
                out.append(capture())
            graph.replay()
        return out[0]

    return step


RUN: dict[str, Callable[[Scores, torch.device], Scores]] = {
    choice.STATIC: static,
    choice.COMPILED: compiled,
    choice.CAPTURED: captured,
}
assert [choice.PLAIN_STEP, *RUN] == list(choice.STEPS)
