"""spilt table: the paper's tables from stored results of any models and data sets, its own numbers beside for its two models.

main: every method at the strength that its training questions give, beside prompts; prompts: the methods against these; tradeoff:
every cell at equal KL, preference and utility; equal: there SPLIT against the others, paired; strengths: those of equal KL; train_test;
fits and averages: of the curves.
With --kl the model is loaded and cells without such a strength get one, which is kept.
With --prompt_baseline it is loaded too, and the losses behind that prompt are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spilt import __version__
from spilt.analysis.paper import TABLES
from spilt.data import prompt_baseline
from spilt.errors import UserError, unknown
from spilt.terminal import complain, program, say

if TYPE_CHECKING:
    from spilt.report.comparison import Set

LACKING = {
    "prompts": "no prompt is measured on these questions; --prompt_baseline NAME=FILE measures one",
    "strengths": "no strengths of equal KL are stored; --kl NATS finds them",
}
FORMATS = {"markdown": ".md", "csv": ".csv", "latex": ".tex", "html": ".html"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the tables; 0, or 2 where there is nothing to read."""
    parser = argparse.ArgumentParser(prog="spilt table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--model_name", nargs="+", default=[], metavar="NAME", help="default: every model with stored losses")
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="default: every data set with stored losses")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all of them")
    parser.add_argument("--format", choices=FORMATS, help="of what is printed (default markdown); with --output all four are written")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write tables.md, .tex, .html and a csv of each table there")
    parser.add_argument("--budget", type=float, default=0.5, help="utility that may be lost from m = 0, nats (default 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--kl", type=float, metavar="NATS", help="find the strengths of equal KL that are not stored yet; loads the model")
    parser.add_argument("--kl_of", nargs="+", default=[], metavar="CELL", help="for --kl: of these alone, such as caa or spilt_lora")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="for --kl: the data set's first N (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N", help="for --kl: of each answer (default 32)")
    parser.add_argument(
        "--prompt_baseline",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help=f"measure the losses of the unsteered model behind a prompt: {prompt_baseline.HELP}; loads the model",
    )
    parser.add_argument("--device", default="", help="for --kl and --prompt_baseline; default: cuda:0 where there is one, else cpu")
    return program(parser, argv, _table)


def _table(args: argparse.Namespace) -> int:
    from spilt.analysis.recommend import refuse_budget
    from spilt.artifacts.atomic import atomic_write
    from spilt.report import comparison

    refuse_budget(args.budget)
    if args.kl is not None and not 0 < args.kl < float("inf"):
        raise UserError(f"--kl {args.kl:g}: wanted nats above 0")
    for name in ("prompts", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: wanted 1 or more")
    if args.format == "csv" and args.output is None and len(args.tables) > 1:
        raise UserError("--format csv prints one table: name it with --tables, or give --output FOLDER for a file of each")
    prompts = prompt_baseline.read(args.prompt_baseline)
    sets = comparison.collect(args.base_dir, args.model_name, args.dataset, args.tables, args.budget, args.seed)
    problems = [problem for one in sets for problem in one.problems]
    for problem in problems:
        complain(f"warning: {problem}")
    sets = [one for one in sets if one.groups]
    if not sets:
        raise UserError("no cell could be read; spilt verify says what is wrong with each file")
    if args.kl is not None:
        _calibrate(args, sets)
    elif args.kl_of:
        raise UserError(f"--kl_of {' '.join(args.kl_of)}: goes with --kl NATS")
    failed = bool(prompts) and not _measure(args, sets, prompts)
    made = comparison.make(sets, args.tables, args.budget, args.seed)
    lacking = [name for name in args.tables if name not in {table.name for table in made}]
    if lacking:
        complain(f"note: no table {', '.join(lacking)}: {'; '.join(LACKING[name] for name in lacking)}")
    if not made:
        return 1
    if args.output is None:
        written = {"markdown": comparison.markdown, "latex": comparison.latex, "html": lambda some: comparison.html(some, __version__)}
        text = comparison.csv(made, made[0].name) if args.format == "csv" else written[args.format or "markdown"](made)
        for line in text.splitlines():
            say(line)
        return int(failed)
    args.output.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.csv": comparison.csv(made, name) for name in dict.fromkeys(table.name for table in made)}
    files |= {
        "tables.md": comparison.markdown(made),
        "tables.tex": comparison.latex(made),
        "tables.html": comparison.html(made, __version__),
    }
    for name, text in files.items():
        atomic_write(args.output / name, text)
    say(f"{args.output}: {', '.join(files)}")
    return int(failed)


def _calibrate(args: argparse.Namespace, sets: Sequence[Set]) -> None:
    from spilt.disturbance import How, calibrate
    from spilt.report.comparison.disturbed import levels

    how = How(args.kl, args.prompts, args.max_new_tokens)
    have = {word: None for one in sets for group in one.groups for word in (group.method, f"{group.method}_{group.cells[0].place.form}")}
    for word in args.kl_of:
        if word not in have:
            raise unknown("cell with stored losses", word, have)
    for one in sets:
        places = [cell.place for group in one.groups for cell in group.cells]
        places = [place for place in places if not args.kl_of or {place.method, f"{place.method}_{place.form}"} & {*args.kl_of}]
        asked = levels(one, args.budget, args.seed)
        also = {(place.method, place.intervention): [level.multiplier for level in asked[place.name][1].values()] for place in places}
        try:
            for concepts in {tuple(place.concepts): None for place in places}:
                cells = [(place.method, place.intervention) for place in places if tuple(place.concepts) == concepts]
                calibrate(args.base_dir, one.model, one.dataset, cells, how, args.device, complain, concepts, also)
        except UserError as error:
            complain(f"warning: {one.heading}: no strengths of equal KL: {error}")


def _measure(args: argparse.Namespace, sets: Sequence[Set], prompts: Sequence[prompt_baseline.Prompt]) -> bool:
    """Whether all of them were measured, or had been."""
    from spilt import prompted
    from spilt.report.comparison import told_on

    whole = True
    for one in sets:
        try:
            first = one.groups[0].cells[0].place
            cell = (first.method, first.intervention)
            prompted.measure(args.base_dir, one.model, one.dataset, cell, told_on(one), prompts, args.device, complain)
        except UserError as error:
            complain(f"warning: {one.heading}: not all prompts are measured: {error}")
            whole = False
    return whole


if __name__ == "__main__":
    sys.exit(main())
