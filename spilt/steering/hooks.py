"""attach(model, applied): the only place that registers hooks on a model. Borrowed with `with`, given back unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.steering.interventions import Intervention, Multiplier


class Applied(NamedTuple):
    """One intervention at one layer. positions [B, T] bool: where it acts, None = everywhere (generation)."""

    layer: int
    intervention: Intervention
    multiplier: Multiplier
    positions: Tensor | None = None


def base(layer: int, intervention: Intervention) -> int:
    """The block whose output can be recorded: block `layer`, or the one below it when the inside of `layer` is steered."""
    return layer if intervention.write_point == "block" else layer - 1


def first(output: Any) -> Tensor:
    """The stream in what a block returns: a tensor or a tuple, by family and transformers version."""
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, stream: Tensor) -> Any:
    """`output` with its stream replaced."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states handed to a module, positionally or by name."""
    return args[0] if args else kwargs["hidden_states"]


def steer(one: Applied, h: Tensor, x: Tensor | None) -> Tensor:
    """The intervention at the positions where it acts, h elsewhere."""
    multiplier = one.multiplier.to(h.device) if isinstance(one.multiplier, Tensor) else one.multiplier
    if isinstance(multiplier, Tensor) and multiplier.ndim and multiplier.shape[0] not in (1, len(h)):
        count = multiplier.shape[0]
        raise UserError(f"{count} multipliers, one for each row, and a batch of {len(h)} rows (each beam and returned sequence is a row)")
    steered = one.intervention(h, x, multiplier)
    return steered if one.positions is None else torch.where(one.positions.to(h.device)[..., None], steered, h)


@contextmanager
def attach(model: nn.Module, applied: Sequence[Applied]) -> Iterator[None]:
    """Steer every forward inside the `with`; all hooks are gone after it, also when it is left by an exception."""
    with ExitStack() as handles:
        for one in applied:
            seen: list[Tensor] = []  # the read point of the forward under way; at most one
            if one.intervention.read_point is not None:

                def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[Tensor] = seen) -> None:
                    seen[:] = [input_of(args, kwargs)]

                at = anatomy.read_point(model, one.layer, one.intervention.read_point)
                handles.callback(at.register_forward_pre_hook(read, with_kwargs=True).remove)

            def write(_: nn.Module, args: tuple[Any, ...], output: Any, one: Applied = one, seen: list[Tensor] = seen) -> Any:
                return like(output, steer(one, first(output), seen.pop() if seen else None))

            def before(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], one: Applied = one, seen: list[Tensor] = seen
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                steered = steer(one, input_of(args, kwargs), seen.pop() if seen else None)
                return ((steered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": steered})

            here = anatomy.write_point(model, one.layer, one.intervention.write_point)
            if anatomy.writes_input(one.intervention.write_point):
                handles.callback(here.register_forward_pre_hook(before, with_kwargs=True).remove)
            else:
                handles.callback(here.register_forward_hook(write).remove)
        yield
