"""The SLURM example: two tasks of an array, at the same time, do each cell of a request once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import families
import pytest

from spilt import verify

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm_array.sh"


@pytest.mark.long
def test_two_tasks_share_the_cells(tmp_path: Path) -> None:
    base = families.make_base(tmp_path / "base", train=6)
    methods = ["caa", "sft", "spilt"]
    words = base.argv("all", "vector", "--method", *methods, "--mode", "generate")
    environment = {**os.environ, "PYTHON": sys.executable, "SLURM_ARRAY_TASK_COUNT": "2", "OMP_NUM_THREADS": "1"}
    environment["SLURM_SUBMIT_DIR"] = str(SCRIPT.parents[1])
    tasks = [
        subprocess.Popen(["bash", SCRIPT, *words], env={**environment, "SLURM_ARRAY_TASK_ID": f"{n}"}, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    said = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    fitted = [line.split()[2] for text in said for line in text.splitlines() if line.startswith("generate ") and " done " in line]
    assert sorted(fitted) == sorted(methods), "each by one task"
    assert all(sum(text.count(f"generate {base.one} {name} ") for text in said) == 1 for name in methods)
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    assert len(list(base.path.rglob("layer_*.pt"))) == len(methods)
