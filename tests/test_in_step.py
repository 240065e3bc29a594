"""`--tensor_parallel`: two processes (CPU, gloo) that hold parts of one model give the files of one; trouble ends all, or is all's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
import forked
import pandas as pd
import pytest
import torch
import transformers

from spilt import cli
from spilt.errors import UserError
from spilt.model import host, parts

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import os\nexec(os.environ['FAULT'])\nfrom spilt.cli import main\nraise SystemExit(main())\n"
ASKED = "--tensor_parallel"
WHOLE = ("--set", "intervention_components=mlp", "--quiet")
BOTH = ("--mode", "both", "--multipliers", "-1", "1", *WHOLE)
LOSS = ("--mode", "loss", "--multipliers", "-1", "1", "--no_report", *WHOLE)
new_library = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="refused with transformers 4")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    return families.make_base(tmp_path_factory.mktemp("parts") / "start", train=8, test=3)


@pytest.fixture
def base(clean: families.Base, tmp_path: Path) -> families.Base:
    return copied(clean, tmp_path / "base")


def copied(base: families.Base, to: Path) -> families.Base:
    shutil.copytree(base.path, to)
    return base._replace(path=to)


def run(
    base: families.Base, words: tuple[str, ...], processes: int, fault: str = "", form: str = "vector", launched: bool = False
) -> tuple[int, str]:
    """Exit code and all that was said; several processes with parts of one model. launched: by torch's launcher, else forks."""
    program = base.path / "program.py"
    program.write_text(PROGRAM)
    argv = [*base.argv("sft", form, *words), *([ASKED] if processes > 1 else [])]
    if launched:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, str(ROOT / "run_spilt.py"), *argv], env=env, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout + done.stderr
    done = forked.run([program, *argv], env={"FAULT": fault}, processes=processes, together=True)
    return done.returncode, done.stdout


def files(base: families.Base) -> dict[str, Path]:
    every = [*base.path.glob("vectors/**/*"), *base.path.glob("generation/**/*")]
    return {str(path.relative_to(base.path)): path for path in every if path.is_file()}


def numbers(path: Path) -> torch.Tensor:
    """What a vector file holds, or the numbers of a table."""
    if path.suffix == ".csv":
        return torch.tensor(pd.read_csv(path).select_dtypes("number").to_numpy(dtype="float64"))
    state = torch.load(path, weights_only=True)
    held = [state] if isinstance(state, torch.Tensor) else [value for value in state.values() if isinstance(value, torch.Tensor)]
    return torch.cat([tensor.double().flatten() for tensor in held])


def the_same(base: families.Base, other: families.Base) -> set[str]:
    """Names of all files, after a look that they hold the same: texts to the letter, numbers up to the rounding of split sums."""
    here, there = files(base), files(other)
    assert here.keys() == there.keys()
    for name, path in here.items():
        if path.name.endswith("_results.json"):
            assert path.read_bytes() == there[name].read_bytes(), name
        elif path.suffix in (".pt", ".csv"):
            torch.testing.assert_close(numbers(path), numbers(there[name]), rtol=1e-4, atol=2e-5)
    return {Path(name).suffix for name in here}


@new_library
@pytest.mark.long
@pytest.mark.slow
def test_two_processes_give_the_files_of_one(tmp_path: Path) -> None:
    """Fits, texts and losses of three forms; the manifest says how they were made, and both count as the same."""
    alone = families.make_base(tmp_path / "alone", "qwen2", train=8, test=3)
    two = copied(alone, tmp_path / "two")
    for words in (BOTH, LOSS):
        assert run(alone, words, 1, form="all")[0] == 0
        code, said = run(two, words, 2, form="all", launched=words is BOTH)
        assert code == 0 and said.count("output / reason") == 1 and "error" not in said, said
    assert the_same(alone, two) >= {".pt", ".json", ".csv"}
    notes = [json.loads(path.read_text())["notes"] for name, path in files(two).items() if name.endswith(".manifest.json")]
    assert len(notes) > 6 and all(note["tensor_parallel"] == 2 for note in notes)
    found = files(two)
    before = {name: path.stat().st_mtime_ns for name, path in found.items()}
    code, said = run(two, BOTH, 1, form="all")  # the same command in one process has nothing left to do
    assert code == 0 and "6 already done" in said, said
    assert before == {name: path.stat().st_mtime_ns for name, path in files(two).items()}


