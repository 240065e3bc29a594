"""in_place(model, steering, m): W' = W + m dW and b' = b + m db in the weights themselves, given back bit by bit.

The same logits as the hooks give, up to rounding, at the speed of the unsteered model; for what folding.py says can be weights. In a
model of less than float32 the sum is rounded as W is, which `lost` measures; hooks add to the output and lose none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.steering.folding import Place, linear, place, transposed
from spilt.steering.interventions import Intervention
from spilt.steering.steering import Steering

HOOKS = "steer(model, steering, m) does it by hooks"


@contextmanager
def in_place(model: nn.Module, steering: Steering, multiplier: float = 1.0) -> Iterator[nn.Module]:
    """Inside the `with` the weights are steered; after it they are as before, bit by bit, also when it is left by an exception.

    Raises UserError for what cannot be weights, before any is touched. Yields the model.
    """
    if not isinstance(multiplier, int | float):
        raise UserError(f"weights have one strength for all rows, not a {type(multiplier).__name__}; {HOOKS}, each row at its own")
    steering.at(multiplier)  # refused where it acts on some tokens alone
    found = by_place(model, steering.to(model))
    with ExitStack() as back:
        for where, made in found.items():
            module = linear(model, where)
            weight, bias = change(module, made)
            if weight is not None:
                _add(module.weight, multiplier * weight, back)
            if bias is not None and module.bias is None:
                module.bias = nn.Parameter((multiplier * bias).to(module.weight.dtype), requires_grad=False)
                back.callback(setattr, module, "bias", None)
            elif bias is not None:
                _add(module.bias, multiplier * bias, back)
        yield model


@torch.no_grad()
def _add(parameter: nn.Parameter, summand: Tensor, back: ExitStack) -> None:
    back.callback(_restore, parameter, parameter.clone())
    parameter.copy_(parameter.float() + summand)


@torch.no_grad()
def _restore(parameter: nn.Parameter, before: Tensor) -> None:
    parameter.copy_(before)


def by_place(model: nn.Module, steering: Steering) -> dict[Place, list[Intervention]]:
    """Each linear map that is changed, with what changes it. Raises UserError where weights cannot be, or cannot be added to."""
    found: dict[Place, list[Intervention]] = {}
    for site, made in steering:
        where = place(model, site, made, HOOKS, "")
        weight = linear(model, where).weight
        if not weight.is_floating_point() or weight.is_meta:
            what = "not in memory" if weight.is_meta else f"{weight.dtype}, quantised"
            raise UserError(f"the weights of {where[1]} in block {where[0]} are {what}, and cannot be added to; {HOOKS}")
        found.setdefault(where, []).append(made)
    return found


def change(module: nn.Module, made: Sequence[Intervention]) -> tuple[Tensor | None, Tensor | None]:
    """What strength 1 adds to the weight of a linear map, as the map keeps it, and to its bias, float32; None for nothing."""
    weights = [one.update() for one in made if one.reads]
    biases = [db for one in made if (db := one.folded()[1]) is not None and db.any()]
    weight: Any = sum(weights) if weights else None
    bias: Any = sum(biases) if biases else None
    return weight if weight is None or transposed(module) else weight.T, bias


def lost(before: Tensor, summand: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """|((W + d) - W) - d|^2 and |d|^2, where W and W + d are kept in `dtype`: what rounding takes from a change d of W."""
    kept = (before.detach().float() + summand.to(before.device)).to(dtype).double() - before.detach().to(dtype).double()
    return float((kept - summand.double().to(kept.device)).square().sum()), float(summand.double().square().sum())
