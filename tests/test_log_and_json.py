"""--log FILE holds all that was said, and no secret; --json is one document on stdout and nothing else."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import families
import forked
import pytest

from spilt import __version__, cli, summary
from spilt.terminal import complain, logging_to, without_secrets

ROOT = Path(__file__).resolve().parents[1]
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) ")
# the same program, in which one kind of cell meets an error that nobody foresaw
BROKEN = """
from spilt import cli
from spilt.tasks import generate
def broken(*_): raise ZeroDivisionError("by hand")
generate.generate = broken
raise SystemExit(cli.main())
"""


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=6)


def called(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return forked.run(words, env=env)


# ---------------------------------------------------------------- the log


@pytest.mark.long
def test_all_that_is_said_is_in_the_log(base: families.Base, tmp_path: Path) -> None:
    """Versions, command, plan, begin and end of each cell, warnings, the table, errors with traceback; the next run goes behind it."""
    path, secret = tmp_path / "run.log", "abcd1234wxyz"
    secret_setting = ("--set", f"system_prompt={secret}", "--set", "use_chat_template=false")
    words = base.argv("sft", "vector", "--multipliers", "1", "--log", str(path), *secret_setting)
    done = called("-c", BROKEN, *words, SOME_API_KEY=secret)
    assert done.returncode == 1, done.stderr
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert STAMP.match(lines[0]) and f"INFO spilt {__version__}, python 3" in lines[0] and "torch" in lines[0]
    said = [STAMP.sub("", line) for line in lines]
    assert said[1].startswith("command: python run_spilt.py --dataset mine --method sft ") and "system_prompt=***" in said[1]
    assert sum(line.startswith(("plan 1. generate mine sft vector: ", "plan 2. apply mine sft vector: ")) for line in said) == 2
    for cell in ("[1/2] begins: generate mine", "[1/2] done: generate mine", "[2/2] begins: apply mine", "[2/2] failed: apply mine"):
        assert sum(line.startswith(cell) for line in said) == 1
    assert re.search(r" ERROR Traceback \(most recent call last\):\n(?:  .*\n)+  ZeroDivisionError: by hand", text)
    assert re.search(r" WARNING .*hold other rows out", text) and "INFO 1 done, 1 failed in" in text and "INFO exit code 1" in text
    for line in filter(None, (done.stdout + done.stderr).replace(secret, "***").splitlines()):
        assert line.removeprefix("WARNING: ").strip() in text, line
    assert secret not in text
    (base.path / "models" / base.model / "config.json").unlink()
    wrong = called("run_spilt.py", *base.argv("sft", "vector", "--log", str(path)))
    after = path.read_text(encoding="utf-8")
    assert wrong.returncode == 2 and after.startswith(text) and re.search(r" ERROR error: unknown model 'tiny'", after[len(text) :])


def test_a_mistake_in_a_cell_has_its_traceback_in_the_log_alone(
    base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.log"
    base.path.joinpath("vectors/tiny/sft/mine/sft_vector").mkdir(parents=True)
    base.path.joinpath("vectors/tiny/sft/mine/sft_vector/layer_2.pt").write_bytes(b"GGUF of another tool")
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--log", str(path))) == 2
    assert "Traceback" not in capsys.readouterr().err
    text = path.read_text()
    assert re.search(r" DEBUG apply mine sft vector failed\n  Traceback", text) and " ERROR error: apply mine sft vector: " in text


@pytest.mark.parametrize("kind", ["no folder", "folder", "fifo", "device", "model", "too long"])
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["run", "dry"])
def test_a_log_that_cannot_be_is_a_mistake_before_anything_runs(
    base: families.Base, tmp_path: Path, kind: str, dry: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = {
        "no folder": tmp_path / "nowhere" / "a.log", "folder": tmp_path, "fifo": tmp_path / "fifo", "device": Path("/dev/full"),
        "model": base.path / "models" / base.model / "model.safetensors", "too long": tmp_path / ("x" * 300),
    }[kind]  # fmt: skip
    if kind == "fifo":
        os.mkfifo(path)
    before = families.listing(base.path)
    assert cli.main(base.argv("sft", "vector", "--mode", "generate", "--log", str(path), *dry)) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: --log {path}: ") and said.err.count("\n") == 1 and said.out == ""
    assert families.listing(base.path) == before


def test_a_dry_run_writes_no_log(base: families.Base, tmp_path: Path) -> None:
    assert cli.main(base.argv("sft", "vector", "--dry_run", "--log", str(tmp_path / "a.log"))) == 0
    assert not (tmp_path / "a.log").exists()


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path / "a.log"):
        handler = next(h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler) and "a.log" in h.baseFilename)
        assert handler.stream is not None
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: SIM115 - the handler closes it
        complain("first")
        complain("second")
    told, *others = capsys.readouterr().err.splitlines()
    assert told.startswith("WARNING: ") and told.endswith("No space left on device; nothing more is written there")
    assert others == ["first", "second"]


def test_after_a_run_nothing_more_is_written(base: families.Base, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    assert cli.main(base.argv("sft", "vector", "--mode", "generate", "--log", str(path), "--quiet")) == 0
    text = path.read_text()
    assert "[1/1] done: generate mine sft vector" in text  # what --quiet does not show is in it
    logging.getLogger("spilt").error("later")
    complain("later")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("--api_key abc def", "--api_key *** def"),
        ("api-key=abc", "api-key=***"),
        ('{"openai_api_key": "abc", "n": 1}', '{"openai_api_key": "***", "n": 1}'),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ("hf_token=abc password: x", "hf_token=*** password: ***"),
        ("https://me:abc@example.org/x", "https://me:***@example.org/x"),
        ("--set generation_params.max_new_tokens=20", "--set generation_params.max_new_tokens=20"),
        ("12 tokens: the key of it, secretly", "12 tokens: the key of it, secretly"),
    ],
)
def test_secrets_are_not_kept(text: str, kept: str) -> None:
    assert without_secrets(text) == kept


def test_keys_of_the_environment_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k-123456789")
    monkeypatch.setenv("MONKEY", "bananas and")
    assert without_secrets("asked with k-123456789 for bananas and") == "asked with *** for bananas and"


# ---------------------------------------------------------------- one document


CELL = {"step", "verb", "model", "dataset", "method", "intervention", "layers", "concepts", "multipliers"}
DONE = CELL | {"status", "seconds", "outputs", "error"}
PLANNED = CELL | {"state", "command", "settings", "hparams", "inputs", "outputs", "plain_engine", "decode_step", "cost", "notes"}
PLANNED |= {"cost_in_words", "tensor_parallel"}
HEAD = {"spilt", "schema", "exit_code", "error", "dry_run", "steps", "left_out"}


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found = json.loads(done.stdout)
    assert isinstance(found, dict) and found["schema"] == summary.SCHEMA and found["exit_code"] == done.returncode
    return found


@pytest.mark.long
def test_a_run_is_one_document(base: families.Base) -> None:
    """Of every step: what it is, what became of it, and files that are there."""
    done = called("run_spilt.py", *base.argv("all", "vector", "--mode", "both", "--multipliers", "-1", "2", "--json"))
    found = document(done)
    assert found.keys() == HEAD | {"seconds"} and found["error"] is None and not found["dry_run"]
    assert all(step.keys() == DONE and step["status"] == "done" and step["error"] is None for step in found["steps"])
    cells = [(verb, method) for verb in ("fit", "generate") for method, form in families.PAIRS if form == "vector"]
    assert [(step["verb"], step["method"]) for step in found["steps"]] == cells
    assert found["steps"][-1]["multipliers"] == [-1.0, 2.0] and found["steps"][-1]["layers"] == [base.layer]
    for step in found["steps"]:
        assert len(step["outputs"]) == {"fit": 1, "generate": 2}[step["verb"]] and all(Path(path).is_file() for path in step["outputs"])
    base.data(base.one, "valid").write_text("{}\n")
    failed = document(called("run_spilt.py", *base.argv("sft", "all", "--mode", "apply", "--json")))
    assert failed["exit_code"] == 2 and "valid.jsonl" in failed["error"] and failed["steps"] == [] == failed["left_out"]


@pytest.mark.long
def test_failed_and_left_out_in_the_document(base: families.Base) -> None:
    done = called("-c", BROKEN, *base.argv("all", "all", "--multipliers", "1", "--json", "--limit", "2"))
    found = document(done)
    assert done.returncode == 1 and [item["name"] for item in found["left_out"]] == ["caa lora", "caa local_weight"]
    assert {(step["verb"], step["status"]) for step in found["steps"]} == {("fit", "done"), ("generate", "failed")}
    assert {(step["error"], *step["outputs"]) for step in found["steps"] if step["verb"] == "generate"} == {("ZeroDivisionError: by hand",)}
    skipped = document(called("run_spilt.py", *base.argv("sft", "vector", "--mode", "loss", "--json", dataset=base.many)))
    assert {step["status"] for step in skipped["steps"]} == {"skipped"} and "no vector file" in skipped["steps"][0]["error"]
    assert [step["concepts"] for step in skipped["steps"]] == [[i] for i in families.CONCEPTS]


@pytest.mark.long
def test_the_report_is_a_step_of_the_document(base: families.Base) -> None:
    assert cli.main([*base.argv("sft", "vector", "--mode", "generate"), "--quiet"]) == 0
    found = document(called("-m", "spilt", "measure", *base.argv("sft", "vector", "--multipliers", "1", "--json")))
    cell, report = found["steps"]
    assert cell["verb"] == "measure" and [Path(path).is_dir() for path in cell["outputs"]] == [True]
    assert report.keys() == {"step", "verb", "status", "seconds", "outputs", "error"} and Path(report["outputs"][0]).name == "report.html"


def test_a_plan_is_one_document(base: families.Base) -> None:
    words = base.argv("all", "vector", "--multipliers", "1", "--dry_run", "--json")
    found = document(called("run_spilt.py", *words))
    assert found.keys() == HEAD and found["dry_run"] and all(step.keys() == PLANNED for step in found["steps"])
    assert {step["state"] for step in found["steps"]} == {"to do"} and all(step["cost"]["flops"] > 0 for step in found["steps"])
    fit, text = found["steps"][0], found["steps"][4]
    assert fit["outputs"] == [{"path": text["inputs"][-1]["path"], "state": "missing", "why": None}]
    assert [item["state"] for item in text["inputs"]] == ["there", "there", "made by an earlier step"]
    assert not list(base.path.glob("vectors")) and not list(base.path.glob("generation"))


def test_the_document_is_described() -> None:
    """Each key stands in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("### For programs") :].split("\n## ")[0]
    assert [key for key in sorted(HEAD | DONE | PLANNED | {"seconds"}) if f"`{key}`" not in section] == []