KILLED = """
import os, signal
from spilt.engine import {module} as m
real, count = m.{name}, 0
def later(*a, **k):
    global count
    count += 1
    if os.environ.get('RANK') == '{rank}' and count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
m.{name} = later
"""


@new_library
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "at", "rank"), [("train", "forward_backward", 7, 1), ("decode", "choose", 10, 0)])
def test_one_process_is_lost(base: families.Base, tmp_path: Path, module: str, name: str, at: int, rank: int) -> None:
    """SIGKILL in the middle of a fit, of texts: all end; the same command goes on, also in one process, and nothing is left over."""
    whole = copied(base, tmp_path / "whole")
    words = (*BOTH, "--checkpoint_seconds", "0", "--batch_size", "2", "--set", "n_epochs=3")
    assert run(whole, words, 1)[0] == 0
    code, said = run(base, words, 2, KILLED.format(module=module, name=name, at=at, rank=rank))
    assert code != 0, said
    left = [path.name for path in base.path.rglob("*unfinished*") if path.is_file()]
    assert left, said
    code, said = run(base, words, 2)
    assert code == 0, said
    assert not list(base.path.rglob("*unfinished*"))
    the_same(base, whole)


RAISES = """
import os
from spilt import in_step
in_step.PATIENCE = 3
from spilt.engine import score as m
real, count = m.suffix.logits, 0
def logits(*a, **k):
    global count
    count += 1
    if count == 2 and os.environ.get('RANK', '0') in {ranks}:
        raise {error}
    return real(*a, **k)
m.suffix.logits = logits
"""
ALL, ONE = "'01'", "'1'"


@new_library
@pytest.mark.long
@pytest.mark.slow
def test_trouble_of_one_and_of_all(base: families.Base, tmp_path: Path) -> None:
    """Memory that runs out in all: smaller batches, the same losses. In one, or an error there: it says so once, and all end, soon."""
    assert run(base, ("--mode", "generate", *WHOLE), 1)[0] == 0
    whole, one = copied(base, tmp_path / "whole"), copied(base, tmp_path / "one")
    assert run(whole, LOSS, 1)[0] == 0
    code, said = run(base, LOSS, 2, RAISES.format(ranks=ALL, error="MemoryError('full')"))
    assert code == 0 and said.count("out of memory") == 1, said
    the_same(base, whole)
    for error in ("MemoryError('full')", "OSError('lost')"):
        begun = time.monotonic()
        code, said = run(one, LOSS, 2, RAISES.format(ranks=ONE, error=error))
        assert code == 1 and said.count("error: process 1: ") == 1 and said.count("a pass needs all processes, so all end") == 1, said
        assert ("out of memory" in said) == ("full" in error) and time.monotonic() - begun < 120
    code, said = run(one, LOSS, 2)
    assert code == 0, said
    the_same(one, whole)


AGREE = """
import os, sys
from spilt.errors import UserError
from spilt.in_step import InStep
team = InStep("cpu")
rank = team.rank
assert team.shard([1, 2, 3]) == [1, 2, 3] and team.gather(lambda: rank) == [0] and team.on_main(lambda: rank) == 0
assert team.each(lambda: rank) == rank and team.writes == (rank == 0) and team.of_one() is team and team.parts == 1
assert team.agree("") == ["", ""] and team.agree(f"no {rank}") == ["no 0", "no 1"]
def fails():
    if rank == 1:
        raise UserError("no such thing")
try:
    team.each(fails)
except UserError as error:
    assert str(error) == ("no such thing" if rank else "process 1: no such thing"), error
    assert team.told and team.speaks == (rank == 0)
else:
    raise AssertionError
def lost():
    if rank == 0:
        raise KeyError("a")
try:
    team.gather(lost)
except (KeyError, RuntimeError) as error:
    assert rank == 0 or "process 0: KeyError" in str(error)
if rank == 0:
    print("all is well", flush=True)
team.leave(3)
"""


