"""One choice of the next token over a large vocabulary: greedy, and sampled with what decoding a row needs besides.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py --rows 64 --vocabulary 151936

The library's side does the same by its own processors over all scores, as the tool did before. Medians, times in ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from spilt.engine import sampling  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9, temperature 0.7": {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
    "the same, repetition_penalty 1.1": {"top_k": 50, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.1},
    "top_p 0.9 alone": {"top_k": 0, "top_p": 0.9},
}


def library(scores: torch.Tensor, how: sampling.Decoding, uniform: torch.Tensor | None, ids: list[list[int]]) -> torch.Tensor:
    """Row by row where rows differ in length, else over all scores."""
    rows = []
    for row, so_far in zip(scores.split(1), ids, strict=True):
        for process in how.processors:
            row = process(torch.tensor([so_far], device=row.device), row)
        rows.append(row)
    scores = torch.cat(rows) if how.processors else scores
    if uniform is None:
        return scores.argmax(-1)
    for warp in how.warpers:
        scores = warp(None, scores)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform.to(scores.device)[:, None] * cumulative[:, -1:], right=True)[:, 0]


def median_ms(work: Callable[[], torch.Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work().tolist()  # waits for a card
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtype", default="float32", help="what the scores were rounded to: bfloat16 makes many equal ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    draw = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(args.rows, args.vocabulary, generator=draw)).to(getattr(torch, args.dtype)).float().to(args.device)
    ids = [torch.randint(args.vocabulary, (100 + i,), generator=draw).tolist() for i in range(args.rows)]
    numbers = torch.rand(args.rows, dtype=torch.float64, generator=draw)
    print("| choice | ms | against greedy | by the library's processors alone, ms |\n|---|---|---|---|")
    greedy = None
    for name, params in WAYS.items():
        how = sampling.decoding({"do_sample": True, **params}, torch.nn.Module(), SimpleNamespace(eos_token_id=None, pad_token_id=0))
        uniform = numbers if how.sample else None
        ours, theirs = (way(scores, how, uniform, ids) for way in (sampling.choose, library))
        assert torch.equal(ours, theirs), name  # no ratio means anything otherwise
        times = [median_ms(lambda: way(scores, how, uniform, ids), args.repeats) for way in (sampling.choose, library)]  # noqa: B023
        greedy = greedy or times[0]
        print(f"| {name} | {times[0]:.1f} | {times[0] / greedy:.2f} | {times[1]:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
