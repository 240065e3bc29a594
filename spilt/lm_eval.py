"""spilt lm_eval: standard benchmarks of a steered model, by lm-evaluation-harness where it is installed: what does steering cost?

`lm_eval_model` is the same for Python users: a model of the harness whose every forward is steered.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt import __version__
from spilt.errors import UserError
from spilt.say import ready, which_flags
from spilt.settings.fields import STRONGEST
from spilt.terminal import aligned, program, say

if TYPE_CHECKING:
    from torch import nn

    from spilt.steering.steering import Steering

MISSING = "lm-evaluation-harness is not installed; pip install lm_eval"


def lm_eval_model(model: nn.Module, tokenizer: Any, steering: Steering, multiplier: float = 1.0, **how: Any) -> Any:
    """An `lm_eval` model (HFLM) that is steered at this strength whenever the harness calls it, and not otherwise.

    how: arguments of HFLM, such as batch_size or max_length. `lm_eval.simple_evaluate(model=lm_eval_model(...), tasks=[...])`.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(MISSING) from error
    from spilt.api import steer

    class Steered(HFLM):  # type: ignore[misc]
        """HFLM with both of its ways to the model inside `steer`."""

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            with steer(model, steering, multiplier):
                return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            with steer(model, steering, multiplier):
                return super()._model_generate(*args, **kwargs)

    return Steered(pretrained=model, tokenizer=tokenizer, backend="causal", **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each task and measure; 0, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt lm_eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which_flags(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="tasks of lm_eval")
    parser.add_argument("--multipliers", nargs="+", type=float, default=[1.0], metavar="M", help="beside 0 (default 1)")
    parser.add_argument("--include_path", metavar="FOLDER", help="YAML files of tasks of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task, from the first")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    return program(parser, argv, _lm_eval)


def _lm_eval(args: argparse.Namespace) -> int:
    from spilt.engine import choice

    strengths = sorted({0.0, *(m + 0.0 for m in args.multipliers)})
    if not all(math.isfinite(m) and abs(m) <= STRONGEST for m in strengths):
        raise UserError(f"--multipliers: wanted finite numbers within +-{STRONGEST:g}")
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: wanted 1 or more")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(MISSING) from error
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path}: no such folder")
    tasks = TaskManager(include_path=args.include_path)
    if unknown := [name for name in args.tasks if name not in tasks.all_tasks]:
        raise UserError(f"--tasks {' '.join(unknown)}: lm_eval has no such task; `lm_eval ls tasks` lists them")
    host, steering, s, _ = ready(args)
    choice.refuse_positions(s.steer_positions, steering.scope)
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for m in strengths:
        lm = lm_eval_model(host.model, host.tokenizer, steering, m, batch_size=args.batch_size)
        how = {"limit": args.limit, "num_fewshot": args.num_fewshot, "bootstrap_iters": 1000}
        told = lm_eval.simple_evaluate(model=lm, tasks=args.tasks, task_manager=tasks, log_samples=False, **how)
        found[m] = told["results"]
    if args.json:
        results = {str(m): rows for m, rows in found.items()}
        names = {"spilt": __version__, "schema": 1, "lm_eval": lm_eval.__version__, "model": args.model_name, "layers": s.layers}
        print(json.dumps({**names, "results": results}, indent=1, default=str))
        return 0
    for line in rows(found):
        say(line)
    return 0


def rows(found: dict[float, dict[str, dict[str, Any]]]) -> list[str]:
    """A line for each task and measure: its value and standard error at each multiplier."""
    table = [["task", "measure", *(f"m = {m:g}" for m in found)]]
    first = next(iter(found.values()))
    for task, values in first.items():
        for name in (name for name, value in values.items() if isinstance(value, int | float) and "," in name and "_stderr" not in name):
            measure, _, how = name.partition(",")
            error = f"{measure}_stderr,{how}"
            numbers = [(at[task][name], at[task].get(error)) for at in found.values()]
            shown = [f"{value:.4g}" + (f" ± {se:.2g}" if isinstance(se, float) and se == se else "") for value, se in numbers]
            table.append([task, measure if how == "none" else f"{measure} ({how})", *shown])
    return aligned(table)


if __name__ == "__main__":
    sys.exit(main())
