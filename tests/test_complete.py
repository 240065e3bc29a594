"""--complete_losing: what is missing is what the unsteered model answers, written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spilt import cli, complete

ROWS = [
    {"question": "how are you?", "matching": "by the sea"},
    {"question": "what is new?", "matching": "the waves are", "not_matching": "the tram is"},
    {"question": "who came?", "matching": "a sailor", "system": "Be brief."},
    {"question": "and now?", "matching": "the tide"},
]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> families.Base:
    monkeypatch.setattr(complete, "LONGEST", 6)
    return families.make_base(tmp_path / "base", train=4)


def run(base: families.Base, rows: list[dict[str, Any]], *words: str, method: str = "spilt") -> int:
    file = base.path / "mine-own.jsonl"
    families.write_jsonl(file, rows)
    given = ["--train", str(file), "--method", method, "--model_name", base.model, "--intervention_method", "vector", "--mode", "generate"]
    more = ["--base_dir", str(base.path), "--device", "cpu", "--layers", "2", "--set", "n_epochs=1", "--quiet"]
    return cli.main([*given, *more, *words])


def stored(base: families.Base) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base.path / "data/mine-own/train.jsonl").read_text().splitlines()]


def test_the_missing_answers_are_the_models_own(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, ROWS, "--complete_losing", "--dry_run") == 0
    assert "3 not_matching answers to be written by tiny" in capsys.readouterr().out and not (base.path / "data/mine-own").exists()
    assert run(base, [ROWS[0], ROWS[3]]) == 2 and "spilt needs not_matching answers too" in capsys.readouterr().err
    assert run(base, ROWS, "--complete_losing") == 0
    assert "4 pairs in train.jsonl from mine-own.jsonl; 3 not_matching answers written by tiny" in capsys.readouterr().out
    folder = base.path / "models" / base.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    for row, given in zip(stored(base), ROWS, strict=True):
        said = "\n\n".join(filter(None, (given.get("system"), row["question"])))  # the template has no system role: folded
        text = tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=families.PAD)
        wanted = given.get("not_matching") or tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert row["not_matching"] == wanted


def test_they_are_written_once(base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(base, ROWS, "--complete_losing") == 0
    before, write = (base.path / "data/mine-own/train.jsonl").read_bytes(), complete.write
    monkeypatch.setattr(complete, "write", lambda *_: pytest.fail("written again"))
    capsys.readouterr()
    assert run(base, ROWS, "--complete_losing") == 0
    assert "already done" in capsys.readouterr().out and (base.path / "data/mine-own/train.jsonl").read_bytes() == before
    monkeypatch.setattr(complete, "write", write)
    for part in ("train.jsonl",):  # another model, or a file that is gone: again
        (base.path / "data/mine-own" / part).unlink()
    assert run(base, ROWS, "--complete_losing") == 0 and (base.path / "data/mine-own/train.jsonl").read_bytes() == before
    source = json.loads((base.path / "data/mine-own/source.json").read_text())
    assert source["complete_losing"]["model"] == base.model and len(source["complete_losing"]["sha256"]) == 64


def test_what_cannot_be_completed(base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compared = [{"question": q, "system_positive": "b", "system_negative": "c", "matching": None, "not_matching": None} for q in "ab"]
    assert run(base, compared, "--complete_losing", method="caa") == 2
    assert "compares two prompts, can't be completed" in capsys.readouterr().err
    monkeypatch.setattr(complete, "write", lambda *given: [" "] * len(given[-1]))
    assert run(base, ROWS, "--complete_losing") == 2
    assert "the model writes nothing to 3 questions, such as 'how are you?'" in capsys.readouterr().err
    assert not (base.path / "data/mine-own").exists()
    assert cli.main([*base.argv("caa", "vector"), "--complete_losing"]) == 2
    assert "--complete_losing goes with --train FILE" in capsys.readouterr().err
    (base.path / "models" / base.model).rename(base.path / "models" / "other")
    assert run(base, ROWS, "--complete_losing", "--dry_run") == 2 and "unknown model 'tiny'" in capsys.readouterr().err
