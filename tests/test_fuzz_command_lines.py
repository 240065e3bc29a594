"""Mutated command lines: a plan or one message, and nothing written."""

from __future__ import annotations

import io
import logging
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mutations import COUNT, Findings, mutated

from spilt import cli
from spilt.errors import UserError

WORDS = [
    "--dataset", "mine", "axbench", "--method", "sft", "caa", "all", "split", "--model_name", "tiny", "../tiny",
    "--intervention_method", "vector", "lora",
    "--mode", "apply", "loss", "both", "--device", "cpu", "auto", "--multipliers", "1", "-1", "1e3", "-2.5e-1", "nan", "inf", "sweep",
    "1e400", "0x1",
    "--base_dir", ".", "", " ", "--limit", "3", "0", "-5", "1.5", "9" * 30, "\u0663", "--seed", "--concepts", "1", "--split", "train",
    "--set", "lr=1", "=", "lr=",
    "a.b=c", "generation_params.top_p=.5", "generation_params={", "--force", "--quiet", "--dtype", "float32", "--checkpoint_seconds",
    "--", "-", "-h9", "--=",
    "--m", "--no", "\0", "\udc80", "🦀", "a" * 5000, "%s", "{}", "$(id)", "../../../etc/passwd", "-1e-2", "--batch_size", "--version",
    "--help",
    "report", "verify", "prepare",
]  # fmt: skip
# changes after which the request is surely wrong: flag -> a value (None: the flag goes)
WRONG: list[tuple[str, Any]] = [
    *((flag, None) for flag in ("--dataset", "--method", "--model_name", "--intervention_method")),
    *(("--dataset", value) for value in ("mime", "", "../mine", "mine/..", "/", "\0", "a" * 5000)),
    *(("--method", value) for value in ("sptl", "", "SFTT", "sft,caa", "../sft")),
    *(("--model_name", value) for value in ("..", "../tiny", "tiny/", "/etc", "", "ti\0ny", "tiny2", "a" * 5000, ".tiny")),
    *(("--intervention_method", value) for value in ("vectr", "", "vector lora", "-")),
    *(("--mode", value) for value in ("fit", "", "generate apply")),
    *(("--multipliers", value) for value in ("nan", "inf", "-inf", "1,2", "one", "", "1e400", "--", "1e7")),
    *(("--limit", value) for value in ("0", "-1", "1.5", "x", "", "1e3")),
    *(("--batch_size", value) for value in ("0", "-1", "x")),
    *(("--seed", value) for value in ("x", "1.5", "", "9" * 30, "-1", "9" * 5000)),
    *(("--concepts", value) for value in ("1", "x", "-1", "9" * 30)),
    *(("--split", value) for value in ("dev", "")),
    *(("--dtype", value) for value in ("float7", "", "int8")),
    *(("--base_dir", value) for value in ("/nowhere", "", "\0", "a" * 5000)),
    *(
        ("--set", value)
        for value in ("lr", "=1", "lerning=1", "lr=[1", "lr=.nan", "lr=-1", "layers=[]", "method=caa", "lr.x=1", "generation_params.x=1")
    ),
    ("--checkpoint_seconds", "soon"),
    ("--unheard", "1"),
    ("stray", "word"),
]


class Reached(Exception):
    """The request was taken; the model would be loaded now."""


def run_line(words: list[str]) -> None:
    """cli.main as a process would run it; exit 2 as UserError, success as nothing."""
    out, err = io.BytesIO(), io.BytesIO()
    before = sys.stdout, sys.stderr
    wrapped = io.TextIOWrapper(out, "utf-8"), io.TextIOWrapper(err, "utf-8", errors="backslashreplace")
    sys.stdout, sys.stderr = wrapped
    try:
        try:
            code = cli.main(words)
        except Reached:
            code = 0
        except SystemExit as stop:  # as a process: the exit code
            code = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before
    if b"Traceback" in err.getvalue():
        raise AssertionError(err.getvalue().decode()[-500:])
    if code == 2:
        raise UserError(err.getvalue().decode().strip())
    if code != 0:
        raise AssertionError(f"exit {code}: {err.getvalue().decode()[-300:]}")


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import families

    caplog.set_level(logging.CRITICAL)
    base = families.make_base(tmp_path / "base", train=4, test=2)
    monkeypatch.chdir(tmp_path)

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr(cli, "run_plan", reached)
    sound = {
        "--dataset": base.one, "--method": "sft", "--model_name": base.model, "--intervention_method": "vector", "--mode": "loss",
        "--device": "cpu", "--base_dir": str(base.path), "--multipliers": "1", "--limit": "3", "--seed": "4",
        "--set": "output_length=300",
    }  # fmt: skip
    findings = Findings()
    had = families.listing(tmp_path)
    for seed in range(COUNT):
        rng = random.Random(f"line {seed}")
        flags, name = dict(sound), "free"
        flags["--mode"] = rng.choice(["generate", "apply", "both", "loss"])
        hurt = rng.random() < 0.4
        if hurt:
            flag, value = rng.choice(WRONG)
            if value is None:
                del flags[flag]
            else:
                flags[flag] = value
            name = f"{flag} {str(value)[:40]!r}"
            # a model folder that is not there is said in the plan's list of inputs: its hparam folder is missing all the same
        dry = rng.random() < 0.5
        words = [word for item in rng.sample(list(flags.items()), len(flags)) for word in item] + ["--dry_run"] * dry
        if not hurt:
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(words))
                kind = rng.randrange(5)
                if kind == 0:
                    words[at] = rng.choice(WORDS)
                elif kind == 1:
                    words.insert(at, rng.choice(WORDS))
                elif kind == 2 and len(words) > 1:
                    del words[at]
                elif kind == 3:
                    words[at] = mutated(words[at].encode("utf-8", "surrogateescape"), rng, 2).decode("utf-8", "surrogateescape")
                else:
                    other = rng.randrange(len(words))
                    words[at], words[other] = words[other], words[at]
        findings.run(f"{name} seed={seed} {' '.join(words)[:400]!r}", hurt, partial(run_line, words))
    findings.check("command lines")
    assert families.listing(tmp_path) == had, "a dry run or a refused request wrote something"
