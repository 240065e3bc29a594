"""spilt tasks train --do-eval killed before each of its writes in turn, and started again: the bytes of a run that was let alone.

As test_weights_kill.py: a driver imports everything once and forks; each child is the command, and kills itself.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from test_weights_kill import child

ROOT = Path(__file__).resolve().parents[1]
MOST = 60  # writes; there are about twenty


def contents(base: Path) -> dict[str, Any]:
    """Every file below tasks/: its bytes; of a manifest all but the time of day."""
    found: dict[str, Any] = {}
    for path in sorted((base / "tasks").rglob("*")):
        if path.is_file():
            found[path.name] = path.read_bytes()
            if path.name.endswith(".manifest.json"):
                found[path.name] = {name: value for name, value in json.loads(path.read_text()).items() if name != "created"}
    return found


def drive(folder: Path) -> dict[str, Any]:
    """Kill before write 1, 2, ...; a table beside each; then to the end."""
    import listops_world as world
    import torch
    from test_tasks import words

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401 - before the forks, so that a child begins to work at once

    from spilt.downstream import answering, table, work  # noqa: F401

    log, made = folder / "log", world.write_untrained(folder / "made")
    world.write_task(made / "new", 1, train=16, test=3)
    flags = ["--lr", "1e-2", "--bs", "4", "--quiet", "--checkpoint-seconds", "0", "--do-eval", "--test-only", "--engine", "plain"]
    flags += ["--batch-size", "1"]
    alone, seen, left = Path(shutil.copytree(made, folder / "alone")), [], set()
    assert child(words(alone, "train", *flags), log, None, False) == 0, log.read_text()
    wanted, different = contents(alone), []
    for kill in range(1, MOST):
        base = Path(shutil.copytree(made, folder / f"killed_{kill}"))
        code = child(words(base, "train", *flags), log, kill, False)
        if code == 0:
            break
        seen.append(code)
        left |= contents(base).keys() - wanted.keys() if (base / "tasks").exists() else set()
        compared = child(["tasks", "table", "--base_dir", str(base)], log, None, False)
        assert compared == (0 if "summary.json" in contents(base) else 2), (kill, compared)
        assert child(words(base, "train", *flags), log, None, False) == 0, log.read_text()
        found = contents(base)
        different += [(kill, name) for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    trouble = [line for line in log.read_text().splitlines() if "Error" in line or "damaged" in line or "Traceback" in line]
    return {"codes": seen, "different": different, "trouble": trouble, "left": sorted(left), "files": sorted(wanted)}


@pytest.mark.long
def test_killed_before_every_write_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = forked.run([__file__, tmp_path], 600, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["different"] == [] and seen["trouble"] == []
    assert set(seen["codes"]) == {-signal.SIGKILL} and 10 <= len(seen["codes"]) < MOST - 1
    assert {"unfinished.pt", "unfinished_test.jsonl"} <= set(seen["left"])
    assert {"steering.safetensors", "steering.manifest.json", "test.json", "test.manifest.json", "summary.json"} <= set(seen["files"])


if __name__ == "__main__":
    print(json.dumps(drive(Path(sys.argv[1]))))
