"""Texts longer than the model's context: told by name where the model still runs, refused where its table of positions ends."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from torch import nn

from spilt import cli
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.steering import anatomy
from spilt.tasks.context import check_context

CONTEXT = 96  # of the models here; the prompts of the shared data have some 30 tokens
LONG = 2  # the row with the longest question


def make(tmp_path: Path, model_type: str) -> families.Base:
    base = families.make_base(tmp_path / "base", model_type, train=6)
    families.build(model_type, max_position_embeddings=CONTEXT).save_pretrained(base.path / "models" / base.model)
    return base


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("spilt"), "propagate", True)


@pytest.fixture
def absolute(tmp_path: Path) -> families.Base:
    return make(tmp_path, "gpt2")


@pytest.fixture
def rotary(tmp_path: Path) -> families.Base:
    return make(tmp_path, "qwen2")


def tokens(question: str) -> int:
    """Of a prompt, with the template."""
    template = families.tokenizer().apply_chat_template([{"role": "user", "content": question}], tokenize=True, add_generation_prompt=True)
    return len(template["input_ids"] if hasattr(template, "keys") else template)


def new_tokens(count: int) -> tuple[str, ...]:
    return ("--set", f"generation_params.max_new_tokens={count}")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "context" in record.getMessage()]


def test_which_families_have_a_table_of_positions() -> None:
    """As the models themselves say: a table has as many rows as the context has positions."""
    for name in families.FAMILY_NAMES:
        model = families.model(name)
        assert anatomy.context(model) == 512
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.num_embeddings == 512]
        assert anatomy.of(model).absolute_positions == bool(tables), name


@pytest.mark.long
def test_a_table_of_positions_is_used_to_its_end_and_not_beyond(absolute: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """The last new token is never read: a prompt of p tokens leaves room for context - p + 1 new ones."""
    longest = max(tokens(row["question"]) for row in families.pairs(3))
    fits = CONTEXT - longest + 1
    assert cli.main(absolute.argv("caa", "vector", "--mode", "generate", "--quiet")) == 0
    assert cli.main([*absolute.argv("caa", "vector", "--mode", "apply", "--multipliers", "1", "--quiet"), *new_tokens(fits)]) == 0
    stored = Store(absolute.path).results(Cell(absolute.model, absolute.one, "caa", "vector", (absolute.layer,)), 2.0)
    capsys.readouterr()
    assert cli.main([*absolute.argv("caa", "vector", "--mode", "apply", "--multipliers", "2", "--quiet"), *new_tokens(fits + 1)]) == 2
    said = capsys.readouterr().err
    for wanted in (f"row {LONG} ", f"{longest} tokens", f"max_new_tokens {fits + 1}", f"context of {CONTEXT} tokens", "shorten the prompt"):
        assert wanted in said, said
    assert "lower generation_params.max_new_tokens" in said and "Traceback" not in said and not stored.exists()


def test_only_the_cell_fails(absolute: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    path = absolute.experiment / "apply_config.yaml"
    path.write_text(path.read_text().replace("max_new_tokens: 5", f"max_new_tokens: {CONTEXT}"))
    assert cli.main(absolute.argv("caa", "vector", "--mode", "both", "--multipliers", "1", "--quiet")) == 1
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out


@pytest.mark.long
def test_a_rotary_model_goes_on_and_tells_once_per_cell(rotary: families.Base, caplog: pytest.LogCaptureFixture) -> None:
    lengths = sorted(tokens(row["question"]) for row in families.pairs(3))
    assert lengths[-2] < lengths[-1]
    assert cli.main([*rotary.argv("sft", "all", "--mode", "generate", "--quiet")]) == 0
    words = rotary.argv("sft", "all", "--mode", "apply", "--multipliers", "-1", "1", "--quiet")
    assert cli.main([*words, *new_tokens(CONTEXT - lengths[-1] + 1)]) == 0 and not warnings(caplog)
    assert cli.main([*words, *new_tokens(CONTEXT - lengths[-1] + 2)]) == 0
    found = warnings(caplog)
    assert len(found) == 3
    for form, message in zip(("vector", "lora", "local_weight"), found, strict=True):
        for wanted in (f"sft {form}", "1 of 3", f"row {LONG} ", f"{lengths[-1]} tokens", f"context of {CONTEXT} "):
            assert wanted in message, message


def lengthen(base: families.Base) -> None:
    """A question that with its answer is longer than the context, in both item sets."""
    for section in ("train", "valid"):
        rows = families.pairs(6)
        rows[4]["question"] = "why " * 19
        families.write_jsonl(base.data(base.one, section), rows)


@pytest.mark.few(1)
@pytest.mark.parametrize(("method", "mode"), [("sft", "generate"), ("caa", "generate"), ("sft", "loss")])
@pytest.mark.usefixtures("no_pictures")
def test_answers_beyond_a_table_of_positions(absolute: families.Base, capsys: pytest.CaptureFixture[str], method: str, mode: str) -> None:
    assert cli.main([*absolute.argv("sft", "vector", "--mode", "generate", "--quiet")]) == 0
    lengthen(absolute)
    words = [*absolute.argv(method, "vector", "--mode", mode, "--quiet"), "--force"]
    capsys.readouterr()
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "row 4 (0-based)" in said and f"context of {CONTEXT} tokens" in said and "Traceback" not in said, said
    if method == "caa":  # its sequences are not cut
        assert "shorten the question" in said and "output_length" not in said
    else:
        assert "lower output_length" in said
        assert cli.main([*words, "--set", f"output_length={CONTEXT}"]) == 0


@pytest.mark.parametrize("method", ["sft", "caa"])
def test_answers_beyond_the_context_of_a_rotary_model(rotary: families.Base, caplog: pytest.LogCaptureFixture, method: str) -> None:
    words = rotary.argv(method, "vector", "--mode", "generate", "--quiet", "--force")
    assert cli.main(words) == 0 and not warnings(caplog)
    lengthen(rotary)
    assert cli.main(words) == 0
    (message,) = warnings(caplog)
    assert "2 of 12" in message and "row 4 (0-based)" in message and f"context of {CONTEXT} " in message


def test_a_model_that_does_not_say_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    config: Any = SimpleNamespace()
    config.get_text_config = lambda: config
    model, rotary = families.build("gpt2"), families.build("llama")
    for one in (model, rotary):
        anatomy.of(one)
        one.config = config
    check_context(model, "", [(0, 10**9)], "")
    config.max_position_embeddings = 8
    check_context(model, "", [(0, 8)], "", 1)
    with pytest.raises(cli.UserError, match="context of 8"):
        check_context(model, "", [(0, 8)], "", 2)
    check_context(rotary, "", [(0, 9)], "")
    assert len(warnings(caplog)) == 1
