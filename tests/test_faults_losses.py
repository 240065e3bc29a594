"""Losses under way: a run that ends before them is gone on with, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import forked
import pytest
from counts import CI
from faults import FIT, LINES, LOSS, ROOT, Here, failing_disk, fresh, no_report

from spilt import cli, verify
from spilt import run as runner
from spilt.artifacts import journal as lines
from spilt.engine import score

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
        done = forked.run(["-c", KILLED, *argv], env={"BATCHES": str(batches)})
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr

    def stop(self, batches: int, *words: str) -> None:
        """Quicker: the same end by an interrupt, in this process."""
        assert self._run(batches, *(words or SCORE), "--checkpoint_seconds", "0")[0] == 130

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


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    base = families.make_base(tmp_path_factory.mktemp("fitted") / "base", train=40, test=24)
    assert cli.main([*base.argv("sft", "vector", *FIT), "--quiet"]) == 0
    return base


@pytest.fixture
def scored(fitted: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Scored]:
    monkeypatch.setattr(runner, "_report", no_report)
    shutil.copytree(fitted.path, tmp_path / "base")
    yield Scored(fitted._replace(path=tmp_path / "base"), capsys)
    fresh()


def in_train(here: Scored) -> int:
    """Batches of the first split."""
    count = here.score(*SCORE, "--split", "train")
    shutil.rmtree(here.path(here.folder))
    return count


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.few(1)
def test_losses_killed_in_the_middle_of_a_split(scored: Scored, split: str) -> None:
    """The rerun scores the batches that are missing, to the bytes of a run without the kill, and nothing is left over."""
    first = in_train(scored)
    every = scored.score()
    whole = scored.listing()
    assert first >= 8 and every - first >= 4 and not scored.unfinished()
    shutil.rmtree(scored.path(scored.folder))
    done = 5 if split == "train" else first + 2
    (scored.kill if CI or split == "train" else scored.stop)(done)
    assert scored.unfinished() == [f"{scored.folder}/unfinished_0.jsonl"]
    assert not [name for name in scored.listing() if f"{split}_losses" in name]
    (found,) = [found for found in verify.check(scored.base.path) if "unfinished" in found.path.name]
    assert found.state == "leftover" and found.reason.startswith("losses of a run"), found
    assert scored.score() == every - done
    assert scored.listing() == whole


@pytest.mark.long
def test_losses_stopped_again_and_again(scored: Scored) -> None:
    every = scored.score()
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    for _ in range(3):
        scored.stop(4)
    assert scored.score() == every - 12 and scored.listing() == whole


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_a_short_measurement_keeps_nothing(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved after --checkpoint_seconds, not before."""
    monkeypatch.setattr(lines.Journal, "append", lambda *_: pytest.fail("wrote within the first minute"))
    assert scored.score() > 0


@pytest.mark.parametrize("line", LINES, ids=[line[:12].decode("latin1") for line in LINES])
@pytest.mark.few(2)
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
@pytest.mark.few(1)
@pytest.mark.long
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
@pytest.mark.long
def test_a_sweep_killed_among_its_random_directions(scored: Scored) -> None:
    """The control is many measurements of a few batches each; they are kept like the others."""
    words = ("--mode", "loss", "--multipliers", "sweep", "--split", "test", "--limit", "8")
    every = scored.score(*words)
    whole = scored.listing()
    shutil.rmtree(scored.path(scored.folder))
    (scored.kill if CI else scored.stop)(every - 7, *words)
    assert scored.unfinished() and not scored.path(f"{scored.folder}/control.csv").exists()
    assert scored.score(*words) == 7 and scored.listing() == whole
