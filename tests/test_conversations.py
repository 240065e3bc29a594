"""Questions as lists of chat messages, and a system prompt of each row's own: from any file through fit, losses and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
from refusal import message
from test_chat import BOS, DROPS, REFUSES, TURNS, shown, tokenizer

from spilt import cli
from spilt.data import Chat, own
from spilt.data.batches import position_mask
from spilt.data.chat import bare, readable
from spilt.data.readers import DatasetFormat, read_pairs, read_prompts
from spilt.data.sources import read_rows
from spilt.model import template

ASKED = (("system", "Be kind."), ("user", "Who?"), ("assistant", "I."), ("user", "Why?"))


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


@pytest.mark.parametrize("template", [TURNS, BOS + TURNS])
def test_the_template_writes_every_turn(template: str) -> None:
    tok = tokenizer(template)
    one = Chat.of(tok, system_prompt="Be brief.").encode(ASKED, " So.")
    before = "<bos><start>system\nBe kind.<end>\n<start>user\n"
    prompt = f"{before}Who?<end>\n<start>assistant\nI.<end>\n<start>user\nWhy?<end>\n<start>model\n"
    assert shown(tok, one.input_ids) == f"{prompt} So.<end>\n", "its own system prompt goes before that of the settings"
    assert shown(tok, one.input_ids[: one.prompt_length]) == prompt
    assert shown(tok, one.input_ids[: one.prefix_length]) == before


@pytest.mark.parametrize("template", [BOS + REFUSES + TURNS, DROPS])
def test_without_a_system_role_it_begins_the_first_user_turn(template: str) -> None:
    """As a system_prompt of the settings does; never dropped in silence."""
    tok = tokenizer(template)
    by_row, by_settings = Chat.of(tok), Chat.of(tok, system_prompt="Be kind.")
    assert by_row.prompt_ids(ASKED) == by_settings.prompt_ids(ASKED[1:])
    assert "<start>user\nBe kind.\n\nWho?<end>" in shown(tok, by_row.prompt_ids(ASKED))
    lone = by_row.encode((("system", "Be kind."), ("user", "Why?")), " So.")
    assert lone.input_ids == by_settings.encode("Why?", " So.").input_ids and lone.prefix_length == by_settings.prefix_length


def test_raw_text_takes_one_turn() -> None:
    chat = Chat.of(tokenizer(None))
    assert chat.prompt_text((("system", "Be kind."), ("user", "Why?"))) == "Be kind.\n\nWhy?"
    assert "a conversation of 3 turns needs a chat template" in message(chat.prompt_ids, ASKED)


def test_each_row_has_its_own_prefix() -> None:
    """What is left unsteered in a fit is the template with the row's own system prompt."""
    chat = Chat.of(tokenizer())
    sequences = [chat.encode(question, "!") for question in (ASKED, "Why?")]
    masks = position_mask(sequences, "skip_prefix", chat.prefix_length).tolist()
    assert [mask.index(True) for mask in masks] == [sequences[0].prefix_length, chat.prefix_length]
    assert chat.prefixes_of([ASKED, "Why?"]) == [sequences[0].prefix_length, chat.prefix_length] != [chat.prefix_length] * 2


def test_a_question_as_a_person_reads_it() -> None:
    assert readable("Why?") == readable((("user", "Why?"),)) == bare((ASKED[0], ASKED[3])) == "Why?"
    assert readable(ASKED) == "system: Be kind.\n\nuser: Who?\n\nassistant: I.\n\nuser: Why?" and bare(ASKED) == ASKED[1:]


