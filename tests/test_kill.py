"""SIGKILL at random moments of a real run, then the same command again: the same bytes as without the kills, and nothing left over.

Starting Python and torch takes seconds and the work of a tiny model takes one, so a driver process imports everything once and
forks: each child is a run of `spilt.cli.main` in its own process group, killed with its whole group at a seeded moment of the
working phase. A few kills of the really started `python run_spilt.py` go beside them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from counts import CI, count
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
KILLS = {"fit": count(6, 4), "generate": count(6, 4), "loss": count(6, 3), "report": count(3, 1)}
SEED = 20260
SWEEP = ["all", "vector", "--mode", "loss", "--multipliers", "-2", "-1", "0", "1", "2", "--checkpoint_seconds", "0"]
TWO, FORMS = ["--method", "caa", "sft"], ["--intervention_method", "vector", "lora"]
# words of the run that is killed, and of those that make what it needs
STAGES: dict[str, tuple[list[str], list[list[str]]]] = {
    # a method that is estimated, one that is trained, all forms
    "fit": (["all", "all", "--method", "caa", "spilt", "--mode", "generate", "--checkpoint_seconds", "0", "--set", "n_epochs=3"], []),
    "generate": (
        ["sft", "all", *FORMS, "--mode", "apply", "--multipliers", "-1", "1", "--batch_size", "4", "--set", "num_responses=2"]
        + ["--set", "generate_orig_output=true", "--set", "generation_params={do_sample: true, temperature: 0.8, max_new_tokens: 16}"],
        [["sft", "all", *FORMS, "--mode", "generate"]],
    ),
    "loss": ([*SWEEP, "--no_report"], [["all", "vector", "--mode", "generate"]]),
    "report": ([*SWEEP, *TWO], [["all", "vector", "--mode", "generate", *TWO], [*SWEEP, "--no_report", *TWO]]),
}
LEFT = (".tmp-", "unfinished")
COMPARED = (".pt", ".json", ".csv", ".jsonl")


# run_spilt.py, which also tells the file that is named first of every text before it is kept
TELLING = """
import json, sys
from pathlib import Path
from spilt import cli
from spilt.tasks import generate
told, add = open(sys.argv[1] + ".texts", "a", buffering=1), generate.Unfinished.add

def telling(self, text, tokens):
    told.write(json.dumps([text.prompt, text.response, text.multiplier or 0.0, tokens]) + chr(10))
    add(self, text, tokens)

generate.Unfinished.add = telling
sys.exit(cli.main(sys.argv[2:]))
"""


# ---------------------------------------------------------------- the driver: a process of its own


def artifacts(base: Path) -> dict[str, bytes]:
    """Vectors, texts, tables and manifests (without the time of day)."""
    found = {}
    for path in sorted(base.rglob("*")):
        name = str(path.relative_to(base))
        if not path.is_file() or not name.startswith(("vectors/", "generation/")) or path.suffix not in COMPARED:
            continue
        data = path.read_bytes()
        if path.name.endswith(".manifest.json"):
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "created"}, sort_keys=True).encode()
        found[name] = data
    return found


def names(base: Path) -> set[str]:
    tops = (base / "vectors", base / "generation")
    return {str(path.relative_to(base)) for top in tops for path in top.rglob("*") if path.is_file()}


def start(words: list[str], log: Path, evidence: Path) -> int:
    """A run in a process group of its own; returns its id. What it resumes from is written to `evidence`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        # tqdm's own lock is a semaphore that all forks share: a child that is killed while it holds it would stop every later one
        tqdm.set_lock(threading.RLock())
        _tell_resumed(evidence)
        from spilt import cli

        code = cli.main(words)
        sys.stdout.flush()
    except BaseException:  # a traceback is a finding: it must not reach the driver's own code
        import traceback

        traceback.print_exc()
        code = 99
    os._exit(code)


