"""Two processes on the CPU (gloo, as accelerate starts them): the files of one process, and a clean end when one of them is lost.

Two tests go through torch's launcher; elsewhere the processes are forks that are told their rank as the launcher tells it (forked.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds; a run takes some ten, and one that waits for ever would take gloo's half hour
FIT = ("--mode", "generate")
APPLY, BOTH = (("--mode", mode, "--multipliers", "-1", "1") for mode in ("apply", "both"))
LOSS = ("--mode", "loss", "--multipliers", "-1", "1", "--no_report")  # the page is drawn by one process from what is stored
pytestmark = pytest.mark.slow

# the same program with a fault put in; FAULT is Python that is run first, in every process
FAULTY = "import os, sys; sys.path.insert(0, {root!r}); exec(os.environ['FAULT'])\nfrom spilt.cli import main\nraise SystemExit(main())\n"


def words_of(base: families.Base, words: tuple[str, ...], form: str = "all", dataset: str | None = None) -> list[str]:
    return [*base.argv("sft", form, *words, "--quiet", dataset=dataset)]


def start(words: list[str], processes: int, fault: str = "", folder: Path | None = None, launched: bool = False) -> Any:
    """A run in a process group of its own; launched: by torch's launcher."""
    program = ROOT / "run_spilt.py"
    if fault:
        assert folder is not None
        program = folder / "faulty.py"
        program.write_text(FAULTY.format(root=str(ROOT)))
    if not launched:
        return forked.Run([program, *words], {"FAULT": fault}, processes=processes, together=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault, "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # with --cpu, accelerate launches one process whatever --num_processes says (more need mpirun); this is its launcher of several
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_addr", "127.0.0.1", "--master_port", port]
    return subprocess.Popen(
        [str(word) for word in [sys.executable, *launch, program, *words]],
        env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ended(run: Any) -> tuple[int, str]:
    """Exit code and output; a run that hangs is ended and is a failure."""
    try:
        said, _ = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        if isinstance(run, subprocess.Popen):
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
        pytest.fail(f"hung for {LIMIT} s\n{str(error.output)[-3000:]}")
    return run.returncode, said


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.few(1)
@pytest.mark.long
def test_there_really_are_two(tmp_path: Path, launched: bool) -> None:
    """Else all of the below would hold for the wrong reason."""
    line = 'f\'rank {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}\\n\'.encode()'  # in one write: two processes share the pipe
    fault = f"os.write(1, {line}); sys.argv[1:] = ['--version']"
    code, said = ended(start([], 2, fault, tmp_path, launched))
    assert code == 0 and "rank 0 of 2" in said and "rank 1 of 2" in said, said


def stored(base: families.Base) -> dict[str, bytes]:
    """Vectors, texts, losses and their manifests, without the time of day and without the report's files."""
    found = {}
    for path in sorted([*base.path.glob("vectors/**/*"), *base.path.glob("generation/**/*")]):
        if not path.is_file() or path.name == "report.manifest.json":  # a page shows texts too, where there are some
            continue
        data = path.read_bytes()
        if path.name.endswith(".manifest.json"):
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "created"}).encode()
        if path.suffix in (".pt", ".json", ".jsonl", ".csv", ".log"):
            found[str(path.relative_to(base.path))] = data
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    return families.make_base(tmp_path_factory.mktemp("team") / "start", train=8, test=5)


@pytest.fixture(scope="module")
def alone(clean: families.Base) -> families.Base:
    """Everything made by one process, begun as the two are: the number of threads decides the last bits."""
    base = clean._replace(path=clean.path.with_name("alone"))
    shutil.copytree(clean.path, base.path)
    requests = [words_of(base, BOTH), words_of(base, LOSS), words_of(base, BOTH, "vector", base.many)]
    before = "from spilt.cli import main\n" + "".join(f"assert main({words}) == 0\n" for words in requests[:-1])
    assert ended(start(requests[-1], 1, before, base.path.parent))[0] == 0
    return base


@pytest.fixture
def base(clean: families.Base, tmp_path: Path) -> families.Base:
    shutil.copytree(clean.path, tmp_path / "base")
    return clean._replace(path=tmp_path / "base")


def different(base: families.Base, alone: families.Base, part: str = "") -> list[str]:
    """Names of files that are not the same; `part`: only those with it in their name."""
    here, there = stored(base), stored(alone)
    return [name for name in sorted({*here, *there}) if part in name and here.get(name) != there.get(name)]


@pytest.mark.long
def test_two_processes_give_the_files_of_one(base: families.Base, alone: families.Base) -> None:
    """Fits are dealt out whole, texts and batches in parts: the same bytes."""
    for words in (words_of(base, BOTH), words_of(base, LOSS), words_of(base, BOTH, "vector", base.many)):
        code, said = ended(start(words, 2, launched="loss" in words))
        assert code == 0, said
        assert said.count("output / reason") == 1, said  # one table
    assert not different(base, alone)
    code, said = ended(start([word for word in words_of(base, LOSS) if word != "--no_report"], 2))
    assert code == 0 and said.count("already done") >= 3, said
    assert list(base.path.glob("**/report.html")), said


