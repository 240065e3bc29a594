"""The command line: words -> Request -> plan -> run -> one table and an exit code.

0: everything asked for is done. 1: a cell failed, or nothing ran. 2: the request itself is wrong (one message, no
traceback). The command line's words (generate, apply, loss) are translated in verbs.MODES and nowhere else.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from spilt import __version__, plan, verbs
from spilt.artifacts.losses import SPLITS
from spilt.cell import FORMS
from spilt.engine.choice import ENGINES
from spilt.errors import UserError, printable, unknown
from spilt.methods import METHODS
from spilt.model.identity import Changed, Seen
from spilt.run import ALREADY, DONE, FAILED, SKIPPED, Outcome, keeps_what_is_unusable, run_plan
from spilt.settings import parse_overrides
from spilt.settings.fields import DTYPES, INTERVENTION_ALIASES, METHOD_ALIASES, STRONGEST, intervention_name, method_name
from spilt.team import place
from spilt.terminal import COMPLETING, complain, say, words_so_far
from spilt.terminal import program as speak
from spilt.verbs import measure as measure_verb

log = logging.getLogger("spilt")

# `spilt WORD ...`: besides the verbs, another program of the package (spilt/WORD), and its line in --help
PROGRAMS = {
    "look": "show the stored texts side by side",
    "recommend": "print the strength of each measured cell by a utility budget",
    "report": "draw curves and report.html anew from stored losses",
    "prepare": "make data/ from the public source files",
    "verify": "check everything that is stored",
}


def parser(base_dir: Path = Path("."), program: str = verbs.Request.program, verb: str = "") -> argparse.ArgumentParser:
    """All flags, or those of a verb; choices are derived from the tables. base_dir: where none is given. program: what was called."""
    made = argparse.ArgumentParser(
        prog=f"spilt {verb}" if verb else program.split()[-1],
        description=f"{verbs.VERBS[verb].does.capitalize()}." if verb else _overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=not verb,  # --mode is no short way to say --model_name
    )
    group: argparse._ActionsContainer = made
    others = {flag for row in verbs.VERBS.values() for flag in row.flags} - {*verbs.VERBS[verb].flags} if verb else set()

    def add(flag: str, offered: Iterable[str] = (), **given: Any) -> None:
        """A flag that means something here. offered: words for a shell that completes."""
        name = flag.removeprefix("--")
        if name in others:
            made.set_defaults(**{name: given.get("default")})
        else:
            words = tuple(offered)
            group.add_argument(flag, **given).completer = lambda **_: words  # type: ignore[attr-defined]

    add("--dataset", required=True, help="a name in hparams/Steer/dataset_format.yaml, such as psychopathy, powerseeking, axbench")
    add("--method", (*METHODS, plan.ALL), required=True, help=f"{', '.join(METHODS)} or all ({_spellings(METHOD_ALIASES)})")
    add("--model_name", required=True, help="a checkpoint folder under models/")
    add("--intervention_method", (*FORMS, plan.ALL), required=True, help=f"{', '.join(FORMS)} or all ({_spellings(INTERVENTION_ALIASES)})")
    if verb:
        made.set_defaults(mode=verbs.VERBS[verb].mode)
    else:
        add("--mode", verbs.MODES, default="both", help=f"{', '.join(verbs.MODES)}: fit / produce text / both / measure (default both)")
    add("--device", default="cuda:0", help="a torch device, cpu, or auto (accelerate's device map); default cuda:0")
    measures = "" if verb == "generate" else ", or 'sweep': over the range that was trained" if verb else "; loss mode also takes 'sweep'"
    add("--multipliers", nargs="+", metavar="M", help=f"strengths m, signed{measures}; default: the YAML's, else 1.0")
    add("--base_dir", default=base_dir, type=Path, help="every relative path is below it; default: this folder")
    add("--dry_run", action="store_true", help="print the plan; write nothing, load no model")
    group = made.add_argument_group("ours")
    add("--dtype", DTYPES, help="of the model: float32, bfloat16, float16 (over the YAML's)")
    add("--batch_size", type=_positive, help="texts decoded side by side (changes no result beyond rounding)")
    add("--limit", type=_positive, help="rows of each data file, from the first")
    add("--seed", type=int, help="over the YAML's")
    add("--concepts", nargs="+", type=int, metavar="ID", help=f"ids of a dataset with concepts; default: first {plan.FIRST_CONCEPTS}")
    splits = ", ".join(SPLITS)
    add("--split", help=f"{'' if verb else 'loss mode: '}{splits} or both; default: what dataset_format.yaml has")
    add(
        "--released_files",
        action=argparse.BooleanOptionalAction,
        help="loss mode: train_losses.csv for each multiplier, measured as released (default where multipliers are numbers), or one "
        "table of losses per cell, measured as text is made (always of a sweep)",
    )
    add("--control_pairs", type=_count, default=32, metavar="N", help="questions for random interventions after a sweep; 0: none")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="any YAML setting, over the file's; repeatable")
    add(
        "--checkpoint_seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="a fit or measurement under way is saved after this long (default 60)",
    )
    add("--force", action="store_true", help="do again what is already done")
    add(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="plain: hooks and the library's own forward (slower, the same results)",
    )
    add("--deterministic", action="store_true", help="only algorithms that give the same bits every time (slower on a GPU)")
    if not verb:
        add("--verify", action="store_true", help="check every stored artifact under --base_dir instead, and say what is stale or damaged")
    add("--quiet", action="store_true", help="no progress bars")
    if not verb:
        add("--version", action="version", version=f"spilt {__version__}")
    # argparse takes -1e-2 for a flag
    made._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-inf$|-nan$")  # type: ignore[attr-defined]
    return made


def first_words() -> dict[str, str]:
    """What may come first on the command line, with a line for each."""
    return {name: row.does for name, row in verbs.VERBS.items()} | PROGRAMS


def _overview() -> str:
    """What this is, with one line for each word that may come first."""
    rows = first_words()
    width = max(map(len, rows))
    return "\n".join(
        [
            "Fit, apply and measure small interventions on transformer language models.",
            "",
            *(f"  spilt {name:{width}}  {line}" for name, line in rows.items()),
            "",
            "Each has a --help of its own; `python -m spilt` is the same as `spilt`. The released command line,",
            "`run_spilt.py --dataset ... --mode ...`, works as before, under each of these names:",
        ]
    )


def _spellings(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{other} = {name}" for other, name in aliases.items())


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def request_of(args: argparse.Namespace, program: str = verbs.Request.program) -> verbs.Request:
    """Checked words, or a UserError."""
    overrides = parse_overrides(args.overrides)
    flags = [word for item in args.overrides for word in ("--set", item)]
    for name in ("seed", "dtype"):
        value = getattr(args, name)
        if value is not None:
            overrides[name] = str(value)
            flags += [f"--{name}", str(value)]
    for name in ("limit", "batch_size", "split"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    if args.released_files is not None:
        flags.append("--released_files" if args.released_files else "--no-released_files")
    if args.control_pairs != verbs.Request.control_pairs:
        flags += ["--control_pairs", str(args.control_pairs)]
    splits = (*SPLITS, "both")
    if not re.fullmatch(r"(cpu|auto|(cuda|xpu|mps|npu|hpu)(:[0-9]{1,3})?)", args.device):
        raise UserError(f"unknown device {args.device!r}; have: cpu, auto, cuda, cuda:0 and the like")
    if args.split is not None and args.split not in splits:
        raise unknown("split", args.split, splits)
    return verbs.Request(
        dataset=args.dataset,
        method=method_name(args.method),
        model=args.model_name,
        intervention=intervention_name(args.intervention_method),
        mode=args.mode,
        device=args.device,
        multipliers=_multipliers(args.multipliers, args.mode),
        base_dir=args.base_dir,
        overrides=overrides,
        concepts=tuple(args.concepts) if args.concepts else None,
        limit=args.limit,
        split=args.split,
        batch_size=args.batch_size,
        force=args.force,
        checkpoint_seconds=args.checkpoint_seconds,
        released_files=args.released_files,
        control_pairs=args.control_pairs,
        deterministic=args.deterministic,
        engine=args.engine,
        flags=tuple(flags),
        program=program,
    )


def _multipliers(words: Sequence[str] | None, mode: str) -> tuple[float, ...] | str | None:
    if words is None:
        return None
    if list(words) == [measure_verb.SWEEP]:
        if mode != "loss":
            raise UserError(f"--multipliers sweep goes with --mode loss; --mode {mode} wants numbers, such as --multipliers -1 0 1")
        return measure_verb.SWEEP
    values = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            raise UserError(f"--multipliers: {word!r} is not a number") from None
        if not math.isfinite(value) or abs(value) > STRONGEST:
            raise UserError(f"--multipliers: {word} is not a usable strength; wanted a finite number within +-{STRONGEST:g}")
        values.append(value + 0.0)  # -0.0 is 0.0
    return tuple(dict.fromkeys(values))


def main(argv: Sequence[str] | None = None, base_dir: Path = Path("."), program: str = verbs.Request.program) -> int:
    """Run; returns the exit code. base_dir: where the words name none. program: what was called."""
    asked = words_so_far() if argv is None else None  # by a shell that completes
    words = list(asked if asked is not None else sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("-") and "--verify" in words:  # needs no dataset or method
        words = ["verify", *(word for word in words if word != "--verify")]
    first = words[0] if words and not words[0].startswith("-") else ""
    known = first_words()
    if asked is not None and first in known:
        os.environ[COMPLETING] = str(int(os.environ[COMPLETING]) + 1)  # it belongs to the command's name
    try:
        if first in PROGRAMS:
            return int(import_module(f"spilt.{first}").main(words[1:]) or 0)
        made = parser(base_dir, program, first if first in known else "")
        if asked is not None:
            made.add_argument("word", nargs="?", choices=[] if first in known else known)
        elif first and first not in known:
            made.error(str(unknown("word", first, known)))
        return speak(made, words[1:] if first else words, lambda args: _run(args, program))
    except SystemExit as stop:
        return int(stop.code or 0)


def console() -> int:
    """The installed command, `spilt`."""
    return main(program="spilt")


def _run(args: argparse.Namespace, program: str) -> int:
    """Plan and run, or show the plan."""
    rank, size = place()
    if rank > 0:  # process 0 speaks for all
        log.setLevel(logging.ERROR)
    request = request_of(args, program)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch looks for it
    made = plan.make(request, dry=args.dry_run)
    if args.dry_run:
        print_plan(made, request)
        return 0
    for item in made.left_out if rank == 0 else []:
        say(f"left out: {item.name}: {item.why}")
    for origin in dict.fromkeys(step.origin for step in made.steps if step.origin):
        log.warning("%s", origin)
    if keys := {note.key for step in made.steps for note in step.notes}:
        log.warning("%d keys of the settings files have no effect here; --dry_run lists them", len(keys))
    try:
        outcomes = run_plan(made, request, complain, quiet=args.quiet or not sys.stderr.isatty())
    except Changed as error:  # the model, while it was loaded
        complain(f"error: {error}")
        return 1
    if rank == 0:
        print_table(outcomes)
    if size > 1:
        # everything is written and everybody has said goodbye; the threads of the process group sometimes abort a normal exit
        sys.stdout.flush()
        sys.stderr.flush()
        # process 0 speaks for all: a launcher ends the others, and process 0 at its report, when one exits with an error
        os._exit(exit_code(outcomes) if rank == 0 else 0)
    return exit_code(outcomes)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all done (skipped cells allowed beside done ones), 2 when wrong input was all that came of it, else 1."""
    names = {outcome.outcome for outcome in outcomes}
    good = names & {DONE, ALREADY}
    if FAILED in names:
        return 2 if not good and all(o.wrong_request for o in outcomes if o.outcome == FAILED) else 1
    return 0 if good else 1


