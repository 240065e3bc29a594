"""What a CUDA graph does, on the CPU: the operations of one run, with the tensors that they were given, done again without any Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spilt.engine.static import Scores

ASKS = ("_local_scalar_dense", "nonzero", "equal", "unique")  # what waits for the device's numbers, which a capture refuses


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Recorded(TorchDispatchMode):
    """Inside: every operation is kept with its tensors. `again` does them all, into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func.name().startswith(tuple(f"aten::{name}" for name in ASKS)), f"{func} asks for numbers"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def again(self) -> None:
        for func, args, kwargs, made in self.calls:
            if func.is_view or torch.Tag.inplace_view in func.tags:  # sees what lies there
                continue
            found, given = func(*args, **kwargs), {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for kept, new in zip(tensors(made), tensors(found), strict=True):
                if kept.untyped_storage().data_ptr() not in given:  # else done in place
                    kept.copy_(new.view_as(kept))  # whose shape may be another since


def replayed(scores: Scores, device: torch.device) -> Scores:
    """In the place of static.captured."""
    recorded, out = Recorded(), list[Tensor]()

    def step() -> Tensor:
        if not out:
            with recorded:
                out.append(scores())
        recorded.again()
        return out[0]

    return step
