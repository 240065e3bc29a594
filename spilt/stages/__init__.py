"""The story of a run: one function per verb, each (step, run) -> 'done' or 'already done'."""

from __future__ import annotations

from pathlib import Path

from spilt.plan import Step
from spilt.stages.fit import fit
from spilt.stages.generate import generate
from spilt.stages.measure import measure_cell
from spilt.stages.recordings import Recordings, Run

STAGES = {"fit": fit, "generate": generate, "measure": measure_cell}


def run_step(step: Step, run: Run) -> str:
    """Run one step; whatever happens, what no later step needs is released."""
    try:
        return STAGES[step.verb](step, run)
    finally:
        run.recordings.release(step)


def not_there(step: Step) -> list[Path]:
    """Stored vectors that the step would read and that do not exist."""
    return [path for path in step.vectors if not path.exists()]


__all__ = ["STAGES", "Recordings", "Run", "not_there", "run_step"]
