"""Faults put in on purpose, each with its named outcome: a failing disk, damaged files, changed inputs, clocks, company, little memory.

docs/reliability.md has the table. Nothing that was stored before is lost, other cells go on, and the exit code and the reason say what was.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from spilt import cli, plan, verify
from spilt import run as runner
from spilt.artifacts import journal as lines
from spilt.artifacts import manifest, store
from spilt.engine import decode as generation
from spilt.engine import prompts, score, suffix
from spilt.engine import train as training
from spilt.methods import METHODS
from spilt.model import identity

ROOT = Path(__file__).resolve().parents[1]
fit_stage = importlib.import_module("spilt.tasks.fit")
FIT, APPLY, LOSS = ("--mode", "generate"), ("--mode", "apply", "--multipliers", "-1", "1"), ("--mode", "loss", "--multipliers", "-1", "1")


class Here:
    """A base folder and a way to run the command line on it."""

    def __init__(self, base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
        self.base, self.capsys = base, capsys

    def run(self, *words: str, form: str = "vector", method: str = "sft") -> tuple[int, str]:
        """Exit code and everything printed, as a new process would have it."""
        fresh()
        self.capsys.readouterr()
        code = cli.main([*self.base.argv(method, form, *words), "--quiet"])
        out, err = self.capsys.readouterr()
        return code, out + err

    def path(self, name: str) -> Path:
        return self.base.path / name

    def vector(self, form: str = "vector") -> Path:
        return self.path(f"vectors/tiny/sft/mine/sft_{form}/layer_2.pt")

    def texts(self, m: float, form: str = "vector") -> Path:
        return self.path(f"generation/tiny/sft/mine/sft_{form}/m{m}/mine_results.json")

    def losses(self, m: float, kind: str = "winning_only", form: str = "vector") -> Path:
        return self.path(f"vectors/tiny/get_sft_loss/sft/mine/sft_{form}/{form}_sft_m{m}_{kind}/train_losses.csv")

    def listing(self) -> dict[str, str]:
        """Every stored file and its hash; manifests without the time of day, folders left out."""
        found = {}
        for name, value in families.listing(self.base.path).items():
            if name.startswith(("vectors/", "generation/")) and value != "folder":
                if name.endswith(".manifest.json"):
                    value = json.dumps({k: v for k, v in json.loads(self.path(name).read_bytes()).items() if k != "created"})
                found[name] = value
        return found

    def states(self) -> dict[str, str]:
        fresh()
        return {str(found.path.relative_to(self.base.path)): found.state for found in verify.check(self.base.path)}


def fresh() -> None:
    """Forget what a process remembers of files."""
    manifest._hash_file.cache_clear()
    identity._hash_model.cache_clear()


def no_report(step: Any, *_: Any, **__: Any) -> runner.Outcome:
    return runner.Outcome("report", runner.DONE, "", 0.0, "")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Vectors, texts and losses of sft in all forms, made once without faults."""
    base = families.make_base(tmp_path_factory.mktemp("prepared") / "base", train=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_report", no_report)
        for words in (FIT, APPLY, LOSS):
            assert cli.main([*base.argv("sft", "all", *words), "--quiet"]) == 0
    return base


@pytest.fixture
def here(prepared: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """A copy with everything made."""
    shutil.copytree(prepared.path, tmp_path / "base")
    monkeypatch.setattr(runner, "_report", no_report)
    monkeypatch.setattr(logging.getLogger("spilt"), "propagate", True)
    yield Here(prepared._replace(path=tmp_path / "base"), capsys)
    fresh()


@pytest.fixture
def bare(here: Here) -> Here:
    """A copy in which nothing is made yet."""
    shutil.rmtree(here.path("vectors"))
    shutil.rmtree(here.path("generation"))
    return here


def temporaries(here: Here) -> list[str]:
    return [name for name in here.listing() if ".tmp-" in name]


# ---------------------------------------------------------------- the disk


@contextmanager
def failing_disk(code: int, call: str, word: str) -> Iterator[list[str]]:
    """`call` of the os module raises for files whose path has `word` in it; yields the paths that were hit."""
    real, hit = getattr(os, call), list[str]()

    def fail(first: Any, *more: Any, **kwargs: Any) -> Any:
        path = str(first) if call == "replace" else os.readlink(f"/proc/self/fd/{first}")
        if word in path:
            hit.append(path)
            raise OSError(code, os.strerror(code))
        return real(first, *more, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        yield hit


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("file", ["layer_2.pt", "layer_2.manifest.json", "metadata_layer_2.jsonl", "train.log"])
def test_a_fit_whose_write_fails(bare: Here, code: int, call: str, file: str) -> None:
    """That cell fails with the system's reason, the other cells are done, no temporary file stays, and a rerun makes it."""
    with failing_disk(code, call, f"sft_lora/.{file}") as hit:
        exit_code, said = bare.run(*FIT, form="all")
    assert hit and exit_code == 1 and os.strerror(code) in said and "Traceback" not in said
    assert bare.vector().exists() and bare.vector("local_weight").exists() and not bare.vector("lora").exists()
    assert not temporaries(bare)
    assert bare.run(*FIT, form="all")[0] == 0
    assert bare.vector("lora").exists() and set(bare.states().values()) == {"ok"}


@pytest.mark.parametrize("method", ["sft", "caa"])
@pytest.mark.parametrize("file", ["layer_3.pt", "layer_3.manifest.json", "metadata_layer_3.jsonl"])
def test_a_fit_of_several_layers_that_stops_between_them(bare: Here, method: str, file: str) -> None:
    """The layers that are done are not fitted again, and train.log tells of all of them as without the stop."""
    words, folder = (*FIT, "--set", "layers=1,3,4"), bare.path(f"vectors/tiny/{method}/mine/{method}_vector")
    assert bare.run(*words, method=method)[0] == 0
    whole = (folder / "train.log").read_text()
    headings = [line for line in whole.splitlines() if "layer" in line]
    assert headings == [f"mine {method} vector layer {layer}" for layer in (1, 3, 4)]
    shutil.rmtree(folder)
    with failing_disk(errno.ENOSPC, "replace", file) as hit:
        assert bare.run(*words, method=method)[0] == 1
    assert hit and (folder / "layer_1.pt").exists() and not (folder / "layer_3.pt").exists()
    first = (folder / "layer_1.pt").stat().st_mtime_ns
    assert bare.run(*words, method=method)[0] == 0
    assert (folder / "train.log").read_text() == whole and (folder / "layer_1.pt").stat().st_mtime_ns == first


def test_train_log_tells_of_the_vectors_that_are_there(bare: Here) -> None:
    """One section per vector: replaced with it, dropped when it is gone; a log that is not ours counts for nothing."""
    log = bare.vector().with_name("train.log")
    log.parent.mkdir(parents=True)
    log.write_bytes(b"a log of the released code\nlayer 3\n\xff\n")
    assert bare.run(*FIT, "--set", "layers=1,3,4")[0] == 0
    before = log.read_text()
    assert before.startswith("mine sft vector layer 1\n")
    log.with_name("layer_3.pt").unlink()
    assert bare.run(*FIT, "--set", "layers=3", "--set", "lr=0.5")[0] == 0
    after = log.read_text()
    parts, again = (text.split("mine sft vector layer ") for text in (before, after))
    assert again[1] == parts[1] and again[3] == parts[3] and again[2] != parts[2] and len(again) == len(parts) == 4
    log.with_name("layer_1.pt").unlink()
    assert bare.run(*FIT, "--set", "layers=4", "--force")[0] == 0
    assert [line for line in log.read_text().splitlines() if "layer" in line] == [f"mine sft vector layer {layer}" for layer in (3, 4)]


@pytest.mark.parametrize("file", ["mine_results.json", "mine_results.manifest.json", "sft_lora_m1.0.log"])
def test_texts_whose_write_fails(here: Here, file: str) -> None:
    before = here.listing()
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_lora"))
    with failing_disk(errno.ENOSPC, "fsync", "sft_lora/m1.0/." + file if "results" in file else "sft_lora/logs/." + file) as hit:
        exit_code, said = here.run(*APPLY, form="all")
    assert hit and exit_code == 1 and "No space left" in said and "Traceback" not in said
    assert not temporaries(here)
    assert here.run(*APPLY, form="all")[0] == 0 and here.listing() == before  # from the lines that were kept


def test_losses_whose_write_fails(here: Here) -> None:
    before = here.listing()
    shutil.rmtree(here.losses(1.0).parent)
    with failing_disk(errno.EIO, "fsync", ".train_losses.csv") as hit:
        exit_code, said = here.run(*LOSS, form="all")
    assert hit and exit_code == 1 and os.strerror(errno.EIO) in said and "Traceback" not in said
    assert not temporaries(here)
    assert here.run(*LOSS, form="all")[0] == 0 and here.listing() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_rewrite_loses_nothing_that_was_stored(here: Here, call: str) -> None:
    """The old vector stays the old vector, with the manifest that speaks of it."""
    before = here.listing()
    with failing_disk(errno.ENOSPC, call, ".layer_2.pt.tmp"):
        assert here.run(*FIT, "--set", "lr=0.02")[0] == 1
    after = here.listing()
    assert after[str(here.vector().relative_to(here.base.path))] == before[str(here.vector().relative_to(here.base.path))]
    if call == "fsync":  # what is written is known to be whole before anything is replaced
        assert here.states()["vectors/tiny/sft/mine/sft_vector/layer_2.pt"] == "ok"
        assert "already done" in here.run(*FIT)[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_texts_under_way_on_a_full_disk(here: Here, code: int) -> None:
    """The line cannot be appended: the cell fails, the texts before it are kept and used."""
    before = here.listing()
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_vector"))
    real, count = os.write, 0

    def write(fd: int, data: bytes) -> int:
        nonlocal count
        if "unfinished" in os.readlink(f"/proc/self/fd/{fd}"):
            count += 1
            if count > 2:
                raise OSError(code, os.strerror(code))
        return real(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        exit_code, said = here.run(*APPLY, form="all")
    assert exit_code == 1 and os.strerror(code) in said and "Traceback" not in said
    lines = here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl")
    assert len(lines.read_bytes().splitlines()) == 2
    assert here.run(*APPLY, form="all")[0] == 0 and here.listing() == before


def test_a_disk_that_takes_half_a_line(here: Here) -> None:
    """A short write, as just before a disk is full: the half line counts for nothing, and no line after it is lost with it."""
    before = here.listing()
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_vector"))
    real, made, count = os.write, list[str](), 0

    def write(fd: int, data: bytes) -> int:
        nonlocal count
        if "unfinished" in os.readlink(f"/proc/self/fd/{fd}"):
            count += 1
            if count == 2:
                return real(fd, data[: len(data) // 2])
            if count == 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        here.run(*APPLY)
    lines = here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        real_generate = generation.generate

        def told(model: Any, sites: Any, rows: Any, *more: Any) -> Any:
            made.extend(row.seed for row in rows)
            return real_generate(model, sites, rows, *more)

        patch.setattr(generation, "generate", told)
        whole = 0 if not lines.exists() else sum(_is_json(line) for line in lines.read_bytes().splitlines())
        assert here.run(*APPLY)[0] == 0
    assert here.listing() == before
    assert whole == 3 and len(made) == 3, f"{whole} whole lines of the 3 texts that were written, {len(made)} texts made again of 3"


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), list)
    except ValueError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_really_full_disk(here: Here, small_disk: Path) -> None:
    """No injection: the results lie on a file system with no byte left."""
    before = here.listing()
    shutil.copytree(here.path("vectors"), small_disk / "vectors")
    for name in ("vectors", "generation"):
        shutil.rmtree(here.path(name))
        (small_disk / name).mkdir(exist_ok=True)
        here.path(name).symlink_to(small_disk / name)
    shutil.rmtree(small_disk / "vectors/tiny/sft/mine/sft_lora")
    try:
        with open(small_disk / "ballast", "wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
    except OSError as error:
        assert error.errno == errno.ENOSPC
    for words in (FIT, APPLY):
        exit_code, said = here.run(*words, form="all")
        assert exit_code == 1 and "No space left on device" in said and "Traceback" not in said, said
    (small_disk / "ballast").unlink()
    for words in (FIT, APPLY):
        assert here.run(*words, form="all")[0] == 0
    for name in ("vectors", "generation"):  # listing does not follow links
        here.path(name).unlink()
        shutil.copytree(small_disk / name, here.path(name))
    assert here.listing() == before


@contextmanager
def read_only(folder: Path) -> Iterator[str]:
    """The folder on a read-only mount (permissions do not stop root)."""
    for words in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        if done.returncode:
            if words[1] == "-o":
                subprocess.run(["umount", "-l", str(folder)], check=False)
            yield done.stderr.strip()
            return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("words", [FIT, APPLY, LOSS], ids=["fit", "generate", "loss"])
def test_a_read_only_base_dir(here: Here, words: tuple[str, ...]) -> None:
    """What is done is found done; what is not fails with the reason; dry run and verify work."""
    before = here.listing()
    with read_only(here.base.path) as refused, pytest.MonkeyPatch.context() as patch:
        if refused:  # mounting is not permitted here: the calls that would meet it
            patch.setattr(Path, "mkdir", _read_only_call)
            patch.setattr("spilt.artifacts.atomic.open", _read_only_call, raising=False)
            patch.setattr(os, "open", _read_only_call)
            patch.setattr(Path, "unlink", _read_only_call)
        assert "already done" in here.run(*words, form="all")[1]
        exit_code, said = here.run(*words, "--force", form="all")
        assert exit_code == 1 and "Read-only file system" in said and "Traceback" not in said, said
        assert said.count("Read-only file system") >= 3  # each cell for itself
        assert here.run(*words, "--dry_run")[0] == 0
        assert set(here.states().values()) == {"ok"}
    assert here.listing() == before


def _read_only_call(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_vector(here: Here, part: float) -> None:
    """apply and loss: that cell fails with the file's name, others go on, exit 1. generate: fitted again to the same bytes."""
    before, path = here.listing(), here.vector("lora")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert here.states()["vectors/tiny/sft/mine/sft_lora/layer_2.pt"] == "damaged"
    assert verify.main(["--base_dir", str(here.base.path)]) == 1
    for words in (APPLY, LOSS):
        exit_code, said = here.run(*words, form="all")
        assert exit_code == 1 and str(path) in said and "Traceback" not in said
        assert "already done" in said  # the two other forms
    exit_code, said = here.run(*FIT, form="all")
    assert exit_code == 0 and here.listing() == before


def test_a_vector_with_one_bit_changed(here: Here) -> None:
    """It still loads: only its manifest tells. It must not be used in silence."""
    path, size = here.vector("lora"), here.vector("lora").stat().st_size
    data = bytearray(path.read_bytes())
    values = torch.load(path, weights_only=True)["lora_A"].numpy().tobytes()
    data[data.index(values[:16]) + 2] ^= 1
    path.write_bytes(data)
    assert len(data) == size and here.states()["vectors/tiny/sft/mine/sft_lora/layer_2.pt"] == "damaged"
    for words in (APPLY, LOSS):
        exit_code, said = here.run(*words, form="all")
        assert exit_code == 1 and str(path) in said and "Traceback" not in said, said


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_truncated_losses_and_texts(here: Here, part: float) -> None:
    """Seen by the hash, made again to the same bytes; files beside them are not touched."""
    before = here.listing()
    for path, words in ((here.losses(1.0), LOSS), (here.texts(-1.0), APPLY)):
        stamps = {name: here.path(name).stat().st_mtime_ns for name in before}
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        assert here.states()[str(path.relative_to(here.base.path))] == "damaged"
        assert "1 damaged" in here.run(*words, "--dry_run")[1]
        assert here.run(*words)[0] == 0
        after = here.listing()  # train.log says what was written last in its folder: here the train split, before the test split
        assert {name: after[name] for name in after if not name.endswith(".log")} == {
            name: before[name] for name in before if not name.endswith(".log")
        }
        touched = {name for name in before if here.path(name).stat().st_mtime_ns != stamps[name]}
        assert len(touched) <= 6, touched  # its folder's files, not the other multipliers'


GARBLED: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "zeros": lambda path: path.write_bytes(b"\0" * 300),
    "list": lambda path: path.write_text("[]"),
    "object": lambda path: path.write_text("{}"),
    "number": lambda path: path.write_text("3"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "digits": lambda path: path.write_text('{"bytes": ' + "9" * 5000 + "}"),
    "wrong types": lambda path: path.write_text('{"sha256": [], "bytes": "x", "identity": {}, "parts": 3}'),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", GARBLED)
def test_a_garbled_manifest(here: Here, how: str) -> None:
    """Not believed: the artifact is made again to the same bytes, without a traceback. A folder in its place fails that cell."""
    before, path = here.listing(), manifest.manifest_path(here.vector("lora"))
    GARBLED[how](path)
    assert here.states()[str(here.vector("lora").relative_to(here.base.path))] == "damaged"
    assert here.run(*FIT, "--dry_run", form="all")[0] == 0
    exit_code, said = here.run(*FIT, form="all")
    assert "Traceback" not in said and said.count("already done") >= 2
    if how == "folder":
        assert exit_code == 1
    else:
        assert exit_code == 0 and here.listing() == before


def test_without_its_manifest_a_vector_is_the_released_codes(here: Here) -> None:
    manifest.manifest_path(here.vector()).unlink()
    before = here.vector().read_bytes()
    assert here.states()[str(here.vector().relative_to(here.base.path))] == "foreign"
    exit_code, said = here.run(*FIT, form="all")
    assert exit_code == 0 and here.vector().read_bytes() == before
    assert here.run(*FIT, "--force")[0] == 0 and manifest.manifest_path(here.vector()).exists()


LINES = [
    b"5",
    b"null",
    b'"text"',
    b"[]",
    b"[1]",
    b'["x", null, 0, 0]',
    b"[[], null, 0, 0, [1]]",
    b"[{}, 1, 2, 3, 4]",
    b"\xff\xfe",
    b"[" * 100_000,
    b"\0" * 50,
]


@pytest.mark.parametrize("line", LINES, ids=[line[:12].decode("latin1") for line in LINES])
def test_garbage_among_unfinished_texts(here: Here, line: bytes) -> None:
    """Lines that no run of ours wrote count for nothing."""
    before = here.listing()
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_vector"))
    lines = here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl")
    lines.parent.mkdir()
    lines.write_bytes(line + b"\n" + line)
    exit_code, said = here.run(*APPLY)
    assert exit_code == 0 and "Traceback" not in said, said
    assert here.listing() == before


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 100], ids=["empty", "text", "zip"])
def test_a_damaged_checkpoint_begins_again(bare: Here, prepared: families.Base, content: bytes) -> None:
    path = bare.vector().with_name("layer_2.unfinished.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert bare.run(*FIT)[0] == 0 and not path.exists()
    assert bare.vector().read_bytes() == (prepared.path / bare.vector().relative_to(bare.base.path)).read_bytes()


# ---------------------------------------------------------------- losses under way

SCORE = ("--mode", "loss", "--multipliers", "-2", "-1", "0", "1", "2")
# run_spilt.py, killed when it is about to score another batch than the first BATCHES
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from spilt.engine import score
real, count = score.Recorded._scores, 0
def scores(*args):
    global count
    count += 1
    if count > int(os.environ["BATCHES"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
score.Recorded._scores = scores
from spilt.cli import main
raise SystemExit(main())
"""


class Scored(Here):
    """A base with enough pairs for many batches in each split."""

    folder = "vectors/tiny/get_sft_loss/sft/mine/sft_vector"

    def kill(self, batches: int, *words: str) -> None:
        """A real process, ended by SIGKILL after so many batches."""
        argv = [*self.base.argv("sft", "vector", *(words or SCORE)), "--quiet", "--checkpoint_seconds", "0"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "BATCHES": str(batches)}
        done = subprocess.run([sys.executable, "-c", KILLED, *argv], env=env, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr

    def stop(self, batches: int) -> None:
        """Quicker: the same end by an interrupt, in this process."""
        assert self._run(batches, *SCORE, "--checkpoint_seconds", "0")[0] == 130

    def score(self, *words: str) -> int:
        """How many batches a run to the end scores."""
        exit_code, said, count = self._run(10**6, *(words or SCORE))
        assert exit_code == 0, said
        return count

    def _run(self, most: int, *words: str) -> tuple[int, str, int]:
        real, count = score.Recorded._scores, 0

        def scores(*args: Any) -> Any:
            nonlocal count
            if count == most:
                raise KeyboardInterrupt
            count += 1
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score.Recorded, "_scores", scores)
            return *self.run(*words), count

    def unfinished(self) -> list[str]:
        return [name for name in self.listing() if "unfinished" in name]


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Scored]:
    monkeypatch.setattr(runner, "_report", no_report)
    base = families.make_base(tmp_path / "base", train=40, test=24)
    assert cli.main([*base.argv("sft", "vector", *FIT), "--quiet"]) == 0
    yield Scored(base, capsys)
    fresh()


def in_train(here: Scored) -> int:
    """Batches of the first split."""
    count = here.score(*SCORE, "--split", "train")
    shutil.rmtree(here.path(here.folder))
    return count


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_losses_killed_in_the_middle_of_a_split(scored: Scored, split: str) -> None:
    """The rerun scores the batches that are missing, to the bytes of a run without the kill, and nothing is left over."""
    first = in_train(scored)
    every = scored.score()
    whole = scored.listing()
    assert first >= 8 and every - first >= 4 and not scored.unfinished()
    shutil.rmtree(scored.path(scored.folder))
    done = 5 if split == "train" else first + 2
    scored.kill(done)
    assert scored.unfinished() == [f"{scored.folder}/unfinished_0.jsonl"]
    assert not [name for name in scored.listing() if f"{split}_losses" in name]
    (found,) = [found for found in verify.check(scored.base.path) if "unfinished" in found.path.name]
    assert found.state == "leftover" and found.reason.startswith("losses of a run"), found
    assert scored.score() == every - done
    assert scored.listing() == whole


def test_losses_stopped_again_and_again(scored: Scored) -> None:
    every = scored.score()
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    for _ in range(3):
        scored.stop(4)
    assert scored.score() == every - 12 and scored.listing() == whole


def test_unfinished_losses_of_another_request(scored: Scored) -> None:
    """Lines count for what was asked alone: other rows, another vector, --force. They go when the result is stored."""
    every = scored.score()
    shutil.rmtree(scored.path(scored.folder))
    scored.stop(5)
    kept = scored.path(f"{scored.folder}/unfinished_0.jsonl").read_bytes()

    def again(*words: str) -> int:
        shutil.rmtree(scored.path(scored.folder))
        scored.path(scored.folder).mkdir()
        scored.path(f"{scored.folder}/unfinished_0.jsonl").write_bytes(kept)
        count = scored.score(*SCORE, *words)
        assert not scored.unfinished()
        return count

    assert again() == every - 5
    assert again("--force") == every
    few = again("--limit", "20")
    assert again("--limit", "20", "--force") == few
    assert scored.run(*FIT, "--force", "--set", "lr=0.5")[0] == 0
    assert again() == every


def test_losses_that_are_scored_and_cannot_be_written(scored: Scored) -> None:
    """The tables that are missing are made of what was kept, though fewer multipliers are asked for now."""
    assert scored.score() > 0
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    with failing_disk(errno.ENOSPC, "fsync", "m1.0_winning_only/.train_losses.csv") as hit:
        exit_code, said = scored.run(*SCORE, "--split", "train", "--checkpoint_seconds", "0")
    assert hit and exit_code == 1 and "No space left" in said
    made = [name for name in scored.listing() if name.endswith("train_losses.csv")]
    assert len(made) == 6 and scored.unfinished()
    assert scored.score(*SCORE, "--split", "train") == 0
    assert scored.score() > 0
    assert scored.listing() == whole


def test_losses_under_way_on_a_full_disk(scored: Scored) -> None:
    """The lines cannot be appended: the cell fails, what was kept before is used."""
    every = scored.score()
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    real, count = os.write, 0

    def write(fd: int, data: bytes) -> int:
        nonlocal count
        if "unfinished" in os.readlink(f"/proc/self/fd/{fd}"):
            count += 1
            if count == 3:
                return real(fd, data[: len(data) // 2])
            if count > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        exit_code, said = scored.run(*SCORE, "--checkpoint_seconds", "0")
    assert exit_code == 1 and "No space left" in said and "Traceback" not in said
    assert scored.score() == every - 2 and scored.listing() == whole


def test_a_short_measurement_keeps_nothing(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved after --checkpoint_seconds, not before."""
    monkeypatch.setattr(lines.Journal, "append", lambda *_: pytest.fail("wrote within the first minute"))
    assert scored.score() > 0


@pytest.mark.parametrize("line", LINES, ids=[line[:12].decode("latin1") for line in LINES])
def test_garbage_among_unfinished_losses(here: Here, line: bytes) -> None:
    before = here.listing()
    folder = here.losses(1.0).parents[1]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "unfinished_0.jsonl").write_bytes(line + b"\n" + line)
    exit_code, said = here.run(*LOSS)
    assert exit_code == 0 and "Traceback" not in said, said
    assert here.listing() == before


DAMAGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "a sequence that is not there": lambda line: [line[0], [10**6, *line[1][1:]], *line[2:]],
    "no sequence": lambda line: [line[0], "all", *line[2:]],
    "too few losses": lambda line: [*line[:2], line[2][1:], line[3]],
    "no losses": lambda line: line[:2],
    "losses that are no numbers": lambda line: [*line[:2], ["?" for _ in line[2]], line[3]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_unfinished_losses(scored: Scored, damage: str) -> None:
    """A line of ours that was changed counts for nothing: its batch is scored again."""
    every = scored.score()
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    scored.stop(5)
    path = scored.path(f"{scored.folder}/unfinished_0.jsonl")
    kept = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(DAMAGES[damage](json.loads(kept[0]))), *kept[1:]]))
    assert scored.score() == every - 4 and scored.listing() == whole


@pytest.mark.slow
def test_a_sweep_killed_among_its_random_directions(scored: Scored) -> None:
    """The control is many measurements of a few batches each; they are kept like the others."""
    words = ("--mode", "loss", "--multipliers", "sweep", "--split", "test", "--limit", "8")
    every = scored.score(*words)
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    scored.kill(every - 7, *words)
    assert scored.unfinished() and not scored.path(f"{scored.folder}/control.csv").exists()
    assert scored.score(*words) == 7 and scored.listing() == whole


# ---------------------------------------------------------------- changed inputs


def outcomes(said: str) -> list[str]:
    """The outcome column of the summary table."""
    return [word for line in said.splitlines() for word in ("already done", "done", "failed", "skipped") if f"  {word}  " in line][:9]


def test_a_swapped_model(here: Here) -> None:
    """Everything made from it is stale: verify says so, and the same command makes it again."""
    folder = here.path("models/tiny")
    families.build("qwen2", seed=1).save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    assert set(here.states().values()) == {"stale"}
    assert verify.main(["--base_dir", str(here.base.path)]) == 0
    before = here.listing()
    for words in (FIT, APPLY, LOSS):
        assert "stale" in here.run(*words, "--dry_run")[1]
        assert "already done" not in here.run(*words, form="all")[1]
    assert set(here.states().values()) == {"ok"}
    after = here.listing()
    assert all(after[name] != before[name] for name in before if name.endswith((".pt", ".csv")))


def test_one_weight_changed_in_a_model_file(here: Here) -> None:
    path = here.path("models/tiny/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert set(here.states().values()) == {"stale"}


def test_edited_settings(here: Here) -> None:
    """A changed value is another request; the file's comments and order are not."""
    path = here.base.hparams("mine", "sft", "generate_sft_vector.yaml")
    text = path.read_text()
    path.write_text("# a comment\n" + "\n".join(reversed(text.splitlines())) if "layers:\n" not in text else "# a comment\n" + text)
    assert "already done" in here.run(*FIT)[1]
    before = here.vector().read_bytes()
    path.write_text(text.replace("1e-2", "2e-2"))
    exit_code, said = here.run(*FIT)
    assert exit_code == 0 and "already done" not in said and here.vector().read_bytes() != before
    for words in (APPLY, LOSS):  # what was made with the old vector
        assert "already done" not in here.run(*words)[1]
    path.write_text(text)
    assert here.run(*FIT)[0] == 0 and here.vector().read_bytes() == before


def test_edited_dataset_format(here: Here) -> None:
    """Other columns of the same data file are other data."""
    path = here.path("hparams/Steer/dataset_format.yaml")
    text = path.read_text()
    swapped = text.replace("matching: matching", "matching: TEMPORARY").replace("not_matching: not_matching", "not_matching: matching")
    assert swapped != text
    path.write_text(swapped.replace("TEMPORARY", "not_matching").replace("not_not_matching", "matching"))
    before = here.vector().read_bytes()
    exit_code, said = here.run(*FIT)
    assert exit_code == 0 and "already done" not in said, "fitted toward the other answer, and called done"
    assert here.vector().read_bytes() != before


def test_edited_data(here: Here) -> None:
    """Fits and losses read train.jsonl, texts valid.jsonl: each is stale with its own file."""
    path = here.base.data("mine", "train")
    path.write_text(path.read_text().replace("is 3 odd", "is 4 odd"))
    states = here.states()
    assert states["vectors/tiny/sft/mine/sft_vector/layer_2.pt"] == "stale"
    assert states[str(here.texts(1.0).relative_to(here.base.path))] == "ok"
    assert "already done" not in here.run(*FIT)[1]
    assert here.states()[str(here.texts(1.0).relative_to(here.base.path))] == "stale"  # its vector has changed now


def test_a_cell_fitted_again_makes_what_was_made_from_it_stale(here: Here) -> None:
    assert here.run(*FIT, "--force", "--set", "lr=0.5")[0] == 0
    states = here.states()
    assert {states[str(path.relative_to(here.base.path))] for path in (here.texts(1.0), here.losses(1.0))} == {"stale"}
    assert states[str(here.texts(1.0, "lora").relative_to(here.base.path))] == "ok"


# ---------------------------------------------------------------- clocks


def test_a_clock_that_goes_backwards(bare: Here, prepared: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result and no decision depends on the time of day."""
    now = [2e9]

    def back(*_: Any) -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(back() * 1e9))
    for words in (FIT, APPLY, LOSS):
        assert bare.run(*words, "--checkpoint_seconds", "0", form="all")[0] == 0
        assert bare.run(*words, form="all")[1].count("already done") >= 3
    made, reference = bare.listing(), Here(prepared, bare.capsys).listing()
    assert made == reference


def test_a_change_with_an_older_time_is_seen(here: Here) -> None:
    """Same size, and a time before the last run: content counts."""
    path = here.base.data("mine", "train")
    path.write_text(path.read_text().replace("is 3 odd", "is 7 odd"))
    os.utime(path, (1, 1))
    os.utime(here.vector(), (2e9, 2e9))
    assert "already done" not in here.run(*FIT)[1]


# ---------------------------------------------------------------- company


@pytest.mark.slow
@pytest.mark.parametrize("round", range(2))
def test_two_runs_of_the_same_request_at_once(bare: Here, prepared: families.Base, round: int) -> None:
    """Both end well, and what is stored is what one alone stores: the last whole file wins, and both are the same."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = bare.base.argv("sft", "all", "--mode", "both", "--multipliers", "-1", "1", "--quiet", "--checkpoint_seconds", "0")
    runs = [
        subprocess.Popen([sys.executable, str(ROOT / "run_spilt.py"), *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=180)[0].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    reference = {name: value for name, value in Here(prepared, bare.capsys).listing().items() if "get_sft_loss" not in name}
    assert bare.listing() == reference
    assert set(bare.states().values()) == {"ok"}


def test_another_run_takes_the_unfinished_texts_away(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one cell share the file of unfinished texts; the one that ends first removes it while the other looks."""
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_vector"))
    lines = here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl")
    lines.parent.mkdir()
    lines.write_bytes(b"")
    real = Path.exists

    def exists(self: Path, **kwargs: Any) -> bool:
        found = real(self, **kwargs)
        if self == lines and found:
            lines.unlink()
        return found

    monkeypatch.setattr(Path, "exists", exists)
    exit_code, said = here.run(*APPLY)
    assert exit_code == 0, said


# ---------------------------------------------------------------- files that vanish


def when_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """`act` once, after the plan is made and before the first step."""
    from spilt.model import host

    real = host.load

    def load(*args: Any) -> Any:
        made = real(*args)
        act()
        return made

    monkeypatch.setattr(host, "load", load)


@pytest.mark.parametrize("words", [APPLY, LOSS], ids=["apply", "loss"])
def test_a_vector_vanishes_midway(here: Here, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    when_the_model_is_loaded(monkeypatch, here.vector("lora").unlink)
    exit_code, said = here.run(*words, "--force", form="all")
    assert "Traceback" not in said and str(here.vector("lora").name) in said
    assert exit_code == 0 and " skipped " in said  # as a vector that was never there
    assert said.count("  done  ") >= 2


def test_the_data_vanishes_midway(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here.base.data("mine", "train")
    when_the_model_is_loaded(monkeypatch, path.unlink)
    before = here.listing()
    exit_code, said = here.run(*FIT, "--force", form="all")
    assert exit_code in (1, 2) and str(path) in said and "Traceback" not in said
    assert here.listing() == before


def test_the_model_vanishes_before_it_is_loaded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    from spilt.model import host

    real = host.load

    def load(*args: Any) -> Any:
        shutil.rmtree(here.path("models/tiny"))
        return real(*args)

    monkeypatch.setattr(host, "load", load)
    before = here.listing()
    exit_code, said = here.run(*APPLY, "--force")
    assert exit_code in (1, 2) and "models/tiny" in said and "Traceback" not in said
    assert here.listing() == before


def test_the_data_vanishes_between_plan_and_run(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment, there is a message and no traceback."""
    real, path = plan.make, here.base.data("mine", "train")

    def make(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        path.unlink()
        return made

    monkeypatch.setattr(plan, "make", make)
    exit_code, said = here.run(*FIT)
    assert exit_code in (1, 2) and path.name in said and "Traceback" not in said


# ---------------------------------------------------------------- memory

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. "
    "Error code 12 (Cannot allocate memory)"
)
ERRORS = {"cuda": CUDA, "cpu": CPU, "host": MemoryError()}


@contextmanager
def little_memory(error: Exception, most: int, *, only: str = "") -> Iterator[list[int]]:
    """More than `most` rows at once raise `error`, in recording, in the suffix and in decoding; yields the sizes that were refused."""
    record, logits, forward = suffix.record, suffix.logits, prompts.forward
    refused: list[int] = []

    def check(rows: int) -> None:
        if rows > most:
            refused.append(rows)
            raise type(error)(*error.args)

    def small_record(model: Any, layer: int, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        check(len(input_ids) if only in ("", "record") else 0)
        return record(model, layer, input_ids, *args, **kwargs)

    def small_logits(model: Any, layer: int, stream: Any, keep: Any, **kwargs: Any) -> Any:
        check(len(stream) if only in ("", "logits") else 0)
        return logits(model, layer, stream, keep, **kwargs)

    def small_forward(model: Any, sites: Any, ids: Any, *args: Any) -> Any:
        check(len(ids) if only in ("", "forward") else 0)
        return forward(model, sites, ids, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "record", small_record)
        patch.setattr(suffix, "logits", small_logits)
        for module in (prompts, generation):
            patch.setattr(module, "forward", small_forward)
        yield refused


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_texts_with_little_memory(here: Here, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """The same texts in smaller batches."""
    before = here.listing()
    shutil.rmtree(here.path("generation"))
    with little_memory(error, 1) as refused:
        assert here.run(*APPLY, form="all")[0] == 0
    assert refused and here.listing() == before
    assert "--batch_size" in caplog.text and "out of memory" in caplog.text


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_losses_with_little_memory(here: Here, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """The same losses up to the rounding of smaller batches."""
    import numpy as np
    import pandas as pd

    before = {m: pd.read_csv(here.losses(m)) for m in (-1.0, 1.0)}
    with little_memory(error, 2) as refused:
        assert here.run(*LOSS, "--force")[0] == 0
    assert refused and "out of memory" in caplog.text
    for m, table in before.items():
        again = pd.read_csv(here.losses(m))
        assert list(again) == list(table) and len(again) == len(table)
        assert np.allclose(again["loss_sum"], table["loss_sum"], atol=1e-4)


@pytest.mark.parametrize("stage", ["generate", "loss"])
def test_the_message_names_batch_length_layer_and_flag(here: Here, caplog: pytest.LogCaptureFixture, stage: str) -> None:
    with little_memory(CUDA, 2):
        assert here.run(*(APPLY if stage == "generate" else LOSS), "--force")[0] == 0
    warnings = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert warnings
    for message in warnings:
        for wanted in ("tokens", "layer 2", "--"):  # length, layer, and the flag that makes it unnecessary; the batch is a number
            assert wanted in message, f"no {wanted!r} in: {message}"
        assert any(word.strip(",;").isdigit() for word in message.split())


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.loss])
def test_a_fit_with_little_memory_goes_on_in_parts(bare: Here, caplog: pytest.LogCaptureFixture, method: str) -> None:
    """The rows of a minibatch are scored a few at a time, the loss is still over all of them: the same vectors up to rounding."""
    words = (*FIT, "--set", "dropout=0")
    assert bare.run(*words, form="all", method=method)[0] == 0
    paths = {form: bare.path(f"vectors/tiny/{method}/mine/{method}_{form}/layer_2.pt") for form in ("vector", "lora", "local_weight")}
    want = {form: torch.load(path, weights_only=True) for form, path in paths.items()}
    with little_memory(CUDA, 2, only="logits") as refused:
        exit_code, said = bare.run(*words, "--force", form="all", method=method)
    assert refused and exit_code == 0, said
    assert "parts" in caplog.text and "layer 2" in caplog.text and "batch_size" in caplog.text
    for form, path in paths.items():
        made = torch.load(path, weights_only=True)
        pairs = [(made, want[form])] if form == "vector" else [(made[k], want[form][k]) for k in made if isinstance(made[k], torch.Tensor)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_a_fit_of_one_row_that_is_too_large_runs_its_blocks_twice(bare: Here, caplog: pytest.LogCaptureFixture) -> None:
    """The last way out before an error: the backward pass keeps the blocks' inputs alone."""
    words = (*FIT, "--set", "dropout=0")
    path = bare.path("vectors/tiny/sft/mine/sft_lora/layer_2.pt")
    assert bare.run(*words, form="lora")[0] == 0
    want, plain, inside = torch.load(path, weights_only=True), (suffix.logits, suffix.checkpointed), [False]

    @contextmanager
    def checkpointed(*args: Any) -> Iterator[None]:
        inside[0] = True
        with plain[1](*args):
            yield
        inside[0] = False

    def logits(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not inside[0]:
            raise type(CUDA)(*CUDA.args)
        return plain[0](*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "logits", logits)
        patch.setattr(suffix, "checkpointed", checkpointed)
        exit_code, said = bare.run(*words, "--force", form="lora")
    assert exit_code == 0, said
    assert "in parts of 1 " in caplog.text and "running each block twice" in caplog.text
    made = torch.load(path, weights_only=True)
    assert all(torch.allclose(made[name], want[name], atol=1e-5) for name in ("lora_A", "lora_B"))


@pytest.mark.parametrize("method", ["caa", "reps"])
def test_caa_and_the_reference_of_reps_with_little_memory(here: Here, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go over all answers, in batches of their own: halved like any other."""
    assert here.run(*FIT, method=method)[0] == 0
    path = here.path(f"vectors/tiny/{method}/mine/{method}_vector/layer_2.pt")
    before, under_way, refused = torch.load(path, weights_only=True), [False], list[int]()

    def inside(call: Any) -> Any:
        def flagged(*args: Any, **kwargs: Any) -> Any:
            under_way[0] = True
            try:
                return call(*args, **kwargs)
            finally:
                under_way[0] = False

        return flagged

    def small(call: Any, place: int) -> Any:
        def limited(*args: Any, **kwargs: Any) -> Any:
            if under_way[0] and len(args[place]) > 2:
                refused.append(len(args[place]))
                raise torch.OutOfMemoryError(*CUDA.args)
            return call(*args, **kwargs)

        return limited

    monkeypatch.setattr(fit_stage, "_closed_form", inside(fit_stage._closed_form))
    monkeypatch.setattr(training.Fit, "_reference", inside(training.Fit._reference))
    monkeypatch.setattr(suffix, "record", small(suffix.record, 2))
    monkeypatch.setattr(suffix, "logits", small(suffix.logits, 2))
    exit_code, said = here.run(*FIT, "--force", method=method)
    assert refused and exit_code == 0, said
    assert torch.allclose(torch.load(path, weights_only=True), before, atol=1e-5)


@pytest.mark.parametrize("words", [FIT, APPLY, LOSS], ids=["fit", "generate", "loss"])
def test_one_sequence_that_does_not_fit_fails_its_cell_only(here: Here, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """The message names length, layer and the way out; the other cells are done; nothing that was stored is lost."""
    before, under_way = here.listing(), [""]
    real = runner._run_step

    def run_step(step: Any, run: Any) -> Any:
        under_way[0] = step.cells[0].intervention
        run.recordings.clear()  # each cell records for itself
        return real(step, run)

    monkeypatch.setattr(runner, "_run_step", run_step)

    def never(call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if under_way[0] == "lora":
                raise type(CPU)(*CPU.args)
            return call(*args, **kwargs)

        return instead

    for module, name in ((suffix, "record"), (suffix, "logits"), (prompts, "forward"), (generation, "forward")):
        monkeypatch.setattr(module, name, never(getattr(module, name)))
    exit_code, said = here.run(*words, "--force", form="all")
    assert exit_code == 1 and said.count("  done  ") >= 2 and "Traceback" not in said, said
    message = next(line for line in said.splitlines() if line.startswith("error:") and "lora" in line)
    assert "does not fit in memory" in message and "tokens" in message
    assert any(way in message for way in ("--device auto", "--dtype", "--set", "output_length", "max_new_tokens"))
    assert "layer 2" in message, message
    assert {name: value for name, value in here.listing().items() if "unfinished" not in name} == before


# ---------------------------------------------------------------- verify


def test_verify_lists_what_is_there(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    (here.vector().parent / ".layer_2.pt.tmp-1-abcd").write_bytes(b"half")
    (here.vector().parent / "layer_2.unfinished.pt").write_bytes(b"")
    here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl").write_bytes(b"")
    lost = here.texts(1.0, "lora")
    lost.unlink()
    manifest.manifest_path(here.texts(-1.0)).unlink()
    before = families.listing(here.base.path)
    fresh()
    assert verify.main(["--base_dir", str(here.base.path)]) == 0
    said = capsys.readouterr().out
    assert said.count("\nleftover ") == 5 and said.count("\nforeign ") == 2 and "damaged       0" in said  # each with its line in the table
    assert families.listing(here.base.path) == before
    here.vector("lora").write_bytes(b"")
    fresh()
    assert verify.main(["--base_dir", str(here.base.path)]) == 1
    assert verify.main(["--base_dir", str(here.base.path / "models")]) == 2
    assert verify.main(["--base_dir", "/nowhere"]) == 2
    assert verify.main(["--what"]) == 2


def _rewrite(path: Path, data: bytes) -> None:
    """Other content with a manifest that speaks of it: only the content can tell."""
    record = json.loads(manifest.manifest_path(path).read_text())
    del record["record_sha256"]  # as an older version wrote it
    path.write_bytes(data)
    record |= {"sha256": manifest.digest(data), "bytes": len(data)}
    manifest.manifest_path(path).write_text(json.dumps(record))


def _saved(content: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CONTENTS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "vector not finite": ("vector", lambda _: _saved(torch.full((families.HIDDEN,), float("nan"))), "NaN"),
    "vector of another size": ("vector", lambda _: _saved(torch.zeros(7)), "[7]"),
    "vector of no rows": ("vector", lambda _: _saved(torch.zeros(0, families.HIDDEN)), "[0, 32]"),
    "vector of whole numbers": ("vector", lambda _: _saved(torch.zeros(families.HIDDEN, dtype=torch.long)), "int64"),
    "vector with code": ("vector", lambda _: b"cos\nsystem\n(S'true'\ntR.", "refused"),
    "losses without a row": ("losses", lambda data: data.rsplit(b"\n", 2)[0] + b"\n", "rows"),
    "losses without a column": ("losses", lambda data: b"\n".join(line.rsplit(b",", 1)[0] for line in data.split(b"\n")), "columns"),
    "losses not finite": ("losses", lambda data: data[:-3] + b"nan\n", "n"),
    "losses cut": ("losses", lambda data: data[:-40], ""),
    "texts without a row": ("texts", lambda data: json.dumps(json.loads(data)[:-1]).encode(), "rows; wanted"),
    "texts without a key": ("texts", lambda data: data.replace(b'"pred"', b'"prod"'), "'pred'"),
    "texts of numbers": ("texts", lambda _: b"[1, 2, 3]", "int"),
    "texts deep": ("texts", lambda _: b"[" * 100_000, "JSON"),
    "no texts": ("texts", lambda _: b"[]", "empty"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_verify_looks_into_the_files(here: Here, what: str) -> None:
    kind, change, wanted = CONTENTS[what]
    path = {"vector": here.vector(), "losses": here.losses(1.0), "texts": here.texts(1.0)}[kind]
    _rewrite(path, change(path.read_bytes()))
    fresh()
    (found,) = [found for found in verify.check(here.base.path) if found.path == path]
    assert found.state == "damaged" and wanted in found.reason, found


def test_verify_knows_concepts_and_the_released_files(here: Here, tmp_path: Path) -> None:
    base = families.make_base(tmp_path / "concepts", train=4)
    for words in (FIT, APPLY):
        assert cli.main([*base.argv("sft", "lora", *words, dataset=base.many), "--quiet"]) == 0
    states = {found.state for found in verify.check(base.path)}
    assert states == {"ok"}
    stored = store.Store(base.path)
    folder = base.path / "vectors/tiny/reps/axbench/reps_vector"
    folder.mkdir(parents=True)
    torch.save(torch.randn(3, families.HIDDEN), folder / "layer_2.pt")
    loss = stored.base_dir / "vectors/tiny/get_sft_loss/reps/mine/reps_vector/vector_reps_m1.0_winning_only/train_losses.csv"
    loss.parent.mkdir(parents=True)
    loss.write_text("epoch,step,pos_steer_loss,pos_steering_factors,neg_steering_factors\n0,0,1.5,1.0,1.0\n")
    found = {str(one.path.relative_to(base.path)): one.state for one in verify.check(base.path)}
    assert [found[str(path.relative_to(base.path))] for path in (folder / "layer_2.pt", loss)] == ["foreign", "foreign"]


def test_verify_imports_no_torch_without_vectors(here: Here) -> None:
    for path in here.base.path.rglob("*.pt"):
        path.unlink()
        manifest.manifest_path(path).unlink(missing_ok=True)
    code = f"import sys; from spilt import verify; verify.main(['--base_dir', {str(here.base.path)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_foreign_vector_is_used_as_it_is(here: Here) -> None:
    manifest.manifest_path(here.vector()).unlink()
    assert here.run(*APPLY, "--force")[0] == 0
