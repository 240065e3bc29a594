"""spilt weights by several processes on the CPU (gloo): the files of one, a clean end where one fails or is lost, one voice."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import families
import forked
import pytest
import weights_base as small

pytestmark = pytest.mark.slow
LIMIT = 240  # seconds; a run takes a few, and one that waits for ever would take a day

# in WHERE, the function NAME of the processes RANKS does DOES at its call number AT
FAULT = """
import os, signal
import WHERE as m
real, calls = m.NAME, 0
def faulty(*a, **k):
    global calls
    calls += 1
    if int(os.environ.get('RANK', '0')) in RANKS and calls == AT:
        DOES
    return real(*a, **k)
m.NAME = faulty
"""
WELL = (0, -signal.SIGTERM)  # a process that process 0 speaks for: it ends by itself, or is ended by the launcher since process 0 has
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# a line in a file for each piece of work, with the number of the process that did it
LOGGED = """
import os
from spilt.weight_steering import arms, make_arms, measured, strengths, train
def logged(module, name):
    real = getattr(module, name)
    def told(run, *words):
        with open(LOG, 'a') as file:
            file.write(' '.join([os.environ['RANK'], name, *(word for word in words if isinstance(word, str))]) + '\\n')
        return real(run, *words)
    setattr(module, name, told)
for module, name in ((train, '_side'), (make_arms, '_vector'), (strengths, '_one'), (measured, '_one')):
    logged(module, name)
"""

# the same of fits, on standard output
FITS = """
import os
from spilt.tasks import fit
real = fit._adapters
def told(step, *words):
    os.write(1, f'process {os.environ.get("RANK")} fits {step}\\n'.encode())
    return real(step, *words)
fit._adapters = told
"""


def fault(where: str, name: str, ranks: tuple[int, ...] = (1,), at: int = 1, does: str = KILL) -> str:
    of_class, _, name = name.rpartition(".")
    head = f"from {where} import {of_class} as m" if of_class else f"import {where} as m"
    made = FAULT.replace("import WHERE as m", head).replace("NAME", name).replace("RANKS", str(ranks))
    return made.replace("AT", str(at)).replace("DOES", does)


def begin(words: list[str], processes: int = 2, before: str = "") -> forked.Run:
    code = f"{before}\nfrom spilt.cli import main\nraise SystemExit(main())"
    return forked.Run(["-c", code, *words], processes=processes, together=True)


def ended(run: forked.Run) -> tuple[int, str]:
    code = run.wait(LIMIT)
    return code, run.said()[0]


def make(base: families.Base, stage: str = "run", *more: str, processes: int = 2, before: str = "") -> str:
    """What a run that does its work says."""
    code, said = ended(begin(small.words(base, stage, *more), processes, before))
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    return small.make(tmp_path_factory.mktemp("weights_team") / "start")


@pytest.fixture(scope="module")
def alone(clean: families.Base) -> families.Base:
    """Made by one process, which says what is in the file `said` beside it. Nothing may be written to it."""
    base = families.Base(Path(shutil.copytree(clean.path, clean.path.with_name("alone"))))
    base.path.with_name("said").write_text(make(base, processes=1))
    return base


@pytest.fixture
def base(clean: families.Base, tmp_path: Path) -> families.Base:
    return families.Base(Path(shutil.copytree(clean.path, tmp_path / "base")))


def different(base: families.Base, alone: families.Base, part: str = "") -> list[str]:
    found, wanted = small.contents(base), small.contents(alone)
    return sorted(name for name in {*found, *wanted} if part in name and found.get(name) != wanted.get(name))


@pytest.mark.long
def test_two_processes_give_the_files_of_one(base: families.Base, alone: families.Base, tmp_path: Path) -> None:
    """Each adapter, arm and calibration whole by one of them, the answers in parts; what is said is what one process says."""
    log = tmp_path / "log"
    said = make(base, before=LOGGED.replace("LOG", repr(str(log))))
    assert not different(base, alone)
    did = sorted(log.read_text().splitlines())
    assert did == sorted(
        ["0 _side lora pos", "1 _side lora neg", "1 _vector caa", "0 _one caa", "1 _one lora", "0 _one prompt"]
        + ["0 _one unsteered", "1 _one caa", "0 _one lora", "1 _one prompt"]
    )
    lines = said.replace(str(base.path), "BASE").splitlines()
    assert sorted(lines) == sorted(alone.path.with_name("said").read_text().replace(str(alone.path), "BASE").splitlines())
    assert len(make(base).splitlines()) < len(lines) and not different(base, alone)  # all is done already


@pytest.mark.long
def test_each_stage_with_another_number_of_processes(base: families.Base, alone: families.Base) -> None:
    """Two, three (the third waits while two are trained), one."""
    for number, stage in enumerate(small.SIZES):
        make(base, stage, processes=(2, 3, 1)[number % 3])
    assert not different(base, alone)
    make(base, "adapters", "--force", processes=3)
    make(base, "run")
    assert not different(base, alone)


MISTAKES = {
    "an unknown flag": (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    "a wrong value": (["--lr", "-1"], "--lr -1"),
    "no such model": (["--model", "nobody"], "no checkpoint"),
    "no such behaviour": (["--behavior", "nothing"], "unknown behavior 'nothing'"),
    "not yet": ([], "no method is stored"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_message(clean: families.Base, what: str) -> None:
    """Process 0 ends with 2, and no other with an error: a launcher would end process 0 then, before it has spoken."""
    more, message = MISTAKES[what]
    run = begin(small.words(clean, "calibrate" if what == "not yet" else "run", *more))
    _, said = ended(run)
    assert run.codes[0] == 2 and run.codes[1] in WELL, run.codes
    assert said.count(message) == 1 and said.count("error: ") == 1 and "Traceback" not in said, said
    assert not small.folder(clean).exists()


ERRORS = {
    "user": ("from spilt.errors import UserError; raise UserError('too long')", 2, "error: process 1: too long"),
    "numbers": ("from spilt.errors import NotFinite; raise NotFinite('the loss is NaN')", 1, "error: process 1: the loss is NaN"),
    "disk": ("raise OSError(28, 'No space left on device')", 1, "error: process 1: OSError: [Errno 28] No space left on device"),
    "unforeseen": ("raise ZeroDivisionError('odd')", 1, "error: process 1: ZeroDivisionError: odd"),
}


@pytest.mark.long
def test_an_error_of_one_is_told_once_and_ends_all(base: families.Base, alone: families.Base) -> None:
    """The other's adapter is kept; what was not foreseen has its traceback too. The same command finishes it."""
    make(base, "data")
    for does, code, message in ERRORS.values():
        run = begin(small.words(base, "run"), before=fault("spilt.weights.training", "Fit.gradients", does=does))
        _, said = ended(run)
        assert run.codes[0] == code and run.codes[1] in WELL, run.codes
        assert said.count(message) == 1 and said.count("error: ") == 1, said
        assert ("Traceback" in said) is ("ZeroDivision" in message), said
        assert (small.folder(base) / "adapters/lora/pos/adapter_model.safetensors").is_file()
        assert not (small.folder(base) / "adapters/lora/neg/adapter_model.safetensors").exists()
    make(base)
    assert not different(base, alone)


