"""spilt weights under SIGKILL: killed right before or after a write, again and again, it ends with the bytes of a run that was let alone.

A driver process imports everything once and forks: each child is a run of `spilt weights run` that kills itself at its n-th write (a
rename, or a line of a journal), n drawn by seed, so that every stage is met in the middle of its work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEED, MOST = 14, 400  # kills; a run has some hundred writes


def child(words: list[str], log: Path, dies_at: int | None, after: bool) -> int:
    """A run in a process of its own; its exit code, or -9."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is shared by all forks
        if dies_at is not None:
            _dying(dies_at, after)
        from spilt import cli

        code = cli.main(words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def _dying(at: int, after: bool) -> None:
    """SIGKILL before or after the at-th write."""
    from spilt.artifacts import journal

    count = 0

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = write(*args)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return written

    os.replace = counted(os.replace)
    journal.Journal.append = counted(journal.Journal.append)  # type: ignore[method-assign]


def drive(folder: Path) -> dict[str, Any]:
    """One round of kills to the end; what was seen."""
    import families
    import torch
    import weights_base as small

    torch.set_num_threads(1)
    import peft  # noqa: F401 - before the forks, so that a child begins to work at once
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from spilt import api  # noqa: F401
    from spilt.weight_steering import make_arms, measured, strengths, tables  # noqa: F401

    log = folder / "log"
    alone = small.make(folder / "alone")
    base = families.Base(Path(shutil.copytree(alone.path, folder / "base")))
    assert child(small.words(alone, "run"), log, None, False) == 0, log.read_text()
    rng, codes, stages = random.Random(SEED), Counter[str](), Counter[str]()
    for kill in range(MOST):
        late = (small.folder(base) / "kl").is_dir()  # there are few writes left
        code = child(small.words(base, "run"), log, rng.randint(1, 3 if late else 12), kill % 2 == 0)
        codes[str(code)] += 1
        if code != -signal.SIGKILL:
            break
        last = max((path for path in small.folder(base).rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        stages[last.relative_to(small.folder(base)).parts[0]] += 1
    found, wanted = small.contents(base), small.contents(alone)
    different = [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]
    trouble = [line for line in log.read_text().splitlines() if "Error" in line or "damaged" in line]
    return {"codes": codes, "stages": stages, "different": different, "trouble": trouble}


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_every_stage_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=900, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["different"] == [] and seen["trouble"] == []
    assert set(seen["codes"]) == {"-9", "0"} and seen["codes"]["0"] == 1 and seen["codes"]["-9"] >= 10
    met = set(seen["stages"])  # where the newest file was at the kill
    assert {"unfinished_data", "adapters", "arms", "kl", "evaluation", "tables"} <= met


if __name__ == "__main__":
    print(json.dumps(drive(Path(sys.argv[1]))))
