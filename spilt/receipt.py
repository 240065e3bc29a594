"""spilt receipt: what one stored vector does to a behaviour, what it costs, in which range, and how that was measured.

The behaviour is a YAML file (README: behaviours of your own) or one that comes with spilt. Strengths are chosen on some of its prompts
and reported on the others. Every number has an interval and says of how many prompts it is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt import __version__, judges
from spilt.analysis.chosen import CHOSEN, DAMAGE, INCOHERENT, Limits
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.manifest import digest
from spilt.artifacts.store import Store
from spilt.behaviour import files
from spilt.data import sources
from spilt.errors import NotFinite, UserError, printable
from spilt.say import ready, which_flags
from spilt.settings.fields import STRONGEST
from spilt.terminal import complain, program, say

if TYPE_CHECKING:
    from spilt.analysis.intervals import Estimate
    from spilt.behaviour.receipt import Receipt


def main(argv: Sequence[str] | None = None) -> int:
    """Write it down; 0, 1 where the model's numbers break down, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt receipt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which_flags(parser)
    behaviour_flags(parser, required=True)
    parser.add_argument("--multiplier", type=float, metavar="M", help="whose cost is written down (default: the one that is chosen)")
    parser.add_argument("--multipliers", type=float, nargs="+", default=[], metavar="M", help="others in the table of strengths")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="a person's verdicts to check the judge by: prompt, text, label")
    parser.add_argument("--prefix", type=Path, metavar="FILE", help="a long text to put before the prompts, as in deployment")
    for name in files.SUITES:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help="its prompts (default: ten illustrations of our own)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write it there, and all numbers and texts to FILE.json")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    return program(parser, argv, _receipt)


