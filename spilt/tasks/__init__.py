"""The story of a run: one function per verb, each (step, run) -> 'done' or 'already done'."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from spilt.model.identity import Changed
from spilt.tasks.recordings import Recordings, Run, refuse_changed
from spilt.verbs import VERBS, Step


def run_step(step: Step, run: Run) -> str:
    """Run one step; whatever happens, what no later step needs is released."""
    try:
        for path in step.vectors:
            refuse_changed(path)
        run.seen.again(step.inputs)
        module, _, function = VERBS[step.verb].work.partition(":")
        return str(getattr(import_module(module), function)(step, run))
    except Changed:
        for path in run.store.unfinished_work(step.verb, step.cells):  # of which inputs it is, nobody can say any more
            path.unlink(missing_ok=True)
        raise
    finally:
        run.recordings.release(step)


def not_there(step: Step) -> list[Path]:
    """Stored vectors that the step would read and that do not exist."""
    return [path for path in step.vectors if not path.exists()]
