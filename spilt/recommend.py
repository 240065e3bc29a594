"""spilt recommend: the multiplier of each measured cell by a utility budget, with intervals, and whether it is beyond chance."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt.terminal import aligned, complain, program, say

if TYPE_CHECKING:
    import pandas as pd


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 when there is nothing to read."""
    parser = argparse.ArgumentParser(prog="spilt recommend", description=__doc__)
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--budget", type=float, default=0.5, help="utility that may be lost from m = 0, nats (default 0.5)")
    parser.add_argument("--norm", choices=("mean", "sum"), default="mean", help="answer loss per token, or summed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="everything, as JSON")
    how.add_argument("--csv", action="store_true", help="everything, as CSV")
    return program(parser, argv, _recommend)


def _recommend(args: argparse.Namespace) -> int:
    from spilt.analysis.recommend import refuse_budget
    from spilt.report import recommend

    refuse_budget(args.budget)
    table = recommend(args.base_dir, args.model_name, args.dataset, args.budget, norm=args.norm)
    for note in table.attrs["notes"]:
        complain(f"warning: {note}")
    if args.json:
        text = json.dumps(json.loads(table.to_json(orient="records", double_precision=15)), indent=1, ensure_ascii=False).splitlines()
    else:
        text = table.to_csv(index=False, lineterminator="\n").splitlines() if args.csv else lines(table)
    for line in text:
        say(line)
    return 0


def lines(table: pd.DataFrame) -> list[str]:
    """At most 8 columns on 100 characters; what a row's note stands for follows below."""
    from spilt.report.places import label, shown

    reasons: dict[str, int] = {}
    rows = [("cell", "m", "usable", "gain, nats", "drop, nats", "p", "best in", "note")]
    for row in table.to_dict("records"):
        on = "test" if row["reported_on"] == "test" else "train"
        note = f"{reasons.setdefault(row['reason'], len(reasons) + 1)}" + ("=" if row["tied"] else "")

        def ranged(value: Any, low: Any, high: Any, spec: str) -> str:
            return shown(value, spec) + (f" [{shown(low, spec)}, {shown(high, spec)}]" if low == low and low is not None else "")

        usable = "–" if row["usable_from"] != row["usable_from"] or row["usable_from"] is None else None
        rows.append(
            (
                label(row["method"], row["intervention"])[:30],
                ranged(row["multiplier"], row["multiplier_low"], row["multiplier_high"], ".3g"),
                usable or f"{shown(row['usable_from'], '.2g')} to {shown(row['usable_to'], '.3g')}",
                ranged(row[f"preference_gain_{on}"], row[f"gain_low_{on}"], row[f"gain_high_{on}"], ".2f"),
                ranged(row[f"utility_drop_{on}"], row[f"drop_low_{on}"], row[f"drop_high_{on}"], ".2f"),
                shown(row["chance_p"], ".3f").lstrip("0"),
                shown(row["choice_stands"], ".0%"),
                note,
            )
        )
    out = [*aligned(rows), "", *(f"{number}: {reason}" for reason, number in reasons.items())]
    on = "test questions" if (table["reported_on"] == "test").any() else f"{table['chosen_on'].iloc[0]} questions"
    return [*out, *(["=: cannot be told from the best"] if table["tied"].any() else []), f"gain and drop from m = 0 on {on}; 95% intervals"]


if __name__ == "__main__":
    sys.exit(main())
