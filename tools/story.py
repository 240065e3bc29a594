"""What a run of `make demo` showed, in a minute's reading: python tools/story.py --base_dir demo-run --model_name ... --dataset sea

The cell with the largest recommended gain; its texts nearest the recommended multiplier, and at the largest one that was tried.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spilt import look  # noqa: E402
from spilt.analysis import freshness  # noqa: E402
from spilt.analysis.behaviour import shows, words  # noqa: E402
from spilt.artifacts.store import Store  # noqa: E402
from spilt.artifacts.texts import Row  # noqa: E402
from spilt.cell import Cell  # noqa: E402
from spilt.errors import UserError  # noqa: E402
from spilt.report import recommend  # noqa: E402
from spilt.terminal import program, say  # noqa: E402

SHOWN = 2  # prompts
WIDTH = 118


class Found(NamedTuple):
    """All that the story needs of a base folder: the cell, its numbers, its texts by multiplier, the page."""

    method: str
    form: str
    of: int  # cells that were measured
    numbers: dict[str, Any]  # a row of `spilt recommend --json`
    texts: dict[float, list[Row]]
    keywords: tuple[str, ...]
    page: Path


def find(base: Path, model: str, dataset: str) -> Found:
    """The only place that knows how results are stored. Raises UserError where there are none."""
    table = recommend(base, model, dataset)
    for row in table[table["multiplier"].fillna(0) != 0].sort_values("preference_gain_train", ascending=False).to_dict("records"):
        texts = look.results(Store(base), Cell(model, dataset, row["method"], row["intervention"], ()))
        if {0.0} < set(texts):
            page = freshness.page(base, model, dataset)
            keywords = look.keywords(base, dataset)
            return Found(row["method"], row["intervention"], len(table), row, dict(sorted(texts.items())), keywords, page)
    reasons = "; ".join(f"{row['method']} {row['intervention']}: {row['reason']}" for row in table.to_dict("records"))
    raise UserError(f"no cell of {dataset} with {model} below {base} is recommended and has texts at m = 0 and another m ({reasons})")


def count(rows: list[Row], keywords: tuple[str, ...]) -> int:
    """How many first answers hold one of the words."""
    return sum(bool(shows(row.texts[0], row.reference, keywords)) for row in rows)


def lines(found: Found) -> list[str]:
    numbers, keywords = found.numbers, found.keywords
    best, split = float(numbers["multiplier"]), "test" if numbers["reported_on"] == "test" else "train"
    steered, most = min((m for m in found.texts if m), key=lambda m: abs(m - best)), max(found.texts, key=abs)
    there = {m: {row.key: row for row in rows} for m, rows in found.texts.items()}

    def seen(m: float, row: Row) -> bool | None:
        return shows(_line(there[m][row.key].texts[0]), row.reference, keywords)

    # first what a reader sees in the line: none of the words without steering, one of them with it
    order = sorted(found.texts[0.0], key=lambda row: bool(seen(0.0, row)) - bool(seen(steered, row)))
    out = []
    for row in order[:SHOWN]:
        for name, text in (("asked", row.prompt), ("unsteered", row.texts[0]), (f"m = {steered:g}", there[steered][row.key].texts[0])):
            out.append(f"{name:<12}{_line(text)}")
    if keywords:
        said = Counter(word for row in there[steered].values() for word in set(words(row.texts[0])) & set(keywords))
        named = f"a keyword ({', '.join(word for word, _ in said.most_common(3))} ...)"
        counts = ", ".join(f"{count(rows, keywords)} at m = {m:g}" for m, rows in found.texts.items())
        out.append(f"{'counted':<12}answers of {len(order)} with {named}: {counts}")
    gain, drop = (_change(numbers, name, split) for name in ("gain", "drop"))
    at = f"{found.method} {found.form} at m = {best:.3g}, the largest gain of {found.of} combinations, on {numbers[f'n_{split}']:.0f}"
    out += [f"{'measured':<12}{at} {split} questions:", f"{'':<12}preference {gain} nat, utility {drop} nat"]
    if numbers.get("chance_rank"):
        beside = f"rank {numbers['chance_rank']:.0f} of {numbers['chance_of']:.0f} beside random directions of its size"
        out.append(f"{'by chance?':<12}{beside}, p = {numbers['chance_p']:.2g}")
    if abs(most) > abs(steered):
        out.append(f"{'too strong':<12}m = {most:g}: {_line(there[most][order[0].key].texts[0])}")
    return out


def _change(numbers: dict[str, Any], name: str, split: str) -> str:
    """Of preference its gain, of utility the drop with a minus, and the 95% interval."""
    of, sign = ("preference", 1) if name == "gain" else ("utility", -1)
    low, high = sorted(sign * numbers[f"{name}_{end}_{split}"] for end in ("low", "high"))
    return f"{sign * numbers[f'{of}_{name}_{split}']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _line(text: str) -> str:
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def _tell(args: argparse.Namespace) -> int:
    found = find(args.base_dir, args.model_name, args.dataset)
    say()
    for line in lines(found):
        say(line)
    cell = f"--base_dir {args.base_dir} --model_name {args.model_name} --dataset {args.dataset} --method {found.method}"
    form = f"--intervention_method {found.form} --multipliers 0 {float(found.numbers['multiplier']):.3g}"
    say(f"{'the page':<12}{found.page}")
    say(f"{'your turn':<12}{os.path.relpath(sys.executable)} -m spilt say 'What is new?' {cell} {form}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dir", type=Path, default=Path("demo-run"))
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", required=True)
    return program(parser, None, _tell)


if __name__ == "__main__":
    raise SystemExit(main())
