"""Rows that are no pair of answers to one question: prompts that differ (contrast by persona), one answer alone, (A) / (B)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from refusal import message
from transformers import AutoModelForCausalLM, AutoTokenizer

import spilt
from spilt import Steering, cli
from spilt.data import own, readers
from spilt.data.sources import read_rows

ROWS = families.pairs(5)
QUESTIONS = [row["question"] for row in ROWS]
MINDED = [{"question": row["question"], "system_positive": f"be good {i}", "system_negative": "be bad"} for i, row in enumerate(ROWS)]
TWICE = [{"question_positive": f"good: {question}", "question_negative": f"so bad: {question}"} for question in QUESTIONS]
ONE_SIDED = [{"question": row["question"], "matching": row["matching"]} for row in ROWS]


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=4)


def run(base: families.Base, rows: list[dict[str, Any]], *words: str, method: str = "caa", mode: str = "generate") -> int:
    families.write_jsonl(file := base.path / "rows.jsonl", rows)
    given = ["--train", str(file), "--model_name", base.model, "--method", method, "--intervention_method", "vector", "--device", "cpu"]
    return cli.main([*given, "--base_dir", str(base.path), "--dtype", "float32", "--quiet", "--layers", "1", "--mode", mode, *words])


def stored(base: families.Base, method: str = "caa") -> torch.Tensor:
    (path,) = base.path.glob(f"vectors/tiny/{method}/rows/{method}_vector@layer1/layer_1.pt")
    return torch.load(path, weights_only=True).flatten()


class Plain:
    """The library's own forward of a text, and what block 1 leaves: the equation, written down again."""

    def __init__(self, base: families.Base) -> None:
        folder = base.path / "models" / base.model
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def mean(self, question: str, answer: str = "", system: str = "") -> torch.Tensor:
        """Over the answer's tokens; without one the prompt's last. The template of the tests has no system role: it is folded."""
        turns = [{"role": "user", "content": f"{system}\n\n{question}" if system else question}]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        texts = (prompt, prompt + (" " + answer if answer else ""))
        begin, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        with torch.no_grad():
            h = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        return h[len(begin) if answer else -1 :].mean(0)


CASES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "by system prompt, no answer": (MINDED, lambda plain, row: [plain.mean(row["question"], "", row[f"system_{s}"]) for s in SIDES]),
    "by system prompt, one answer": (
        [{**row, "matching": pair["matching"]} for row, pair in zip(MINDED, ROWS, strict=True)],
        lambda plain, row: [plain.mean(row["question"], row["matching"], row[f"system_{s}"]) for s in SIDES],
    ),
    "by system prompt, two answers": (
        [{**row, **pair} for row, pair in zip(MINDED, ROWS, strict=True)],
        lambda plain, row: [
            plain.mean(row["question"], row[answer], row[f"system_{s}"])
            for s, answer in zip(SIDES, ("matching", "not_matching"), strict=True)
        ],
    ),
    "by question, no answer": (TWICE, lambda plain, row: [plain.mean(row[f"question_{s}"]) for s in SIDES]),
    "by question under one system prompt": (
        [{**row, "system": "be calm"} for row in TWICE],
        lambda plain, row: [plain.mean(row[f"question_{s}"], "", "be calm") for s in SIDES],
    ),
}
SIDES = ("positive", "negative")


@pytest.mark.parametrize("name", CASES)
def test_caa_is_the_mean_difference_of_the_two_prompts(name: str, base: families.Base) -> None:
    rows, sides = CASES[name]
    assert run(base, rows) == 0
    plain = Plain(base)
    wanted = torch.stack([one - other for one, other in (sides(plain, row) for row in rows)]).mean(0)
    torch.testing.assert_close(stored(base), wanted, rtol=1e-4, atol=1e-5)


