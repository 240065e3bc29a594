"""What a run on a task is told: what is learned, and how it is trained. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from spilt.cell import NONLINEARITIES
from spilt.errors import UserError, unknown
from spilt.settings.fields import WRITE_POINTS
from spilt.settings.files import MAX_INT
from spilt.settings.values import SCOPES


class Kind(NamedTuple):
    """A kind of what is learned. words: the fields of Variant that mean something to it."""

    says: str
    words: tuple[str, ...] = ()


_PLACED = ("sites", "layers", "scope")
KINDS: Mapping[str, Kind] = {
    "post_block": Kind("h + alpha U act(D h) after every block (arXiv 2603.00425)", (*_PLACED, "rank", "nonlinearity", "alpha")),
    "vector": Kind("h + v, the same for every token", _PLACED),
    "loreft": Kind("h + R^T (W h + b - R h), R orthonormal (arXiv 2404.03592)", (*_PLACED, "rank")),
    "lora": Kind("x W + x A B at every linear map (arXiv 2106.09685)", ("layers", "rank")),
    "joint": Kind(
        "lora and post_block together, the adapters off what the LoRA writes",
        ("layers", "rank", "nonlinearity", "alpha", "lora_rank", "projection"),
    ),
    "full": Kind("all weights of the model"),
    "base": Kind("nothing: the model as it is"),
}
PROJECTIONS = ("none", "input", "output")  # of joint: what an adapter does not read (the public code), does not write (the paper)
PARTS = ("all", "lora_only", "adapter_only")  # of joint, when it is evaluated
OVERLONG = ("truncate", "drop")  # a prompt that is too long loses its beginning, or its row is left out
LINEAR = "linear"  # the nonlinearity that is none
SUBMODULES = ("mlp", "attn")  # of --submodules: one at each


@dataclass(frozen=True)
class Variant:
    """Everything that decides what is learned, and how it acts. layers None: all. nonlinearity: of post_block alone."""

    kind: str = "post_block"
    rank: int = 8
    nonlinearity: str = "silu"
    sites: tuple[str, ...] = ("block",)
    layers: tuple[int, ...] | None = None
    scope: str = "all"
    alpha: float = 1.0
    lora_rank: int = 8
    projection: str = "output"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("variant", self.kind, KINDS)
        if self.nonlinearity not in NONLINEARITIES:
            raise unknown("nonlinearity", self.nonlinearity, NONLINEARITIES)
        for site in self.sites:
            if site not in WRITE_POINTS:
                raise unknown("site", site, WRITE_POINTS)
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.projection not in PROJECTIONS:
            raise unknown("projection", self.projection, PROJECTIONS)
        for flag, rank in (("adapter", self.rank), ("lora", self.lora_rank)):
            if rank < 1:
                raise UserError(f"--{flag}-rank {rank}: wanted 1 or more")
        if self.kind in ("base", "full") and (self.layers is not None or self.scope != "all"):
            raise UserError(f"--variant {self.kind} acts everywhere: --layers and scopes are of the others")
        if self.kind in ("lora", "joint") and self.scope != "all":
            raise UserError(f"--variant {self.kind} changes weights, which act on every token: leave the scope out")

    @property
    def name(self) -> str:
        """Of its folder: everything that tells it from another one, so that no two share a folder."""
        words = [self.kind]
        if self.kind in ("base", "full"):
            return self.kind
        own = KINDS[self.kind].words
        words += ["+".join(self.sites)] if "sites" in own else []
        words += [self.nonlinearity] if "nonlinearity" in own else []
        words += [f"r{self.rank}"] if "rank" in own else []
        words += [f"lora{self.lora_rank}", self.projection] if "projection" in own else []
        words += [f"alpha{self.alpha:g}"] if "alpha" in own and self.alpha != 1.0 else []
        if self.layers is not None:
            words.append(f"layers{'+'.join(map(str, self.layers))}")
        return "_".join([*words, *([] if self.scope == "all" else [self.scope])])

    def as_dict(self) -> dict[str, Any]:
        """What of it means something for its kind."""
        return {name: value for name, value in asdict(self).items() if name == "kind" or name in KINDS[self.kind].words}

    def plain(self) -> Variant:
        """With the defaults where a word means nothing to the kind: equal variants are equal."""
        return Variant(**self.as_dict())


def acting(multiplier: float, part: str) -> str:
    """What a name says of an evaluation that is not of the whole as it was trained; '' of that."""
    return ("" if multiplier == 1.0 else f"_m{multiplier:g}") + ("" if part == PARTS[0] else f"_{part}")


SCHEDULERS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class TrainSettings:
    """Defaults are those of the public code, where it has one."""

    lr: float = 9e-4
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    epochs: int = 1
    bs: int = 8
    grad_accum: int = 2
    scheduler: str = "linear"
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise unknown("scheduler", self.scheduler, SCHEDULERS)
        for name in ("epochs", "bs", "grad_accum"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted 1 or more")
        if not 0 <= self.seed <= MAX_INT:
            raise UserError(f"--seed {self.seed}: wanted 0 to {MAX_INT}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted a number above 0")
        if not (0 <= self.warmup_ratio < 1 and 0 <= self.weight_decay < math.inf):
            raise UserError(f"--warmup-ratio {self.warmup_ratio}, --weight-decay {self.weight_decay}: wanted 0 <= ratio < 1 and decay >= 0")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
