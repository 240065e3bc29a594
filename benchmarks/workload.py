"""One workload, both ways, in one run: the package's command line and `naive.py`, process starts included.

    python benchmarks/workload.py                            # Qwen2 12 x 512, 64 train / 32 test rows, medians of 3
    python benchmarks/workload.py --stages fit apply         # some of fit, apply, loss, all (fit, apply and loss in one process), sweep
    python benchmarks/workload.py --shape gemma-2-9b --train 500 --test 200 --sides ours
    python benchmarks/workload.py --against ../before --stages fit apply loss sweep   # another checkout in naive's place
    python benchmarks/workload.py --shape tiny --train 4 --test 2 --repeats 1      # does it run

Both sides are interleaved (ours, naive, ours, ...) and their numbers compared: losses per step of fit, every text, every
loss. Dropout is 0 on both sides, since its random numbers would depend on the batches; all else is as released. naive's
share of `sweep` is not run but counted: its 42 processes each do what one process of its `loss` does; that of `all` is the sum of its
fit, apply and loss. Loss mode's report
(curves and pictures of all that is stored) is ours alone and is in ours' time.

What importing the libraries and loading the model takes is measured beside them, for it says more of the machine and of the libraries'
release than of either side; the last column leaves it out of both, as often as each side starts.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import world  # noqa: E402

STAGES = ("fit", "apply", "loss", "all", "sweep")
COUNTED = ("all", "sweep")  # of naive: from what its other stages cost
MULTIPLIERS = (0.5, 1.0, 1.5, 2.0)  # all of one sign: with both, ours needs fewer passes
SWEEP = tuple(round(0.2 * k, 6) for k in range(-10, 11))
PREFERENCES = ("winning_only", "losing_only")
NAME = "model"
START = (
    "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "[kind.from_pretrained(sys.argv[1]) for kind in (M, T)]"
)
ALONE = (
    "import contextlib, sys; sys.path.insert(0, sys.argv[2])\nwith contextlib.suppress(ImportError): from spilt import lean; lean.arm()\n"
)
STARTS = {"fit": 1, "apply": len(MULTIPLIERS), "loss": len(MULTIPLIERS) * len(PREFERENCES)}  # processes of naive; ours is one of each
STARTS["all"] = sum(STARTS.values())


class Cost(NamedTuple):
    """Of one or several processes, one after the other: wall and processor seconds, and the largest resident set of any (MB).

    With one thread on an idle machine the two times are the same; on a shared one the processor's is the steadier.
    """

    seconds: float
    cpu: float
    peak_mb: float


def timed(command: list[str], threads: int, log: Path) -> Cost:
    """Run a command to its end; its output goes to `log`. Raises RuntimeError when it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "ab") as file:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=world.REPO)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"exit code {child.returncode}: {' '.join(command)}\n{log.read_text(errors='replace')[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def together(parts: list[Cost]) -> Cost:
    """Processes that run one after the other."""
    return Cost(sum(part.seconds for part in parts), sum(part.cpu for part in parts), max(part.peak_mb for part in parts))


class Side:
    """Where one side's commands and results are."""

    def __init__(self, base: Path, threads: int, extra: list[str]) -> None:
        self.base, self.threads, self.extra = base, threads, extra
        self.settings = ["--set", "dropout=0.0", "--set", "n_epochs=1"]
        self.repo = world.REPO

    def run(self, stage: str) -> Cost:
        raise NotImplementedError(f"no stage {stage}")

    begin = START

    def start(self) -> Cost:
        """The libraries and the model, as this side imports them, and nothing done with them."""
        command = [sys.executable, "-c", self.begin, str(self.base / "models" / NAME), str(self.repo)]
        return timed(command, self.threads, self.base / "start.log")


class Ours(Side):
    begin = ALONE + START

    def run(self, stage: str) -> Cost:
        cell = ["--dataset", "psychopathy", "--method", "spilt", "--model_name", NAME, "--intervention_method", "local_weight"]
        common = [*cell, "--device", "cpu", "--base_dir", str(self.base), "--force", "--quiet", *self.extra]
        words = {
            "fit": ["--mode", "generate", *self.settings],
            "apply": ["--mode", "apply", "--multipliers", *map(str, MULTIPLIERS)],
            "loss": ["--mode", "loss", "--split", "train", "--multipliers", *map(str, MULTIPLIERS)],
            "all": ["--mode", "all", "--split", "train", "--multipliers", *map(str, MULTIPLIERS), *self.settings],
            "sweep": ["--mode", "loss", "--split", "train", "--multipliers", *map(str, SWEEP)],
        }[stage]
        return timed([sys.executable, str(self.repo / "run_spilt.py"), *common, *words], self.threads, self.base / "ours.log")

    def fit_losses(self) -> list[float]:
        text = (self.base / "vectors" / NAME / "spilt/psychopathy/spilt_local_weight/train.log").read_text()
        return [float(x) for x in re.findall(r"^epoch \d+ step \d+ loss (\S+)", text, re.MULTILINE)]

    def texts(self, m: float) -> list[str]:
        path = self.base / "generation" / NAME / f"spilt/psychopathy/spilt_local_weight/m{m}/psychopathy_results.json"
        return [row["pred"][0] for row in json.loads(path.read_text())]

    def losses(self, m: float, preference: str) -> list[float]:
        root = self.base / "vectors" / NAME / "get_sft_loss/spilt/psychopathy/spilt_local_weight"
        return _column(root / f"local_weight_spilt_m{m}_{preference}" / "train_losses.csv")


