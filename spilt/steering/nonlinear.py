"""Forms that are not linear in their strength, those of baselines by others: each a class whose docstring is its equation.

The contract is that of interventions.py: h [B, T, D] at the write point, m a number or a tensor [B, 1, 1]. c = m s, with s = `scale`, 1
until a Steering is multiplied. Whatever reads the stream reads the one that it changes. Forms whose `identity` is False change the stream
at c = 0 too, so they have a KL that no strength gets below; c = 0 is not the unsteered model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spilt.cell import NONLINEAR as ROWS
from spilt.errors import UserError
from spilt.steering.interventions import Intervention, Multiplier, State

TINY = 1e-12


def unit(v: Tensor) -> Tensor:
    """v / |v| along the last axis; 0 stays 0."""
    return v / v.norm(dim=-1, keepdim=True).clamp(min=TINY)


class Nonlinear(Intervention):
    """What these forms share: parameters as they are stored, in float32, and the factor `scale`."""

    linear = ("scale",)
    scale: nn.Parameter
    main: ClassVar[str]  # the parameter that says whether there is an effect

    def __init__(self, parameters: Mapping[str, Tensor], *, write_point: str = "block", read_point: str | None = None, **_: Any) -> None:
        super().__init__(None, write_point, 0.0)
        for name in ROWS[self.form].tensors:
            value = parameters.get(name, torch.ones(()))  # scale alone may be left out
            setattr(self, name, nn.Parameter(value.detach().float().clone(memory_format=torch.contiguous_format)))

    def c(self, m: Multiplier) -> Tensor:
        """m s, of any shape that m has."""
        return torch.as_tensor(m, dtype=torch.float32, device=self.scale.device) * self.scale

    def norm(self) -> float:
        """|s| |main|, to tell what has no effect; not the size of an update, which depends on the stream."""
        return abs(self.scale.item()) * float(self.get_parameter(self.main).detach().norm())

    def state(self) -> State:
        return {**{name: p.detach().float().cpu().clone() for name, p in self.named_parameters()}, "intervention_components": None}

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> Nonlinear:
        assert isinstance(state, Mapping)
        return cls({name: value for name, value in state.items() if isinstance(value, Tensor)}, **kwargs)

    def folded(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        raise UserError(f"{self.form} is not linear in the stream: no weight of the model does it; --format safetensors holds any Steering")

    def describe(self) -> dict[str, Any]:
        sizes = [self.get_parameter(name).shape[axes.index("r")] for name, axes in ROWS[self.form].tensors.items() if "r" in axes]
        return {"intervention_components": None, "rank": sizes[0] if sizes else None, "alpha": None}


class DirectionalAblation(Nonlinear):
    """h' = h - (h . v) v + c v, v = direction / |direction|: what points along v is replaced by c (arXiv 2406.11717, eq. 4, and an offset).

    At c = 0 the component is removed, which is not the identity; `ablation` removes by degrees instead.
    """

    direction: nn.Parameter
    form = "directional_ablation"
    main = "direction"
    identity = False

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        v = unit(self.direction)
        return (self.c(multiplier) - (h.float() @ v)[..., None]) * v


class CosineGated(Nonlinear):
    """h' = h + c max(0, |cos(h, v)| - tau) v, v = direction / |direction|, tau = gate.

    The gate does not see the sign. It is small in wide streams, so c is larger than for a vector.
    """

    direction: nn.Parameter
    gate: nn.Parameter
    form = "cosine_gated"
    main = "direction"

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        v = unit(self.direction)
        open_ = ((unit(h.float()) @ v).abs() - self.gate).clamp(min=0)
        return self.c(multiplier) * open_[..., None] * v


class Angular(Nonlinear):
    """h' = h - P h + |P h| (cos c b1 + sin c b2): the part of h in the plane of b1, b2 is turned to the angle c, radians.

    P h = (h . b1) b1 + (h . b2) b2, with b1 = first / |first| and b2 = what of second is orthogonal to it, normalised. |h'| = |h|. c is an
    absolute angle: it says where the part points, not by how much it is turned, so c = 0 is not the identity, and c + 2 pi is c
    (Angular Steering, arXiv 2510.26243).
    """

    first: nn.Parameter
    second: nn.Parameter
    form = "angular"
    main = "first"
    identity = False

    def furthest(self) -> float:
        return math.pi / max(abs(self.scale.item()), TINY)

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        b1 = unit(self.first)
        b2 = unit(self.second - (self.second @ b1) * b1)
        one, two = (h.float() @ b1)[..., None], (h.float() @ b2)[..., None]
        length, c = (one**2 + two**2).sqrt(), self.c(multiplier)
        return (length * c.cos() - one) * b1 + (length * c.sin() - two) * b2


class Spherical(Nonlinear):
    """h' = |h| [sin((1 - c) W) / sin W h / |h| + sin(c W) / sin W v], W the angle of h and v = direction / |direction| (slerp).

    h turns towards v by the share c of the way, beyond it at c > 1, away at c < 0; |h'| = |h|. Computed as h' = |h| [cos((1 - c) W) v +
    sin((1 - c) W) e], e the unit vector of h's part orthogonal to v and W = atan2(|part|, h . v): the same, without arccos, which is
    not finite or not exact beside v and -v. A stream that points along v or -v exactly stays: no way is the shortest.
    """

    direction: nn.Parameter
    form = "spherical"
    main = "direction"

    def furthest(self) -> float:
        return 2 / max(abs(self.scale.item()), TINY)  # h' = -h where h is orthogonal to v

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        v, stream = unit(self.direction), h.float()
        along = (stream @ v)[..., None]
        part = stream - along * v
        size, length = part.norm(dim=-1, keepdim=True), stream.norm(dim=-1, keepdim=True)
        left = (1 - self.c(multiplier)) * torch.atan2(size, along)
        turned = length * (left.cos() * v + left.sin() * unit(part)) - stream
        return torch.where((size > 1e-6 * length) & (self.c(multiplier) != 0), turned, 0)


class LinearAct(Nonlinear):
    """h' = (1 - c) h + c (omega h + beta), coordinate by coordinate; omega = slope, beta = shift [D] (Linear-AcT, arXiv 2410.23054)."""

    slope: nn.Parameter
    shift: nn.Parameter
    form = "linear_act"
    main = "shift"

    def norm(self) -> float:
        return abs(self.scale.item()) * math.hypot(float((self.slope.detach() - 1).norm()), float(self.shift.detach().norm()))

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        return self.c(multiplier) * ((self.slope - 1) * h.float() + self.shift)


