"""What is measured is what is applied: positions, doses, tables and random interventions, recomputed here with transformers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spilt import cli, look, report, verify
from spilt.analysis import odds
from spilt.artifacts import manifest, texts
from spilt.artifacts.losses import TABLE
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.tasks import control

PAIRS = 6


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> families.Base:
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))
    return families.make_base(tmp_path / "base", train=PAIRS)


def run(base: families.Base, mode: str, *words: str, form: str = "vector") -> int:
    return cli.main([*base.argv("sft", form, "--mode", mode, *words), "--quiet"])


def place(base: families.Base, form: str = "vector") -> Cell:
    return Cell(base.model, base.one, "sft", form, (base.layer,))


def table(base: families.Base, split: str = "train", form: str = "vector") -> pd.DataFrame:
    return pd.read_csv(Store(base.path).loss_table(place(base, form), split))


class Plain:
    """The model with one hook of our own, and nothing of the package."""

    def __init__(self, base: families.Base, form: str = "vector") -> None:
        folder = base.path / "models" / base.model
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.block = self.model.model.layers[base.layer]
        self.stored = torch.load(Store(base.path).vector(place(base, form), base.layer), weights_only=True)
        self.rows = [json.loads(line) for line in (base.path / f"data/{base.one}/train.jsonl").read_text().splitlines()]
        self.mid: Tensor | None = None
        self.stream: Tensor | None = None

    def delta(self, like: Tensor) -> Tensor:
        if isinstance(self.stored, Tensor):
            return self.stored.expand_as(like)
        return self.mid @ self.stored["lora_A"] @ self.stored["lora_B"]

    def forward(self, ids: list[int], multiplier: float, first: int = 0) -> Tensor:
        """Logits [T, V], steered from token `first` on."""

        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            self.mid = args[0]

        def add(_: Any, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            self.stream = h
            there = (torch.arange(h.shape[1]) >= first)[None, :, None]
            made = torch.where(there, h + multiplier * self.delta(h), h)
            return (made, *output[1:]) if isinstance(output, tuple) else made

        handles = [self.block.mlp.down_proj.register_forward_pre_hook(keep), self.block.register_forward_hook(add)]
        try:
            with torch.no_grad():
                return self.model(torch.tensor([ids])).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def prompt(self, question: str) -> list[int]:
        said = [{"role": "user", "content": question}]
        return self.tokenizer(
            self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]

    def prefix(self) -> int:
        """Tokens that all prompts begin with, as two of other content tell."""
        one, other = self.prompt("aa"), self.prompt("zz")
        return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

    def loss(self, question: str, answer: str, multiplier: float, first: int = 0) -> float:
        """Summed over the answer's own tokens, nats."""
        prompt, text = self.prompt(question), self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        logp = self.forward([*prompt, *text], multiplier, first).log_softmax(-1)
        return -sum(logp[len(prompt) - 1 + k, token].item() for k, token in enumerate(text))


@pytest.mark.parametrize("form", ["vector", "lora"])
@pytest.mark.few(1)
def test_a_table_is_what_hooks_on_every_token_give(base: families.Base, form: str) -> None:
    assert run(base, "generate", form=form) == 0
    assert run(base, "loss", "--multipliers", "-2", "1.5", "--no-released_files", form=form) == 0
    plain, found = Plain(base, form), table(base, form=form)
    assert list(found.columns) == [*TABLE] and set(found["positions"]) == {"all"}
    assert sorted(found["multiplier"].unique()) == [-2.0, 0.0, 1.5], "m = 0 is always measured"
    for row in found.itertuples():
        answer = plain.rows[row.example][row.target]
        assert row.answer_loss_sum == pytest.approx(plain.loss(plain.rows[row.example]["question"], answer, row.multiplier), abs=2e-4)


def test_the_released_files_leave_the_template_prefix_alone_and_say_nothing_else(base: families.Base) -> None:
    assert run(base, "generate") == 0
    assert run(base, "loss", "--multipliers", "2", "--split", "train") == 0
    plain, store = Plain(base), Store(base.path)
    prefix = plain.prefix()
    assert prefix > 0
    frame = odds.collect(store.loss_folder(place(base)), "train")
    assert frame.attrs["positions"] is None and frame["dose"].isna().all()
    at = frame[frame["multiplier"] == 2].set_index("example")
    released = [plain.loss(row["question"], row["matching"], 2.0, prefix) for row in plain.rows]
    tokens = [len(plain.tokenizer(row["matching"], add_special_tokens=False)["input_ids"]) for row in plain.rows]
    np.testing.assert_allclose(at["loss_matching"], np.array(released) / tokens, atol=2e-4)
    everywhere = [plain.loss(row["question"], row["matching"], 2.0) for row in plain.rows]
    assert np.abs(np.array(everywhere) - released).max() > 1e-3, "the prefix matters here"