class Naive(Side):
    processes = STARTS["loss"]  # of loss: so many are run, the others counted as their mean

    def one(self, mode: str, name: str, *words: str) -> Cost:
        script = [sys.executable, str(Path(__file__).with_name("naive.py")), mode, "--base_dir", str(self.base), "--model_name", NAME]
        out = ["--out", str(self.base / "naive" / name), "--threads", str(self.threads)]
        return timed([*script, *out, *words], self.threads, self.base / "naive.log")

    def run(self, stage: str) -> Cost:
        if stage == "fit":
            return self.one("fit", "fit.pt", *self.settings)
        if stage == "apply":
            return together([self.one("apply", f"texts_{m}.json", "--multiplier", str(m)) for m in MULTIPLIERS])
        every = [(m, p) for m in MULTIPLIERS for p in PREFERENCES]
        run = [self.one("loss", f"losses_{m}_{p}.csv", "--multiplier", str(m), "--preference", p) for m, p in every[: self.processes]]
        one = together(run)
        return Cost(one.seconds * len(every) / len(run), one.cpu * len(every) / len(run), one.peak_mb)

    def fit_losses(self) -> list[float]:
        import torch

        return torch.load(self.base / "naive/fit.pt", weights_only=True)["loss"]

    def texts(self, m: float) -> list[str]:
        return [row["pred"][0] for row in json.loads((self.base / f"naive/texts_{m}.json").read_text())]

    def losses(self, m: float, preference: str) -> list[float]:
        return _column(self.base / f"naive/losses_{m}_{preference}.csv")


def _column(path: Path) -> list[float]:
    with open(path, encoding="utf-8", newline="") as file:
        return [float(row["pos_steer_loss"]) for row in csv.DictReader(file)]


def compare(ours: Ours, naive: Naive, stages: list[str]) -> dict[str, Any]:
    """How far the two sides' numbers are apart: without this no ratio means anything."""

    def apart(a: list[float], b: list[float]) -> float:
        assert len(a) == len(b) > 0, f"{len(a)} numbers against {len(b)}"
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    found: dict[str, Any] = {}
    if "fit" in stages:
        found["fit: largest difference of a step's loss"] = apart(ours.fit_losses(), naive.fit_losses())
    if "apply" in stages:
        same = [a == b for m in MULTIPLIERS for a, b in zip(ours.texts(m), naive.texts(m), strict=True)]
        found["apply: equal texts"], found["apply: texts"] = sum(same), len(same)
    if "loss" in stages:
        run = [(m, p) for m in MULTIPLIERS for p in PREFERENCES][: naive.processes]
        found["loss: largest difference"] = max(apart(ours.losses(m, p), naive.losses(m, p)) for m, p in run)
    return found


def agree(found: dict[str, Any]) -> bool:
    """Losses within 1e-4, all texts equal."""
    return all(v <= 1e-4 for k, v in found.items() if "difference" in k) and found.get("apply: equal texts") == found.get("apply: texts")


def device() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib import metadata

    lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind = f"{cpu.get('Model name', platform.processor())} (family {cpu.get('CPU family')}, model {cpu.get('Model')})"
    return {
        "cpu": f"{kind}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }


def median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))


