"""LoRA and post-block adapters trained together, each off the other's subspace (arXiv 2603.00425, joint adaptation).

Both are one Steering: LoRA entries at linear maps, adapters at blocks. Trained without a constraint they come to use the same
directions. V [H, k]: an orthonormal basis of what the LoRA of a block's down projection writes, span(B). Projection

    input    D <- D (I - V V^T)      the adapter does not read what the LoRA writes (the public code)
    output   U <- (I - V V^T) U      it does not write there (the paper)

V has as many columns as B has rank: singular values below tol times the largest are none, and B = 0, as a LoRA begins, projects nothing.
Adam divides each number by a size of its own, which leads out of a subspace, and its moments would lead back in: gradients are projected
before a step, first moments and parameters after it, by the V of that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt.errors import UserError, unknown
from spilt.steering import anatomy
from spilt.steering.interventions import LoRA, PostBlock
from spilt.steering.steering import Site, Steering

PROJECTIONS = ("none", "input", "output")
MODES = {"all": (LoRA, PostBlock), "lora_only": (LoRA,), "adapter_only": (PostBlock,)}
TOLERANCE = 1e-6  # of the largest singular value


def lora(
    model: nn.Module, layers: Iterable[int] | None = None, maps: Sequence[str] | None = None, *, rank: int = 8, seed: int = 42
) -> Steering:
    """A fresh LoRA at linear maps of blocks, W x + (x A) B: nothing at the start, float32, trainable. A as in PEFT, B zero; alpha = rank.

    layers: None: all. maps: last names of the maps, such as q_proj; None: every one of a block. Raises UserError for names that are none.
    """
    entries = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in range(len(anatomy.blocks(model))) if layers is None else layers:
            have = anatomy.linears(model, layer)
            for name in maps or ():
                if name not in {path.rpartition(".")[2] for path in have}:
                    raise unknown("linear map", name, {path.rpartition(".")[2] for path in have})
            for path in (path for path in have if not maps or path.rpartition(".")[2] in maps):
                read, hidden = anatomy.read_width(model, layer, path), anatomy.write_width(model, layer, path)
                made = LoRA(hidden, read, read_point=path, write_point=path, rank=rank, alpha=float(rank))
                nn.init.uniform_(made.lora_A, -(read**-0.5), read**-0.5)
                entries.append((Site(layer, path, path), made.to(anatomy.device_of(model, layer))))
    return Steering(entries)


def both(one: Steering, other: Steering) -> Steering:
    """The entries of both, sharing their parameters (`+` copies them). `about` of the second."""
    return Steering((*one.entries, *other.entries), other.about)


def part(steering: Steering, mode: str) -> Steering:
    """The LoRA alone, the adapters alone, or all of it; the parameters are shared. Raises UserError where there is none."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    kept = [(site, made) for site, made in steering if isinstance(made, MODES[mode])]
    if not kept:
        raise UserError(f"mode {mode}: nothing of that kind is in {steering!r}")
    return Steering(kept, steering.about)


def basis(B: Tensor, tol: float = TOLERANCE) -> Tensor:
    """V [H, k], orthonormal, of what B [r, H] (a LoRA's `lora_B`) writes; k = its numerical rank, 0 of a B that is zero."""
    left, sigma, _ = torch.linalg.svd(B.detach().T, full_matrices=False)
    return left[:, sigma > tol * sigma.max()] if sigma.max() > 0 else left[:, :0]


def without(V: Tensor, of: Tensor, axis: int) -> Tensor:
    """`of` less its part in span(V): along its last axis (D [r, H], axis 1) or its first (U [H, r], axis 0)."""
    return of - (of @ V) @ V.T if axis else of - V @ (V.T @ of)


class Overlap(NamedTuple):
    """How much of an adapter lies in what the LoRA writes: ||D V|| / ||D|| and ||V^T U|| / ||U||; 0 of what is zero."""

    read: float
    write: float


def overlap(V: Tensor, adapter: PostBlock) -> Overlap:
    """Of one block."""
    down, up = adapter.down.detach(), adapter.up.detach()
    sizes = ((down @ V).norm(), down.norm()), ((V.T @ up).norm(), up.norm())
    return Overlap(*(float(inside / whole) if whole > 0 else 0.0 for inside, whole in sizes))


class Apart:
    """Keeps the adapters of a joint Steering off its LoRA: `gradients` before each optimizer step, `parameters` after it."""

    def __init__(self, model: nn.Module, steering: Steering, projection: str, tol: float = TOLERANCE) -> None:
        """Raises UserError for a word that is none, and where a projection has nothing to act on."""
        if projection not in PROJECTIONS:
            raise unknown("projection", projection, PROJECTIONS)
        self.projection, self.tol = projection, tol
        down = {layer: parts.mlp_mid for layer, parts in enumerate(anatomy.of(model).parts)}
        writes = {
            site.layer: made for site, made in steering if isinstance(made, LoRA) and site.write_point in (down[site.layer], "down_proj")
        }
        reads = [(site, made) for site, made in steering if isinstance(made, PostBlock) and site.write_point in ("block", "mlp")]
        self.pairs = [(site.layer, writes[site.layer], made) for site, made in reads if site.layer in writes]
        if projection != "none" and not self.pairs:
            raise UserError(
                f"projection {projection}: no block has both a LoRA at its down projection and an adapter behind it: {steering!r}"
            )

    def _each(self) -> Iterable[tuple[Tensor, nn.Parameter, int]]:
        """V, the projected parameter, its axis."""
        if self.projection != "none":
            for _, writer, adapter in self.pairs:
                of, axis = (adapter.down, 1) if self.projection == "input" else (adapter.up, 0)
                yield basis(writer.lora_B, self.tol), of, axis

    @torch.no_grad()
    def gradients(self) -> None:
        """What the step would do inside the LoRA's subspace is taken out of the gradients."""
        for V, parameter, axis in self._each():
            if parameter.grad is not None:
                parameter.grad.copy_(without(V, parameter.grad, axis))

    @torch.no_grad()
    def parameters(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters and first moments are put outside again, of the subspace as it is after the step."""
        for V, parameter, axis in self._each():
            parameter.copy_(without(V, parameter, axis))
            state: Mapping[str, Any] = optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                state["exp_avg"].copy_(without(V, state["exp_avg"], axis))

    def overlaps(self) -> dict[int, Overlap]:
        """layer -> how much of its adapter lies in what its LoRA writes."""
        return {layer: overlap(basis(writer.lora_B, self.tol), adapter) for layer, writer, adapter in self.pairs}
