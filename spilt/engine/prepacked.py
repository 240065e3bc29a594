"""Linear maps on a CPU, their weights laid out once in the order in which its library (oneDNN) multiplies by them.

    y = x W^T + b,    dL/dx = dL/dy W

A product of few rows spends much of its time on bringing W into that order, and here every step, batch and multiplier has the same W:
a decoding step is 1.1 to 1.4 times as fast, losses and fits 1.2 times (benchmarks/RESULTS.md). The model keeps its weights: they are
copied, bit by bit, and a product goes the model's own way where they have been written into or exchanged since. A row of y has the
same bits whatever rows are beside it.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spilt import memory
from spilt.engine import attention, suffix
from spilt.steering import anatomy
from spilt.team import place

log = logging.getLogger("spilt")
SHARE = 0.25  # of this machine's memory: what the copies may take
TOKENS = 512  # that go through the model: from here on the copies pay (they take as long as some 5 steps of decoding)
ROWS = 512  # for which the library chooses its order; it multiplies by that of any number of rows


@contextmanager
def weights(model: nn.Module, tokens: int = TOKENS) -> Iterator[None]:
    """Inside: the linear maps of the decoder blocks and the output head multiply by copies. tokens: that will go through the model."""
    maps = [module for module in _maps(model) if _suits(module)] if tokens >= TOKENS else []
    size = sum(module.weight.nbytes for module in maps)
    if size > SHARE * memory.total() / place()[1]:
        log.debug("%.1f GiB of weights are not laid out anew: too much for this machine's memory", size / 2**30)
        maps = []
    with ExitStack() as undo:
        for module in maps:
            undo.enter_context(suffix.forward_by(module, Prepacked(module)))
        yield


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Inside: maps that multiply by copies keep one of W^T too, for the backward pass; without it that goes the model's own way."""
    forwards = [module.__dict__.get("forward") for module in _maps(model)]
    by = [forward for forward in forwards if isinstance(forward, Prepacked)]
    try:
        for one in by:
            one.learning = True
        yield
    finally:
        for one in by:
            one.learning, one.transposed = False, None
        if by:
            memory.trim()


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Inside: the maps multiply by their own weights. For what may write into these by `.data`, which nothing tells afterwards."""
    found = [(module, forward) for module in model.modules() if isinstance(forward := module.__dict__.get("forward"), Prepacked)]
    for module, _ in found:
        del module.__dict__["forward"]
    try:
        yield
    finally:
        for module, forward in found:
            module.__dict__["forward"] = forward


def _maps(model: nn.Module) -> Iterator[nn.Linear]:
    """The linear maps that the text goes through; not those of an image tower."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for part in (*anatomy.blocks(model), *([head] if head is not None else [])):
        yield from (module for module in part.modules() if type(module) is nn.Linear)


def _suits(module: nn.Linear) -> bool:
    """Whether this machine's library has its own order for the weights, and nothing else computes the map already."""
    weight = module.weight
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and attention.has_bfloat16()))
        and "forward" not in module.__dict__
        and weight.numel() > 0
        and able()
    )


def able() -> bool:
    """Whether products by weights in oneDNN's order are here, on a processor on which they were measured."""
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def laid_out(weight: Tensor) -> Tensor:
    """W [n, k] in oneDNN's order; for `product` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b: [..., k] -> [..., n]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class Prepacked:
    """What takes the place of a linear map's forward."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.own = module, module.forward
        self.packed, self.at = laid_out(module.weight), self._place()
        self.learning = False
        self.transposed: Tensor | None = None
        memory.let_go(module.weight)

    def _place(self) -> tuple[int, int]:
        """Another after the weight has been written into, or exchanged."""
        return self.module.weight.data_ptr(), self.module.weight._version

    def __call__(self, x: Tensor) -> Tensor:
        module, learned = self.module, torch.is_grad_enabled()
        weight, bias = module.weight, module.bias
        if (
            self._place() != self.at
            or x.dtype != weight.dtype
            or x.device != weight.device
            or torch.is_autocast_enabled("cpu")
            or (learned and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        ):
            return self.own(x)
        if not (learned and x.requires_grad):
            return product(x, self.packed, bias)
        y: Tensor = _Product.apply(x, self, bias)  # type: ignore[no-untyped-call]
        return y

    def back(self, slope: Tensor) -> Tensor:
        """dL/dx of dL/dy. W^T is laid out when it is first asked for: of the blocks below what is learned, never."""
        if not self.learning:
            return slope @ self.module.weight
        if self.transposed is None:
            self.transposed = laid_out(self.module.weight.T)
            memory.let_go(self.module.weight)
        return product(slope, self.transposed, None)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Prepacked, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.by = by
        return product(x, by.packed, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.by.back(slope), None, None