def table(costs: dict[str, dict[str, list[Cost]]], begin: dict[str, Cost], starts: dict[str, int]) -> list[str]:
    """Markdown rows: stage, then both sides and their ratio, for wall seconds, processor seconds and peak memory; then without starts.

    begin: what a start takes, by side; starts: how many the other side has of each stage.
    """
    head = [f"{what}{side}" for what in ("", "CPU ") for side in ("ours s", "naive s", "times faster")]
    head += ["ours MB", "naive MB", "memory ratio", "CPU times faster besides starts"]
    lines = [f"| stage | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    rows = {stage: {side: median(c) for side, c in sides.items() if c} for stage, sides in costs.items()}
    full = [row for stage, row in rows.items() if stage not in COUNTED and len(row) == 2]
    if len(full) == 3:
        rows["all three"] = {side: together([row[side] for row in full]) for side in ("ours", "naive")}
    for stage, row in rows.items():
        ours, naive = row.get("ours"), row.get("naive")
        cells = [stage]
        for field, form in (("seconds", ".1f"), ("cpu", ".1f"), ("peak_mb", ".0f")):
            a, b = (getattr(cost, field) if cost else None for cost in (ours, naive))
            cells += [format(a, form) if a else "", format(b, form) if b else ""]
            cells.append("" if not a or not b else f"{a / b:.2f}" if field == "peak_mb" else f"{b / a:.2f}")
        three = [starts[name] for name in ("fit", "apply", "loss")] if stage == "all three" else []
        counts = {"ours": len(three) or 1, "naive": sum(three) or starts.get(stage, 0)}
        net = [row[side].cpu - n * begin[side].cpu for side, n in counts.items() if side in row and n]
        cells.append(f"{net[1] / net[0]:.2f}" if len(net) == 2 and min(net) > 0 else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-12x512", choices=list(world.SHAPES))
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--stages", nargs="+", default=["fit", "apply", "loss"], choices=STAGES)
    parser.add_argument("--sides", nargs="+", default=["ours", "naive"], choices=["ours", "naive"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--naive_repeats", type=int, help="of the naive side where fewer will do; default: as --repeats")
    parser.add_argument("--naive_processes", type=int, default=Naive.processes, help="of naive's 8 equal ones of loss; the rest is counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="in naive's place: this checkout's command line, in a base dir of its own"
    )
    parser.add_argument("--base_dir", type=Path, help="keep the folder (made if it is not there); default: a temporary one")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="further flags of run_spilt.py")
    parser.add_argument("--out", type=Path, help="results as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spilt-bench-") as temporary:
        base = args.base_dir or Path(temporary) / "base"
        if not base.exists():
            world.write(base, NAME, world.SHAPES[args.shape], train=args.train, test=args.test, new_tokens=args.new_tokens)
        ours: Ours = Ours(base, args.threads, args.ours)
        naive: Any = Naive(base, args.threads, [])
        if args.against:
            shutil.copytree(base, base.with_name("against"))
            naive = Ours(base.with_name("against"), args.threads, args.ours)
            naive.repo = args.against.resolve()
        naive.processes = args.naive_processes
        if "fit" not in args.stages and not list((base / "vectors").glob("**/*.pt")):
            ours.run("fit")
            if args.against:
                naive.run("fit")
        costs: dict[str, dict[str, list[Cost]]] = {stage: {"ours": [], "naive": []} for stage in args.stages}
        begins: dict[str, list[Cost]] = {"ours": [], "naive": []}
        for stage in args.stages:
            for _ in range(args.repeats):
                for side, runner in (("ours", ours), ("naive", naive)):
                    begins[side].append(runner.start())
            rounds = {"ours": args.repeats, "naive": args.repeats if args.naive_repeats is None else args.naive_repeats}
            for number in range(max(rounds.values())):
                for side, runner in (("ours", ours), ("naive", naive)):
                    if side in args.sides and number < rounds[side] and (args.against or side == "ours" or stage not in COUNTED):
                        costs[stage][side].append(runner.run(stage))
                        cost = costs[stage][side][-1]
                        line = f"{stage} {side} {number + 1}: {cost.seconds:.1f} s, CPU {cost.cpu:.1f} s, {cost.peak_mb:.0f} MB"
                        print(line, file=sys.stderr, flush=True)
        if "sweep" in costs and not args.against and costs.get("loss", {}).get("naive"):
            share = len(SWEEP) / len(MULTIPLIERS)
            costs["sweep"]["naive"] = [Cost(c.seconds * share, c.cpu * share, c.peak_mb) for c in costs["loss"]["naive"]]
        three = [median(costs[stage]["naive"]) for stage in ("fit", "apply", "loss") if costs.get(stage, {}).get("naive")]
        if "all" in costs and not args.against and len(three) == 3:
            costs["all"]["naive"] = [together(three)]
        both = {"ours", "naive"} <= set(args.sides)
        found = compare(ours, naive, args.stages) if both else {}
    begin = {side: median(some) for side, some in begins.items()}
    lines = table(costs, begin, dict.fromkeys(STARTS, 1) if args.against else STARTS)
    lines = [line.replace("naive", "before") if args.against else line for line in lines]
    print("\n".join(lines))
    for side, cost in begin.items():
        name = "before" if args.against and side == "naive" else side
        of = f"(median of {len(begins[side])})"
        print(f"a start of {name}, libraries and model: {cost.seconds:.1f} s, CPU {cost.cpu:.1f} s, {cost.peak_mb:.0f} MB {of}")
    if both:
        print(("same numbers: " if agree(found) else "THE NUMBERS DIFFER: ") + json.dumps(found))
    words = {k: v for k, v in vars(args).items() if k not in ("out", "base_dir")}
    record = {"device": device(), "arguments": words, "starts": begins, "costs": costs, "check": found, "table": lines}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return 0 if not both or agree(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