class Chars(Nonlinear):
    """h' = h + c sum_ij P_ij k_i (b_j - a_i) / sum_ij P_ij k_i, k_i = exp(-|h - a_i|^2 / 2 s^2): moved as clusters a_i are carried to b_j.

    a = source, b = target [k, D] cluster means of either side, P = plan [k, k] the entropic transport of their masses. s = bandwidth, or
    where that is 0 the lower median of |h - a_i| at each token. With one cluster it is c (b - a), the difference of means.
    """

    source: nn.Parameter
    target: nn.Parameter
    plan: nn.Parameter
    bandwidth: nn.Parameter
    form = "chars"
    main = "target"

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        stream, mass = h.float(), self.plan.sum(1)
        moves = self.plan @ self.target / mass[:, None].clamp(min=TINY) - self.source  # [k, D]: where each cluster goes
        far = torch.stack([(stream - a).pow(2).sum(-1) for a in self.source], -1)  # [B, T, k]
        wide = torch.where(self.bandwidth > 0, self.bandwidth**2, far.median(-1, keepdim=True).values)
        near = (-far / (2 * wide).clamp(min=TINY) + mass.clamp(min=TINY).log()).softmax(-1)
        return self.c(multiplier) * (near @ moves)


class Clusters(Nonlinear):
    """h' = h + c r_i, i = argmax over clusters of cos(h, r_i): the nearest of several directions, r = centroids [k, D], of length 1."""

    centroids: nn.Parameter
    form = "clusters"
    main = "centroids"

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        r = unit(self.centroids)
        return self.c(multiplier) * r[(h.float() @ r.T).argmax(-1)]


class SSpace(Nonlinear):
    """y' = y + c |cos(z, d)| ((d root) U^T), z = (y - bias) U / root: along d in the coordinates of a weight's singular vectors.

    U = basis [D, r], root [r] the square roots of its singular values, d = direction [r], of length 1; of a linear map W = U S V^T with
    bias, y = W x + bias, so z = x V sqrt(S). At a block's output (super_sspace) the basis is that of many weights, and the bias 0.
    """

    basis: nn.Parameter
    root: nn.Parameter
    direction: nn.Parameter
    bias: nn.Parameter
    form = "sspace"
    main = "direction"

    def coordinates(self, y: Tensor) -> Tensor:
        """z [B, T, r]."""
        return (y.float() - self.bias) @ self.basis / self.root

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        d = unit(self.direction)
        gate = (unit(self.coordinates(h)) @ d).abs()[..., None]
        return self.c(multiplier) * gate * ((d * self.root) @ self.basis.T)


class SSpaceAblate(SSpace):
    """y' = y + (c - z . d) ((d root) U^T), z as of sspace: what points along d is replaced by c. At c = 0 it is removed, no identity."""

    form = "sspace_ablate"
    identity = False

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        d = unit(self.direction)
        return (self.c(multiplier) - (self.coordinates(h) @ d)[..., None]) * ((d * self.root) @ self.basis.T)


NONLINEAR: dict[str, type[Intervention]] = {
    kind.form: kind for kind in (DirectionalAblation, CosineGated, Angular, Spherical, LinearAct, Chars, Clusters, SSpace, SSpaceAblate)
}
assert list(NONLINEAR) == list(ROWS)
