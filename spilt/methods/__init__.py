"""How an intervention's parameters are found: a file for each method (docstring = equation and source) and its row here.

Torch is imported where it is used: the table also serves the command line's choices and dry runs.
"""

from __future__ import annotations

from spilt.cell import FORMS
from spilt.methods.base import DIRECTIONS, Method, Scored, always, never
from spilt.methods.bipo import bipo
from spilt.methods.caa import caa
from spilt.methods.lda import lda
from spilt.methods.mean_centred import mean_centred
from spilt.methods.pca import pca
from spilt.methods.probe import probe
from spilt.methods.reps import LOSS_TYPES, reps
from spilt.methods.sft import sft
from spilt.methods.spilt import spilt
from spilt.methods.weight_arithmetic import weight_arithmetic

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "caa",
            "difference of means",
            estimate=caa,
            forms=DIRECTIONS,
            why="caa is a mean of activation differences, which is a direction and nothing else",
        ),
        Method("reps", "reference-scaled preference", reps, needs_reference=lambda s: s.loss_type != "simpo"),
        Method("sft", "winning answers only", sft, needs_losing=never),
        Method("spilt", "preference and utility with a hinge", spilt, needs_reference=lambda s: bool(s.ref_loss_weight)),
        # baselines of others, by name only
        Method("pca", "principal direction of pair differences", estimate=pca, forms=DIRECTIONS, why="pca finds a direction", in_all=False),
        Method("probe", "direction of a linear probe", estimate=probe, forms=DIRECTIONS, why="a probe is a direction", in_all=False),
        Method("lda", "whitened difference of means", estimate=lda, forms=DIRECTIONS, why="lda finds a direction", in_all=False),
        Method(
            "mean_centred",
            "mean of matching answers less that of neutral text",
            estimate=mean_centred,
            forms=DIRECTIONS,
            why="a difference of means is a direction",
            against_neutral=True,
            in_all=False,
        ),
        Method(
            "bipo",
            "preference in both directions",
            bipo,
            forms=("vector",),
            why="bipo is defined for a vector",
            needs_reference=always,
            one_side=True,
            in_all=False,
        ),
        Method(
            "weight_arithmetic",
            "difference of two adapters' weights",
            weight_arithmetic,  # of each adapter
            forms=("lora", "local_weight"),
            why="a difference of weights is of low rank (lora) or dense (local_weight)",
            in_all=False,
            adapters=True,
        ),
    )
}


def stand_ins(method: str, form: str) -> list[tuple[str, str]]:
    """(method, form) whose settings say where this one acts where it has none of its own, best first; [] of those
    that `all` means, and of adapters, which act elsewhere."""
    if METHODS[method].in_all and FORMS[form].in_all or METHODS[method].adapters:
        return []
    released = [(name, own) for name, row in METHODS.items() if row.in_all for own in row.forms if FORMS[own].in_all]
    return sorted(released, key=lambda cell: (cell[0] != method, cell[1] != "vector"))


__all__ = ["LOSS_TYPES", "METHODS", "Method", "Scored", "stand_ins"]
