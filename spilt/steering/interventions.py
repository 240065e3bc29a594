"""The forms of an intervention: small modules whose docstring is the equation.

All are one idea, a dynamic weight update of one layer, h' = (W + m1 dW) x + (b + m2 db)
(arXiv 2602.02343, eq. 3), written as what it adds to the residual stream: delta = m (dW x + db).

Contract: `forward(h, x, multiplier) -> h'` with h [B, T, D] the stream at the write point, x [B, T, F] the read
point (None when the form reads nothing), multiplier a float or a tensor [B, 1, 1]. A new tensor comes out; nothing
is written in place, and no state is set from outside. Parameters are float32 whatever the model's dtype (bf16
parameters lose small updates); the delta is cast to the stream's dtype when it is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from spilt.cell import FORMS, HELD, NONLINEARITIES
from spilt.errors import UserError, unknown

Multiplier = float | Tensor
State = Tensor | dict[str, Any]  # what layer_{id}.pt holds for one concept


class Intervention(nn.Module):
    """What the forms share: where they read (`read_point`) and write (`write_point`), and dropout while fitting.

    read_point: 'mlp_mid' | 'mlp' | 'attn' | 'block' (anatomy.read_point), None for a form that reads nothing.
    write_point: 'block' (the block's output, after every norm inside it), 'down_proj' (the MLP's down projection), 'mlp', 'attn'
    (what the MLP, the attention gives, before the residual add) or 'mlp_input' (what the MLP is given).
    """

    form: ClassVar[str]  # its name: key of FORMS and INTERVENTIONS, word of YAML and command line
    reads: ClassVar[bool] = True  # of its row in FORMS, as the training factors are
    one_mask: bool = False  # dropout acts on the parameters: one mask for all rows of a batch
    linear: ClassVar[tuple[str, ...]]  # parameters that, scaled together, scale delta
    factors: ClassVar[tuple[float, ...]]
    identity: ClassVar[bool] = True  # at m = 0 it leaves the stream as it is
    named: ClassVar[tuple[str, ...]] = ()  # attributes that decide delta beside the parameters and the places

    def __init_subclass__(cls) -> None:
        if "form" in cls.__dict__:
            cls.reads, cls.factors = HELD[cls.form].reads, HELD[cls.form].factors

    def __init__(self, read_point: str | None, write_point: str, dropout: float) -> None:
        super().__init__()
        self.read_point = read_point
        self.write_point = write_point
        self.dropout = nn.Dropout(dropout)

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        """m (dW x + db), broadcastable to h [B, T, D], in float32."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds to the stream")

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        """h' = h + m (dW x + db). At m = 0 this is h (0 is added)."""
        return h + self.delta(h, x, multiplier).to(h.dtype)

    def norm(self) -> float:
        """Frobenius norm of (dW, db), the update at multiplier 1: 0 means that no multiplier has an effect."""
        raise NotImplementedError(f"{type(self).__name__} does not say how large its update is")

    def state(self) -> State:
        """What the released code stores for this form (one concept); parameters detached, on the CPU, float32."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is stored")

    @classmethod
    def shapes(cls, hidden: int, read: int, rank: int | None) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter: D = hidden, the width of the stream; F = read, that of the read point."""
        return HELD[cls.form].shapes(hidden, read, rank)

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Tensor], **kwargs: Any) -> Intervention:
        """The form with copies of these parameters. kwargs: read_point, write_point, dropout, and what `named` says."""
        return cls.from_state(next(iter(parameters.values())) if HELD[cls.form].bare else dict(parameters), **kwargs)

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> Intervention:
        """The form from what `state` gave. kwargs: read_point, write_point, dropout."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is made of what is stored")

    @classmethod
    def from_direction(cls, v: Tensor, **kwargs: Any) -> Intervention:
        """The form along v [D], which a closed form found; its length too, where the form has one. kwargs: write_point."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is made of a direction")

    def scaled(self, factor: float) -> Intervention:
        """Itself, with delta times `factor`."""
        with torch.no_grad():
            for name in self.linear:
                self.get_parameter(name).mul_(factor)
        return self

    def furthest(self) -> float:
        """The largest |m| that does something new: where an angle has gone round, for example."""
        return math.inf

    def folded(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """((A [F, r], B [r, D]), db [D]) with delta = m ((x A) B + db); None for what it does not have."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is written as weights")

    def update(self) -> Tensor:
        """dW [F, D] at multiplier 1, of a form that reads."""
        pair = self.folded()[0]
        assert pair is not None
        return pair[0] @ pair[1]

    def options(self) -> dict[str, Any]:
        """name -> value of `named`, as `of_parameters` takes them."""
        return {name: getattr(self, name) for name in self.named}

    def describe(self) -> dict[str, Any]:
        """The fields of metadata_layer_{id}.jsonl that belong to the form."""
        return {"intervention_components": self.read_point, "rank": None, "alpha": None, **self.options()}


class Vector(Intervention):
    """delta = m v, v [D]. Dropout acts on v itself. Initialised uniform in +-1/sqrt(D), as released."""

    form = "vector"
    one_mask = True
    linear = ("v",)

    def __init__(self, hidden: int, read: int | None = None, *, write_point: str = "block", dropout: float = 0.0, **_: Any) -> None:
        super().__init__(None, write_point, dropout)
        bound = 1 / math.sqrt(hidden)
        self.v = nn.Parameter(torch.empty(hidden, dtype=torch.float32).uniform_(-bound, bound))

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        return multiplier * self.dropout(self.v)

    def without_component(self, h: Tensor, v: Tensor | None = None) -> Tensor:
        """h - (relu(h . v) / |v|^2) v: the stream with what points along v removed (RePS null-it-out, arXiv 2505.20809)."""
        v = self.dropout(self.v) if v is None else v
        along = torch.relu(h.float() @ v)[..., None]  # [B, T, 1]
        return h - (along / v.pow(2).sum() * v).to(h.dtype)

    def steered_or_removed(self, h: Tensor, multiplier: Multiplier, removed: Tensor) -> Tensor:
        """h + m v; in the rows `removed` [B] bool, h without its component along v. One dropout mask for both."""
        v = self.dropout(self.v)
        return torch.where(removed[:, None, None], self.without_component(h, v), h + (multiplier * v).to(h.dtype))

    def norm(self) -> float:
        return self.v.detach().norm().item()

    def folded(self) -> tuple[None, Tensor]:
        return None, self.v.detach()

    def state(self) -> State:
        return self.v.detach().float().cpu().clone()

    @classmethod
    def from_direction(cls, v: Tensor, **kwargs: Any) -> Vector:
        return cls.from_state(v, **kwargs)

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> Vector:
        assert isinstance(state, Tensor)
        made = cls(state.shape[-1], **kwargs)
        made.v = nn.Parameter(state.detach().float().reshape(-1).clone())
        return made


class LoRA(Intervention):
    """delta = m (x A) B, A [F, r], B [r, D]. A Kaiming-uniform(a = sqrt 5), B zero. Dropout acts on the delta.

    `alpha` is stored because the released files hold it; it never scales anything.
    """

    form = "lora"
    linear = ("lora_B",)

    def __init__(
        self,
        hidden: int,
        read: int,
        *,
        read_point: str | None = "mlp_mid",
        write_point: str = "block",
        dropout: float = 0.0,
        rank: int = 4,
        alpha: float = 32.0,
        **_: Any,
    ) -> None:
        super().__init__(read_point, write_point, dropout)
        self.rank, self.alpha = rank, alpha
        # the released layer draws A as [F, r] with fan_in counted on its last axis
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(read, rank, dtype=torch.float32), a=math.sqrt(5)))
        self.lora_B = nn.Parameter(torch.zeros(rank, hidden, dtype=torch.float32))

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        assert x is not None
        return self.dropout(multiplier * (x.float() @ self.lora_A @ self.lora_B))

    def norm(self) -> float:
        a, b = self.lora_A.detach().double(), self.lora_B.detach().double()
        return float(((a.T @ a) * (b @ b.T)).sum().clamp(min=0).sqrt())  # |A B|, without the product [F, D]

    def folded(self) -> tuple[tuple[Tensor, Tensor], None]:
        return (self.lora_A.detach(), self.lora_B.detach()), None

    def state(self) -> State:
        return {
            "lora_A": self.lora_A.detach().float().cpu().clone(),
            "lora_B": self.lora_B.detach().float().cpu().clone(),
            "r": self.rank,
            "alpha": self.alpha,
            "intervention_components": self.read_point,
        }

    def describe(self) -> dict[str, Any]:
        return {"intervention_components": self.read_point, "rank": self.rank, "alpha": self.alpha}

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> LoRA:
        assert isinstance(state, Mapping)
        a, b = state["lora_A"].float(), state["lora_B"].float()
        made = cls(b.shape[1], a.shape[0], rank=a.shape[1], alpha=float(state.get("alpha") or 32.0), **kwargs)
        made.lora_A, made.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        return made


class LocalWeight(Intervention):
    """delta = m (x dW + db), dW [F, D], db [D], both zero at the start. Dropout acts on the delta."""

    form = "local_weight"
    linear = ("weight", "bias")

    def __init__(
        self, hidden: int, read: int, *, read_point: str | None = "mlp_mid", write_point: str = "block", dropout: float = 0.0, **_: Any
    ) -> None:
        super().__init__(read_point, write_point, dropout)
        self.weight = nn.Parameter(torch.zeros(read, hidden, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(hidden, dtype=torch.float32))

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        assert x is not None
        return self.dropout(multiplier * (x.float() @ self.weight + self.bias))

    def norm(self) -> float:
        return math.hypot(self.weight.detach().norm().item(), self.bias.detach().norm().item())

    def update(self) -> Tensor:
        return self.weight.detach()

    def folded(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """dW is dW times 1, of rank D, or 1 times dW where F is smaller: nothing is rounded."""
        dW = self.weight.detach()
        one = torch.eye(min(dW.shape), device=dW.device)
        return ((one, dW) if len(dW) < dW.shape[1] else (dW, one)), self.bias.detach()

    def state(self) -> State:
        return {
            "weight": self.weight.detach().float().cpu().clone(),
            "bias": self.bias.detach().float().cpu().clone(),
            "intervention_components": self.read_point,
        }

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> LocalWeight:
        assert isinstance(state, Mapping)
        made = cls(state["weight"].shape[1], state["weight"].shape[0], **kwargs)
        made.weight, made.bias = nn.Parameter(state["weight"].float().clone()), nn.Parameter(state["bias"].float().clone())
        return made


class Ablation(Intervention):
    """delta = -m s (h . r) r, r = direction / |direction| [D]: at m s = 1 nothing of the stream points along r any more.

    Directional ablation (arXiv 2406.11717, eq. 4). It reads the stream that it writes to; s = 1 until a Steering is scaled.
    Dropout acts on the delta.
    """

    form = "ablation"
    linear = ("scale",)

    def __init__(self, hidden: int, read: int | None = None, *, write_point: str = "block", dropout: float = 0.0, **_: Any) -> None:
        super().__init__(None, write_point, dropout)
        self.direction = nn.Parameter(torch.empty(hidden, dtype=torch.float32).uniform_(-1, 1))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float32))

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        r = self.direction / self.direction.norm()
        return self.dropout(-multiplier * self.scale * (h.float() @ r)[..., None] * r)

    def norm(self) -> float:
        """Of s r r^T; 0 where there is no direction."""
        return abs(self.scale.item()) if self.direction.detach().norm() > 1e-6 else 0.0

    def folded(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        raise UserError(
            "ablation reads the stream that it changes, as no weight of the model does; --format safetensors holds any Steering"
        )

    def state(self) -> State:
        return {**{name: p.detach().float().cpu().clone() for name, p in self.named_parameters()}, "intervention_components": None}

    @classmethod
    def from_direction(cls, v: Tensor, **kwargs: Any) -> Ablation:
        return cls.from_state({"direction": v, "scale": torch.ones(())}, **kwargs)

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> Ablation:
        assert isinstance(state, Mapping)
        made = cls(len(state["direction"]), **kwargs)
        made.direction, made.scale = (nn.Parameter(state[name].detach().float().clone()) for name in ("direction", "scale"))
        return made


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,  # the exact one: x Phi(x)
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
assert tuple(ACTIVATIONS) == NONLINEARITIES
SMALL = 1e-3  # of D at the start: the activation begins in its linear range


class PostBlock(Intervention):
    """delta = m alpha U act(D h), D [r, D], U [D, r], no biases: a low-rank adapter after a block (arXiv 2603.00425).

    It reads the stream that it writes to. D begins Kaiming-uniform(a = sqrt 5) times 1e-3, that is uniform in +-1e-3/sqrt(D), and U
    zero: delta is 0 exactly, and the first step moves U alone. `nonlinearity` is a key of ACTIVATIONS. Dropout acts on the delta.
    """

    form = "post_block"
    linear = ("up",)
    named = ("alpha", "nonlinearity")

    def __init__(
        self,
        hidden: int,
        read: int | None = None,
        *,
        write_point: str = "block",
        dropout: float = 0.0,
        rank: int = 8,
        alpha: float = 1.0,
        nonlinearity: str = "silu",
        **_: Any,
    ) -> None:
        super().__init__(None, write_point, dropout)
        if nonlinearity not in ACTIVATIONS:
            raise unknown("nonlinearity", str(nonlinearity)[:60], ACTIVATIONS)
        if not math.isfinite(alpha):
            raise UserError(f"a post-block adapter with alpha {alpha}: wanted a finite number")
        self.rank, self.alpha, self.nonlinearity = rank, alpha, nonlinearity
        self.down = nn.Parameter(SMALL * nn.init.kaiming_uniform_(torch.empty(rank, hidden, dtype=torch.float32), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(hidden, rank, dtype=torch.float32))

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        read = ACTIVATIONS[self.nonlinearity](h.to(self.down.dtype) @ self.down.T)  # [B, T, r]
        return self.dropout(multiplier * (self.alpha * (read @ self.up.T)))

    def norm(self) -> float:
        """Of alpha U D: as large as delta / h gets where the activation passes all."""
        down, up = self.down.detach().double(), self.up.detach().double()
        return abs(self.alpha) * float(((down @ down.T) * (up.T @ up)).sum().clamp(min=0).sqrt())

    def folded(self) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        why = "reads the stream that it changes, as no weight of the model does"
        if self.nonlinearity != "linear":
            why = f"is not linear ({self.nonlinearity}), and weights are"
        raise UserError(f"a post-block adapter {why}; --format safetensors holds any Steering")

    def state(self) -> State:
        kept = {name: p.detach().float().cpu().clone() for name, p in self.named_parameters()}
        return {**kept, "r": self.rank, **self.options(), "site": self.write_point, "intervention_components": None}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "rank": self.rank}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Tensor], **kwargs: Any) -> PostBlock:
        made = cls(parameters["down"].shape[1], rank=parameters["down"].shape[0], **kwargs)
        made.down, made.up = (nn.Parameter(parameters[name].detach().float().clone()) for name in ("down", "up"))
        return made

    @classmethod
    def from_state(cls, state: State, **kwargs: Any) -> PostBlock:
        """Raises UserError where the state does not say the activation, or was made for another site."""
        assert isinstance(state, Mapping)
        if missing := [name for name in cls.named if state.get(name) is None]:
            raise UserError(
                f"a post-block adapter without its {' and '.join(missing)}: its tensors do not tell how they are used; where it is known, "
                "`spilt.read_post_block` takes it as an argument"
            )
        site, own = kwargs.get("write_point", "block"), str(state.get("site") or "")[:60]
        if own not in ("", site):
            raise UserError(f"a post-block adapter that was fitted at {own!r} would act at {site!r}; --set site={own}")
        return cls.of_parameters(state, **{name: state[name] for name in cls.named}, **kwargs)


INTERVENTIONS: dict[str, type[Intervention]] = {kind.form: kind for kind in (Vector, LoRA, LocalWeight, Ablation, PostBlock)}
assert list(INTERVENTIONS) == list(FORMS)
