"""spilt strength: at which multiplier? At equal disturbance (--by kl), or where most is as wanted within limits (--by accuracy, behaviour).

kl: both multipliers at which KL(steered || base), nats per token along the steered model's own greedy answers, has its 95th percentile at
the budget, so that methods and layers compare there. accuracy: share of questions whose matching answer has the likelier first token, as
the paper's main table has it; found on training questions, reported on held-out ones. behaviour: found on some prompts of the behaviour,
reported on the others. Both tell the range that works. Several --layers are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spilt import __version__
from spilt.analysis.chosen import CHOSEN
from spilt.artifacts.store import Store
from spilt.behaviour import files
from spilt.cell import Cell, variant_of
from spilt.data import entries, readers
from spilt.data.chat import Question
from spilt.errors import NotFinite, UserError
from spilt.model.locate import locate
from spilt.receipt import behaviour_flags, judge_for, limits_of, probe_of
from spilt.say import Named, loaded, named, which_flags
from spilt.settings.fields import intervention_name, method_name
from spilt.terminal import complain, program, say
from spilt.verbs import VERBS
from spilt.verbs.base import layer_groups

PROMPTS = 32  # of kl

# column -> (heading, format)
SHOWN = {
    "layers": ("layers", ""), "side": ("side", ""), "multiplier": ("m", ".4g"), "dose": ("dose", ".3g"),
    "works_from": ("works from", ".4g"), "works_to": ("to", ".4g"), "wanted": ("as wanted", ""), "unsteered": ("unsteered", ""),
    "incoherent": ("incoherent", ""),
    "damage": ("KL, benign", ".3f"), "kl_p95": ("kl p95", ".3f"), "kl_mean": ("mean", ".3f"), "kl_max": ("max", ".3f"),
    "unrated": ("not rated", ""),
    "audit_kl_p95": ("p95 on other prompts", ".3f"), "status": ("status", ""),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the strengths; 0, 1 where the model's numbers break down, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt strength", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which_flags(parser)
    parser.add_argument("--by", choices=tuple(BY), default="kl", help="default kl")
    parser.add_argument("--budget", type=float, default=1.0, metavar="NATS", help="of kl; default 1")
    many = "of kl: the first N, and the next N to check (default 32); of accuracy: the first N of each split (default all)"
    parser.add_argument("--prompts", type=int, metavar="N", help=many)
    parser.add_argument("--prompts_file", type=Path, metavar="FILE", help="of kl: a prompt a line, in place of the dataset's")
    parser.add_argument("--max_new_tokens", type=int, default=50, metavar="N", help="of each answer, of kl (default 50)")
    behaviour_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, with everything that was tried")
    return program(parser, argv, _strength)


def _strength(args: argparse.Namespace) -> int:
    if args.behaviour is not None and args.by != "behaviour":
        raise UserError(f"--behaviour {args.behaviour}: --by {args.by} looks at none; give --by behaviour, or leave it out")
    if args.prompts is not None and args.prompts < 1:
        raise UserError(f"--prompts {args.prompts}: wanted 1 or more")
    told, measure, line = BY[args.by](args)
    from spilt.memory import OutOfMemory

    host = None
    rows: Rows = []
    probes: Rows = []
    try:
        for what in [*_named(args)]:
            host, steering, settings, _ = loaded(what, known=host)
            at = {"layers": "+".join(map(str, steering.layers))}
            found, tried = measure(host, steering, settings)
            rows += [at | row for row in found]
            probes += [at | row for row in tried]
    except (NotFinite, OutOfMemory) as error:
        complain(f"error: {error}")
        return 1
    if args.json:
        about = {"spilt": __version__, "schema": 1, "model": args.model_name, "by": args.by, **told}
        print(json.dumps({**about, "sides": [*map(_plain, rows)], "probes": [*map(_plain, probes)]}, indent=1, allow_nan=False))
        return 0
    several = len({row["layers"] for row in rows}) > 1
    names = [name for name in SHOWN if any(name in row for row in rows) and (several or name != "layers")]
    table = [[SHOWN[name][0] for name in names]]
    table += [[_shown(row.get(name), SHOWN[name][1]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        say("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
    say(line)
    if args.by != "kl" and several and any(row["status"] == CHOSEN for row in rows):
        best = max((row for row in rows if row["status"] == CHOSEN), key=lambda row: (row["chosen_on"], -row["damage"]))
        say(f"most on the prompts that it is chosen on: layers {best['layers']}, m = {best['multiplier']:.4g}")
    return 0


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: a number that is none is null."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def _shown(value: Any, spec: str) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if math.isfinite(value[0]) else "–"
    return "–" if value is None or value != value else f"{value:{spec}}"


def _named(args: argparse.Namespace) -> Iterator[Named]:
    """Each of --layers; of `all` those that are stored."""
    words = args.layers
    if words and args.steering is None and layer_groups(words) == ():
        words = _stored_layers(args)
    for layers in [None] if not words else [[word] for word in words] if args.steering is None else [words]:
        yield named(argparse.Namespace(**{**vars(args), "layers": layers}))


def _stored_layers(args: argparse.Namespace) -> list[str]:
    """Words of --layers: the layers of the cell's own folder, and those of the folders beside it."""
    store, (model, _) = Store(args.base_dir), locate(args.base_dir, args.model_name)
    cell = Cell(model, args.dataset, method_name(args.method), intervention_name(args.intervention_method), (), args.concept)
    folder = store.vector(cell, 0).parent
    own = {path.stem.removeprefix("layer_") for path in folder.glob("layer_*.pt") if path.stem.removeprefix("layer_").isdigit()}
    beside = [variant_of(path.name.removeprefix(f"{folder.name.split('_')[0]}_")) for path in folder.parent.glob(f"{folder.name}@*")]
    found = {"+".join(map(str, one.layers)) for one in beside if one.layers and one.seed is None}
    if not own | found:
        raise UserError(f"no layer of {args.dataset} {args.method} {args.intervention_method} is stored; fit them with spilt fit --layers")
    return sorted(own | found, key=lambda word: [int(n) for n in word.split("+")])


