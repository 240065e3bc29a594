"""spilt look: the stored texts of a dataset, side by side by multiplier, and how many begin as the reference answer does."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spilt.artifact import of_one_vector
from spilt.cell import FORMS, Cell
from spilt.errors import UserError
from spilt.methods import METHODS
from spilt.store import Store

log = logging.getLogger("spilt")


def results(store: Store, cell: Cell) -> dict[float, list[dict[str, Any]]]:
    """multiplier -> rows, of what has been generated for a cell; concepts one after the other.

    Texts of another vector than the one that lies there now are left out, with a warning.
    """
    found = {}
    there = store.generated(cell)
    kept, others = of_one_vector(store.base_dir, [path for _, path in there])
    if others:
        at = ", ".join(f"m={m:g}" for m, path in there if path in others)
        log.warning("%s: %s left out: of another vector than the one that lies there now; --mode apply makes them again", cell, at)
    for multiplier, path in there:
        if path not in kept:
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))
        found[multiplier] = [row for part in rows for row in part.get("generated_results", [part])]
    return found


def agreement(rows: Sequence[dict[str, Any]]) -> float | None:
    """Share of first responses that say what the reference says; None where it has more than one word (no rule can tell there)."""
    asked = [(row["pred"][0], row["reference_response"]) for row in rows if row["reference_response"]]
    if not asked or any(len(reference.split()) != 1 for _, reference in asked):
        return None
    return sum(_first(text) == _first(reference) for text, reference in asked) / len(asked)


def _first(text: str) -> str:
    words = re.findall(r"\w+", text.lower())
    return words[0] if words else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the texts; 0, or 2 when there are none."""
    parser = argparse.ArgumentParser(prog="spilt look", description=__doc__)
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--method", default="all", help=f"{', '.join(METHODS)} or all")
    parser.add_argument("--intervention_method", default="all", help=f"{', '.join(FORMS)} or all")
    parser.add_argument("--prompts", type=int, default=2, help="prompts shown per cell")
    try:
        args = parser.parse_args(argv)
        shown = show(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    if not shown:
        print(f"error: no texts of {args.dataset} with {args.model_name} below {args.base_dir}; run --mode apply first", file=sys.stderr)
        return 2
    return 0


def show(args: argparse.Namespace) -> int:
    """Print every cell that has texts; returns how many."""
    from spilt.plan import pairs_of

    store, shown = Store(args.base_dir), 0
    width = shutil.get_terminal_size((120, 24)).columns
    for method, form in pairs_of(args.method, args.intervention_method)[0]:
        found = results(store, Cell(args.model_name, args.dataset, method, form, ()))
        if not found:
            continue
        shown += 1
        print(f"\n== {args.dataset}, {method}, {form}")
        shares = {m: agreement(rows) for m, rows in found.items()}
        if any(share is not None for share in shares.values()):
            print("   answers as the reference: " + "  ".join(f"m={m:g}: {share:.0%}" for m, share in shares.items() if share is not None))
        first = next(iter(found.values()))
        for i in range(min(args.prompts, len(first))):
            print(f"   {_line(first[i]['input'], width - 3)}")
            for m, rows in found.items():
                print(f"   m={m:<6g} {_line(rows[i]['pred'][0], width - 13)}")
    return shown


def _line(text: str, width: int) -> str:
    """One line of printable text, cut to the terminal; escape sequences of a model's text stay text."""
    flat = re.sub(r"\s+", " ", "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)).strip()
    return flat if len(flat) <= width else flat[: max(0, width - 1)] + "\N{HORIZONTAL ELLIPSIS}"


if __name__ == "__main__":
    sys.exit(main())