def _tell_resumed(evidence: Path) -> None:
    fit, generate, measure = (importlib.import_module(f"spilt.tasks.{name}") for name in ("fit", "generate", "measure"))

    def note(what: str) -> None:
        with open(evidence, "a") as file:
            file.write(what + "\n")

    resume, read, read_losses = fit.unsealed, generate.Unfinished.read, measure.Unfinished.read

    def told_resume(*args: Any) -> Any:
        state = resume(*args)
        if state is not None:
            note("fit")
        return state

    def told_read(self: Any) -> Any:
        found = read(self)
        if found:
            note("generate")
        return found

    def told_read_losses(*args: Any) -> Any:
        found = read_losses(*args)
        if (found == found).any():  # some are no NaN
            note("loss")
        return found

    fit.unsealed, generate.Unfinished.read, measure.Unfinished.read = told_resume, told_read, told_read_losses


def killed_at(pid: int, moment: float, begun: Callable[[], bool] = lambda: True) -> int | None:
    """Wait; SIGKILL to the group `moment` seconds after it has `begun`. None: killed; else the exit code of a run that was faster."""
    end = math.inf
    while time.monotonic() < end:
        end = time.monotonic() + moment if end == math.inf and begun() else end
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # not its own group yet, or over
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == -signal.SIGKILL else code


def drive(stage: str, folder: Path, kills: int, more: list[str]) -> dict[str, Any]:
    """All kills of one stage; what was seen, as plain values."""
    import families
    import torch

    torch.set_num_threads(1)
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401 - imported before the fork, so that a child begins to work at once

    import spilt.report
    import spilt.tasks  # noqa: F401
    from spilt.model import template

    template.look(families.TEMPLATE, families.tokenizer().special_tokens_map)  # as every later run of one process knows it

    rng = random.Random(f"{SEED} {stage}")
    words, before = STAGES[stage]
    log, evidence = folder / "log", folder / "evidence"
    evidence.touch()
    log.touch()
    clean = families.make_base(folder / "start", test=4)

    def argv(base: Path, items: list[str]) -> list[str]:
        return [*clean._replace(path=base).argv(items[0], items[1], *items[2:]), "--quiet", *more]

    def whole(base: Path, items: list[str]) -> int:
        if more:  # by hand: really started processes alone
            return subprocess.run([sys.executable, "-c", TELLING, str(evidence), *argv(base, items)], capture_output=True).returncode
        return os.waitstatus_to_exitcode(os.waitpid(start(argv(base, items), log, evidence), 0)[1])

    for items in before:
        assert whole(clean.path, items) == 0, log.read_text()
    reference = folder / "reference"
    shutil.copytree(clean.path, reference)
    begun = time.monotonic()
    assert whole(reference, words) == 0, log.read_text()
    span = time.monotonic() - begun
    wanted, wanted_names, given = artifacts(reference), names(reference), names(clean.path)

    seen: dict[str, Any] = {"kills": 0, "rounds": 0, "partial": 0, "state": 0, "cut": 0, "span": round(span, 2)}
    seen |= {"different": [], "left": [], "codes": []}
    results = {name for name in wanted_names - given if name.endswith((".pt", "_results.json", "_losses.csv"))}
    base = folder / "base"
    while seen["kills"] < kills:
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(clean.path, base)
        for kill in range(100):  # until a run is through before its moment
            real = bool(more) or kill == 0 and seen["rounds"] % 10 == 0  # the first of every tenth round: a really started process
            if real:
                code = kill_started([str(evidence), *argv(base, words)], base, rng)
            else:
                top = 0.7 * span if rng.random() < 0.8 and not results <= names(base) else 1.5 * span
                had = names(base)
                at_work = (lambda had=had: names(base) != had) if seen["kills"] % 2 else (lambda: True)  # every second: once it has written
                top *= 0.5 if seen["kills"] % 2 else 1.0
                code = killed_at(start(argv(base, words), log, evidence), rng.uniform(0, top), at_work)
            if code is not None:
                break
            seen["kills"] += 1
            now = names(base)
            seen["partial"] += 0 < len(now & results) < len(results)
            seen["state"] += any("unfinished" in name for name in now)
            seen["cut"] += any(".tmp-" in name for name in now)
        seen["codes"].append(code)
        seen["rounds"] += 1
        if whole(base, words) != 0:  # everything is there: says so and changes nothing
            seen["codes"].append("again")
        found, now = artifacts(base), names(base)
        seen["left"] += sorted(name for name in now if any(word in Path(name).name for word in LEFT))
        kept = {name for name in now if not any(word in Path(name).name for word in LEFT)}
        seen["different"] += sorted(kept ^ wanted_names)
        seen["different"] += [name for name in wanted if name in found and found[name] != wanted[name]]
    if more and stage == "generate":  # texts are promised token by token: docs/reliability.md
        import test_promise

        lines = [json.loads(line) for line in Path(f"{evidence}.texts").read_text().splitlines() if line.endswith("]")]
        made = {(i, k, m, tuple(new)): new for i, k, m, new in lines}
        dtype, where = more[more.index("--dtype") + 1], clean._replace(path=base)
        found_misfits = [test_promise.misfits(where, dtype, {key[:3]: new}, 0.8)[0] for key, new in made.items()]
        seen["texts"], seen["different texts"], seen["misfit"] = len(lines), len(made), max(found_misfits)
    seen["resumed"] = evidence.read_text().split().count(stage)
    seen["log"] = [line for line in log.read_text().splitlines() if "Error" in line or "Traceback" in line][:20]
    return seen


