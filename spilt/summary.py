"""The plan, and what became of it: as lines, or as one JSON document (README, "For programs")."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spilt import __version__, plan, verbs
from spilt.artifacts.store import Store
from spilt.doubts import doubts_of
from spilt.engine.choice import PLAIN_STEP
from spilt.errors import UserError, printable
from spilt.model.identity import Seen
from spilt.run import ALREADY, DONE, FAILED, SKIPPED, Outcome, keeps_what_is_unusable
from spilt.terminal import aligned, say
from spilt.verbs import measure as measure_verb
from spilt.verbs.base import RECOMMENDED

SCHEMA = 1  # raised when a key of the document is renamed, removed or changes its meaning


def document(shown: Mapping[str, Any], code: int, error: str | None = None) -> str:
    """shown: dry_run and, as far as it came, steps, left_out, seconds. error: what is wrong with the request."""
    head = {"spilt": __version__, "schema": SCHEMA, "exit_code": code, "error": error, "steps": [], "left_out": []}
    return json.dumps({**head, **shown}, indent=1, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value)


def _about(step: verbs.Step) -> dict[str, Any]:
    """What a step is."""
    first, concepts = step.cells[0], [cell.concept for cell in step.cells if cell.concept is not None]
    names = {name: getattr(first, name) for name in ("model", "dataset", "method", "intervention", "layers")}
    strengths = measure_verb.SWEEP if step.sweep else [*step.multipliers, *([RECOMMENDED] if step.waits else [])]
    return {"step": str(step), "verb": step.verb, **names, "concepts": concepts, "multipliers": strengths}


def done(outcomes: Iterable[Outcome], made: plan.Plan, request: verbs.Request) -> list[dict[str, Any]]:
    """What became of each step; the last of loss mode is the report's."""
    steps, store = {str(step): step for step in made.steps}, Store(request.base_dir)
    rows = []
    for one in outcomes:
        step, good = steps.get(one.step), one.outcome in (DONE, ALREADY)
        files = [store.base_dir / one.output] if step is None or step.verb == "measure" else step.outputs
        about = {"step": one.step, "verb": one.step} if step is None else _about(step)
        result = {"status": one.outcome, "seconds": round(one.seconds, 3), "outputs": files if good else [], "error": one.reason or None}
        told = {"scores": scores(step)} if good and step is not None and step.verb == "evaluate" else {}
        rows.append({**about, **result, **told})
    return rows


def planned(made: plan.Plan, request: verbs.Request) -> list[dict[str, Any]]:
    """Every step in order: what runs, its own command line, hparam files, inputs, outputs, cost, and whether it is done."""
    from spilt.verbs import cost

    seen, again, read, rows = Seen(), set[Path](), dict[Any, Any](), []
    made_before: set[Path] = set()
    for step in made.steps:
        missing = set(verbs.missing_inputs(step))
        standing = verbs.standing(step, request.limit, seen)
        if request.force or not again.isdisjoint(step.vectors):
            standing = {path: plan.AGAIN if state in ("done", "foreign") else state for path, state in standing.items()}
        if step.verb == "fit" and not set(standing.values()) <= {"done", "foreign"}:
            again.update(step.outputs)
        parts = {} if missing else verbs.output_parts(step, request.limit, seen)
        why = {path: reason for reason, paths in verbs.replaced(parts).items() for path in paths}
        lacking = {path: "made by an earlier step" if path in made_before else "missing" for path in missing}
        guess = cost(step, request, read)
        failing = keeps_what_is_unusable(step, request)
        rows.append(
            {
                **_about(step),
                "state": plan.summary(standing),
                "command": step.command,
                "settings": step.settings.as_dict(),
                "hparams": [*step.files, *([step.origin] if step.origin else [])],
                "inputs": [{"path": path, "state": lacking.get(path, "there")} for path in step.inputs],
                "outputs": [{"path": path, "state": state, "why": why.get(path)} for path, state in standing.items()],
                "plain_engine": plan.why_plain(step, request.engine) or None,
                "tensor_parallel": request.tensor_parallel,
                "decode_step": request.decode_step if step.verb == "generate" else None,
                "cost": None if guess is None else guess._asdict(),
                "cost_in_words": None if guess is None else str(guess),
                "notes": [*([f"will fail: {failing}"] if failing else []), *_doubts(step, request, seen), *filter(None, [step.lacks])],
            }
        )
        made_before.update(step.outputs)
    return rows