# ---------------------------------------------------------------- the plan


def print_plan(made: plan.Plan, request: verbs.Request) -> None:
    """Every step in order: what runs, its own command line, hparam file, inputs, outputs, cost, and whether it is done."""
    from spilt.verbs import cost

    seen, again, rows = Seen(), set[Path](), dict[Any, Any]()
    for number, step in enumerate(made.steps, 1):
        missing = set(verbs.missing_inputs(step))
        standing = verbs.standing(step, request.limit, seen)
        if request.force or not again.isdisjoint(step.vectors):
            standing = {path: plan.AGAIN if state in ("done", "foreign") else state for path, state in standing.items()}
        if step.verb == "fit" and not set(standing.values()) <= {"done", "foreign"}:
            again.update(step.outputs)
        say(f"{number}. {step}   [{plan.summary(standing)}]")
        say(f"   {step.command}")
        for path in step.files:
            say(f"   hparams  {path}")
        if step.origin:
            say(f"   hparams  {step.origin}")
        made_before = {path for earlier in made.steps[: number - 1] for path in earlier.outputs}
        for path in step.inputs:
            lacking = "" if path not in missing else "   made by an earlier step" if path in made_before else "   missing"
            say(f"   input    {path}{lacking}")
        outputs = {} if missing else verbs.output_parts(step, request.limit, seen)
        why = {path: f": {reason}" for reason, paths in verbs.replaced(outputs).items() for path in paths}
        shown = list(standing.items())
        for path, state in shown if len(shown) <= 12 else [*shown[:3], *shown[-1:]]:
            word = "" if state == "missing" else f"   {state}{why.get(path, '')}"
            say(f"   output   {path}{word}")
        if len(shown) > 12:
            say(f"            ({len(shown)} files in all)")
        if step.sweep:
            say(f"            (widened by half while a tail still moves, up to {measure_verb.SWEEP_MOST} multipliers)")
        plain = plan.why_plain(step, request.engine)
        say(f"   engine   {f'plain: {plain}' if plain else 'fast'}")
        guess = cost(step, request, rows)
        say(f"   cost     {guess if guess is not None else 'unknown until model and data are there'}")
        if reason := keeps_what_is_unusable(step, request):
            say(f"   note     will fail: {reason}")
        for note in _doubts(step, request, seen):
            say(f"   note     {note}")
    for reason, (keys, files) in verbs.without_effect(made.steps).items():
        say(f"no effect: {', '.join(keys)} ({files} file{'s' if files > 1 else ''}): {reason}")
    for item in made.left_out:
        say(f"left out: {item.name}: {item.why}")
    say(f"{len(made.steps)} steps, {len(made.left_out)} combinations left out; nothing was run or written")


def _doubts(step: verbs.Step, request: verbs.Request, seen: Seen) -> list[str]:
    """What speaks against the use of the stored vectors that the step reads."""
    said = []
    for cell in step.cells if step.verb != "fit" and not verbs.missing_inputs(step) else ():
        for layer in cell.layers:
            try:
                said += plan.doubts(cell, layer, step.settings, request, seen)
            except UserError as error:
                said.append(f"will be refused: {error}")
    return said


def print_table(outcomes: Sequence[Outcome]) -> None:
    """cell, outcome, reason, seconds, output path."""
    header = ("cell", "outcome", "seconds", "output / reason")
    rows = [tuple(map(printable, (o.step, o.outcome, f"{o.seconds:.1f}", o.output or o.reason))) for o in outcomes]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    say()
    for row in [header, tuple("-" * width for width in [*widths, len(header[3])]), *rows]:
        say("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    counts = {name: sum(o.outcome == name for o in outcomes) for name in (DONE, ALREADY, SKIPPED, FAILED)}
    say()
    say(", ".join(f"{count} {name}" for name, count in counts.items() if count) + f" in {sum(o.seconds for o in outcomes):.1f} s")
