"""spilt look: the stored texts of a dataset, side by side by multiplier, and how many begin as the reference answer does."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from spilt.analysis.behaviour import share
from spilt.analysis.provenance import made_otherwise, stored_texts
from spilt.artifacts import texts
from spilt.artifacts.store import Store
from spilt.cell import FORMS, Cell, variant_of
from spilt.data import entries
from spilt.errors import UserError
from spilt.methods import METHODS
from spilt.terminal import program, say

log = logging.getLogger("spilt")


def results(store: Store, cell: Cell) -> dict[float, list[texts.Row]]:
    """multiplier -> rows, of what has been generated for a cell; concepts one after the other.

    Texts of another vector than the one that lies there now, and files that cannot be read, are left out, with a warning.
    """
    found, others, broken = stored_texts(store, cell)
    if others:
        at = ", ".join(f"m={m:g}" for m in others)
        log.warning("%s: %s left out: of another vector than the one that lies there now; --mode apply makes them again", cell, at)
    for said in made_otherwise(store, cell):
        log.warning("%s: %s", cell, said)
    for error in broken:
        log.warning("%s: left out: %s", cell, error)
    return dict(found)


def agreement(rows: Sequence[texts.Row], words: Sequence[str] = ()) -> float | None:
    """Share of first responses that show the behaviour; None where no rule can tell."""
    return share(((row.texts[0], row.reference) for row in rows if row.texts and (words or row.reference)), words)


def keywords(base_dir: Path, dataset: str) -> tuple[str, ...]:
    """Those of the dataset's entry; none where it has no entry any more."""
    try:
        return entries.dataset_format(base_dir, dataset, "generation").keywords
    except UserError:
        return ()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the texts; 0, or 2 when there are none, or for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt look", description=__doc__)
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--method", default="all", help=f"{', '.join(METHODS)} or all")
    parser.add_argument("--intervention_method", default="all", help=f"{', '.join(FORMS)} or all")
    parser.add_argument("--prompts", type=int, default=2, help="prompts shown per cell")
    return program(parser, argv, _look)


def _look(args: argparse.Namespace) -> int:
    if not show(args):
        raise UserError(f"no texts of {args.dataset} with {args.model_name} below {args.base_dir}; run --mode apply first")
    return 0


def show(args: argparse.Namespace) -> int:
    """Print every cell that has texts; returns how many."""
    from spilt.plan import pairs_of

    store, shown = Store(args.base_dir), 0
    width = shutil.get_terminal_size((120, 24)).columns
    cells = [Cell(args.model_name, args.dataset, method, form, ()) for method, form in pairs_of(args.method, args.intervention_method)[0]]
    every = [found for plain in cells for found in store.variants(plain)]
    if args.method == args.intervention_method == "all":
        every += store.behind_prompts(args.model_name, args.dataset)
    for cell in every:
        found = results(store, cell)
        if not found:
            continue
        shown += 1
        say()
        variant = variant_of(cell.intervention)
        say(f"== {args.dataset}, {cell.method}, {variant.form}{variant}")
        words = keywords(args.base_dir, args.dataset)
        shares = {m: agreement(rows, words) for m, rows in found.items()}
        if told := "  ".join(f"m={m:g}: {part:.0%}" for m, part in shares.items() if part is not None):
            say(f"   {'answers with a keyword of the dataset' if words else 'answers as the reference'}: {told}")
        at = {m: {row.key: row for row in rows} for m, rows in found.items()}
        prompts = dict.fromkeys(key for rows in at.values() for key in rows)  # a multiplier may have fewer of them
        for key in list(prompts)[: max(0, args.prompts)]:
            say(f"   {_line(key[-1], width - 3)}")
            for m, own in at.items():
                text = own[key].texts if key in own else []
                say(f"   m={m:<6g} {_line(text[0], width - 13) if text else '(none)'}")
    return shown


def _line(text: str, width: int) -> str:
    """One line of printable text, cut to the terminal; escape sequences of a model's text stay text."""
    flat = re.sub(r"\s+", " ", "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)).strip()
    return flat if len(flat) <= width else flat[: max(0, width - 1)] + "\N{HORIZONTAL ELLIPSIS}"


if __name__ == "__main__":
    sys.exit(main())
