"""The benchmarks' own claims: naive does the same work (same numbers), the counts are right, the GPU script runs."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("name", ["qwen2-12x128", "tiny-gemma-2"])
def test_what_a_backward_pass_keeps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Linear in rows and blocks; without what the activation returned; and the estimate of a dry run is near it."""
    from benchmarks import kept
    from spilt.verbs.estimate import Shape

    shape, length = world.SHAPES[name], 64
    config = shape.config
    found = kept.report(name, length, 4, "float32")
    assert found["the same with the activation kept"] - found["a block and row"] == length * config["intermediate_size"] * 4
    assert found["minibatch at once"] == 8 * (config["num_hidden_layers"] - shape.layer - 1) * found["a block and row"]
    heads, dim = config["num_attention_heads"], config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"], heads, config["num_key_value_heads"], dim)
    guess = Shape(*sizes, config["vocab_size"], True, eager=config["model_type"] == "gemma2").kept(length, length, 4)
    assert 0.5 < guess / found["a block and row"] < 2
    assert kept.main(["--shapes", name, "--length", "32", "--batch", "2", "--dtype", "float32"]) == 0
    assert "peak above weights" in capsys.readouterr().out


def test_rows_have_the_real_lengths() -> None:
    from spilt.data.chat import Chat

    chat = Chat.of(world.tokenizer(8000))
    assert chat.prefix_length == world.PREFIX_TOKENS
    lengths = [len(chat.encode(q, " Yes").input_ids) for q in world.questions(200, 8000, 0)]
    assert 76 < sum(lengths) / len(lengths) < 82
    assert len(chat.encode("x", " Yes").input_ids) - chat.encode("x", " Yes").prompt_length == 3  # the answer and the suffix


def _here(command: list[str], threads: int, log: Path) -> Any:
    """workload.timed, in this process."""
    from benchmarks import naive, workload
    from spilt import cli

    script, words = Path(command[1]).name, command[2:]
    if script == "-c":  # a start
        exec(compile(words[0].removeprefix(workload.ALONE).replace("sys.argv[1]", repr(words[1])), "start", "exec"), {})
        return workload.Cost(0.1, 0.1, 1.0)
    assert script in ("run_spilt.py", "naive.py")
    assert (cli.main(words) if script == "run_spilt.py" else naive.main(words)) in (0, None)
    return workload.Cost(1.0, 1.0, 1.0)


@pytest.mark.long
@pytest.mark.slow
def test_naive_and_ours_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of fit and loss within 1e-4, all texts equal; without this no ratio means anything."""
    import spilt.report
    from benchmarks import workload

    monkeypatch.setattr(workload, "timed", _here)
    monkeypatch.setattr(spilt.report, "update", lambda base_dir, *_, **__: base_dir)
    out = tmp_path / "out.json"
    small = ["--shape", "tiny", "--train", "5", "--test", "2", "--new_tokens", "6", "--repeats", "1"]
    assert workload.main([*small, "--out", str(out)]) == 0
    assert "same numbers" in capsys.readouterr().out
    record = json.loads(out.read_text())
    check = record["check"]
    assert check["fit: largest difference of a step's loss"] <= 1e-4
    assert check["loss: largest difference"] <= 1e-4
    assert check["apply: equal texts"] == check["apply: texts"] == 8
    assert set(record["costs"]) == {"fit", "apply", "loss"}


@pytest.mark.long
def test_naive_gemma_2_has_the_soft_cap_and_the_late_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spilt.report
    from benchmarks import workload

    monkeypatch.setattr(workload, "timed", _here)
    monkeypatch.setattr(spilt.report, "update", lambda base_dir, *_, **__: base_dir)
    small = ["--shape", "tiny-gemma-2", "--train", "3", "--test", "1", "--new_tokens", "4", "--repeats", "1"]
    assert workload.main(small) == 0


@pytest.mark.long
@pytest.mark.slow
def test_gpu_script_runs_on_the_cpu_at_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu
    from spilt.engine import static

    monkeypatch.setitem(static.RUN, "compiled", partial(static.compiled, backend="eager"))  # traced only: compiling takes a minute
    assert gpu.main(["--tiny", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["shapes"]) == {"tiny", "tiny-gemma-2"}
    for steps in report["shapes"].values():
        assert steps["correct"]["right"], steps["correct"]
        assert all(steps[name]["seconds"] > 0 for name in ("fit", "loss"))
        assert steps["generation"]["floor tokens/s"] > 0
        assert "CUDA device" in steps["steps"]["captured"]
        assert all(steps["steps"][f"{how} equal tokens"] == 1 for how in ("plain", "static", "compiled"))
    assert "tiny-gemma-2" in (tmp_path / "gpu.md").read_text()


def test_gpu_script_says_when_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from benchmarks import gpu

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.long
def test_growth_point() -> None:
    from benchmarks import growth

    point = {"multipliers": 2, "cells": 2, "rows": 3, "length": 12, "depth": 3, "layer": 1, "stages": ["fit", "apply", "loss"]}
    found = growth.point(point)
    assert all(found[stage] > 0 for stage in ("fit", "apply", "loss"))