def test_texts_are_asked_without_the_compared_prompts(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """The neutral question where there is one; questions of their own otherwise. --test holds questions out."""
    words = ["--multipliers", "1", "--set", "generation_params.max_new_tokens=3"]
    assert run(base, MINDED, *words, "--test", "2", mode="both") == 0
    assert "3 contrasts without answers in train.jsonl, 2 contrasts without answers in test.jsonl" in capsys.readouterr().out
    (path,) = base.path.glob("generation/**/rows_results.json")
    asked = [row["input"] for row in json.loads(path.read_text())]
    assert len(asked) == 2 and set(asked) < set(QUESTIONS)
    assert run(base, TWICE, *words, mode="both", method="caa") == 2
    assert "only questions that are compared, none to ask" in capsys.readouterr().err
    families.write_jsonl(base.path / "asked.jsonl", [{"question": "and now?"}])
    assert run(base, TWICE, *words, "--test", str(base.path / "asked.jsonl"), mode="both") == 0
    assert [row["input"] for row in json.loads(path.read_text())] == ["and now?"]


def test_inspect_marks_what_is_compared(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, MINDED, "--inspect", "--json") == 0
    (fit,) = json.loads(capsys.readouterr().out)["inspected"]
    assert [one["text"] for one in fit["shown"]] == ["positive", "negative"] * 2
    for one in fit["shown"]:
        assert one["marked"].count("x") == 1 and one["marked"][-1] == "x" and one["roles"][-1] == "A"


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("rows", "method", "mode", "words", "wanted"),
    [
        (MINDED, "sft", "generate", (), "sft is trained on answers to one question, not on two prompts; methods that compare them: caa"),
        (TWICE, "reps", "generate", (), "reps is trained on answers to one question"),
        (MINDED, "caa", "loss", (), "preference and utility compare two answers to one question"),
        (MINDED, "caa", "generate", ("--set", "multiple_choice=true"), "multiple_choice reads an answer's token, and there are no answers"),
        (ONE_SIDED, "caa", "generate", (), "caa needs not_matching answers too; --method sft --set preference_pairs=orig_add does without"),
        (ONE_SIDED, "spilt", "generate", (), "spilt needs not_matching answers too; --method sft"),
        (ONE_SIDED, "sft", "generate", (), "orig_sub shows the not_matching answers, and there are none; --set preference_pairs=orig_add"),
        (ONE_SIDED, "sft", "loss", (), "has one-sided rows: preference and utility compare two answers"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    rows: Any, method: str, mode: str, words: Any, wanted: str, dry: Any, base: families.Base, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, rows, *words, *dry, method=method, mode=mode) == 2
    assert wanted in capsys.readouterr().err and not (base.path / "data/rows").exists()
    families.write_jsonl(base.data(base.one, "train"), [{"matching": None, "not_matching": None, **row} for row in rows])
    formats = base.path / readers.FORMATS_FILE
    entries = yaml.safe_load(formats.read_text())
    entries["train"][base.one]["field_names"] |= {field: field for field in rows[0] if field in readers.ASKED}
    formats.write_text(yaml.safe_dump(entries))
    given = [*base.argv(method, "vector", "--mode", mode, "--dtype", "float32", *words, *dry), "--quiet"]
    if "question" in rows[0]:
        assert cli.main(given) == 2 and wanted in capsys.readouterr().err, "by its name too"


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one side": ([{**MINDED[0], "system_negative": None}], "no system_negative where the other side has one"),
    "the same twice": ([{**row, "system_negative": row["system_positive"]} for row in MINDED], "both prompts are the same in all 5 rows"),
    "mixed": ([*ROWS[:2], ONE_SIDED[3] | {"not_matching": None}], "not_matching is None: one-sided rows here, pairs above"),
    "only the losing answer": ([{**ROWS[0], "matching": None}], "a not_matching answer without a matching one"),
    "no answer, nothing compared": ([{"question": "a"}], "no column 'matching', 'not_matching' (columns found: question)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_told(name: str, tmp_path: Path) -> None:
    rows, wanted = WRONG[name]
    families.write_jsonl(path := tmp_path / "rows.jsonl", rows)
    assert wanted in message(own.bring, tmp_path, "rows", own.Own((path,))) and not (tmp_path / "data").exists()


def test_one_sided_rows_fit_by_sft_as_the_pairs_do(base: families.Base) -> None:
    """sft reads the matching answers alone: with or without others beside them it finds the same vector."""
    words = ["--set", "preference_pairs=orig_add", "--set", "n_epochs=1"]
    assert run(base, ONE_SIDED, *words, method="sft") == 0
    alone = stored(base, "sft")
    (base.path / "data/rows/source.json").unlink()
    for path in (base.path / "data/rows").iterdir():
        path.unlink()
    assert run(base, ROWS, *words, method="sft") == 0
    torch.testing.assert_close(stored(base, "sft"), alone, rtol=1e-4, atol=1e-6)
    assert Steering.load(next(base.path.glob("vectors/**/layer_1.pt"))).layers == (1,)


# ---------------------------------------------------------------- (A) / (B)

CHOICES = [
    {
        "question": f"Which of {i}?\n\nChoices:\n (A) this\n (B) that",
        "answer_matching_behavior": f"({'AB'[i % 2]})",
        "answer_not_matching_behavior": f"({'BA'[i % 2]})",
    }
    for i in range(4)
]  # as the files of CAA and of the model-written evals have them
EVALS = "matching=answer_matching_behavior,not_matching=answer_not_matching_behavior"


def test_of_choices_the_letter_is_compared(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """caa takes the letter's token, as multiple_choice does; losses score it alone, what stands around it is given."""
    assert run(base, CHOICES, "--columns", EVALS, "--inspect", "--json", method="all") == 0
    for entry in json.loads(capsys.readouterr().out)["inspected"]:
        for one, letter in zip(entry["shown"], "ABBA", strict=True):
            assert one["parts"]["answer"] == [letter] and one["parts"]["prompt"][-1] == "(" and entry["answer_tokens"] == [1, 1, 1]
    assert run(base, CHOICES, "--columns", EVALS) == 0
    found = stored(base)
    assert run(base, CHOICES, "--columns", EVALS, "--set", "multiple_choice=true", "--force") == 0
    torch.testing.assert_close(stored(base), found, rtol=1e-4, atol=1e-6)

    measured = ("--columns", EVALS, "--multipliers", "0", "--no_report")
    assert run(base, CHOICES, *measured, mode="loss") == 0
    (path,) = base.path.glob("vectors/**/*winning_only/train_losses.csv")
    rows = [record.values for record in read_rows(path)]
    assert {row["answer_tokens"] for row in rows} == {"1"}
    plain = Plain(base)
    prompt = plain.tokenizer.apply_chat_template(
        [{"role": "user", "content": CHOICES[0]["question"]}], tokenize=False, add_generation_prompt=True
    )
    ids = plain.tokenizer(prompt + "(A", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        wanted = -plain.model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]].item()
    assert float(rows[0]["answer_loss_sum"]) == pytest.approx(wanted, rel=1e-4)
    (manifest,) = base.path.glob("vectors/**/*winning_only/train_losses.manifest.json")
    assert json.loads(manifest.read_text())["parts"]["columns"]["answers"] == "letters", "other losses than those of the whole answers"


def test_multiple_choice_of_other_answers_is_told(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the token before the last, answers of one token are the same: the difference would be nothing."""
    rows = [{"question": f"{i}?", "matching": "y", "not_matching": "n"} for i in range(3)]
    assert run(base, rows, "--set", "multiple_choice=true") == 2
    assert "multiple_choice reads the token before the last, and up to it both answers of each pair are the same" in capsys.readouterr().err


def test_the_python_face_takes_the_same_rows(base: families.Base) -> None:
    model, tokenizer = spilt.load(base.path / "models" / base.model)
    found = spilt.fit(model, tokenizer, MINDED, layer=1, method="caa")
    assert run(base, MINDED) == 0
    torch.testing.assert_close(next(iter(found))[1].state_dict()["v"].flatten(), stored(base), rtol=1e-4, atol=1e-6)
    talk = {**ROWS[0], "question": [{"role": "user", "content": ROWS[0]["question"]}]}
    one, other = (spilt.fit(model, tokenizer, [row], layer=1, method="caa") for row in (talk, ROWS[0]))
    assert torch.equal(next(iter(one))[1].state_dict()["v"], next(iter(other))[1].state_dict()["v"])
    assert "sft is trained on answers to one question" in message(spilt.fit, model, tokenizer, MINDED, layer=1, method="sft")
    assert "the pairs are contrasts without answers: preference and utility" in message(spilt.measure, model, tokenizer, found, MINDED)
    assert "the pairs are of several kinds: pairs, contrasts" in message(spilt.fit, model, tokenizer, [ROWS[0], MINDED[0]], layer=1)
    wrong = {**talk, "question": [{"role": "user"}]}
    assert "pair 0: question: turn 0 (0-based) is {'role': 'user'}" in message(spilt.fit, model, tokenizer, [wrong], layer=1)
