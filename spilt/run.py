"""The run: the steps of a plan in order, one model load, several processes. Prints nothing: `tell` is handed every message.

A step that fails is its outcome and the others go on; what is raised from here (a changed model, ^C) ends the run.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from spilt import plan, verbs
from spilt.artifacts.manifest import manifest_path
from spilt.artifacts.store import Store
from spilt.errors import NotFinite, UserError, first_line
from spilt.model.identity import Changed, Seen
from spilt.steering.layer_file import beside
from spilt.team import place

DONE, ALREADY, SKIPPED, FAILED = "done", "already done", "skipped", "failed"
log = logging.getLogger("spilt")
Tell = Callable[[str], None]


class Outcome(NamedTuple):
    """What became of one step."""

    step: str
    outcome: str
    reason: str
    seconds: float
    output: str
    wrong_request: bool = False
    trace: str = ""  # of an error that nobody foresaw


def run_plan(made: plan.Plan, request: verbs.Request, tell: Tell = lambda text: None, *, quiet: bool = True) -> list[Outcome]:
    """The outcome of every step. tell: hears of what fails, and unless quiet of what is done; quiet: no progress bars either."""
    outcomes, waiting, seen = [], [], Seen()
    coming = {path for step in made.steps if step.verb == "fit" for path in step.outputs}
    again: set[Path] = set()  # vectors that this run fits: what is made from them is judged afterwards
    broken: set[Path] = set()
    for step in made.steps:
        lacking = [path for path in step.vectors if not path.exists() and path not in coming]
        if lacking:
            reason = f"no vector file {lacking[0]}{beside(lacking[0])}; make it with --mode generate"
            log.warning("%s: skipped: %s", step, reason)
            outcomes.append(Outcome(str(step), SKIPPED, reason, 0.0, ""))
        elif not broken.isdisjoint(step.vectors):
            outcomes.append(Outcome(str(step), SKIPPED, "its vector cannot be used", 0.0, ""))
        elif reason := keeps_what_is_unusable(step, request):
            tell(f"error: {step}: {reason}")
            broken.update(step.outputs)
            outcomes.append(Outcome(str(step), FAILED, reason, 0.0, "", wrong_request=True))
        elif not request.force and not step.sweep and again.isdisjoint(step.vectors) and _all_done(step, request, seen):
            outcomes.append(Outcome(str(step), ALREADY, "", 0.0, _shown(step, request)))
            _tidy(step, request, seen)
        else:
            waiting.append(step)
            again.update(step.outputs if step.verb == "fit" else ())
    if waiting or place()[1] > 1:
        outcomes = _run_waiting(waiting, outcomes, request, tell, quiet, seen)
    if request.mode == "loss" and any(outcome.outcome in (DONE, ALREADY) for outcome in outcomes):
        outcomes.append(_report(made.steps[0], request, tell, quiet))
    return outcomes


def keeps_what_is_unusable(step: verbs.Step, request: verbs.Request) -> str:
    """Why a fit can't leave what lies there: a file without manifest is somebody's own and is kept, but no run could read it."""
    if step.verb != "fit" or request.force:
        return ""
    for path in step.outputs:
        if path.exists() and not manifest_path(path).exists():
            from spilt import verify

            if why := verify.unusable(request.base_dir, path):
                return f"{path} has no manifest (made elsewhere) and {why}; put the sound file there, or fit it again with --force"
    return ""


def _tidy(step: verbs.Step, request: verbs.Request, seen: Seen) -> None:
    """A run that was killed after its last result was stored left what it had kept for it: that goes. Other work under way stays."""
    if left := Store(request.base_dir).unfinished_work(step.verb, step.cells):
        from spilt.artifacts.journal import Journal

        known = verbs.VERBS[step.verb].unfinished(step, request.limit, seen)
        for path in left:
            if step.verb == "fit" or Journal.identities_in(path) <= known:
                path.unlink(missing_ok=True)


def _run_waiting(
    waiting: list[verbs.Step], before: list[Outcome], request: verbs.Request, tell: Tell, quiet: bool, seen: Seen
) -> list[Outcome]:
    """The steps that are to run: fits dealt out over the processes, the others done together."""
    from spilt import tasks as stages
    from spilt.team import Team

    team = Team(request.device)
    quiet = quiet or not team.main
    waiting, before = team.on_main(lambda: (waiting, before))
    request = replace(request, device=team.device)
    recordings = stages.Recordings(waiting, request.limit, request.engine)
    hosts = _Hosts(request, recordings, seen)

    def one(step: verbs.Step) -> Outcome:
        outcome = _run_step(step, stages.Run(request, hosts.of(step), Store(request.base_dir), recordings, quiet, team, seen))
        if outcome.outcome == FAILED and (team.main or outcome.trace):
            tell(outcome.trace or f"error: {step}: {outcome.reason}")
        if not quiet:
            tell(f"{outcome.outcome}: {step}{outcome.reason and ': '}{outcome.reason} ({outcome.seconds:.1f} s)")
        return outcome

    fits = team.shard([step for step in waiting if step.verb == "fit"])
    done = {str(step): one(step) for step in fits}
    after = {name: outcome for part in team.gather(lambda: done) for name, outcome in part.items()}
    seen.forget([path for step in waiting if step.verb == "fit" for path in step.outputs])  # those of other processes too
    failed = {path for step in waiting if step.verb == "fit" and after[str(step)].outcome == FAILED for path in step.outputs}
    for step in waiting:
        if step.verb == "fit":
            continue
        if failed.isdisjoint(step.vectors):
            after[str(step)] = one(step)
        else:  # an older vector may lie there: what it would give is not what was asked for
            after[str(step)] = Outcome(str(step), SKIPPED, "its fit failed", 0.0, "")
    team.end()
    return [*before, *(after[str(step)] for step in waiting)]


class _Hosts:
    """The model, loaded when the first step asks for it, and once for all steps that want the same dtype."""

    def __init__(self, request: verbs.Request, recordings: Any, seen: Seen) -> None:
        self.request, self.recordings, self.seen = request, recordings, seen
        self.host: Any = None
        self.dtype = ""

    def of(self, step: verbs.Step) -> Any:
        if self.host is None or step.settings.dtype != self.dtype:
            import torch

            from spilt.model.host import load

            torch.use_deterministic_algorithms(self.request.deterministic)
            _quiet_libraries()
            self.host, self.dtype = None, step.settings.dtype
            self.recordings.clear()
            self.seen.of(step.model)
            self.host = load(step.model, self.dtype, self.request.device)
            self.seen.again([step.model])
        return self.host


def _run_step(step: verbs.Step, here: Any) -> Outcome:
    """One step. Whatever goes wrong in it is its outcome, not the end of the run."""
    from spilt import tasks as stages
    from spilt.memory import OutOfMemory, ran_out

    start = time.monotonic()

    def failed(reason: str, wrong_request: bool = False, trace: str = "") -> Outcome:
        return Outcome(str(step), FAILED, reason, time.monotonic() - start, "", wrong_request, trace)

    try:
        if lacking := stages.not_there(step):
            return Outcome(str(step), SKIPPED, f"no vector file {lacking[0]} (its fit failed)", 0.0, "")
        result = stages.run_step(step, here)
        return Outcome(str(step), result, "", time.monotonic() - start, _shown(step, here.request))
    except OSError as error:
        return failed(f"{type(error).__name__}: {error}")
    except (UserError, OutOfMemory, Changed, NotFinite) as error:  # what the message says is all there is to know
        return failed(str(error), wrong_request=isinstance(error, UserError))
    except Exception as error:  # noqa: BLE001 - reported with its traceback; the other cells go on
        if not ran_out(error):
            return failed(f"{type(error).__name__}: {first_line(error)}", trace=traceback.format_exc().rstrip("\n"))
        layers = ", ".join(map(str, step.cells[0].layers))
        reason = f"one piece of work does not fit in memory at layer {layers}: {first_line(error)}"
        return failed(f"{reason}; fewer tokens (--set output_length=N), --dtype bfloat16 or --device auto")


def _report(step: verbs.Step, request: verbs.Request, tell: Tell, quiet: bool) -> Outcome:
    """Curves, pictures and the page, of everything that is stored by now."""
    from spilt.report import update

    start = time.monotonic()
    if place()[0] > 0:
        return Outcome("report", DONE, "", 0.0, "")
    try:
        page = update(
            request.base_dir,
            request.model,
            request.dataset,
            progress=lambda text: None if quiet else tell(f"report: {text}"),
        )
    except (UserError, OSError) as error:
        tell(f"error: report: {error}")
        return Outcome("report", FAILED, str(error), time.monotonic() - start, "")
    except Exception as error:  # noqa: BLE001 - reported with its traceback; what was measured is stored and has its line in the table
        tell(traceback.format_exc().rstrip("\n"))
        return Outcome("report", FAILED, f"{type(error).__name__}: {first_line(error)}", time.monotonic() - start, "")
    return Outcome("report", DONE, "", time.monotonic() - start, Store(request.base_dir).relative(page))


def _all_done(step: verbs.Step, request: verbs.Request, seen: Seen) -> bool:
    return set(verbs.standing(step, request.limit, seen).values()) <= ({"done", "foreign"} if step.verb == "fit" else {"done"})


def _quiet_libraries() -> None:
    """Their bars and notices on loading say nothing a user of this tool needs."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


def _shown(step: verbs.Step, request: verbs.Request) -> str:
    """The output that the table names: the file, of several multipliers the first, of loss mode the cell's folder."""
    store = Store(request.base_dir)
    if step.verb == "measure":
        return store.relative(store.loss_folder(step.cells[0]))
    return store.relative(step.outputs[0]) + (f" (and {len(step.outputs) - 1} more)" if len(step.outputs) > 1 else "")
