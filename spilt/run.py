"""The run: the steps of a plan in order, one model load, several processes. `tell` is handed every message.

A step that fails is its outcome and the others go on; what is raised from here (a changed model, ^C) ends the run.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spilt import plan, verbs
from spilt.analysis import freshness
from spilt.artifacts.manifest import manifest_path
from spilt.artifacts.store import Store
from spilt.engine import choice
from spilt.errors import NotFinite, UserError, first_line
from spilt.lean import uncollected
from spilt.model.identity import Changed, Seen
from spilt.steering.layer_file import beside
from spilt.team import place

if TYPE_CHECKING:
    from spilt.progress import Progress, Work

DONE, ALREADY, SKIPPED, FAILED = "done", "already done", "skipped", "failed"
LATE = 20.0  # seconds until another machine shows a file that was written on this one
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
    from spilt.progress import Progress

    quiet = quiet or place()[0] > 0
    outcomes, waiting, seen = [], [], Seen()
    coming = {path for step in made.steps if step.verb == "fit" for path in step.outputs}
    again: set[Path] = set()  # vectors that this run fits: what is made from them is judged afterwards
    broken: set[Path] = set()
    for step in made.steps:
        lacking = [path for path in step.vectors if not path.exists() and path not in coming]
        unsaid = [path for path in step.texts if not path.exists()]
        if lacking or unsaid:
            reason = f"no texts {unsaid[0]}; make them with --mode apply" if unsaid else ""
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
        elif not request.force and not step.sweep and not step.waits and again.isdisjoint(step.vectors) and _all_done(step, request, seen):
            outcomes.append(Outcome(str(step), ALREADY, "", 0.0, _shown(step, request)))
            _tidy(step, request, seen)
        else:
            waiting.append(step)
            again.update(step.outputs if step.verb == "fit" else ())
    draws = "measure" in verbs.MODES[request.mode] and request.report
    work = {**_work(waiting, request, quiet), **({"report": ("report", 0.0)} if draws else {})}
    with Progress(work, len(outcomes), tell, quiet=quiet) as progress:
        if waiting or place()[1] > 1:
            with ExitStack() as borrowed:
                outcomes = _run_waiting(waiting, outcomes, made, request, tell, progress, seen, borrowed)
        if draws and any(outcome.outcome in (DONE, ALREADY) for outcome in outcomes):
            outcomes.append(_report(request, tell, progress))
    return outcomes


def _work(steps: list[verbs.Step], request: verbs.Request, quiet: bool) -> dict[str, Work]:
    """What is to be done, by its estimated cost; where that is not known of all, each counts the same."""
    rows: dict[Any, Any] = {}
    try:
        costs = [None if quiet else verbs.cost(step, request, rows) for step in steps]
    except (UserError, OSError):  # the step says so itself
        costs = [None]
    flops = [cost.flops for cost in costs if cost]
    work = {str(step): (step.verb, flops[i] if len(flops) == len(steps) else 1.0) for i, step in enumerate(steps)}
    fits = [str(step) for step in steps if step.verb == "fit"]
    dealt = 1 if request.tensor_parallel else place()[1]
    return work | {name: ("fit", 0.0) for i, name in enumerate(fits) if i % dealt}  # those of other processes


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
    waiting: list[verbs.Step],
    before: list[Outcome],
    made: plan.Plan,
    request: verbs.Request,
    tell: Tell,
    progress: Progress,
    seen: Seen,
    borrowed: ExitStack,
) -> list[Outcome]:
    """The steps that are to run: fits dealt out over the processes, the others done together. made: is told what was waited for;
    borrowed: gives the model back."""
    with uncollected():
        from spilt import tasks as stages
    from spilt.in_step import InStep
    from spilt.team import Team

    team = InStep(request.device) if request.tensor_parallel else Team(request.device)
    waiting, before = team.on_main(lambda: (waiting, before))
    request = replace(request, device=team.device)
    recordings = stages.Recordings(waiting, request.limit, request.engine)
    hosts = _Hosts(request, recordings, seen, borrowed)

    def one(step: verbs.Step) -> Outcome:
        progress.begin(str(step))
        together = team.of_one() if step.verb == "fit" else team
        outcome = _run_step(step, stages.Run(request, hosts.of(step), Store(request.base_dir), recordings, progress, together, seen))
        told = together.agree(outcome.reason if outcome.outcome == FAILED else "")
        if failed := [f"process {rank}: {why}" for rank, why in enumerate(told) if why]:
            outcome = outcome if outcome.outcome == FAILED else outcome._replace(outcome=FAILED, reason="; ".join(failed))
        if outcome.outcome == FAILED and (team.main or outcome.trace):
            tell(outcome.trace or f"error: {step}: {outcome.reason}")
        progress.end(*outcome[:4])
        return outcome

    done = {str(step): one(step) for step in team.shard([step for step in waiting if step.verb == "fit"])}
    after = {name: outcome for part in team.gather(lambda: done) for name, outcome in part.items()}
    for name in [name for name in after if name not in done]:  # fitted by other processes
        progress.end(*after[name][:4])
    seen.forget([path for step in waiting if step.verb == "fit" for path in step.outputs])  # those of other processes too
    failed = {path for step in waiting if step.verb == "fit" and after[str(step)].outcome == FAILED for path in step.outputs}
    for step in waiting:
        if step.verb == "fit":
            continue
        # an older vector may lie there: what it would give is not what was asked for
        why = "" if failed.isdisjoint(step.vectors) else "its fit failed"
        if step.waits and not why:
            if not request.recommended:
                request = team.on_main(partial(_after_the_losses, request, waiting, after))
            settled, none = plan.settled(step, request)
            made.steps[made.steps.index(step)] = step = settled
            why = "" if step.outputs else none
            if none and not why:
                log.warning("%s: %s", step, none)
        if why:
            after[str(step)] = Outcome(str(step), SKIPPED, why, 0.0, "")
            progress.end(*after[str(step)][:4])
        else:
            after[str(step)] = one(step)
    team.end()
    return [*before, *(after[str(step)] for step in waiting)]


def with_recommended(request: verbs.Request) -> verbs.Request:
    """The request with what the stored losses recommend."""
    from spilt.report import recommend

    rows = recommend(request.base_dir, request.model, request.dataset).to_dict("records")
    found = {
        (row["method"], row["intervention"]): row["multiplier"] if row["multiplier"] > 0 or row["multiplier"] < 0 else row["reason"]
        for row in rows
    }
    return replace(request, recommended=found)


def _after_the_losses(request: verbs.Request, steps: Sequence[verbs.Step], after: Mapping[str, Outcome]) -> verbs.Request:
    """The same for a run that has just measured: older losses of a cell whose measurement failed recommend nothing."""
    cells = [(step, (cell.method, cell.variant)) for step in steps for cell in step.cells]
    failed = {name for step, name in cells if step.verb == "measure" and after[str(step)].outcome == FAILED}
    try:
        known = dict(with_recommended(request).recommended)
    except (UserError, OSError) as error:
        known = dict.fromkeys((name for _, name in cells), str(error))
    return replace(request, recommended=known | dict.fromkeys(failed, "its losses could not be measured"))


class _Hosts:
    """The model, loaded when the first step asks for it, and once for all steps that want the same dtype and anatomy."""

    def __init__(self, request: verbs.Request, recordings: Any, seen: Seen, borrowed: ExitStack) -> None:
        self.request, self.recordings, self.seen, self.borrowed = request, recordings, seen, borrowed
        self.host: Any = None
        self.how = ("", "")

    def of(self, step: verbs.Step) -> Any:
        how = (step.settings.dtype, step.settings.anatomy)
        if self.host is None or how != self.how:
            import torch

            from spilt.model.host import load

            if torch.are_deterministic_algorithms_enabled() != self.request.deterministic:  # the call loads torch's compiler
                torch.use_deterministic_algorithms(self.request.deterministic)
            quiet_libraries()
            self.borrowed.close()
            self.host, self.how = None, how
            self.recordings.clear()
            self.seen.of(step.model)
            device = "cpu" if step.engine else self.request.device  # the card is the other engine's
            with uncollected():
                self.host = load(step.model, how[0], device, how[1], in_parts=self.request.tensor_parallel)
            self.seen.again([step.model])
            # a compiler lays weights out by itself; the plain engine is the model as it is
            if self.request.engine != choice.PLAIN and self.request.decode_step == choice.PLAIN_STEP and not self.request.tensor_parallel:
                from spilt.engine import prepacked

                self.borrowed.enter_context(prepacked.weights(self.host.model))
        return self.host


def _run_step(step: verbs.Step, here: Any) -> Outcome:
    """One step. Whatever goes wrong in it is its outcome, not the end of the run."""
    from spilt import tasks as stages
    from spilt.memory import OutOfMemory, ran_out

    start = time.monotonic()

    def failed(reason: str, wrong_request: bool = False, trace: str = "") -> Outcome:
        log.debug("%s failed", step, exc_info=True)  # for a log file
        return Outcome(str(step), FAILED, reason, time.monotonic() - start, "", wrong_request, trace)

    try:
        if here.request.tensor_parallel:
            _same_files(step, here)
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


def _same_files(step: verbs.Step, here: Any) -> None:
    """Every process sees the inputs that process 0 sees: a shared folder may show a new file late. Raises UserError where it does not."""
    told = here.team.on_main(lambda: {path: here.seen.of(path) for path in step.inputs if path.exists()})

    def look() -> None:
        end = time.monotonic() + LATE
        for path, wanted in told.items():
            while not path.exists() or here.seen.of(path) != wanted:
                if time.monotonic() > end:
                    raise UserError(f"{path}: is another file here than process 0 sees; all need the same folder, or the same copy of it")
                here.seen.forget([path])
                time.sleep(0.2)

    here.team.each(look)


def _report(request: verbs.Request, tell: Tell, progress: Progress) -> Outcome:
    """Curves, pictures and the page, of everything that is stored by now; what is as it was when they were drawn is left."""
    if place()[0] > 0:
        return Outcome("report", DONE, "", 0.0, "")
    start = time.monotonic()
    progress.begin("report")
    outcome = _draw(request, tell, progress)._replace(seconds=time.monotonic() - start)
    progress.end(*outcome[:4])
    return outcome


def _draw(request: verbs.Request, tell: Tell, progress: Progress) -> Outcome:
    about = (request.base_dir, request.model, request.dataset)
    page = Store(request.base_dir).relative(freshness.page(*about))
    try:
        if not request.force and (problems := freshness.problems_of_current(*about)) is not None:
            for problem in problems:
                log.warning("report: %s", problem)
            return Outcome("report", ALREADY, "", 0.0, page)
        with uncollected():
            from spilt.report import update

        with progress.bar(desc="report", unit="cell") as bar:
            update(*about, progress=lambda text: bar.set_description_str(f"report, {text}"))
    except (UserError, OSError) as error:
        tell(f"error: report: {error}")
        return Outcome("report", FAILED, str(error), 0.0, "")
    except Exception as error:  # noqa: BLE001 - reported with its traceback; what was measured is stored and has its line in the table
        tell(traceback.format_exc().rstrip("\n"))
        return Outcome("report", FAILED, f"{type(error).__name__}: {first_line(error)}", 0.0, "")
    return Outcome("report", DONE, "", 0.0, page)


def _all_done(step: verbs.Step, request: verbs.Request, seen: Seen) -> bool:
    return set(verbs.standing(step, request.limit, seen).values()) <= ({"done", "foreign"} if step.verb == "fit" else {"done"})


def quiet_libraries() -> None:
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