def behaviour_flags(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The flags that name a behaviour and what it may cost."""
    have = ", ".join(files.shipped())
    parser.add_argument("--behaviour", required=required, metavar="NAME|FILE", help=f"{have}, or a YAML file of your own")
    parser.add_argument("--judge", metavar="endpoint|MODEL", help="who rates the answers, where the behaviour is judged by a rubric")
    parser.add_argument("--max_incoherent", type=float, default=INCOHERENT, metavar="SHARE", help=f"more than unsteered ({INCOHERENT:g})")
    parser.add_argument("--max_damage", type=float, default=DAMAGE, metavar="NATS", help=f"KL per token on benign prompts ({DAMAGE:g})")


def judge_for(behaviour: files.Behaviour, args: argparse.Namespace) -> judges.Judge | None:
    """Who is asked about the answers; None where rules tell. Raises UserError where a word is missing or says nothing."""
    kind, rule = behaviour.judge
    if kind != "rubric":
        if args.judge is not None:
            raise UserError(f"--judge {args.judge}: {behaviour.name} is judged by {kind}, so nobody is asked; leave it out")
        return None
    if args.judge is None:
        raise UserError(f"{behaviour.name} is judged by the rubric {rule.rubric.name}: who is asked? {judges.HOW}")
    import torch

    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    return judges.judge_of(args.judge, args.base_dir, Store(args.base_dir).judged(), device)


def limits_of(args: argparse.Namespace) -> Limits:
    if not 0 <= args.max_incoherent <= 1:
        raise UserError(f"--max_incoherent {args.max_incoherent:g}: wanted a share between 0 and 1")
    if not 0 < args.max_damage < math.inf:
        raise UserError(f"--max_damage {args.max_damage:g}: wanted nats above 0")
    return Limits(args.max_incoherent, args.max_damage)


def probe_of(host: Any, steering: Any, settings: Any, judge: judges.Judge | None = None) -> Any:
    """A Probe with the settings of --mode apply."""
    from tqdm import tqdm

    from spilt.behaviour.probe import Probe

    if settings.applied_positions != "all":
        raise UserError(f"steer_positions = {settings.applied_positions}: every token is steered here, so it would be another thing")
    how = {name: getattr(settings, name) for name in ("seed", "batch_size", "use_chat_template", "system_prompt")}
    params = {name: value for name, value in settings.generation_params.as_kwargs().items() if name != "max_new_tokens"}
    bar = tqdm(desc="answers", unit=" answers", leave=False, disable=not sys.stderr.isatty())
    return Probe(host.model, host.tokenizer, steering, progress=bar.update, judge=judge, **how, **params)


def _receipt(args: argparse.Namespace) -> int:
    given = [] if args.multiplier is None else [args.multiplier]
    if not all(abs(m) <= STRONGEST for m in (*given, *args.multipliers)):  # nan is not
        raise UserError(f"--multiplier, --multipliers: wanted finite numbers within +-{STRONGEST:g}")
    if args.multiplier == 0:
        raise UserError("--multiplier 0 is the unsteered model, which is in every table; give another one, or leave it out")
    if args.output is not None and (args.output.suffix != ".md" or args.output.is_dir()):
        raise UserError(f"--output {args.output}: is written as a markdown file; give a name that ends in .md and is no folder")
    limits, behaviour = limits_of(args), files.load(args.behaviour)
    prefix = None if args.prefix is None else "\n".join(sources.lines(args.prefix))
    if prefix == "":
        raise UserError(f"--prefix {args.prefix}: is empty")
    suites = {name: path for name in files.SUITES if (path := getattr(args, name)) is not None}
    for name, path in suites.items():
        files.SUITES[name].read(path)
    judge = judge_for(behaviour, args)
    host, steering, s, _ = ready(args)
    from spilt.behaviour import receipt
    from spilt.memory import OutOfMemory

    asked: Any = {"multiplier": args.multiplier, "more": args.multipliers, "labels": args.labels, "prefix": prefix, "suites": suites}
    try:
        found = receipt.write_down(probe_of(host, steering, s, judge), behaviour, limits=limits, **asked)
    except (NotFinite, OutOfMemory) as error:
        complain(f"error: {error}")
        return 1
    about = {
        "model": args.model_name,
        "vector": str(args.steering or " ".join(filter(None, (args.dataset, args.method, args.intervention_method)))),
        "layers": list(steering.layers),
        "parameters": digest(b"".join(p.detach().float().cpu().numpy().tobytes() for p in steering.parameters())),
        "decoding": s.generation_params.as_kwargs() | {"max_new_tokens": behaviour.max_new_tokens},
        "seed": s.seed,
        "judge": None if judge is None else {"name": judge.name, "asked": str(judge.tally)},
        "spilt": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    told = json.dumps(document(found, about), indent=1, allow_nan=False)
    if args.output is not None:
        atomic_write(args.output, "\n".join(markdown(found, about)) + "\n")
        atomic_write(args.output.with_suffix(".json"), told + "\n")
    if args.json:
        print(told)
    else:
        for line in markdown(found, about):
            say(line)
    return 0


# ---------------------------------------------------------------- as a document


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _estimate(found: Estimate) -> dict[str, Any]:
    return {name: _number(value) for name, value in found._asdict().items()}


def document(found: Receipt, about: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values."""
    chosen, behaviour = found.found, found.behaviour
    rule = behaviour.judge.rule
    return {
        "schema": 1,
        **about,
        "behaviour": {"name": behaviour.name, "about": behaviour.about, "judge": behaviour.judge.kind, "want": behaviour.want},
        "rubric": {**rule.rubric.decides, "at_least": rule.at_least, "concept": rule.concept} if isinstance(rule, files.Rated) else None,
        "unrated": dict(zip(("missing", "of"), found.unrated, strict=True)),
        "checked": {"kappa": _estimate(found.checked.kappa), "file": found.checked.file},
        "limits": found.limits._asdict(),
        "status": chosen.status,
        "multiplier": found.multiplier,
        "dose": abs(found.multiplier) * found.unit,
        "range": [edge._asdict() for edge in chosen.edges],
        "tried": [{name: _number(value) for name, value in point._asdict().items()} for point in chosen.points],
        "strengths": [
            {"multiplier": m, "dose": abs(m) * found.unit, **{name: _estimate(value) for name, value in row.items()}}
            for m, row in found.rows.items()
        ],
        "failures": [
            {
                "failure": row.name,
                "of": row.of,
                "unsteered": _estimate(finding.before),
                "steered": _estimate(finding.after),
                "change": _estimate(finding.change),
                "bad": finding.bad,
                "note": finding.note,
            }
            for row, finding in found.failures
        ],
        "texts": found.samples,
    }


# ---------------------------------------------------------------- as a page


def _shown(found: Estimate, signed: bool = False) -> str:
    if not math.isfinite(found.value):
        return "–"
    sign = "+" if signed else ""
    ends = f" [{found.low:{sign}.2f}, {found.high:{sign}.2f}]" if math.isfinite(found.low) else ""
    return f"{found.value:{sign}.2f}{ends}"


def _cell(text: str) -> str:
    """Any text as one cell of a markdown table: no markup of its own, nothing that steers a terminal."""
    flat = printable(re.sub(r"\s+", " ", text).strip())
    return re.sub(r"([\\`*_{}\[\]()<>#|!&~])", r"\\\1", flat)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def _range(found: Receipt) -> list[str]:
    """Which strengths work, and what ends it on either side."""
    chosen = found.found
    if chosen.status != CHOSEN:
        return [f"**{chosen.status}**: no strength within the limits shows it more than the unsteered model."]
    inner, outer = chosen.edges
    said = [f"Chosen: m = {chosen.multiplier:.4g}, dose {abs(chosen.multiplier) * found.unit:.3g}. It works from m = {inner.works:.4g} "
            f"to {outer.works:.4g} (dose {abs(inner.works) * found.unit:.3g} to {abs(outer.works) * found.unit:.3g})."]  # fmt: skip
    for name, edge in (("weaker", inner), ("stronger", outer)):
        what = "no {0} one was tried" if edge.fails is None else "the next {0} one that was tried, m = {1:.4g}, does not work ({2})"
        said.append(f"- {what.format(name, edge.fails or 0.0, edge.why)}")
    return said


def markdown(found: Receipt, about: dict[str, Any]) -> list[str]:
    behaviour, limits = found.behaviour, found.limits
    rule, judge = behaviour.judge.rule, about["judge"]
    ways = {"first_token": "which of two answers is the likelier beginning"}
    if judge is not None:
        ways["rubric"] = (
            f"the rubric {rule.rubric.name}, at least {rule.at_least} of {rule.rubric.scale[1]}, as {_cell(judge['name'])} rates; "
            f"{found.unrated[0]} of {found.unrated[1]} answers have no rating and are left out ({_cell(judge['asked'])})"
        )
    out = [
        f"# Receipt: {_cell(about['vector'])} on {_cell(about['model'])}",
        "",
        f"Behaviour: {_cell(behaviour.name)}{behaviour.about and ': '}{_cell(behaviour.about)} (wanted: {behaviour.want}).",
        f"Judged by: {ways.get(behaviour.judge.kind, behaviour.judge.kind)}; {found.checked}.",
        f"Layers {'+'.join(map(str, about['layers']))}; parameters {about['parameters'][:12]}; spilt {about['spilt']}; {about['created']}.",
        "",
        "## In which range",
        "",
        *_range(found),
        "",
        f"Works: at least half of the largest gain, at most {limits.incoherent:.0%} more incoherent answers than unsteered, at most "
        f"{limits.damage:g} nats of KL per token on benign prompts; found on {len(behaviour.chosen_on)} prompts of the behaviour.",
        "",
        "## What it does",
        "",
        *_table(
            ("m", "dose", "as wanted", "incoherent", "KL on benign prompts, nats per token", "n"),
            [
                (
                    f"{m:.4g}",
                    f"{abs(m) * found.unit:.3g}",
                    *(_shown(row[name]) for name in ("wanted", "incoherent", "kl")),
                    f"{row['wanted'].n}, {row['kl'].n}",
                )
                for m, row in found.rows.items()
            ],
        ),
        "",
        f"On {len(behaviour.reported_on)} other prompts; judge: {found.checked}. An incoherent answer is never as wanted.",
        "",
        "## What it costs" + (f", at m = {found.multiplier:.4g}" if found.multiplier else ""),
        "",
    ]
    if found.failures:
        said = {True: "**yes**", False: "not seen", None: "–"}
        out += _table(
            ("failure", "measured", "unsteered", "steered", "change", "n", "bad", "how"),
            [
                (
                    row.name,
                    row.of,
                    _shown(finding.before),
                    _shown(finding.after),
                    _shown(finding.change, True),
                    str(finding.after.n or ""),
                    said[finding.bad],
                    "; ".join(_cell(part) for part in (finding.note, str(found.checked) if row.checked else "") if part),
                )
                for row, finding in found.failures
            ],
        )
        out += ["", "95% intervals: Wilson (shares), Newcombe (paired changes), resampled prompts (means). Not seen is not: not there."]
    else:
        out += ["Nothing was chosen, so there is no strength to measure at; --multiplier M takes one."]
    samples = [row for row in found.samples if row["multiplier"] in (0.0, found.multiplier)]
    prompts = list(dict.fromkeys(row["prompt"] for row in samples))[:3]
    rows = [row for row in samples if row["prompt"] in prompts]
    return [*out, "", "## Some answers", "", *_table(
        ("prompt", "m", "verdict", "answer"),
        [(_cell(r["prompt"]), f"{r['multiplier']:.4g}", r["verdict"] or "–", _cell(r["text"][:300])) for r in rows],
    )]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