def kill_started(words: list[str], base: Path, rng: random.Random) -> int | None:
    """The real command, started as such, killed with its group a moment after the first new file."""
    had = names(base)
    run = subprocess.Popen(
        [sys.executable, "-c", TELLING, *words], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while run.poll() is None and names(base) == had:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    code = run.wait()
    return None if code == -signal.SIGKILL else code


# ---------------------------------------------------------------- what it must show

_seen: dict[str, dict[str, Any]] = {}


@pytest.fixture
def seen(stage: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The driver's findings, once per stage."""
    if stage not in _seen:
        folder = tmp_path_factory.mktemp(stage)
        env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = forked.run([__file__, stage, folder], 600, env=env)
        _seen[stage] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"broken": done.stdout + done.stderr}
        print(stage, _seen[stage])
        shutil.rmtree(folder, ignore_errors=True)
    assert "broken" not in _seen[stage], _seen[stage]["broken"]
    return _seen[stage]


pytestmark = [pytest.mark.slow, pytest.mark.few(1), pytest.mark.parametrize("stage", STAGES)]


@pytest.mark.long
def test_the_kills_were_in_the_middle(stage: str, seen: dict[str, Any]) -> None:
    assert seen["kills"] >= KILLS[stage]
    if not CI or stage == "report":  # a page is drawn from nothing, and put in its place whole
        return
    assert seen["partial"] >= KILLS[stage] // 3  # some artifacts there, some not
    assert seen["state"] >= KILLS[stage] // 3  # a fit's checkpoint, or lines of texts or losses, lay there
    assert seen["resumed"] >= KILLS[stage] // 3  # and a rerun went on from them


@pytest.mark.long
def test_the_same_bytes_as_without_kills(stage: str, seen: dict[str, Any]) -> None:
    assert not seen["different"], seen
    assert set(seen["codes"]) == {0}, seen


@pytest.mark.long
def test_nothing_is_left_over(stage: str, seen: dict[str, Any]) -> None:
    assert not seen["left"], seen


if __name__ == "__main__":
    name, place, *more = sys.argv[1:]  # by hand: STAGE FOLDER [words of the command, such as --dtype bfloat16 --checkpoint_seconds 60]
    print(json.dumps(drive(name, Path(place), KILLS[name], more)))
