"""The command line: words -> Request -> plan -> run -> one table and an exit code.

0: everything asked for is done. 1: a cell failed, or nothing ran. 2: the request itself is wrong (one message, no
traceback). The command line's words (generate, apply, loss) are translated in verbs.MODES and nowhere else.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from spilt import __version__, complete, lean, plan, reading, summary, verbs
from spilt.artifacts.losses import SPLITS
from spilt.artifacts.manifest import versions
from spilt.data import own, prompt_baseline
from spilt.engine.choice import PLAIN_STEP, VLLM
from spilt.errors import UserError, unknown
from spilt.flags import ELSEWHERE, PROGRAMS, first_words, parser
from spilt.in_step import InStep
from spilt.model.identity import Changed
from spilt.model.locate import link, locate
from spilt.run import ALREADY, DONE, FAILED, Outcome, run_plan, with_recommended
from spilt.settings import parse_overrides
from spilt.settings.fields import STRONGEST
from spilt.team import Team, place
from spilt.terminal import COMPLETING, complain, say, spoken, words_so_far
from spilt.terminal import program as speak
from spilt.verbs.base import RECOMMENDED, layer_groups
from spilt.verbs.measure import SWEEP

log = logging.getLogger("spilt")
# flags that are fields of a Request by the same name
AS_GIVEN = (
    *("mode", "device", "base_dir", "limit", "split", "batch_size", "force", "checkpoint_seconds", "released_files", "control_pairs"),
    *("judge", "judge_limit", "deterministic", "engine", "decode_step", "tensor_parallel"),
)


def request_of(args: argparse.Namespace, program: str = verbs.Request.program) -> verbs.Request:
    """Checked words, or a UserError."""
    overrides = parse_overrides(args.overrides)
    if args.seeds and (args.seed is not None or "seed" in overrides):
        raise UserError("--seeds and --seed both say the seed of the fits; give one of them")
    flags = [word for item in args.overrides for word in ("--set", item)]
    for name in ("seed", "dtype", "anatomy"):
        value = getattr(args, name)
        if value is not None:
            overrides[name] = str(value)
            flags += [f"--{name}", str(value)]
    for name in ("limit", "batch_size", "split", "judge", "judge_limit"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    flags += ["--rubric", *args.rubric] if args.rubric else []
    if args.released_files is not None:
        flags.append("--released_files" if args.released_files else "--no-released_files")
    if args.control_pairs != verbs.Request.control_pairs:
        flags += ["--control_pairs", str(args.control_pairs)]
    flags += ["--tensor_parallel"] if args.tensor_parallel else []
    if args.engine == VLLM:  # its texts are its own; the others give the same
        flags += ["--engine", VLLM]
    layers = layer_groups(args.layers)
    if layers is not None and "layers" in overrides:
        raise UserError("--layers and --set layers both say where it acts; give one of them")
    files = _own(args)
    for name in ("train", "test", "columns") if files else ():
        given = getattr(args, name)
        flags += [] if given is None else [f"--{name}", *map(str, given if isinstance(given, list) else [given])]
    flags += ["--complete_losing"] if args.complete_losing else []
    splits = (*SPLITS, "both")
    if not re.fullmatch(r"(cpu|auto|(cuda|xpu|mps|npu|hpu)(:[0-9]{1,3})?)", args.device):
        raise UserError(f"unknown device {args.device!r}; have: cpu, auto, cuda, cuda:0 and the like")
    if args.split is not None and args.split not in splits:
        raise unknown("split", args.split, splits)
    _refuse_mute(args)
    strengths, words = _multipliers(args.multipliers, args.mode)
    name, folder = locate(args.base_dir, args.model_name, args.download)
    return verbs.Request(
        dataset=args.dataset or own.name_of(args.train),
        method=tuple(args.method),
        model=name,
        **({} if name == args.model_name else {"model_said": args.model_name, "folder": folder}),
        intervention=tuple(args.intervention_method),
        multipliers=strengths,
        words=words,
        overrides=overrides,
        concepts=tuple(args.concepts) if args.concepts else None,
        seeds=tuple(dict.fromkeys(args.seeds)) if args.seeds else (None,),
        layers=layers,
        own=files,
        report=not args.no_report,
        rubrics=tuple(dict.fromkeys(args.rubric or ())),
        prompts=tuple(prompt_baseline.read(args.prompt_baseline)),
        flags=tuple(flags),
        program=program,
        **{name: getattr(args, name) for name in AS_GIVEN},
    )


def _refuse_mute(args: argparse.Namespace) -> None:
    """Raises UserError for words about judges where nobody is asked."""
    for name in ("judge", "rubric", "judge_limit"):
        if getattr(args, name) and "evaluate" not in verbs.MODES.get(args.mode, ("evaluate",)):
            raise UserError(f"--{name} goes with --mode evaluate; --mode {args.mode} asks no judge")
    if args.judge_limit is not None and args.judge is None:
        raise UserError(f"--judge_limit {args.judge_limit}: nobody is asked; give --judge as well, or leave it out")


def _own(args: argparse.Namespace) -> own.Own | None:
    """The user's files, where --train names some."""
    if args.train is None:
        for name in ("test", "columns", "complete_losing"):
            if getattr(args, name) not in (None, False):
                raise UserError(f"--{name} goes with --train FILE; a dataset of dataset_format.yaml has its own")
        if not args.dataset:
            raise UserError("which data? give --dataset NAME, or --train FILE with pairs of your own")
        return None
    columns = own.columns_from(args.columns) if args.columns is not None else {}
    seed = {} if args.seed is None else {"seed": args.seed}
    return own.Own(tuple(args.train), own.test_from(args.test), columns, **seed, download=args.download)


