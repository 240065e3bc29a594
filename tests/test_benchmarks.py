"""The benchmarks' own claims: naive does the same work (same numbers), the counts are right, the GPU script runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import flops, world  # noqa: E402

# D = 2, F = 3, 2 heads of 1, 1 key/value head, 5 tokens in the vocabulary, 3 blocks
HAND = {
    "hidden_size": 2,
    "intermediate_size": 3,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 5,
}


def test_counts_by_hand() -> None:
    # q 2x2 = 4, k 2x1 = 2, v 2, o 4, gate 6, up 6, down 6: 30 multiply-adds
    assert flops.linear_per_token(HAND) == 60
    # scores and sum: 2 heads x 1 wide x 2, 2 operations each
    assert flops.attention_per_pair(HAND) == 8
    assert flops.head_per_token(HAND) == 20
    assert flops.causal_pairs(3) == 1 + 2 + 3
    assert flops.causal_pairs(2, before=3) == 4 + 5
    # one sequence of 3 tokens: 3 blocks x (180 + 48) + 3 x 20
    assert flops.full(HAND, [3]) == 3 * 228 + 60
    assert flops.prefix(HAND, 0, [3]) == 228
    assert flops.suffix(HAND, 0, [3], scored=1) == 2 * 228 + 20
    assert flops.prefix(HAND, 0, [3]) + flops.suffix(HAND, 0, [3], scored=3) == flops.full(HAND, [3])
    # backward: projections and head once more, attention twice (48 twice), the intervention's 2 x 2 x 3 x 2 a token
    assert flops.fit(HAND, 0, [3], 1, "local_weight") == 2 * (2 * 228 + 20) + 2 * 48 + 2 * 12 * 3


def test_shared_counts_nothing_twice() -> None:
    # template 2, prompt 4, answers of 1 and 2 tokens: 2 + 2 + 1 + 2 = 7 tokens a block instead of 5 + 6
    pairs = 3 + (3 + 4) + 5 + (5 + 6)
    assert flops.shared_suffix(HAND, 1, 2, [4], [[1, 2]], scored=3) == 7 * 60 + pairs * 8 + 3 * 20
    # with one answer and no template it is the plain count
    assert flops.shared_suffix(HAND, 1, 0, [3], [[2]], scored=2) == flops.suffix(HAND, 1, [5], 2)


def test_shapes_count_the_parameters_of_the_library() -> None:
    """Multiply-adds of a forward's projections and head are the model's matrix entries."""
    made = world.model(world.SHAPES["tiny"])
    matrices = sum(p.numel() for name, p in made.named_parameters() if p.ndim == 2 and "embed" not in name)
    config = world.SHAPES["tiny"].config
    assert 2 * matrices == config["num_hidden_layers"] * flops.linear_per_token(config) + flops.head_per_token(config)


def test_rows_have_the_real_lengths() -> None:
    from spilt.data.chat import Chat

    chat = Chat.of(world.tokenizer(8000))
    assert chat.prefix_length == world.PREFIX_TOKENS
    lengths = [len(chat.encode(q, " Yes").input_ids) for q in world.questions(200, 8000, 0)]
    assert 76 < sum(lengths) / len(lengths) < 82
    assert len(chat.encode("x", " Yes").input_ids) - chat.encode("x", " Yes").prompt_length == 3  # the answer and the suffix


def _run(script: str, *words: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, f"benchmarks/{script}", *words], cwd=world.REPO, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_naive_and_ours_give_the_same_numbers(tmp_path: Path) -> None:
    """Both sides through their processes: losses of fit and loss within 1e-4, all texts equal."""
    out = tmp_path / "out.json"
    small = ["--shape", "tiny", "--train", "5", "--test", "2", "--new_tokens", "6", "--repeats", "1", "--naive_processes", "2"]
    printed = _run("workload.py", *small, "--out", str(out))
    record = json.loads(out.read_text())
    assert "same numbers" in printed
    check = record["check"]
    assert check["fit: largest difference of a step's loss"] <= 1e-4
    assert check["loss: largest difference"] <= 1e-4
    assert check["apply: equal texts"] == check["apply: texts"] == 8
    assert set(record["costs"]) == {"fit", "apply", "loss"}


@pytest.mark.slow
def test_gpu_script_runs_on_the_cpu_at_small_size(tmp_path: Path) -> None:
    _run("gpu.py", "--tiny", "--out", str(tmp_path))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["shapes"]) == {"tiny", "tiny-gemma-2"}
    for steps in report["shapes"].values():
        assert steps["correct"]["right"], steps["correct"]
        assert all(steps[name]["seconds"] > 0 for name in ("fit", "loss"))
        assert steps["generation"]["floor tokens/s"] > 0
    assert "tiny-gemma-2" in (tmp_path / "gpu.md").read_text()


def test_gpu_script_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path)], cwd=world.REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "--tiny" in done.stderr


@pytest.mark.slow
def test_growth_point() -> None:
    point = {"multipliers": 2, "cells": 2, "rows": 3, "length": 12, "depth": 3, "layer": 1, "stages": ["fit", "apply", "loss"]}
    found = json.loads(_run("growth.py", "--point", json.dumps(point)).splitlines()[-1])
    assert all(found[stage] > 0 for stage in point["stages"])  # type: ignore[union-attr]