@pytest.mark.long
def test_the_dose_is_the_mean_of_delta_over_h(base: families.Base) -> None:
    for form in ("vector", "lora"):
        assert run(base, "generate", form=form) == 0
        assert run(base, "loss", "--multipliers", "3", "--no-released_files", form=form) == 0
        plain, ratios = Plain(base, form), []
        for row in plain.rows:
            for answer in (row["matching"], row["not_matching"]):
                ids = [*plain.prompt(row["question"]), *plain.tokenizer(answer, add_special_tokens=False)["input_ids"]]
                whole = plain.tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}], tokenize=False
                )
                ids = plain.tokenizer(whole, add_special_tokens=False)["input_ids"]
                plain.forward(ids, 0.0)
                h = plain.stream
                assert h is not None
                ratios += (plain.delta(h).norm(dim=-1) / h.norm(dim=-1))[0].tolist()
        found = table(base, form=form)
        assert set(found[found["multiplier"] == 0]["dose"]) == {0.0}
        assert found[found["multiplier"] == 3]["dose"].iloc[0] == pytest.approx(3 * np.mean(ratios), rel=0.05)


@pytest.mark.few(2)
@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("where", ["skip_prefix", "all_generation"])
def test_one_setting_says_where_fits_losses_and_texts_are_steered(base: families.Base, where: str, engine: str) -> None:
    words = ("--set", f"steer_positions={where}", "--engine", engine)
    assert run(base, "generate", *words) == 0
    assert run(base, "loss", "--multipliers", "2", "--no-released_files", *words) == 0
    assert run(base, "apply", "--multipliers", "2", *words) == 0
    plain, found = Plain(base), table(base)
    assert set(found["positions"]) == {where}
    for row in found.itertuples():
        question = plain.rows[row.example]["question"]
        first = plain.prefix() if where == "skip_prefix" else len(plain.prompt(question))
        wanted = plain.loss(question, plain.rows[row.example][row.target], row.multiplier, first)
        assert row.answer_loss_sum == pytest.approx(wanted, abs=2e-4)
    for made in json.loads(Store(base.path).results(place(base), 2.0).read_text()):
        ids = plain.prompt(made["input"])
        first, new = plain.prefix() if where == "skip_prefix" else len(ids), list[int]()
        while len(new) < 5 and plain.tokenizer.eos_token_id not in new:
            new.append(int(plain.forward([*ids, *new], 2.0, first)[-1].argmax()))
        assert made["pred"] == [plain.tokenizer.decode(new, skip_special_tokens=True)]


@pytest.mark.long
def test_a_table_grows_and_is_the_same_whatever_the_order(base: families.Base, tmp_path: Path) -> None:
    assert run(base, "generate") == 0
    for words in (["1"], ["-2", "3"], ["1"]):
        assert run(base, "loss", "--multipliers", *words, "--no-released_files") == 0
    path = Store(base.path).loss_table(place(base), "train")
    bit_by_bit, notes = path.read_bytes(), (manifest.read(path) or {})["notes"]
    assert notes["multipliers"] == [-2.0, 0.0, 1.0, 3.0] and not notes["swept"]
    assert run(base, "loss", "--multipliers", "3", "1", "-2", "--no-released_files", "--force") == 0
    assert path.read_bytes() == bit_by_bit
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    path.write_bytes(bit_by_bit.replace(b"\n", b"\n1", 1))
    assert verify.DAMAGED in {found.state for found in verify.check(base.path)}


@pytest.mark.long
def test_random_interventions_have_the_doses_that_they_are_said_to_have(base: families.Base) -> None:
    assert run(base, "generate") == 0
    assert run(base, "loss", "--multipliers", "sweep", "--control_pairs", "2", "--split", "train") == 0
    drawn = pd.read_csv(Store(base.path).control(place(base)))
    assert drawn["draw"].nunique() == control.DRAWS >= 40 and set(drawn["n"]) == {2}
    assert sorted(drawn["dose"].unique()) == [0.0, *control.DOSES]
    swept = table(base)
    unit = (swept["dose"] / swept["multiplier"].abs()).dropna().iloc[0]
    np.testing.assert_allclose(drawn["multiplier"].abs() * unit, drawn["dose"], atol=1e-9)
    assert drawn[drawn["dose"] == 0].groupby("draw")["preference"].first().nunique() == 1
    notes = (manifest.read(Store(base.path).loss_table(place(base), "train")) or {})["notes"]
    assert notes["swept"]
    assert run(base, "loss", "--multipliers", "sweep", "--control_pairs", "2", "--split", "train") == 0