def _short(value: Any) -> str:
    """A setting as --set takes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_short(item)}" for name, item in value.items() if item is not None) + "}"
    return ",".join(map(_short, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def print_plan(rows: Sequence[Mapping[str, Any]], made: plan.Plan) -> None:
    """What `planned` gives, for people."""
    for number, (row, step) in enumerate(zip(rows, made.steps, strict=True), 1):
        say(f"{number}. {row['step']}   [{row['state']}]")
        say(f"   {row['command']}")
        for path in row["hparams"]:
            say(f"   hparams  {path}")
        if step.origin:  # no file says them
            given = {
                name: value
                for name, value in row["settings"].items()
                if value not in (None, "") and name not in ("method", "intervention_method")
            }
            say(f"   settings {' '.join(f'{name}={_short(value)}' for name, value in given.items())}")
        for item in row["inputs"]:
            say(f"   input    {item['path']}{'' if item['state'] == 'there' else '   ' + item['state']}")
        outputs = row["outputs"]
        for item in outputs if len(outputs) <= 12 else [*outputs[:3], *outputs[-1:]]:
            word = "" if item["state"] == "missing" else f"   {item['state']}{': ' if item['why'] else ''}{item['why'] or ''}"
            say(f"   output   {item['path']}{word}")
        if len(outputs) > 12:
            say(f"            ({len(outputs)} files in all)")
        if RECOMMENDED in row["multipliers"]:
            say("            (and those of the multiplier that the losses will recommend)")
        if row["multipliers"] == measure_verb.SWEEP:
            say(f"            (widened by half while a tail still moves, up to {measure_verb.SWEEP_MOST} multipliers)")
        why = row["plain_engine"]
        say(f"   engine   {f'plain: {why}' if why else step.engine or 'fast'}")
        if row["tensor_parallel"]:
            say("   parts    of one model in each process (tensor parallel)")
        if row["decode_step"] not in (None, PLAIN_STEP):
            say(f"   decode   {row['decode_step']} step")
        say(f"   cost     {row['cost_in_words'] or 'unknown until model and data are there'}")
        for note in row["notes"]:
            say(f"   note     {note}")
    for reason, (keys, files) in verbs.without_effect(made.steps).items():
        say(f"no effect: {', '.join(keys)} ({files} file{'s' if files > 1 else ''}): {reason}")
    for item in made.left_out:
        say(f"left out: {item.name}: {item.why}")
    steps, out = len(made.steps), len(made.left_out)
    say(f"{steps} step{'s' * (steps != 1)}, {out} combination{'s' * (out != 1)} left out; nothing was run or written")


def _doubts(step: verbs.Step, request: verbs.Request, seen: Seen) -> list[str]:
    """What speaks against the use of the stored vectors that the step reads."""
    found = []
    for cell in step.cells if step.verb != "fit" and not verbs.missing_inputs(step) else ():
        for layer in cell.layers:
            try:
                found += doubts_of(cell, layer, step.settings, request, seen)
            except UserError as error:
                found.append(f"will be refused: {error}")
    return found


def scores(step: verbs.Step) -> list[dict[str, Any]]:
    """What an evaluated cell has: a row per measure and multiplier (analysis/scores.py)."""
    from spilt.analysis import scores as analysis

    rows = analysis.summarise(analysis.read_all([path for path in step.outputs if path.is_file()])).to_dict("records")
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]


def print_scores(steps: Iterable[Mapping[str, Any]]) -> None:
    """Of `done`: a table for each evaluated cell, measures down, multipliers across; then what is missing, and why."""
    for step in steps:
        rows = step.get("scores")
        if not rows:
            continue
        strengths, names = (list(dict.fromkeys(row[what] for row in rows)) for what in ("multiplier", "measure"))
        cells = {(row["measure"], row["multiplier"]): _mean(row) for row in rows}
        counts = {name: sorted({row["n"] for row in rows if row["measure"] == name}) for name in names}
        head = (step["step"], "n", *(f"m = {m:g}" for m in strengths))
        several = {name: f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0]) for name, found in counts.items()}
        lines = [head, *((name, several[name], *(cells.get((name, m), "-") for m in strengths)) for name in names)]
        say()
        for line in aligned(lines):
            say(line)
        for row in (row for row in rows if row["missing"]):
            of = row["n"] + row["missing"]
            say(f"missing: {row['measure']} at m = {row['multiplier']:g}: {row['missing']} of {of} ({row['reasons']})")


def _mean(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "-"
    return f"{row['mean']:.3g}" + ("" if row["low"] is None else f" [{row['low']:.3g}, {row['high']:.3g}]")


def print_table(outcomes: Sequence[Outcome]) -> None:
    """cell, outcome, reason, seconds, output path."""
    header = ("cell", "outcome", "seconds", "output / reason")
    rows = [tuple(map(printable, (o.step, o.outcome, f"{o.seconds:.1f}", o.output or o.reason))) for o in outcomes]
    widths = [*(max(len(row[i]) for row in [header, *rows]) for i in range(3)), len(header[3])]
    say()
    for line in aligned([header, tuple("-" * width for width in widths), *rows]):
        say(line)
    counts = {name: sum(o.outcome == name for o in outcomes) for name in (DONE, ALREADY, SKIPPED, FAILED)}
    say()
    say(", ".join(f"{count} {name}" for name, count in counts.items() if count) + f" in {sum(o.seconds for o in outcomes):.1f} s")
