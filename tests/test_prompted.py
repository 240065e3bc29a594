"""Prompts as baselines: scored as any conversation is, without a prompt the row m = 0 of the losses, and rows beside the methods."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest

import spilt
from spilt import cli, prompted, verify
from spilt.analysis import odds
from spilt.artifacts.store import Store
from spilt.data import entries, prompt_baseline, readers
from spilt.data.chat import SYSTEM, Chat

EXAMPLES = [{"question": "where to", "answer": "home"}, {"question": "and then", "answer": "away"}]
SYSTEM_TEMPLATE = families.TEMPLATE.replace("{{ raise_exception('no system role') }}", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """With losses of two methods on the test questions, and files of prompts."""
    base = families.make_base(tmp_path_factory.mktemp("prompted") / "base", train=4, test=8)
    words = [*base.argv(), "--method", "sft", "caa", "--quiet"]
    assert cli.main([*words, "--mode", "generate"]) == 0
    assert cli.main([*words, "--mode", "loss", "--multipliers", "-4", "4", "--no-released_files", "--no_report"]) == 0
    (base.path / "kind.txt").write_text("be the matching one\n")
    (base.path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return base


def test_a_prompt_comes_before_the_question() -> None:
    kind, shots = ((SYSTEM, "be kind"),), (("user", "a"), ("assistant", "b"))
    assert prompt_baseline.behind(kind, "q") == ((SYSTEM, "be kind"), ("user", "q"))
    assert prompt_baseline.behind(kind, ((SYSTEM, "own"), ("user", "q")), "settings") == ((SYSTEM, "own\n\nbe kind"), ("user", "q"))
    assert prompt_baseline.behind(shots, "q", "settings") == ((SYSTEM, "settings"), *shots, ("user", "q"))
    assert prompt_baseline.behind((), "q") == (("user", "q"),)


@pytest.mark.parametrize("template", [families.TEMPLATE, SYSTEM_TEMPLATE])
def test_the_same_answer_tokens_are_scored_however_long_the_prompt_is(template: str) -> None:
    """Also where an answer is cut: as without the prompt, and by a template with or without a system role."""
    chat = Chat.of(families.tokenizer(template))
    pairs = [readers.Pair("where is it", "by the river and by the lake", "no", None, None, 0)]
    most = len(chat.prompt_ids("where is it")) + 3
    for turns in (((SYSTEM, "be kind and long " * 5),), (("user", "a"), ("assistant", "b"))):
        for plain, behind in zip(prompted.encoded(chat, (), pairs, most), prompted.encoded(chat, turns, pairs, most), strict=True):
            assert behind.input_ids[behind.prompt_length :] == plain.input_ids[plain.prompt_length :]
            assert behind.suffix_length == plain.suffix_length and behind.prompt_length > plain.prompt_length


def test_numbers_are_those_of_measure_and_without_a_prompt_those_of_m_0(base: families.Base) -> None:
    store, prompts = Store(base.path), prompt_baseline.read([f"kind={base.path / 'kind.txt'}", f"shots={base.path / 'shots.jsonl'}"])
    every = [*prompts, prompt_baseline.Prompt("none", ())]
    assert prompted.measure(base.path, base.model, base.one, ("sft", "vector"), "test", every, "cpu", lambda _: None) == 3
    assert prompted.measure(base.path, base.model, base.one, ("sft", "vector"), "test", every, "cpu", lambda _: None) == 0
    tables = {path.parent.name: odds.losses_table(path) for path in store.prompt_tables(base.model, base.one, "test")}
    folder = store.loss_root(base.model) / "sft" / base.one / "sft_vector"
    stored = odds.losses_table(folder / "losses_test.csv")
    plain = stored[stored["multiplier"] == 0].reset_index(drop=True)
    for name in ("loss_sum", "answer_loss_sum"):
        np.testing.assert_allclose(tables["none"].set_index(["example", "target"])[name].sort_index(),
                                   plain.set_index(["example", "target"])[name].sort_index(), rtol=1e-5)  # fmt: skip
    model, tokenizer = spilt.load(store.model(base.model))
    steering = spilt.Steering.load(next((base.path / "vectors").rglob("sft_vector/layer_*.pt")))
    rows = readers.read_pairs(entries.dataset_format(base.path, base.one, "valid"))
    for prompt in prompts:
        pairs = [row._replace(question=prompt_baseline.behind(prompt.turns, row.question)) for row in rows]  # type: ignore[arg-type]
        told = spilt.measure(model, tokenizer, steering, pairs, [0.0], use_chat_template=True).iloc[0]
        found = odds.per_question(odds.answers(tables[prompt.name], "mean"), "test")
        assert found["preference"].mean() == pytest.approx(told["preference"], rel=1e-4, abs=1e-5)
        assert found["utility"].mean() == pytest.approx(told["utility"], rel=1e-4)
    assert {found.state for found in verify.check(base.path) if "prompt" in str(found.path)} == {verify.OK}


def test_prompts_are_rows_beside_the_methods(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table", "--base_dir", str(base.path), "--device", "cpu", "--format", "csv"]
    assert cli.main([*words, "--tables", "main", "--prompt_baseline", f"kind={base.path / 'kind.txt'}"]) == 0
    main = pd.read_csv(io.StringIO(capsys.readouterr().out)).set_index(["method", "intervention", "measure"])
    gain, drop = (main.loc[("prompt", "kind", name)] for name in ("preference gain, nats", "utility drop, nats"))
    assert gain["low"] < gain["value"] < gain["high"] and drop["low"] < drop["value"] < drop["high"]
    none = main.loc[("prompt", "none", "preference gain, nats")]
    assert none["value"] == pytest.approx(0, abs=1e-5)  # no steering is the row m = 0
    assert main.loc[("prompt", "none", "preferred"), "value"] == main.loc[("no steering", float("nan"), "preferred"), "value"]
    assert cli.main([*words, "--tables", "prompts"]) == 0
    against = pd.read_csv(io.StringIO(capsys.readouterr().out)).set_index(["method", "than", "of"])
    row = against.loc[("sft", "kind", "preference")]
    assert row["own"] == pytest.approx(main.loc[("sft", "vector", "preference gain, nats"), "value"], abs=1e-6)
    assert row["other"] == pytest.approx(gain["value"], abs=1e-6) and row["difference"] == pytest.approx(
        row["own"] - row["other"], abs=1e-6
    )
    assert row["low"] <= row["difference"] <= row["high"] and 0 <= row["p"] <= 1


def test_a_prompt_of_other_questions_is_no_row(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    path = Store(base.path).prompt_table(base.model, base.one, "kind", "test")
    record = path.with_name("prompt_test.manifest.json")
    before = record.read_text()
    changed = json.loads(before)
    changed["parts"]["data"] = "another"
    record.write_text(json.dumps(changed))
    try:
        assert cli.main(["table", "--base_dir", str(base.path), "--tables", "main"]) == 0
        said = capsys.readouterr().out
        assert "| prompt: kind" not in said and "| prompt: shots" in said and "Not shown" in said and "prompt kind" in said
    finally:
        record.write_text(before)


def test_what_cannot_be_measured_is_told_and_no_success(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base.path, tmp_path / "base", ignore=shutil.ignore_patterns("models"))
    words = ["table", "--base_dir", str(tmp_path / "base"), "--tables", "main", "--device", "cpu"]
    assert cli.main([*words, "--prompt_baseline", f"again={base.path / 'kind.txt'}"]) == 1
    said = capsys.readouterr()
    assert "not all prompts are measured" in said.err and "| prompt: kind" in said.out and "again" not in said.out


def test_wrong_prompts_are_refused(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "half.jsonl").write_text('{"question": "only this"}\n')
    for words, said in (
        (["kind"], "wanted NAME=FILE"),
        (["../x=a.txt"], "cannot be a folder name"),
        ([f"x={tmp_path / 'none.txt'}"], "can't be read"),
        ([f"x={tmp_path / 'empty.txt'}"], "is empty"),
        ([f"x={tmp_path / 'half.jsonl'}"], "answer is None"),
        ([f"x={base.path / 'kind.txt'}", f"x={base.path / 'shots.jsonl'}"], "named twice"),
    ):
        assert cli.main(["table", "--base_dir", str(base.path), "--prompt_baseline", *words]) == 2
        assert said in capsys.readouterr().err