KILLED = {
    "fit": (FIT, "layer_2"),
    "generate": (APPLY, "unfinished"),
    "loss": (LOSS, "train_losses.csv"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", KILLED)
@pytest.mark.long
def test_one_process_is_lost(base: families.Base, alone: families.Base, tmp_path: Path, stage: str, rank: int) -> None:
    """Killed in the middle of its work: the run ends with an error, soon; one process finishes it, to the same bytes, nothing is left."""
    words, sign = KILLED[stage]
    if stage != "fit":
        shutil.copytree(alone.path / "vectors/tiny/sft", base.path / "vectors/tiny/sft")
    place = {
        "fit": "from spilt.engine.train import Fit as m; name = 'gradients'",
        "generate": "from spilt.engine import decode as m; name = 'choose'",
        "loss": "from spilt.engine import score as m; name = 'losses'",
    }[stage]
    fault = f"""
import signal
{place}
real, count = getattr(m, name), 0
def later(*a, **k):
    global count
    count += 1
    if os.environ['RANK'] == '{rank}' and count == {1 if stage == "loss" else 4}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
setattr(m, name, later)
"""
    begun = time.monotonic()
    code, said = ended(start(words_of(base, words), 2, fault, tmp_path))
    assert code != 0, said
    assert time.monotonic() - begun < 120
    half = stored(base)
    complete = stored(alone)
    for name, data in half.items():  # what is there is whole
        if name in complete:
            assert data == complete[name] or name.endswith(".log"), name
    code, said = ended(start(words_of(base, words), 1))
    assert code == 0, said
    folder = {"fit": "vectors/tiny/sft/mine", "generate": "generation/tiny/sft/mine", "loss": "vectors/tiny/get_sft_loss"}[stage]
    assert not different(base, alone, folder)


# a dot in a file for each batch that is scored; process RANK is killed when it is about to score another than the first MOST
COUNTED = """
import signal
from spilt.engine import score
real, count, rank = score.Recorded._scores, 0, os.environ.get('RANK', '0')
def scores(*a):
    global count
    if rank == str(RANK) and count == MOST:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    with open(DOTS, 'a') as file:
        file.write('.')
    return real(*a)
score.Recorded._scores = scores
"""


@pytest.mark.long
def test_losses_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two processes killed in the middle of a split and one that goes on, one killed and two that go on: the bytes of one alone."""
    alone = families.make_base(tmp_path / "alone", train=40, test=5)
    assert ended(start(words_of(alone, FIT, "lora"), 1))[0] == 0
    two, one = (alone._replace(path=tmp_path / name) for name in ("two", "one"))
    for base in (two, one):
        shutil.copytree(alone.path, base.path)
    words = ("--mode", "loss", "--multipliers", "-2", "-1", "0", "1", "2", "--checkpoint_seconds", "0")

    def run(base: families.Base, processes: int, rank: int = 0, most: int = 10**6) -> tuple[int, int]:
        """Exit code, and how many batches were scored."""
        dots = tmp_path / "dots"
        dots.write_text("")
        fault = COUNTED.replace("RANK)", f"{rank})").replace("MOST", str(most)).replace("DOTS", repr(str(dots)))
        code, said = ended(start(words_of(base, words, "lora"), processes, fault, tmp_path))
        assert code == 0 or most < 10**6, said
        return code, len(dots.read_text())

    every = run(alone, 1)[1]
    folder = "vectors/tiny/get_sft_loss/sft/mine/sft_lora"
    assert every > 12 and not list((alone.path / folder).glob("unfinished*"))
    code, scored = run(two, 2, rank=1, most=3)
    assert code != 0 and scored >= 3
    assert (two.path / folder / "unfinished_1.jsonl").read_bytes() and not list((two.path / folder).glob("*/*.csv"))
    assert run(two, 1)[1] <= every - 3
    code, scored = run(one, 1, most=5)
    assert code == -signal.SIGKILL and scored == 5
    assert run(one, 2)[1] == every - 5
    assert not different(two, alone, folder) and not different(one, alone, folder)


FULL_DISK = """
import errno
from spilt.artifacts import atomic
real = os.fsync
def full(fd):
    if os.environ.get('RANK', '0') == '0' and WORD in os.readlink(f'/proc/self/fd/{fd}'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    return real(fd)
os.fsync = full
"""


@pytest.mark.parametrize(("words", "word"), [(APPLY, "sft_lora/m1.0/"), (LOSS, "lora_sft_m1.0_winning_only/")], ids=["generate", "loss"])
@pytest.mark.long
def test_the_writing_process_has_no_room(
    base: families.Base, alone: families.Base, tmp_path: Path, words: tuple[str, ...], word: str
) -> None:
    """Process 0 cannot write one cell: that cell fails, the others are done by both, nobody waits for ever."""
    shutil.copytree(alone.path / "vectors/tiny/sft", base.path / "vectors/tiny/sft")
    folder = "generation/tiny/sft/mine" if words == APPLY else "get_sft_loss/sft/mine"
    code, said = ended(start(words_of(base, words), 2, FULL_DISK.replace("WORD", repr(word)), tmp_path))
    assert code == 1 and "No space left" in said, said
    others = [name for name in different(base, alone, folder) if "lora" not in name]
    assert not others, others
    code, said = ended(start(words_of(base, words), 2))
    assert code == 0, said
    assert not different(base, alone, folder)


@pytest.mark.long
def test_a_vector_that_only_one_process_cannot_read(base: families.Base, alone: families.Base, tmp_path: Path) -> None:
    """A shared folder that fails on one machine: the cell fails on both, the others are done."""
    shutil.copytree(alone.path / "vectors/tiny/sft", base.path / "vectors/tiny/sft")
    fault = """
from spilt.steering import layer_file
real = layer_file.read
def lost(path, *a, **k):
    if os.environ.get('RANK') == '1' and 'sft_lora' in str(path):
        raise OSError(5, 'Input/output error', str(path))
    return real(path, *a, **k)
layer_file.read = lost
"""
    code, said = ended(start(words_of(base, APPLY), 2, fault, tmp_path))
    assert code == 1 and "Input/output error" in said, said
    assert not [name for name in different(base, alone, "generation/tiny/sft/mine") if "lora" not in name]
