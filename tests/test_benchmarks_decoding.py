"""The decoding benchmarks compare like with like: the same texts, the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import decoding, sampling  # noqa: E402


def test_the_plain_hook_makes_the_same_texts() -> None:
    ours, plain = (decoding.one("tiny", 9, 6, 4, way)["texts"] for way in ("ours", "plain"))
    assert ours == plain and [len(text) for text in ours] == [6] * 9


def test_every_decoding_step_chooses_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "tiny", "--steps", "plain", "static", "--batch", "3", "--new_tokens", "6", "--repeats", "1"]
    assert decoding.main(words) == 0 and capsys.readouterr().out.count("| 3 of 3 |") == 2


def test_both_ways_choose_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling.main(["--rows", "3", "--vocabulary", "1000", "--repeats", "1"]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(sampling.WAYS)
