"""The paper's main table on one GPU: every method and form is fitted, measured, read and scored on every data set, then `spilt table`.

    python examples/main_table.py --dry_run                                 hours and memory, nothing is run
    python examples/main_table.py --model_name gemma-2-9b-it qwen2.5-7b-it  models/ and data/ as the README's "The paper's data" has them
    sh examples/main_table_small.sh                                         the same of a small model on a CPU, in minutes

Accuracy (psychopathy) needs nobody; power and concept scores need a judge: --judge endpoint, or a local model, as `spilt evaluate` has it.

It can be stopped at any moment: the same command goes on. Hours are what is computed by --tflops, those that the card sustains; texts,
which wait for memory, are counted --text_factor times.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spilt import cli  # noqa: E402
from spilt.analysis.paper import DATASETS, MODELS  # noqa: E402
from spilt.cell import FORMS  # noqa: E402
from spilt.methods import METHODS  # noqa: E402

RELEASED = [name for name, row in METHODS.items() if row.in_all]


def shares(options: argparse.Namespace) -> list[list[str]]:
    """The cells (the paper's methods in all forms, the baselines as vectors), dealt out to the processes."""
    cells = [(name, form) for name in options.method for form in (METHODS[name].forms if METHODS[name].in_all else ("vector",))]
    asked = options.form or [name for name, row in FORMS.items() if row.in_all]
    chosen = [f"{name}_{form}" for name, form in cells if form in asked]
    return [share for k in range(options.jobs) if (share := chosen[k :: options.jobs])]


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The runs, one for each model, data set and process."""
    more = ["--control_pairs", str(options.control_pairs), "--no_report", *limit(options)]
    places = [(model, dataset) for model in options.model_name for dataset in options.dataset]
    return [of(options, *place, share, "all", more) for place in places for share in shares(options)]


def of(options: argparse.Namespace, model: str, dataset: str, cells: list[str], mode: str, more: list[str]) -> list[str]:
    """The words of one run."""
    words = ["--dataset", dataset, "--model_name", model, "--method", *cells, "--intervention_method", "vector", "--mode", mode]
    return [*words, "--device", options.device, "--base_dir", str(options.base_dir), *more, *options.words]


def limit(options: argparse.Namespace) -> list[str]:
    return ["--limit", str(options.limit)] if options.limit else []


def planned(words: list[str]) -> list[dict[str, Any]]:
    """The steps of a run as its dry run has them."""
    done = subprocess.run([sys.executable, str(ROOT / "run_spilt.py"), *words, "--dry_run", "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return list(json.loads(done.stdout)["steps"])


def strengths(path: Path, wanted: Callable[[dict[str, str]], str]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """Of a table as CSV: (model, data set) -> cell -> its strengths. wanted: a row's strength, or ''."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in csv.DictReader(path.open(encoding="utf-8")) if path.is_file() else ():
        if m := wanted(row):
            cell = f"{row['method']}_{row['intervention'].partition('@')[0]}"  # its layers and seed stand in --words
            found.setdefault((row["model"], row["dataset"]), {}).setdefault(cell, []).append(m)
    return found


def at_equal_kl(options: argparse.Namespace) -> list[list[str]]:
    """The runs that measure each cell's losses at its own strengths of equal KL, beside those of its sweep."""
    found = strengths(options.output / "strengths.csv", lambda row: row["multiplier"] if row["status"] == "converged" else "")
    more = ["--no-released_files", "--no_report", *limit(options)]
    return [
        of(options, *place, [cell], "loss", [*more, "--multipliers", *own]) for place, cells in found.items() for cell, own in cells.items()
    ]


def texts(options: argparse.Namespace, mode: str) -> list[list[str]]:
    """The runs that make (apply) or score (evaluate) each cell's texts at its own strength of the main table.

    With the first cell of a data set also the unsteered model's, and those behind prompts.
    """
    found = strengths(options.output / "main.csv", lambda row: row["value"] if row["measure"] == "m" else "")
    prompts = ["--prompt_baseline", *options.prompt_baseline] if options.prompt_baseline else []
    judge = ["--judge", options.judge] if options.judge else []
    judge += ["--judge_limit", str(options.judge_limit)] if options.judge_limit else []
    more = [*limit(options), *([*judge, "--no_report"] if mode == "evaluate" else [])]
    return [
        of(options, *place, [cell], mode, ["--multipliers", *(["0", *own, *prompts] if number == 0 else own), *more])
        for place, cells in found.items()
        for number, (cell, own) in enumerate(cells.items())
    ]


def run(words: Sequence[str]) -> int:
    """run_spilt.py with these words, in this process: torch is imported once."""
    return cli.main(words)


def in_processes(jobs: int) -> Callable[[Sequence[list[str]]], list[int]]:
    """What runs commands, jobs at a time, to their exit codes. Processes are forked before torch is there, with its share of cores."""

    def begin() -> None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))

    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), begin) if jobs > 1 else None

    def run_all(several: Sequence[list[str]]) -> list[int]:
        codes = []
        for code in pool.map(run, several) if pool else map(run, several):
            codes.append(code)
            if code == 130:  # Ctrl-C stops all of it
                raise KeyboardInterrupt
        return codes

    return run_all


