"""How an intervention's parameters are found: a file for each method (docstring = equation and source) and its row here.

Torch is imported where it is used: the table also serves the command line's choices and dry runs.
"""

from __future__ import annotations

from spilt.methods.base import Method, Scored, never
from spilt.methods.caa import caa
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
            forms=("vector",),
            why="caa is a mean of activation differences, which is a vector and nothing else",
        ),
        Method("reps", "reference-scaled preference", reps, needs_reference=lambda s: s.loss_type != "simpo"),
        Method("sft", "winning answers only", sft, needs_losing=never),
        Method("spilt", "preference and utility with a hinge", spilt, needs_reference=lambda s: bool(s.ref_loss_weight)),
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

__all__ = ["LOSS_TYPES", "METHODS", "Method", "Scored"]
