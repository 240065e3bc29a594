"""spilt strength: the strengths at which a stored vector disturbs the model as much as a budget allows, so that methods compare there.

Measured as KL(steered || base) in nats per token along the steered model's own greedy answers, 95th percentile over all tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spilt import __version__
from spilt.data import readers
from spilt.data.chat import Question
from spilt.errors import UserError
from spilt.say import ready, which_flags
from spilt.terminal import program, say

SHOWN = {"kl_p95": "kl p95", "kl_mean": "mean", "kl_max": "max", "audit_kl_p95": "p95 on other prompts"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print both strengths; 0, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt strength", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which_flags(parser)
    parser.add_argument("--budget", type=float, default=1.0, metavar="NATS", help="default 1")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="the dataset's first N, and the next N to check (default 32)")
    parser.add_argument("--prompts_file", type=Path, metavar="FILE", help="a prompt a line, in place of the dataset's")
    parser.add_argument("--max_new_tokens", type=int, default=50, metavar="N", help="of each answer (default 50)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with everything that was tried")
    return program(parser, argv, _strength)


def _strength(args: argparse.Namespace) -> int:
    if not 0 < args.budget < float("inf"):  # nan is not
        raise UserError(f"--budget {args.budget:g}: wanted nats above 0")
    if args.prompts < 1:
        raise UserError(f"--prompts {args.prompts}: wanted 1 or more")
    prompts = _prompts(args)
    host, steering, s, _ = ready(args)
    from spilt import api

    how = {name: getattr(s, name) for name in ("batch_size", "use_chat_template", "system_prompt")}
    used, others = prompts[: args.prompts], prompts[args.prompts : 2 * args.prompts]
    known = {"audit": others, "max_new_tokens": args.max_new_tokens}
    table = api.calibrate(host.model, host.tokenizer, steering, used, args.budget, **known, **how)
    if args.json:
        tables = {"sides": table, "probes": table.attrs["probes"]}
        told = {name: json.loads(some.to_json(orient="records", double_precision=15)) for name, some in tables.items()}
        counts = {"prompts": len(used), "audit": len(others), "max_new_tokens": args.max_new_tokens}
        print(json.dumps({"spilt": __version__, "schema": 1, "model": args.model_name, "budget": args.budget, **counts, **told}, indent=1))
        return 0
    shown = [name for name in SHOWN if name in table]
    rows = [("side", "m", *(SHOWN[name] for name in shown), "status")]
    rows += [
        (row["side"], f"{row['multiplier']:.4g}", *(f"{row[name]:.3f}" for name in shown), row["status"])
        for row in table.to_dict("records")
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    say(f"KL(steered || base), nats per token of {len(used)} greedy answers; budget {args.budget:g} at p95")
    return 0


def _prompts(args: argparse.Namespace) -> Sequence[Question]:
    """Those to calibrate on, and after them those to check."""
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {args.prompts_file}: cannot be read ({error})") from None
        if found := [line.strip() for line in lines if line.strip()]:
            return found
        raise UserError(f"--prompts_file {args.prompts_file}: has no prompt; write one a line")
    if not args.dataset:
        raise UserError("which prompts? give --dataset, or --prompts_file FILE with one a line")
    fmt = readers.dataset_format(args.base_dir, args.dataset, "generation")
    return [row.input for row in readers.read_prompts(fmt, args.concept, 2 * args.prompts)]


if __name__ == "__main__":
    sys.exit(main())