LOST: tuple[tuple[str, str, str, tuple[int, ...], int], ...] = (
    ("data", "spilt.artifacts.journal", "Journal.append", (1,), 4),
    ("data", "spilt.artifacts.journal", "Journal.append", (0, 1), 3),
    ("adapters", "spilt.weights.training", "Fit.gradients", (0,), 3),
    ("adapters", "spilt.weights.training", "Fit.gradients", (0, 1), 3),
    ("arms", "spilt.weight_steering.make_arms", "_vector", (1,), 1),
    ("kl", "spilt.weight_steering.arms", "kl_row", (0, 1), 2),
    ("evaluation", "spilt.weight_steering.arms", "unsteered_losses", (0,), 2),
)


@pytest.mark.long
def test_a_process_is_lost_at_every_stage(base: families.Base, alone: families.Base) -> None:
    """Killed in the middle of its work, alone or with the other: the run ends, and the next goes on, at last to the same bytes."""
    for _, where, name, ranks, at in LOST:
        begun = time.monotonic()
        run = begin(small.words(base, "run"), before=fault(where, name, ranks, at))
        code, said = ended(run)
        assert code != 0 and -signal.SIGKILL in run.codes and "run: done" not in said, said
        assert time.monotonic() - begun < LIMIT / 2
        half, whole = small.contents(base), small.contents(alone)
        for file in half:  # what is there is whole
            assert "unfinished" in file or ".tmp-" in file or half[file] == whole[file], file
    make(base)
    assert not different(base, alone)


@pytest.mark.long
def test_without_a_launcher_the_others_end_too(base: families.Base) -> None:
    """Nobody ends the process whose peer is lost: it sees that itself."""
    make(base, "data")
    run: Any = begin(small.words(base, "run"), before=fault("spilt.weights.training", "Fit.gradients", at=3))
    for one in run._all:
        one.join(LIMIT)
    assert run.codes[1] == -signal.SIGKILL and run.codes[0] == 1, (run.codes, run.said())
    assert (small.folder(base) / "adapters/lora/pos/adapter_model.safetensors").is_file()  # its own was finished


@pytest.mark.long
def test_fits_of_weight_arithmetic_are_dealt_out_whole(tmp_path: Path) -> None:
    """run_spilt.py --method weight_arithmetic: two fits, one of either process, and the losses of both by both."""
    alone = families.make_base(tmp_path / "alone", train=8, test=4)
    base = families.Base(Path(shutil.copytree(alone.path, tmp_path / "base")))
    few = [word for name in ("lr=0.03", "gradient_accumulation_steps=1", "rank=2", "n_epochs=2") for word in ("--set", name)]
    said = ""
    for where, processes in ((alone, 1), (base, 2)):
        words = where.argv("weight_arithmetic", "lora", *few, "--mode", "both", "--multipliers", "-1", "1", "--layers", "1+3", "--quiet")
        words.insert(words.index("lora") + 1, "local_weight")
        code, said = ended(begin([*words], processes, FITS))
        assert code == 0, said
    assert sorted(line.split(" fits ")[0] for line in said.splitlines() if " fits " in line) == ["process 0", "process 1"], said
    for path in sorted(alone.path.rglob("*")):
        if path.suffix in (".pt", ".safetensors", ".json", ".csv") and "manifest" not in path.name:
            assert (base.path / path.relative_to(alone.path)).read_bytes() == path.read_bytes(), path
