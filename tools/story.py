"""What a run of `make demo` showed, in a minute's reading: python tools/story.py --base_dir demo-run --model_name ... --dataset sea

The best cell by `spilt recommend`; its texts nearest the recommended multiplier, and at the largest one that was tried.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spilt import look  # noqa: E402
from spilt.artifacts.store import Store  # noqa: E402
from spilt.artifacts.texts import Row  # noqa: E402
from spilt.cell import Cell  # noqa: E402
from spilt.data import dataset_format  # noqa: E402
from spilt.errors import UserError  # noqa: E402
from spilt.report import recommend  # noqa: E402
from spilt.terminal import program, say  # noqa: E402

SHOWN = 2  # prompts
WIDTH = 130


class Found(NamedTuple):
    """All that the story needs of a base folder: the cell, its numbers on held-out questions, its texts by multiplier."""

    method: str
    form: str
    of: int  # cells that were measured
    numbers: dict[str, Any]
    texts: dict[float, list[Row]]
    keywords: tuple[str, ...]


def find(base: Path, model: str, dataset: str) -> Found:
    """The only place that knows how results are stored. Raises UserError where there are none."""
    table = recommend(base, model, dataset)
    beyond = table[~table["within_chance"].astype(bool) & table["multiplier"].notna() & (table["multiplier"] != 0)]
    for row in beyond.sort_values("preference_gain_train", ascending=False).to_dict("records"):
        texts = look.results(Store(base), Cell(model, dataset, row["method"], row["intervention"], ()))
        if {0.0} < set(texts):
            keywords = dataset_format(base, dataset, "generation").keywords
            return Found(row["method"], row["intervention"], len(table), row, dict(sorted(texts.items())), keywords)
    raise UserError(f"no cell of {dataset} with {model} below {base} has both a gain beyond chance and texts at m = 0 and another m")


def with_keyword(rows: list[Row], keywords: tuple[str, ...]) -> int:
    """How many first answers hold one of the words."""
    return sum(bool(set(re.findall(r"\w+", row.texts[0].lower())) & set(keywords)) for row in rows)


def tell(found: Found) -> None:
    best, numbers = float(found.numbers["multiplier"]), found.numbers
    steered = min((m for m in found.texts if m), key=lambda m: abs(m - best))
    most = max(found.texts, key=abs)
    plain, there = found.texts[0.0], {m: {row.key: row for row in rows} for m, rows in found.texts.items()}
    # those that the words tell apart best, so that a reader sees what is counted
    order = sorted(plain, key=lambda row: with_keyword([row], found.keywords) - with_keyword([there[steered][row.key]], found.keywords))
    for row in order[:SHOWN]:
        say(f"Asked        {row.prompt}")
        say(f"unsteered    {_line(row.texts[0])}")
        say(f"{f'm = {steered:g}':<13}{_line(there[steered][row.key].texts[0])}")
    if found.keywords:
        counts = ", ".join(f"{with_keyword(rows, found.keywords)} at m = {m:g}" for m, rows in found.texts.items())
        say(f"Answers of {len(plain)} with a word of the trait ({', '.join(found.keywords[:4])} ...): {counts}.")
    say(
        f"{found.method} {found.form}, the best of {found.of} combinations within the budget, m = {best:g}, "
        f"on {numbers['n_test']:.0f} questions held out: preference +{numbers['preference_gain_test']:.2f} nat {_span(numbers, 'gain')}, "
        f"utility -{numbers['utility_drop_test']:.2f} nat {_span(numbers, 'drop')}."
    )
    if abs(most) > abs(steered):
        say(f"Too much, m = {most:g}: {_line(there[most][order[0].key].texts[0])}")


def _span(numbers: dict[str, Any], name: str) -> str:
    sign = 1 if name == "gain" else -1
    low, high = sorted(sign * numbers[f"{name}_{end}_test"] for end in ("low", "high"))
    return f"[{low:.2f}, {high:.2f}]"


def _line(text: str) -> str:
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def _tell(args: argparse.Namespace) -> int:
    tell(find(args.base_dir, args.model_name, args.dataset))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dir", type=Path, default=Path("demo-run"))
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", required=True)
    return program(parser, None, _tell)


if __name__ == "__main__":
    raise SystemExit(main())
