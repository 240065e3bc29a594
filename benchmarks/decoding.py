"""Decoding alone: this package's stream of rows beside a good plain way, batched `generate` with one hook and a multiplier per row.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py --batch 8 32 64 --new_tokens 32
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --batch 8 32 64 --new_tokens 32 --equal_memory
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --against ../other-checkout
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --steps plain static compiled --batch 8 32

Greedy, a vector, the same rows on both sides in turns; medians of processor seconds, prompts read included. Both must give the same texts.
--equal_memory: ours with the largest batch (of LADDER) whose highest memory is not above the other side's; it is looked for first.
--against: ours beside another checkout of this package instead, in processes of their own. --steps: the ways of --decode_step instead, in
turns in one process; time of a step with its choice of tokens, prompts and the first step (which compiles) left out.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmarks  # noqa: E402, F401 - the same world for both checkouts

HERE = Path(os.environ.get("SPILT_CHECKOUT", sys.path[0]))
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

from benchmarks import inprocess, world  # noqa: E402
from spilt.data.chat import Chat  # noqa: E402
from spilt.engine import choice, decode  # noqa: E402
from spilt.steering import anatomy  # noqa: E402
from spilt.steering.interventions import Vector  # noqa: E402
from spilt.steering.steering import Steering  # noqa: E402

STRENGTHS = (-1.0, 0.0, 1.0, 2.0)
LADDER = tuple(range(8, 257, 8))  # batches of ours beside another's, at equal memory


@torch.no_grad()
def plain(model: Any, layer: int, vector: torch.Tensor, rows: Sequence[decode.Row], new: int, batch: int) -> list[list[int]]:
    """What one writes in an afternoon: left padding, a forward hook, `generate`."""
    texts: list[list[int]] = []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(rows), batch):
        part = [rows[i] for i in order[start : start + batch]]
        width = max(len(row.prompt) for row in part)
        ids = torch.tensor([[0] * (width - len(row.prompt)) + list(row.prompt) for row in part])
        mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in part])
        added = torch.tensor([row.multiplier for row in part])[:, None, None] * vector

        def add(_: Any, __: Any, output: Any, added: torch.Tensor = added) -> Any:
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        handle = anatomy.block(model, layer).register_forward_hook(add)
        made = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
        handle.remove()
        texts += made[:, width:].tolist()
    return [text for _, text in sorted(zip(order, texts, strict=True))]


def ours(model: Any, layer: int, vector: torch.Tensor, rows: Sequence[decode.Row], new: int, batch: int) -> list[list[int]]:
    made = Vector(len(vector))
    made.load_state_dict({"v": vector})
    how = decode.Decoding(new, False, (), 0, [], [])
    return [text for _, text in sorted(decode.generate(model, Steering.of({layer: made}), rows, how, batch))]


def rows_of(shape: world.Shape, count: int, longer: int = 0) -> list[decode.Row]:
    """`count` rows: questions of the benchmarks' world, each at four strengths. longer: tokens that the template has more."""
    chat = Chat.of(world.tokenizer(shape.config["vocab_size"]))
    asked = world.questions(-(-count // len(STRENGTHS)), shape.config["vocab_size"], 0)
    return [decode.Row((*range(100, 100 + longer), *chat.prompt_ids(question)), m, "") for question in asked for m in STRENGTHS][:count]


class Timed(NamedTuple):
    """first: seconds until the first step is done, prompts included. step: seconds of each after it (on a CPU, of the processor).
    tokens: of each row."""

    first: float
    step: float
    tokens: list[list[int]]


@torch.no_grad()
def timed(model: Any, steering: Steering, rows: Sequence[decode.Row], new: int, how: str) -> Timed:
    """All rows side by side, greedy, until each has `new` tokens. how: of choice.STEPS."""

    def now() -> float:
        if anatomy.input_device(model).type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    stream = decode._Stream(model, steering.at, rows, decode.Decoding(new, False, (), 0, [], []), len(rows), how)
    stream.advance()  # reads the prompts and takes the first step
    begun = now()
    for _ in range(new - 2):
        stream.advance()
    took = now() - begun
    stream.advance()  # the last choice, without a step
    return Timed(begun - start, took / (new - 2), [tokens for _, tokens in sorted(stream.finished)])


def by_step(shape: world.Shape, new: int, batches: Sequence[int], steps: Sequence[str], repeats: int) -> None:
    """A table of them, medians of runs in turns."""
    model = world.model(shape)
    steering = Steering.of({shape.layer: Vector(shape.config["hidden_size"])})
    print("| batch | step | CPU ms a step | against plain | first step CPU s | equal texts |\n|---|---|---|---|---|---|")
    for batch in batches:
        rows = rows_of(shape, batch)
        found: dict[str, list[Timed]] = {how: [] for how in steps}
        for _ in range(repeats):
            for how in steps:
                found[how].append(timed(model, steering, rows, new, how))
        ms = {how: 1000 * statistics.median(one.step for one in runs) for how, runs in found.items()}
        for how, runs in found.items():
            same = sum(a == b for a, b in zip(runs[0].tokens, found[steps[0]][0].tokens, strict=True))
            cells = [how, f"{ms[how]:.1f}", f"{ms[how] / ms[steps[0]]:.2f}", f"{runs[0].first:.1f}", f"{same} of {len(rows)}"]
            print(f"| {batch} | {' | '.join(cells)} |", flush=True)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def one(shape_name: str, count: int, new: int, batch: int, way: str, longer: int = 0) -> dict[str, Any]:
    """One run of one side, after a small one that warms up."""
    shape = world.SHAPES[shape_name]
    model = world.model(shape)
    vector = torch.randn(shape.config["hidden_size"], generator=torch.Generator().manual_seed(0)) / 10
    rows, side = rows_of(shape, count, longer), {"ours": ours, "plain": plain}[way]
    side(model, shape.layer, vector, rows[:2], 2, 2)
    seconds, texts = cpu_seconds(lambda: side(model, shape.layer, vector, rows, new, batch))
    return {"seconds": seconds, "texts": texts, "mb": inprocess.peak_mb()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-12x512", choices=list(world.SHAPES))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--longer", type=int, default=0, help="tokens that the template has more than its 38")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--equal_memory", action="store_true", help="ours with as many rows at once as the other's memory holds")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--steps", nargs="+", choices=choice.STEPS, help="ways of the decoding step, beside the first of them")
    parser.add_argument("--only", choices=["ours", "plain"], help="one run in this process; prints JSON")
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(one(args.shape, args.rows, args.new_tokens, args.batch[0], args.only, args.longer)))
        return 0
    if args.steps:
        by_step(world.SHAPES[args.shape], args.new_tokens, args.batch, args.steps, args.repeats)
        return 0
    other = "other checkout" if args.against else "plain hook"

    def run(name: str, batch: int) -> dict[str, Any]:
        checkout = args.against.resolve() if args.against and name == other else HERE
        words = ["--shape", args.shape, "--rows", args.rows, "--batch", batch, "--new_tokens", args.new_tokens, "--longer", args.longer]
        words += ["--only", "plain" if name == "plain hook" else "ours"]
        done = subprocess.run(
            [sys.executable, __file__, *map(str, words)],
            env={**os.environ, "SPILT_CHECKOUT": str(checkout)}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    print(f"| {other}'s batch | ours | times faster | ours CPU s | {other} CPU s | ours MB | {other} MB | equal texts |")
    print("|---|---|---|---|---|---|---|---|")
    for theirs in args.batch:
        mine = theirs
        if args.equal_memory:
            room = run(other, theirs)["mb"]
            fit = bisect.bisect_right(LADDER, room, hi=args.rows // LADDER[0], key=lambda batch: run("ours", batch)["mb"])
            mine = LADDER[max(0, fit - 1)]
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], other: []}
        for _ in range(args.repeats):
            for name, batch in (("ours", mine), (other, theirs)):
                runs[name].append(run(name, batch))
        took, mb = ({name: statistics.median(one[what] for one in made) for name, made in runs.items()} for what in ("seconds", "mb"))
        same = sum(a == b for a, b in zip(runs["ours"][0]["texts"], runs[other][0]["texts"], strict=True))
        cells = [theirs, mine, f"**{took[other] / took['ours']:.2f}**", *(f"{took[name]:.1f}" for name in took)]
        cells += [f"{mb[name]:.0f}" for name in mb]
        print(f"| {' | '.join(map(str, cells))} | {same} of {args.rows} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
