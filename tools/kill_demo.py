"""Kill the real command on the demo at random moments, then finish it: python tools/kill_demo.py fit|generate|loss [kills]."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "fit": ["--mode", "generate", "--checkpoint_seconds", "0"],
    "generate": ["--mode", "apply"],
    "loss": ["--mode", "loss", "--multipliers", "-1", "0", "1", "2"],
}


def start(base: Path, words: list[str]) -> subprocess.Popen[bytes]:
    cell = ["--dataset", "psychopathy", "--method", "spilt", "--model_name", "demo-qwen2", "--intervention_method", "all"]
    command = [sys.executable, str(ROOT / "run_spilt.py"), *cell, "--device", "cpu", "--base_dir", str(base), "--quiet", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def files(base: Path) -> dict[str, str]:
    """Vectors, texts and losses with their hashes; manifests hold the time of day, the report is drawn."""
    found = [path for name in ("vectors", "generation") for path in (base / name).rglob("*") if path.is_file()]
    kept = [path for path in found if not path.name.endswith(".manifest.json") and "report" not in path.parts]
    return {str(path.relative_to(base)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def main(stage: str, wanted: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="spilt-kill-"))
    begun, whole, base = folder / "begun", folder / "whole", folder / "killed"
    shutil.copytree(ROOT / "examples" / "demo", begun)
    if stage != "fit":
        assert start(begun, WORDS["fit"]).wait() == 0
    shutil.copytree(begun, whole)
    clock = time.monotonic()
    assert start(whole, WORDS[stage]).wait() == 0
    seconds, want, first = time.monotonic() - clock, files(whole), files(begun)
    moments, kills, half = random.Random(stage), 0, 0
    shutil.copytree(begun, base)
    while kills < wanted:
        run = start(base, WORDS[stage])
        try:
            assert run.wait(moments.uniform(0.3, 0.9) * seconds) == 0 and files(base) == want
            shutil.rmtree(base)
            shutil.copytree(begun, base)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
            half += files(base) not in (want, first)
    assert start(base, WORDS[stage]).wait() == 0 and files(base) == want
    print(f"{stage}: {kills} kills, {half} with work half done, {len(want)} files byte-identical; {seconds:.1f} s without kills")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 30))