# ---------------------------------------------------------------- by what: (args) -> what --json says of it, the measurement, a last line

Rows = list[dict[str, Any]]
By = tuple[dict[str, Any], Callable[[Any, Any, Any], tuple[Rows, Rows]], str]


def _kl(args: argparse.Namespace) -> By:
    if not 0 < args.budget < float("inf"):  # nan is not
        raise UserError(f"--budget {args.budget:g}: wanted nats above 0")
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: wanted 1 or more")
    many = args.prompts or PROMPTS
    prompts = _prompts(args, 2 * many)
    used, others = prompts[:many], prompts[many : 2 * many]

    def measure(host: Any, steering: Any, settings: Any) -> tuple[Rows, Rows]:
        from spilt import api

        how = {name: getattr(settings, name) for name in ("batch_size", "use_chat_template", "system_prompt")}
        probe = probe_of(host, steering, settings)
        probe.prompts([*used, *others], args.max_new_tokens)
        unit = probe.doses_on(used)
        known: Any = {"audit": others, "max_new_tokens": args.max_new_tokens}
        table = api.calibrate(host.model, host.tokenizer, steering, used, args.budget, **known, **how)
        rows = [{**row, "dose": abs(row["multiplier"]) * unit} for row in table.to_dict("records")]
        return rows, table.attrs["probes"].to_dict("records")

    told = {"budget": args.budget, "prompts": len(used), "audit": len(others), "max_new_tokens": args.max_new_tokens}
    return told, measure, f"KL(steered || base), nats per token of {len(used)} greedy answers; budget {args.budget:g} at p95"


def _behaviour(args: argparse.Namespace) -> By:
    if args.behaviour is None:
        raise UserError(f"--by behaviour: which? give --behaviour, {', '.join(files.shipped())} or a YAML file")
    behaviour = files.load(args.behaviour)
    line = "{}: chosen on {} prompts; shares of {} others, 95% intervals"
    return _chosen(args, behaviour, line.format(behaviour.name, len(behaviour.chosen_on), len(behaviour.reported_on)))