# ---------------------------------------------------------------- files


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    """A model whose template has a system role."""
    made = families.make_base(tmp_path / "base", train=4)
    template = families.TEMPLATE.replace("message['role'] == 'system'", "false")
    (made.path / "models" / made.model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return made


def run(base: families.Base, file: Path, *words: str, method: str = "sft") -> int:
    given = ["--train", str(file), "--model_name", base.model, "--method", method, "--intervention_method", "vector", "--device", "cpu"]
    given += ["--base_dir", str(base.path), "--dtype", "float32", "--quiet", "--layers", "1"]
    return cli.main([*given, *([] if method == "caa" else ["--set", "n_epochs=1"]), *words])


TEXTS = ("--multipliers", "0", "1", "--set", "generation_params.max_new_tokens=4")
PAIRS = families.pairs(6)
TALKS = [
    {
        "prompt": turns(("user", "hello"), ("assistant", f"hi {i}"), ("user", row["question"])),
        "chosen": turns(("assistant", row["matching"])),
        "rejected": turns(("assistant", row["not_matching"])),
    }
    for i, row in enumerate(PAIRS)
]  # as trl has them
WHOLE = [{name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")} for row in TALKS]  # without a prompt of its own
TRL = "question=prompt,matching=chosen,not_matching=rejected"


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("name", "rows"), [("a.jsonl", TALKS), ("a.parquet", TALKS), ("b.jsonl", WHOLE), ("b.parquet", WHOLE)])
def test_the_same_conversations_in_every_shape(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (_parquet if name.endswith("parquet") else families.write_jsonl)(path := tmp_path / name, rows)
    columns = own.columns_from(TRL if "prompt" in rows[0] else TRL.partition(",")[2])
    own.bring(tmp_path, "talks", own.Own((path,), columns=columns))
    kept = [record.values for record in read_rows(tmp_path / "data/talks/train.jsonl")]
    assert [(row["question"], row["matching"]) for row in kept] == [
        (talk["prompt"], pair["matching"]) for talk, pair in zip(TALKS, PAIRS, strict=True)
    ]
    pairs = read_pairs(DatasetFormat("talks", "train", tmp_path / "data/talks/train.jsonl", {}, False))
    assert pairs[2].question == (("user", "hello"), ("assistant", "hi 2"), ("user", PAIRS[2]["question"])) and pairs[2].kind == "pairs"


def losses(base: families.Base, name: str) -> list[dict[str, Any]]:
    (path,) = base.path.glob(f"vectors/**/{name}")
    return [record.values for record in read_rows(path)]


def test_through_every_stage(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit, losses and texts of conversations with a system column; the fast engine measures what the plain one does."""
    families.write_jsonl(file := tmp_path / "talks.jsonl", [{**row, "system": f"be {i}"} for i, row in enumerate(TALKS)])
    words = ["--columns", TRL, "--test", "2"]
    assert run(base, file, *words, *TEXTS) == 0
    (texts,) = base.path.glob("generation/**/m1.0/talks_results.json")
    asked = json.loads(texts.read_text())[0]["input"]
    assert asked.startswith("system: be ") and "\n\nassistant: hi " in asked
    measured = {}
    for engine in ("fast", "plain"):
        assert run(base, file, *words, "--mode", "loss", "--multipliers", "1", "--no_report", "--engine", engine, "--force") == 0
        measured[engine] = [float(row["loss_sum"]) for row in losses(base, "*winning_only/train_losses.csv")]
    assert measured["fast"] == pytest.approx(measured["plain"], rel=1e-5)
    assert run(base, file, *words, *TEXTS) == 0 and "already done" in capsys.readouterr().out


def test_inspect_shows_the_turns(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.write_jsonl(file := tmp_path / "talks.jsonl", [{**row, "system": f"be {i}"} for i, row in enumerate(TALKS)])
    assert run(base, file, "--columns", TRL, "--inspect", "--json", "--mode", "both") == 0
    fit, prompts = json.loads(capsys.readouterr().out)["inspected"]
    one, other = fit["shown"][0], prompts["shown"][1]
    parts = {name: "".join(words) for name, words in one["parts"].items()}
    assert parts["prefix"] == "<bos><turn>system\nbe 0<end>\n<turn>user\n"
    assert parts["prompt"] == f"hello<end>\n<turn>assistant\nhi 0<end>\n<turn>user\n{PAIRS[0]['question']}<end>\n<turn>model\n"
    assert parts["answer"] == PAIRS[0]["matching"] and one["roles"].count("-") == one["marked"].index("x")
    assert "".join(other["parts"]["prefix"]) == "<bos><turn>system\nbe 1<end>\n<turn>user\n"


def test_a_question_is_held_out_under_all_its_system_prompts(tmp_path: Path) -> None:
    rows = [{**row, "system": system} for row in PAIRS for system in ("be kind", "be brief")]
    families.write_jsonl(file := tmp_path / "talks.jsonl", rows)
    own.bring(tmp_path, "talks", own.Own((file,), test=2))
    parts = [[record.values for record in read_rows(tmp_path / f"data/talks/{part}.jsonl")] for part in ("train", "test")]
    assert [len(part) for part in parts] == [8, 4] and not {row["question"] for row in parts[0]} & {row["question"] for row in parts[1]}
    prompts = read_prompts(DatasetFormat("talks", "generation", tmp_path / "data/talks/test.jsonl", {"input": "question"}, False))
    assert {prompt.input[0] for prompt in prompts} == {("system", "be kind"), ("system", "be brief")}
    assert all("system" not in prompt.extra for prompt in prompts)


USER, SYSTEM, BOT = ("user", "a"), ("system", "b"), ("assistant", "c")
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "the model's turn last": ({"question": turns(USER, BOT)}, "question has turns of user, assistant; wanted user and assistant by turns"),
    "no turn": ({"question": []}, "question has turns of none"),
    "the system turn later": ({"question": turns(USER, SYSTEM)}, "question has turns of user, system"),
    "two users": ({"question": turns(USER, USER, USER)}, "question has turns of user, user, user"),
    "another make": (
        {"question": [{"from": "human", "value": "a"}]},
        "turn 0 (0-based) is {'from': 'human', 'value': 'a'}; wanted {'role'",
    ),
    "a picture": ({"question": [{"role": "user", "content": [{"type": "image"}]}]}, "question: content is [{'type': 'image'}] (list)"),
    "two system prompts": ({"question": turns(SYSTEM, USER), "system": "d"}, "a system turn in question, and another in column 'system'"),
    "a system prompt of another type": ({"system": 3}, "system is 3 (int) in column 'system'; wanted text"),
    "an answer of several turns": (
        {"matching": turns(USER, BOT)},
        "matching has turns of user, assistant; wanted text, or one turn of the assistant",
    ),
    "an empty answer": ({"matching": turns(("assistant", " "))}, "empty answer ' ' in column 'matching'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_conversation_is_told_by_its_line(name: str, tmp_path: Path) -> None:
    change, wanted = WRONG[name]
    families.write_jsonl(path := tmp_path / "talks.jsonl", [PAIRS[0], {**PAIRS[1], **change}])
    said = message(own.bring, tmp_path, "talks", own.Own((path,)))
    assert said.startswith(f"{path} line 2: ") and wanted in said and not (tmp_path / "data").exists()


def test_conversations_that_begin_differently_are_no_pair(tmp_path: Path) -> None:
    families.write_jsonl(path := tmp_path / "talks.jsonl", [WHOLE[0], {**WHOLE[1], "rejected": WHOLE[2]["rejected"]}])
    said = message(own.bring, tmp_path, "talks", own.Own((path,), columns={"matching": "chosen", "not_matching": "rejected"}))
    assert said.startswith(f"{path} line 2: 'chosen' and 'rejected' are conversations that begin differently")


def test_a_template_that_never_ends_on_later_turns_is_refused_before_it_is_used() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    endless = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}" + loop + "{% endif %}{% endfor %}"
    assert "writes more than 100,000 characters" in message(template.check, endless, {})


def test_the_python_face_takes_them(base: families.Base) -> None:
    """One or several, as messages; the table has them as a person reads them."""
    import spilt

    model, tokenizer = spilt.load(base.path / "models" / base.model)
    steering = spilt.fit(model, tokenizer, families.pairs(4), layer=1, method="caa")
    talk = turns(("system", "be brief"), ("user", "is 3 odd?"))
    made = spilt.generate(model, tokenizer, steering, ["is 3 odd?", talk], 1.0, max_new_tokens=2)
    alone = spilt.generate(model, tokenizer, steering, talk, 1.0, max_new_tokens=2, first=1)
    assert list(made.prompt) == ["is 3 odd?", "system: be brief\n\nuser: is 3 odd?"] and list(alone.prompt) == list(made.prompt[1:])
    assert list(alone.text) == list(made.text[1:])
    assert spilt.divergence(model, tokenizer, steering, talk, 1.0, max_new_tokens=2).tokens[0] == 2
    told = message(spilt.generate, model, tokenizer, steering, turns(("assistant", "no")), 1.0)
    assert "wanted user and assistant by turns" in told
