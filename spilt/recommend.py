"""spilt recommend: the multiplier of each measured cell by a utility budget, chosen on training items, with its test-item numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spilt.terminal import complain, program, say


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 when there is nothing to read."""
    parser = argparse.ArgumentParser(prog="spilt recommend", description=__doc__)
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--budget", type=float, default=0.5, help="utility that may be lost from m = 0, nats (default 0.5)")
    parser.add_argument("--norm", choices=("mean", "sum"), default="mean", help="answer loss per token, or summed")
    return program(parser, argv, _recommend)


def _recommend(args: argparse.Namespace) -> int:
    from spilt.report import recommend

    table = recommend(args.base_dir, args.model_name, args.dataset, args.budget, norm=args.norm)
    for note in table.attrs["notes"]:
        complain(f"warning: {note}")
    for line in table.to_string(index=False, float_format=lambda x: f"{x:.3f}").split("\n"):
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
