"""A disk that fails, is full, takes half a line or is read only: that cell fails with the reason, what was stored stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults import APPLY, FIT, LOSS, Here, failing_disk, temporaries

from spilt.engine import decode as generation


@pytest.mark.few(2)
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


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["sft", "caa"])
@pytest.mark.parametrize("file", ["layer_3.pt", "layer_3.manifest.json", "metadata_layer_3.jsonl"])
@pytest.mark.long
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

        def told(model: Any, sites: Any, rows: Any, *more: Any, **how: Any) -> Any:
            made.extend(row.seed for row in rows)
            return real_generate(model, sites, rows, *more, **how)

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


@pytest.mark.long
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
@pytest.mark.few(1)
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
