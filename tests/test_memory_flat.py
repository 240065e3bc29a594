"""A long run holds no more memory at its end than after its tenth cell (resident size within 5%)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from counts import count

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, CELLS = count(1000, 200), count(50, 12)

# In a process of its own: what the other tests keep does not count. The resident size is taken after each step.
LONG_RUN = """
import gc, json, sys
from pathlib import Path
import families, torch
from spilt import cli
from spilt import run as runner

torch.set_num_threads(1)
kind, folder, prompts, cells = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
base = families.make_base(folder / "base", train=20, test=prompts if kind == "prompts" else 4)
sizes, real = [], runner._run_step

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def run_step(step, run):
    outcome = real(step, run)
    assert outcome.outcome == "done", outcome
    gc.collect()
    if not sizes:
        gc.freeze()  # what was loaded by now is there to the end: later collections pass it by
    sizes.append(resident())
    return outcome

runner._run_step = run_step
runner._report = lambda step, *a, **k: runner.Outcome("report", "done", "", 0.0, "")
if kind == "cells":  # one run of `cells` fits, texts and losses: a dataset with many concepts
    rows = [
        {**row, "input": row["question"], "output_concept": f"c{i}", "concept_id": i, "category": "positive"}
        for i in range(cells) for row in families.pairs(4, f"{i} ")
    ]
    for section in ("train", "valid"):
        families.write_jsonl(base.data(base.many, section), rows)
    ids = ["--concepts", *map(str, range(cells))]
    assert cli.main([*base.argv("sft", "lora", "--mode", "generate", *ids, dataset=base.many), "--quiet"]) == 0
    fits = list(sizes)
    sizes.clear()
    assert cli.main([*base.argv("sft", "lora", "--mode", "loss", "--multipliers", "-1", "1", *ids, dataset=base.many), "--quiet"]) == 0
    found = {"fit": fits, "loss": sizes}
else:  # one cell of `prompts` texts: the size after each hundredth
    assert cli.main([*base.argv("sft", "vector", "--mode", "generate"), "--quiet"]) == 0
    sizes.clear()
    from spilt import tasks as stages
    import importlib
    unfinished, count = importlib.import_module("spilt.tasks.generate").Unfinished, 0
    add = unfinished.add

    def told(self, text, tokens):
        global count
        add(self, text, tokens)
        count += 1
        if count % 100 == 0:
            sizes.append(resident())

    unfinished.add = told
    assert cli.main([*base.argv("sft", "vector", "--mode", "apply", "--multipliers", "1", "--batch_size", "8"), "--quiet"]) == 0
    found = {"texts": sizes[: prompts // 100]}
print(json.dumps(found))
"""


def long_run(kind: str, folder: Path) -> dict[str, list[int]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", LONG_RUN, kind, str(folder), str(PROMPTS), str(CELLS)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for stage, sizes in found.items():
        print(f"{stage}: {len(sizes)} sizes, MiB first {sizes[0] / 2**20:.1f}, last {sizes[-1] / 2**20:.1f}")
    return found


@pytest.mark.slow
@pytest.mark.long
def test_fifty_cells(tmp_path: Path) -> None:
    for stage, sizes in long_run("cells", tmp_path).items():
        assert len(sizes) == CELLS
        assert sizes[-1] <= 1.05 * sizes[9], f"{stage}: {[round(size / 2**20) for size in sizes]} MiB"


@pytest.mark.slow
@pytest.mark.long
def test_a_thousand_prompts(tmp_path: Path) -> None:
    (sizes,) = long_run("prompts", tmp_path).values()
    assert len(sizes) == PROMPTS // 100
    assert sizes[-1] <= 1.05 * sizes[0], f"{[round(size / 2**20) for size in sizes]} MiB"
