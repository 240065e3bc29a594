"""Bases that faults are put in on purpose, and a failing disk. The files test_faults_*.py put them in.

docs/reliability.md has the table. Nothing that was stored before is lost, other cells go on, and the exit code and the reason say what was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest

from spilt import cli, verify
from spilt import run as runner
from spilt.artifacts import manifest
from spilt.model import identity
from spilt.report import drawing

ROOT = Path(__file__).resolve().parents[1]
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


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time and reads no file; test_report.py draws."""
    patch.setattr(drawing, "png_of", lambda figure: b"")
    patch.setattr(drawing, "svg_of", lambda figure: '<svg viewBox="0 0 10 10"></svg>')


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


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


def outcomes(said: str) -> list[str]:
    """The outcome column of the summary table."""
    return [word for line in said.splitlines() for word in ("already done", "done", "failed", "skipped") if f"  {word}  " in line][:9]