def estimate(options: argparse.Namespace) -> int:
    total, largest, unknown = 0.0, 0.0, 0
    for words in commands(options):
        steps = [step for step in planned(words) if step["state"] != "already done"]
        known = [step for step in steps if step["cost"]]
        unknown += len(steps) - len(known)
        flops = sum(step["cost"]["flops"] * (options.text_factor if step["verb"] == "generate" else 1) for step in known)
        peak = max((step["cost"]["peak"] for step in known), default=0.0)
        total, largest = total + flops, max(largest, peak)
        print(f"{words[3]} {words[1]}: {len(steps)} steps, {flops / options.tflops / 3.6e15:.2f} h, {peak / 2**30:.1f} GiB")
    if largest:
        hours = total / options.tflops / 3.6e15
        print(f"in all about {hours:.1f} hours at {options.tflops:g} TFLOP/s, up to {largest / 2**30:.1f} GiB at once")
    if unknown:
        print(f"{unknown} steps are not counted: their model or data are not there yet")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dir", type=Path, default=ROOT)
    parser.add_argument("--model_name", nargs="+", default=list(MODELS))
    parser.add_argument("--dataset", nargs="+", default=list(DATASETS))
    parser.add_argument("--method", nargs="+", default=RELEASED, choices=METHODS, help=f"default: {' '.join(RELEASED)}")
    parser.add_argument("--form", nargs="+", choices=FORMS, help="default: all of a method")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kl", type=float, default=1.0, help="nats at which methods are compared at equal disturbance (default 1)")
    parser.add_argument("--control_pairs", type=int, default=32, help="questions for random interventions; 0: none")
    parser.add_argument("--limit", type=int, help="rows of each data file")
    parser.add_argument("--output", type=Path, default=Path("tables"), help="folder for the tables (default: tables)")
    parser.add_argument("--tflops", type=float, default=100.0, help="that the card sustains (default 100; a CPU core: 0.05)")
    parser.add_argument("--text_factor", type=float, default=10.0, help="how much slower text is made than read (default 10)")
    parser.add_argument("--prompt_baseline", nargs="+", default=[], metavar="NAME=FILE", help="prompts as rows beside the methods")
    parser.add_argument("--judge", help="'endpoint' or a local model, which rates the texts as spilt evaluate does; default: nobody")
    parser.add_argument("--judge_limit", type=int, metavar="N", help="rate texts to the first N prompts of each strength")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="for equal KL: the data set's first N (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N", help="for equal KL: of each answer (default 32)")
    parser.add_argument("--words", nargs=argparse.REMAINDER, default=[], help="more words of run_spilt.py, last: --words --layers 15")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the cells (default 1; on a CPU: its cores)")
    parser.add_argument("--dry_run", action="store_true", help="print hours and memory; run nothing")
    options = parser.parse_args()
    if options.dry_run:
        return estimate(options)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: wanted 1 or more")
    run_all, failed = in_processes(options.jobs), list[list[str]]()

    def do(several: list[list[str]]) -> None:
        failed.extend(words for words, code in zip(several, run_all(several), strict=True) if code)

    do(commands(options))
    which = ["--base_dir", str(options.base_dir), "--model_name", *options.model_name, "--dataset", *options.dataset]
    table = ["table", *which, "--device", options.device, "--output", str(options.output)]
    found = ["--kl", str(options.kl), "--prompts", str(options.prompts), "--max_new_tokens", str(options.max_new_tokens)]
    if options.jobs > 1:
        do([["table", *table[1:-2], "--tables", "strengths", *found, "--kl_of", *share] for share in shares(options)])
    found += ["--prompt_baseline", *options.prompt_baseline] if options.prompt_baseline else []
    do([[*table, "--tables", "strengths", *found]])
    do(at_equal_kl(options))
    do([table])  # with what was measured there: a cell's own strength may be another
    do(texts(options, "apply"))
    do(texts(options, "evaluate"))
    do([table])
    if "--no_report" not in options.words:
        do([["report", "--base_dir", str(options.base_dir)]])
    for words in failed:
        print(f"not all was done: run_spilt.py {' '.join(words)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
