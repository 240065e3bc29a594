"""spilt receipt: what one stored vector does to a behaviour, what it costs, in which range, and how that was measured.

The behaviour is a YAML file (README: behaviours of your own) or one that comes with spilt. Strengths are chosen on some of its prompts
and reported on the others. Every number has an interval and says of how many prompts it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt import __version__, judges
from spilt.analysis.chosen import DAMAGE, INCOHERENT, Limits
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.manifest import digest
from spilt.artifacts.store import Store
from spilt.behaviour import files
from spilt.data import prompt_baseline, sources
from spilt.errors import NotFinite, UserError
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
    known = f"beside it the unsteered model behind a prompt: {prompt_baseline.HELP}"
    parser.add_argument("--prompt_baseline", nargs="+", default=[], metavar="NAME=FILE", help=known)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write it there, as a page to FILE.html, all of it to FILE.json")
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
    prompts = prompt_baseline.read(args.prompt_baseline)
    judge = judge_for(behaviour, args)
    host, steering, s, _ = ready(args)
    from spilt.behaviour import receipt
    from spilt.memory import OutOfMemory
    from spilt.report import receipt as written

    asked: Any = {"multiplier": args.multiplier, "more": args.multipliers, "labels": args.labels, "prefix": prefix, "suites": suites}
    asked["prompts"] = prompts
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
    told = document(found, about)
    text, lines = json.dumps(told, indent=1, allow_nan=False), written.markdown(told)
    if args.output is not None:
        atomic_write(args.output, "\n".join(lines) + "\n")
        atomic_write(args.output.with_suffix(".json"), text + "\n")
        atomic_write(args.output.with_suffix(".html"), written.html(told))
    if args.json:
        print(text)
    else:
        for line in lines:
            say(line)
    return 0


# ---------------------------------------------------------------- as a document


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _estimate(found: Estimate) -> dict[str, Any]:
    return {name: _number(value) for name, value in found._asdict().items()}


def document(found: Receipt, about: dict[str, Any]) -> dict[str, Any]:
    """Everything as JSON values; what `report.receipt` shows."""
    chosen, behaviour = found.found, found.behaviour
    rule = behaviour.judge.rule
    return {
        "schema": 1,
        **about,
        "behaviour": {"name": behaviour.name, "about": behaviour.about, "judge": behaviour.judge.kind, "want": behaviour.want},
        "rubric": {**rule.rubric.decides, "at_least": rule.at_least, "concept": rule.concept} if isinstance(rule, files.Rated) else None,
        "unrated": dict(zip(("missing", "of"), found.unrated, strict=True)),
        "checked": {"kappa": _estimate(found.checked.kappa), "file": found.checked.file, "said": str(found.checked)},
        "limits": found.limits._asdict(),
        "prompts": {"chosen_on": len(behaviour.chosen_on), "reported_on": len(behaviour.reported_on)},
        "status": chosen.status,
        "multiplier": found.multiplier,
        "dose": abs(found.multiplier) * found.unit,
        "chosen": chosen.multiplier,
        "unit": found.unit,
        "range": [edge._asdict() for edge in chosen.edges],
        "tried": [{name: _number(value) for name, value in point._asdict().items()} for point in chosen.points],
        "strengths": [
            {"multiplier": m, "dose": abs(m) * found.unit, **{name: _estimate(value) for name, value in row.items()}}
            for m, row in found.rows.items()
        ],
        "prompt_baselines": [
            {"name": one.prompt.name, "turns": one.prompt.decides, **{name: _estimate(value) for name, value in one.row.items()}}
            | {"texts": one.samples}
            for one in found.prompts
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
                "checked": row.checked,
            }
            for row, finding in found.failures
        ],
        "texts": found.samples,
    }


if __name__ == "__main__":
    sys.exit(main())