def _accuracy(args: argparse.Namespace) -> By:
    if not args.dataset:
        raise UserError("--by accuracy: of which questions? give --dataset")

    def asked(section: str) -> tuple[files.Asked, ...]:
        pairs = readers.read_pairs(entries.dataset_format(args.base_dir, args.dataset, section), args.concept, args.prompts)
        if any(pair.kind != readers.PAIRS for pair in pairs):
            raise UserError(f"--by accuracy: compares two answers to one question, and {args.dataset} has other rows; --by behaviour or kl")
        # a conversation is as good as a text: only its next token is looked at
        both = [(pair.question, {"matching": pair.matching, "not_matching": pair.not_matching}) for pair in pairs]
        return tuple(files.Asked(question, row) for question, row in both)  # type: ignore[arg-type]

    first = files.Judge("first_token", files.COLUMNS)
    whole = files.Incoherence(mass=0.0)  # as `spilt evaluate` counts
    train, test = map(asked, (VERBS["measure"].sections[split] for split in ("train", "test")))
    behaviour = files.Behaviour(prompts=test, tune_on=train, judge=first, incoherent=whole, name=f"accuracy, {args.dataset}")
    line = f"as wanted: the matching answer begins likelier; chosen on {len(train)} training questions, shares of {len(test)} held-out ones"
    return _chosen(args, behaviour, line)


def _chosen(args: argparse.Namespace, behaviour: files.Behaviour, line: str) -> By:
    """Where most of the behaviour's answers are as wanted, within the limits."""
    limits, judge = limits_of(args), judge_for(behaviour, args)

    def measure(host: Any, steering: Any, settings: Any) -> tuple[Rows, Rows]:
        from spilt.analysis.behaviour import INCOHERENT
        from spilt.analysis.chosen import choose
        from spilt.analysis.intervals import share

        probe = probe_of(host, steering, settings, judge)
        unit = probe.doses_on([asked.text for asked in behaviour.chosen_on])
        found = choose(lambda m: probe.point(behaviour, m), unit, limits)

        def on_others(m: float, word: str) -> Any:
            return share([verdict == word for verdict in probe.verdicts(behaviour, behaviour.reported_on, m) if verdict is not None])

        row = {"multiplier": found.multiplier, "dose": abs(found.multiplier) * unit, "status": found.status}
        row |= {"unsteered": on_others(0.0, behaviour.want)}
        if found.status == CHOSEN:
            inner, outer = found.edges
            row |= {"works_from": inner.works, "works_to": outer.works, "fails_below": inner.fails, "fails_above": outer.fails}
            row |= {"dose_from": abs(inner.works) * unit, "dose_to": abs(outer.works) * unit, "chosen_on": found.point.success}
            row |= {"wanted": on_others(found.multiplier, behaviour.want), "incoherent": on_others(found.multiplier, INCOHERENT)}
            row |= {"damage": found.point.damage}
        if judge is not None:
            row |= {"unrated": "{} of {}".format(*probe.unrated)}
        return [row], [{**point._asdict(), "dose": abs(point.multiplier) * unit} for point in found.points]

    counts = {"chosen_on": len(behaviour.chosen_on), "reported_on": len(behaviour.reported_on)}
    told = {"behaviour": behaviour.name, "limits": limits._asdict(), **counts, "judge": None if judge is None else judge.name}
    return told, measure, line


BY: dict[str, Callable[[argparse.Namespace], By]] = {"kl": _kl, "accuracy": _accuracy, "behaviour": _behaviour}


def _prompts(args: argparse.Namespace, most: int) -> Sequence[Question]:
    """Those to calibrate on, and after them those to check."""
    if args.prompts_file is not None:
        return [asked.text for asked in files.asked_of(args.prompts_file)]
    if not args.dataset:
        raise UserError("which prompts? give --dataset, or --prompts_file FILE with one a line")
    fmt = entries.dataset_format(args.base_dir, args.dataset, "generation")
    return [row.input for row in readers.read_prompts(fmt, args.concept, most)]


if __name__ == "__main__":
    sys.exit(main())
