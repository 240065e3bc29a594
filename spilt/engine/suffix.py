"""Run only what an intervention changes: record the stream at block `layer` once, then replay the blocks after it.

Blocks 0..layer do not depend on the intervention, so their output serves every epoch, pair, factor, multiplier and
method. Replay needs no family code: the library's own forward runs, with the blocks before `layer` passing their
input through and block `layer` returning the given stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spilt.engine import attention
from spilt.steering import anatomy, hooks

_returns_tuple: dict[type, bool] = {}  # class of a block -> what its forward returns, learnt once


class Recorded(NamedTuple):
    """Streams of one padded batch. h [B, T, D]; x: read point name -> [B, T, F], number of a lower block -> its output [B, T, D]."""

    h: Tensor
    x: dict[str | int, Tensor]


class _Reached(Exception):
    """Block `layer` has been computed: the rest of the forward is not needed."""


@torch.no_grad()
def record(model: nn.Module, layer: int, input_ids: Tensor, read_points: tuple[str | int, ...] = (), **inputs: Any) -> Recorded:
    """The output of block `layer` (and the read points, or numbers of lower blocks, asked for); the forward stops there.

    input_ids [B, T], right-padded: causal attention keeps the padding away from real tokens, so no mask is needed.
    """
    seen: dict[str | int, Tensor] = {}
    with ExitStack() as handles:
        for read_point in read_points:

            def after(_: nn.Module, args: Any, output: Any, name: str | int = read_point) -> None:
                seen[name] = hooks.first(output)

            def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | int = read_point) -> None:
                seen[name] = hooks.input_of(args, kwargs)

            if isinstance(read_point, int):
                handles.callback(anatomy.block(model, read_point).register_forward_hook(after).remove)
                continue
            at = anatomy.read_point(model, layer, read_point)
            handles.callback(at.register_forward_pre_hook(read, with_kwargs=True).remove)

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            _returns_tuple[type(module)] = isinstance(output, tuple)
            seen["h"] = hooks.first(output)
            raise _Reached

        handles.callback(anatomy.block(model, layer).register_forward_hook(stop).remove)
        inputs.setdefault("use_cache", False)
        try:
            model(input_ids=input_ids, **inputs)
        except _Reached:
            return Recorded(seen.pop("h"), seen)
    raise RuntimeError(f"block {layer} was not reached by a forward of {type(model).__name__}")


def returns_tuple(model: nn.Module) -> bool:
    """Whether this model's blocks return a tuple (by family and transformers version): asked of block 0 with one token."""
    kind = type(anatomy.block(model, 0))
    if kind not in _returns_tuple:
        record(model, 0, torch.zeros(1, 1, dtype=torch.long, device=anatomy.input_device(model)))
    return _returns_tuple[kind]


@contextmanager
def replay(model: nn.Module, layer: int, stream: Tensor) -> Iterator[None]:
    """Inside: blocks before `layer` pass their input through and block `layer` returns `stream` [B, T, D]."""
    as_output = (lambda h: (h,)) if returns_tuple(model) else (lambda h: h)

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        return as_output(hooks.input_of(args, kwargs))

    def give_stream(*args: Any, **kwargs: Any) -> Any:
        return as_output(stream)

    with ExitStack() as undo:
        for index, module in enumerate(anatomy.blocks(model)[: layer + 1]):
            undo.enter_context(forward_by(module, give_stream if index == layer else pass_through))
        yield


@contextmanager
def forward_by(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Inside: the module's forward is another one."""
    own = module.__dict__.get("forward")  # accelerate puts one there when it places a model
    module.forward = instead
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def checkpointed(model: nn.Module, layer: int) -> Iterator[None]:
    """Inside: blocks after `layer` keep their input alone for the backward pass and run once more there (arXiv 1604.06174).

    Not the last one: its MLP sees fewer rows only while `last_mlp_rows` lasts, and keeps little.
    """
    with ExitStack() as undo:
        for module in anatomy.blocks(model)[layer + 1 : -1]:
            undo.enter_context(forward_by(module, partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)))
        yield


@contextmanager
def head_rows(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Inside: the output head sees only the positions in `keep` [B, T] bool, so logits are [1, n, V]."""

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][keep.to(args[0].device)][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def last_mlp_rows(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Inside: the last block's MLP sees only the positions in `keep` [B, T] bool; elsewhere it adds 0, which nobody looks at.

    Nothing reads the last block's output but the head. With hooks inside that MLP (it is being steered), or experts in it, it sees all.
    """
    last = len(anatomy.blocks(model)) - 1
    if anatomy.of(model).parts[last].mlp_mid is None:  # experts want the stream as it is, [B, T, D]
        yield
        return
    mlp = anatomy.read_point(model, last, "mlp")
    if any(module._forward_hooks or module._forward_pre_hooks for module in mlp.modules()):
        yield
        return

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][keep.to(args[0].device)], *args[1:])

    def put_back(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        at = keep.to(output.device)
        return output.new_zeros(*at.shape, output.shape[-1]).masked_scatter(at[..., None], output)

    with ExitStack() as handles:
        handles.callback(mlp.register_forward_pre_hook(select).remove)
        handles.callback(mlp.register_forward_hook(put_back).remove)
        yield


def logits(model: nn.Module, layer: int, stream: Tensor, keep: Tensor, **inputs: Any) -> Tensor:
    """Logits [n, V] at the positions `keep` [B, T], from the stream [B, T, D] that leaves block `layer`.

    Gradients flow to `stream` and no further down. Sequences are right-padded.
    """
    # what enters the model is never looked at: block `layer` gives the stream; a zero-stride tensor carries the shape
    nothing = torch.zeros((), dtype=stream.dtype, device=stream.device).expand(stream.shape)
    inputs.setdefault("use_cache", False)
    with attention.sequences(model, inputs), replay(model, layer, stream), last_mlp_rows(model, keep), head_rows(model, keep):
        return model(inputs_embeds=nothing, **inputs).logits[0]