def _words_of(mode: str) -> list[str]:
    """Those of --multipliers that a mode takes: what older losses recommend says nothing of a new fit."""
    names = verbs.MODES.get(mode, ())
    return [] if "fit" in names and "measure" not in names else [word for name in names for word in verbs.VERBS[name].words]


def _multipliers(given: Sequence[str] | None, mode: str) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    """Numbers (None: none are given) and words. Of a sweep alone, numbers would say nothing."""
    taken = _words_of(mode)
    if given is None:
        return None, tuple(taken) if mode == "all" else ()
    words = tuple(word for word in (SWEEP, RECOMMENDED) if word in given)
    for word in words:
        if word not in taken or (mode == "loss" and len(given) > 1):
            have = " or ".join(name for name in verbs.MODES if word in _words_of(name)) + (", alone" if word in taken else "")
            raise UserError(f"--multipliers {word} goes with --mode {have}; --mode {mode} wants numbers, such as --multipliers -1 0 1")
    values = []
    for word in (word for word in given if word not in words):
        try:
            value = float(word)
        except ValueError:
            raise UserError(f"--multipliers: {word!r} is not a number") from None
        if not math.isfinite(value) or abs(value) > STRONGEST:
            raise UserError(f"--multipliers: {word} is not a usable strength; wanted a finite number within +-{STRONGEST:g}")
        values.append(value + 0.0)  # -0.0 is 0.0
    return tuple(dict.fromkeys(values)) or None, words