@pytest.mark.slow
def test_they_agree() -> None:
    done = forked.run(["-c", AGREE], processes=2, together=True)
    assert done.returncode == 1 and done.stdout.count("all is well") == 1, done.stdout  # of forked, which ends all at the first error
    assert "Traceback" not in done.stdout


# ---------------------------------------------------------------- what is refused

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "evaluate": (("--mode", "evaluate"), "is done by one process"),
    "vllm": (("--mode", "apply", "--engine", "vllm", "--device", "cuda"), "vLLM splits a model by itself"),
    "step": (("--mode", "apply", "--decode_step", "static"), "whole on one device"),
    "auto": (("--device", "auto"), "--device auto: the parts are not placed so; --device cuda"),
    "card": (("--device", "cuda:1"), "--device cuda:1"),
    "mlp_mid": (("--intervention_method", "lora"), "mlp_mid is read, .* intervention_components=mlp, attn or block"),
    "adapters": (("--method", "weight_arithmetic", "--intervention_method", "lora"), "changes the weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(clean: families.Base, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = REFUSED[case]
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    before = families.listing(clean.path)
    assert cli.main([*clean.argv("sft", "vector", "--dry_run", ASKED, *words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and re.search(message, line), line
    assert families.listing(clean.path) == before


def test_it_needs_processes_that_share_the_heads(
    base: families.Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(base.argv("sft", "vector", ASKED)) == 2
    assert "there is one process; torchrun --nproc_per_node N run_spilt.py" in capsys.readouterr().err
    for name, value in {**LAUNCHED, "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(base.argv("sft", "vector", ASKED, "--dry_run")) == 2
    assert "4 num_attention_heads cannot be dealt out to 3 processes; start 2, 4" in capsys.readouterr().err
    config = base.path / "models/tiny/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(base.argv("sft", "vector", ASKED, "--dry_run")) == 2
    assert "the model is quantised" in capsys.readouterr().err


def test_what_the_library_cannot_split(monkeypatch: pytest.MonkeyPatch) -> None:
    config, known = families.config("gpt2"), families.config("llama")
    if int(transformers.__version__.split(".")[0]) >= 5:
        with pytest.raises(UserError, match="no tp_plan for GPT2LMHeadModel; --device auto"):
            parts.check_plan(config, host.skeleton(config), "cpu")
        monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
        with pytest.raises(UserError, match="would place the parts on cuda; CUDA_VISIBLE_DEVICES= hides the cards"):
            parts.check_plan(known, host.skeleton(known), "cpu")
    monkeypatch.setattr(parts, "version", lambda name: "4.57.6")
    with pytest.raises(UserError, match="needs transformers 5, and 4.57.6 is installed"):
        parts.check_plan(known, host.skeleton(known), "cpu")


def test_the_plan_shows_it(clean: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is not started by a launcher; each step's command line begins with one."""
    assert "WORLD_SIZE" not in os.environ
    assert cli.main(clean.argv("sft", "vector", "--dry_run", ASKED)) == 0
    said = capsys.readouterr().out
    assert said.count("parts    of one model in each process (tensor parallel)") == 2
    assert said.count("torchrun --nproc_per_node 2 run_spilt.py --dataset mine") == 2 and said.count(ASKED) == 2


def test_a_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a loaded model: what one process has otherwise than the first, or not in full width."""
    model: Any = families.build("llama")
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, **_: tensor)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor)
    parts.check(model)
    assert parts.split(model) == 0
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, **_: seen.append(tensor) or tensor.mul_(1 + (len(seen) > 8)))
    with pytest.raises(UserError, match=r"mlp of block 1 and \d+ more: not whole and the same in every process"):
        parts.check(model)
