"""Cell: one grid point of a request, that is what is fitted, applied or measured; and the forms that it may have. No torch."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PROMPT = "prompt"  # in the place of a method, of a cell that is no steering: the unsteered model behind the prompt of that name
NONLINEARITIES = ("silu", "relu", "gelu", "tanh", "linear")  # of post_block


class Form(NamedTuple):
    """The facts of a form that need no torch. Its class, with the equation, is that of steering/interventions.py with this name."""

    name: str
    label: str  # in figures
    tensors: Mapping[str, str]  # stored tensor -> its axes: D the stream, F the read point, r the rank
    bare: bool = False  # the file is the only tensor itself, not a dict
    reads: bool = True  # has a read point
    direction: bool = False  # one direction of the stream: it can be removed
    positional: bool = False  # fits and released losses let it act at `intervention_positions` alone, as released
    lr: float = 0.01  # released defaults
    factors: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    in_all: bool = True  # the word `all` means it too (the released forms)
    rank: int = 4  # of a form that has one
    dropout: float = 0.1
    joint: bool = False  # its layers are one thing: several are always fitted together

    def shapes(self, hidden: int, read: int, rank: int | None) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each tensor."""
        size = {"D": hidden, "F": read, "r": rank or 0}
        return {name: tuple(size[axis] for axis in axes) for name, axes in self.tensors.items()}


# in the order in which `all` runs them
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("vector", "vector", {"v": "D"}, True, False, True, True, lr=0.08, factors=tuple(map(float, range(2, 21, 2)))),
        Form("lora", "LoRA", {"lora_A": "Fr", "lora_B": "rD"}),
        Form("local_weight", "local weight", {"weight": "FD", "bias": "D"}),
        Form("ablation", "ablation", {"direction": "D", "scale": ""}, reads=False, in_all=False),
        Form("post_block", "post-block", {"down": "rD", "up": "Dr"}, reads=False, lr=5e-3, in_all=False, rank=8, dropout=0.0, joint=True),
    )
}

# Forms that are not linear in m, of steering/nonlinear.py: found by spilt/baselines alone, so no word of the command line names them.
# factors: the range of m in which they do something on models of usual width; a calibration begins at its end.
NONLINEAR: dict[str, Form] = {
    name: Form(name, name.replace("_", " "), {**tensors, "scale": ""}, reads=False, factors=(most,), in_all=False)
    for name, most, tensors in (
        ("directional_ablation", 10.0, {"direction": "D"}),
        ("cosine_gated", 20.0, {"direction": "D", "gate": ""}),
        ("angular", 1.0, {"first": "D", "second": "D"}),
        ("spherical", 0.1, {"direction": "D"}),
        ("linear_act", 1.0, {"slope": "D", "shift": "D"}),
        ("chars", 1.0, {"source": "rD", "target": "rD", "plan": "rr", "bandwidth": ""}),
        ("clusters", 10.0, {"centroids": "rD"}),
        ("sspace", 10.0, {"basis": "Dr", "root": "r", "direction": "r", "bias": "D"}),
        ("sspace_ablate", 10.0, {"basis": "Dr", "root": "r", "direction": "r", "bias": "D"}),
    )
}
HELD = ChainMap(FORMS, NONLINEAR)  # all that a Steering can hold


@dataclass(frozen=True)
class Cell:
    """One grid point. A value: equal cells are the same work.

    `concept` is the concept id of a dataset with one intervention per concept (axbench), else None.
    `layers` are 0-based decoder block indices; each has its own parameters, all act together when applied.
    `seed` is that of a fit beside others (--seeds), None of the settings' own.
    `apart`: the layers are those of --layers and not the settings' own, so their results lie in folders of their own.
    """

    model: str
    dataset: str
    method: str
    intervention: str
    layers: tuple[int, ...]
    concept: int | None = None
    seed: int | None = None
    apart: bool = False

    @property
    def variant(self) -> str:
        """The form with what else tells its folders from others of the method and form: 'vector@layer10+14@seed2'."""
        layers = f"{LAYER}{'+'.join(map(str, self.layers))}" if self.apart else ""
        return self.intervention + layers + ("" if self.seed is None else f"{SEED}{self.seed}")

    @property
    def leaf(self) -> str:
        """The name of its folders."""
        return f"{self.method}_{self.variant}"

    def __str__(self) -> str:
        concept = "" if self.concept is None else f" concept {self.concept}"
        seed = "" if self.seed is None else f" seed {self.seed}"
        layers = f" layer {spans(self.layers)}" if self.apart else ""
        return f"{self.dataset}{concept} {self.method} {self.intervention}{layers}{seed}"


# between a form and the layers of --layers or the seed of a fit beside others, in the names of folders
LAYER, SEED = "@layer", "@seed"
VARIANT = re.compile(rf"(?P<form>[^@]+)(?:{LAYER}(?P<layers>[0-9]{{1,5}}(?:\+[0-9]{{1,5}})*))?(?:{SEED}(?P<seed>[0-9]{{1,9}}))?", re.ASCII)


def spans(layers: Sequence[int]) -> str:
    """Layers that act together, as they are shown: (5, 9, 10, 11) -> '5+9–11'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "+".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs)


class Variant(NamedTuple):
    """What `Cell.variant` says."""

    form: str
    layers: tuple[int, ...] | None = None  # None: the settings' own
    seed: int | None = None

    def __str__(self) -> str:
        """What follows the form when it is shown."""
        layers = "" if self.layers is None else f", layer {spans(self.layers)}"
        return layers + ("" if self.seed is None else f", seed {self.seed}")


def variant_of(name: str) -> Variant:
    """'vector@layer10+14@seed2' -> ('vector', (10, 14), 2); a name of another make is a form."""
    hit = VARIANT.fullmatch(name)
    if hit is None:
        return Variant(name)
    layers = tuple(map(int, hit["layers"].split("+"))) if hit["layers"] else None
    return Variant(hit["form"], layers, int(hit["seed"]) if hit["seed"] else None)