def main(argv: Sequence[str] | None = None, base_dir: Path = Path("."), program: str = verbs.Request.program) -> int:
    """Run; returns the exit code. base_dir: where the words name none. program: what was called."""
    asked = words_so_far() if argv is None else None  # by a shell that completes
    if argv is None:  # a process of its own
        lean.arm()
    words = list(asked if asked is not None else sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("-") and "--verify" in words:  # needs no dataset or method
        words = ["verify", *(word for word in words if word != "--verify")]
    first = words[0] if words and not words[0].startswith("-") else ""
    known = first_words()
    if asked is not None and first in known:
        os.environ[COMPLETING] = str(int(os.environ[COMPLETING]) + 1)  # it belongs to the command's name
    try:
        if first in PROGRAMS:
            return int(import_module(f"spilt.{ELSEWHERE.get(first, first)}").main(words[1:]) or 0)
        made = parser(base_dir, program, first if first in known else "")
        if asked is not None:
            made.add_argument("word", nargs="?", choices=[] if first in known else known)
        elif first and first not in known:
            made.error(str(unknown("word", first, known)))
        return speak(made, words[1:] if first else words, lambda args: _run(args, program, words), shared=True)
    except SystemExit as stop:
        return int(stop.code or 0)


def console() -> int:
    """The installed command, `spilt`."""
    return main(program="spilt")


def _run(args: argparse.Namespace, program: str, words: Sequence[str]) -> int:
    """Plan and run, or show the plan: as text, or as one document and nothing else."""
    if not args.tensor_parallel or place()[1] == 1 or args.dry_run or args.inspect:
        return _said(args, program, words)
    return _in_step(args, partial(_said, args, program, words))


def _in_step(args: argparse.Namespace, work: Callable[[Team], int]) -> NoReturn:
    """One of the processes that hold parts of a model, to its end. Process 0 says what all know."""
    team = InStep(args.device)
    try:
        code = spoken(lambda: work(team), lambda: team.speaks)
    except Exception:  # noqa: BLE001 - not foreseen: where it was raised
        if team.speaks:
            traceback.print_exc()
        code = 1
    team.leave(code)


def _said(args: argparse.Namespace, program: str, words: Sequence[str], team: Team | None = None) -> int:
    """The exit code. team: of processes that do all of it in step."""
    rank, size = place()
    if rank > 0:  # process 0 speaks for all
        log.setLevel(logging.ERROR)
    log.info("spilt %s, python %s, %s", __version__, platform.python_version(), ", ".join(map(" ".join, versions())))
    log.info("command: %s", shlex.join([*program.split(), *words]))
    shown: dict[str, Any] = {"dry_run": args.dry_run}
    try:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():  # what else is printed
            code = team.each(lambda: _plan_and_run(args, program, shown)) if team else _plan_and_run(args, program, shown)
    except (UserError, OSError) as error:
        if args.json and rank == 0:
            print(summary.document(shown, 2, str(error)))
        raise
    if args.json and rank == 0:
        print(summary.document(shown, code))
    log.info("exit code %d", code)
    if size > 1 and not args.dry_run and team is None:
        # everything is written and everybody has said goodbye; the threads of the process group sometimes abort a normal exit
        sys.stdout.flush()
        sys.stderr.flush()
        # process 0 speaks for all: a launcher ends the others, and process 0 at its report, when one exits with an error
        os._exit(code if rank == 0 else 0)
    return code


def _plan_and_run(args: argparse.Namespace, program: str, shown: dict[str, Any]) -> int:
    """The exit code. shown: is told what --json shows."""
    rank, start, dry = place()[0], time.monotonic(), args.dry_run or args.inspect
    request = request_of(args, program)
    if RECOMMENDED in request.words and request.mode != "all":  # `all` measures first
        request = with_recommended(request)
    # both before torch looks for them; products in bfloat16 would keep 1024 kernels, each for one shape, and be no faster for it
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    if request.tensor_parallel or request.engine == VLLM or request.decode_step != PLAIN_STEP:
        lean.disarm()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if request.own is not None:
        made = plan.make(request, dry=True)  # what is wrong with the words is told before the files are taken over
        files, step = request.own, made.steps[0]
        if args.complete_losing:
            files = files._replace(writer=complete.writer(request, step))
            request = replace(request, own=files)
        reading.refuse_rows(made.steps, own.kinds(own.as_completed(files, own.parts(files, request.dataset))))
        write = partial(complete.write, request, step, files)
        for line in own.bring(request.base_dir, request.dataset, files, dry=dry, write=write):
            say(line)
    made = plan.make(request, dry=dry)
    if args.inspect:
        from spilt import inspect

        shown["inspected"] = inspect.inspected(made, request)
        if not args.json:
            inspect.show(shown["inspected"])
        return 0
    shown["left_out"] = [item._asdict() for item in made.left_out]
    if args.dry_run:
        shown["steps"] = summary.planned(made, request)
        if not args.json:
            summary.print_plan(shown["steps"], made)
        return 0
    if request.folder is not None and not (request.tensor_parallel and rank):
        link(request.base_dir, request.model, request.folder)
    for number, step in enumerate(made.steps, 1):
        log.info("plan %d. %s: %s", number, step, step.command)
    for item in made.left_out if rank == 0 else []:
        say(f"left out: {item.name}: {item.why}")
    for said in dict.fromkeys(said for step in made.steps for said in (step.origin, step.lacks) if said):
        log.warning("%s", said)
    if keys := {note.key for step in made.steps for note in step.notes}:
        log.warning("%d keys of the settings files have no effect here; --dry_run lists them", len(keys))
    try:
        tell = (lambda text: None) if request.tensor_parallel and rank else complain  # all know what process 0 tells
        outcomes = run_plan(made, request, tell, quiet=args.quiet)
    except Changed as error:  # the model, while it was loaded
        shown["error"] = str(error)
        complain(f"error: {error}")
        return 1
    shown["seconds"] = round(time.monotonic() - start, 3)
    shown["steps"] = summary.done(outcomes, made, request)
    if rank == 0 and not args.json:
        summary.print_table(outcomes)
        summary.print_scores(shown["steps"])
    return exit_code(outcomes)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all done (skipped cells allowed beside done ones), 2 when wrong input was all that came of it, else 1."""
    names = {outcome.outcome for outcome in outcomes}
    good = names & {DONE, ALREADY}
    if FAILED in names:
        return 2 if not good and all(o.wrong_request for o in outcomes if o.outcome == FAILED) else 1
    return 0 if good else 1
