"""The verbs: what each reads, writes, is decided by and costs stands in its file. What does the work is in tasks/."""

from spilt.verbs.base import (
    MODES,
    VERBS,
    Request,
    Step,
    Verb,
    cost,
    entry_of,
    missing_inputs,
    output_parts,
    parts_of,
    register,
    replaced,
    standing,
    state,
    without_effect,
)  # fmt: skip
from spilt.verbs.evaluate import Evaluate
from spilt.verbs.fit import Fit
from spilt.verbs.generate import Generate
from spilt.verbs.measure import Measure

for _verb in (Fit(), Generate(), Measure(), Evaluate()):
    register(_verb)
MODES["both"] = ("fit", "generate")
MODES["all"] = ("fit", "measure", "generate")  # what the losses recommend is applied