def test_steer_positions_of_another_word_are_refused(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "generate", "--set", "steer_positions=everything") == 2
    assert "wanted all, skip_prefix, all_prompt" in capsys.readouterr().err


@pytest.mark.long
def test_neutral_text_is_measured_beside_the_pairs(base: families.Base) -> None:
    texts = [("name a colour", "blue"), ("two and two", "four"), ("name a bird", "robin")]
    rows = [json.dumps({"input": asked, "reference_response": said}) for asked, said in texts]
    (base.path / "data/neutral.jsonl").write_text("\n".join(rows) + "\n")
    path = base.path / "hparams/Steer/dataset_format.yaml"
    path.write_text(path.read_text() + f"neutral:\n  {base.one}: {{file_path: data/neutral.jsonl}}\n")
    assert run(base, "generate") == 0
    assert run(base, "loss", "--multipliers", "2", "--no-released_files") == 0
    plain, found = Plain(base), odds.collect_neutral(Store(base.path).loss_folder(place(base)))
    assert len(found) == 2 * len(texts)
    for row in found.itertuples():
        asked, said = texts[int(row.example)]
        count = len(plain.tokenizer(said, add_special_tokens=False)["input_ids"])
        assert row.loss == pytest.approx(plain.loss(asked, said, row.multiplier) / count, abs=2e-4)
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    (base.path / "data/neutral.jsonl").write_text(rows[0].replace("blue", "") + "\n")
    assert run(base, "loss", "--multipliers", "3", "--no-released_files") in (1, 2)


@pytest.mark.long
def test_answers_along_random_interventions_at_the_same_dose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's Yes/No answers: the stored vector's own row is what apply gives, the others are random ones of its dose."""
    demo = tmp_path / "demo"
    shutil.copytree(Path(__file__).parents[1] / "examples/demo", demo)
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))
    monkeypatch.setattr(control, "DRAWS", 20)  # the fewest among which one can be beyond chance
    words = ["--dataset", "psychopathy", "--method", "sft", "--model_name", "demo-qwen2", "--intervention_method", "vector"]
    words += ["--base_dir", str(demo), "--device", "cpu", "--quiet"]
    assert cli.main([*words, "--mode", "generate"]) == 0
    assert cli.main([*words, "--mode", "loss", "--multipliers", "sweep", "--control_pairs", "4", "--limit", "16"]) == 0
    cell = Cell("demo-qwen2", "psychopathy", "sft", "vector", (2,))
    path = Store(demo).control_texts(cell)
    found = pd.read_csv(path).set_index("draw")
    assert list(found.index) == [-1, *range(control.DRAWS)] and set(found["n"]) == {control.FIRST_WORD[0]}
    assert found.loc[-1, "score"] == 1, "the demo's vector works"
    assert found.loc[0:, "score"].mean() < 0.8 and found.loc[0:, "score"].nunique() > 2
    m = found.loc[-1, "multiplier"]
    assert cli.main([*words, "--mode", "apply", "--multipliers", str(m), "--limit", str(control.FIRST_WORD[0])]) == 0
    rows = texts.read(Store(demo).results(cell, m))
    assert look.agreement(rows) == found.loc[-1, "score"]
    assert cli.main([*words, "--mode", "apply", "--multipliers", "recommended", "--limit", str(control.FIRST_WORD[0])]) == 0
    assert {at for at, _ in Store(demo).generated(cell)} == {0.0, m}
    others = [word if word != "sft" else "all" for word in words]
    assert cli.main([*others, "--mode", "apply", "--multipliers", "recommended", "--dry_run"]) == 0
    assert "reps vector: no recommended multiplier: not measured" in capsys.readouterr().out
    before = path.read_bytes()
    assert cli.main([*words, "--mode", "loss", "--multipliers", "sweep", "--control_pairs", "4", "--limit", "16", "--force"]) == 0
    assert path.read_bytes() == before
