"""spilt weights on a tiny model: what each stage stores against plain transformers and PEFT; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import torch
import weights_base as small

from spilt import verify
from spilt.artifacts import manifest
from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.steering.steering import Steering
from spilt.weight_steering import data, personas


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """The whole pipeline once. Nothing may be written to it."""
    base = small.make(tmp_path_factory.mktemp("weights") / "base")
    assert small.run(base, "run") == 0
    return base


@pytest.fixture
def mine(done: families.Base, tmp_path: Path) -> families.Base:
    """A copy to work on."""
    return families.Base(Path(shutil.copytree(done.path, tmp_path / "base")))


def plain(base: families.Base) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = base.path / "models" / base.model
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def rows_of(base: families.Base, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (small.folder(base) / "answers.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def steered(base: families.Base, m: float) -> Any:
    """The library's model with m dW in its weights, made from both adapters by PEFT's own merge."""
    from peft import PeftModel

    sides = []
    for side in ("pos", "neg"):
        model, _ = plain(base)
        sides.append(PeftModel.from_pretrained(model, small.folder(base) / "adapters" / "lora" / side).merge_and_unload().state_dict())
    model, _ = plain(base)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight += m * (sides[0][name] - sides[1][name])
    return model


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_answers_are_the_models_own(done: families.Base) -> None:
    """Rows of the original's columns; tokens decode to the text; the audit questions are none of the training ones."""
    train, audit = rows_of(done, "train"), rows_of(done, "audit")
    assert len(train) == 3 * 2 * 2 and len(audit) == 3 * 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in audit}
    _, tokenizer = plain(done)
    for row in (*train, *audit):
        for side in ("pos", "neg"):
            assert tokenizer.decode(row[f"tokens_{side}"], skip_special_tokens=True).rstrip() == row[f"response_{side}"]
            assert row[f"ended_{side}"] == (row[f"tokens_{side}"][-1] in (families.EOS, families.END)) or not row[f"ended_{side}"]
    assert {(row["sys_prompt_pos"], row["sys_prompt_neg"]) for row in train} == set(personas.behaviour("optimism").pairs[:2])
    notes = manifest.read(small.folder(done) / "answers.jsonl")["notes"]  # type: ignore[index]
    assert notes["rows"] == notes["kept"] + notes["empty"] == len(train) + len(audit) and notes["without_end"] > 0


def test_dW_is_the_difference_of_the_merged_models(done: families.Base) -> None:
    """By PEFT's own loading and merging, at every map and nowhere else."""
    at_one, (base, _) = steered(done, 1.0), plain(done)
    dW = Steering.load(small.folder(done) / "arms" / "lora.safetensors")
    assert len(dW) == 4 and set(dW.forms) == {"lora"} and dW.about["kind"] == "dW"
    changed = {name for name, weight in at_one.state_dict().items() if not torch.equal(weight, base.state_dict()[name])}
    assert len(changed) == len(dW)
    for site, made in dW:
        path = site.write_point if "." in site.write_point else "mlp.down_proj"
        theirs, ours = (anatomy.block(model, site.layer).get_submodule(path).weight for model in (at_one, base))
        assert torch.allclose(theirs - ours, made.update().T, atol=1e-5) and float((theirs - ours).detach().norm()) > 1e-3
    told = json.loads((small.folder(done) / "arms" / "lora.diagnostics.json").read_text())
    whole = sum(float((at_one.state_dict()[name] - base.state_dict()[name]).double().square().sum()) for name in changed) ** 0.5
    assert told["norm"] == pytest.approx(whole, rel=1e-4) and told["geometry"]["norm_dW"] == pytest.approx(whole, rel=1e-4)
    assert 0 < told["bfloat16_error"]["stored"] < told["bfloat16_error"]["merged"] < 1 and len(told["by_map"]) == 4


def test_losses_are_those_of_the_library(done: families.Base) -> None:
    """-log p per token of the answers' own tokens behind the bare question, at both strengths and unsteered."""
    strengths = json.loads((small.folder(done) / "kl" / "lora.json").read_text())
    table = pd.read_csv(small.folder(done) / "evaluation" / "lora" / "preference.csv")
    assert sorted(table["multiplier"].unique()) == pytest.approx(sorted(side["multiplier"] for side in strengths["sides"]))
    base = pd.read_csv(small.folder(done) / "evaluation" / "unsteered" / "preference.csv").assign(multiplier=0.0)
    _, tokenizer = plain(done)
    for m, part in pd.concat([table, base]).groupby("multiplier"):
        model = steered(done, m)
        for row, found in zip(rows_of(done, "audit"), part.to_dict("records"), strict=True):
            for side in ("pos", "neg"):
                prompt = prompt_of(tokenizer, row["prompt"])
                ids = torch.tensor([prompt + row[f"tokens_{side}"]])
                with torch.no_grad():
                    logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                loss = -logp.gather(1, ids[0, len(prompt) :, None]).mean()
                assert found[f"loss_{side}"] == pytest.approx(float(loss), abs=2e-4)


@pytest.mark.long
def test_strengths_meet_the_budget_by_the_librarys_generate(done: families.Base) -> None:
    """KL(steered || base), p95 over the tokens of greedy answers, by merged weights, `generate` and a plain forward."""
    told = json.loads((small.folder(done) / "kl" / "lora.json").read_text())
    asked = json.loads((small.folder(done) / "personas.json").read_text())
    every = [personas.Question(*one) for one in asked["questions"]]
    base, tokenizer = plain(done)
    for which, split in (("", "calibration"), ("audit_", "audit")):
        prompts = [prompt_of(tokenizer, one.text) for one in personas.of_split(every, split, 3)]
        for side in told["sides"]:
            model, kl = steered(done, side["multiplier"]), []
            for prompt in prompts:
                ids = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0)
                with torch.no_grad():
                    p, q = (one(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for one in (model, base))
                kl += (p.exp() * (p - q)).sum(-1).tolist()
            assert side[f"{which}kl_p95"] == pytest.approx(float(np.quantile(kl, 0.95)), abs=2e-3)
    met = [side for side in told["sides"] if side["status"] == "converged"]  # of so few tokens p95 may jump over the budget
    assert met and all(abs(side["kl_p95"] - 0.3) <= 0.015 for side in met)
    history = pd.read_csv(small.folder(done) / "kl" / "history.csv")
    assert (history["method"] == "dW:lora").sum() == len(told["probes"]) and {"caa", "dW:lora"} == set(history["method"])
    summary = pd.read_csv(small.folder(done) / "kl" / "summary.csv").set_index("method")
    assert summary.loc["dW:lora", "alpha_neg"] == pytest.approx(-told["sides"][1]["multiplier"])


def test_the_table_is_made_of_the_losses(done: families.Base) -> None:
    """Movement and side effects from the stored losses, question by question."""
    from spilt.analysis.odds import utility_log_odds

    table = pd.read_csv(small.folder(done) / "tables" / "movement.csv")
    assert list(table["method"]) == ["dW:lora", "dW:lora", "caa", "caa", "prompt", "prompt"] and list(table["way"]) == [1, -1] * 3
    base = pd.read_csv(small.folder(done) / "evaluation" / "unsteered" / "preference.csv")
    for row in table.to_dict("records"):
        own = pd.read_csv(small.folder(done) / "evaluation" / row["arm"] / "preference.csv")
        own = own[np.sign(own["multiplier"]) == row["way"]].reset_index(drop=True)
        moved = (own["loss_neg"] - own["loss_pos"]) - (base["loss_neg"] - base["loss_pos"])
        assert row["movement"] == pytest.approx(moved.groupby(own["topic_idx"]).mean().mean())
        assert row["movement_low"] <= row["movement"] <= row["movement_high"] and row["n"] == 3
        utility = utility_log_odds(own["loss_pos"], own["loss_neg"]) - utility_log_odds(base["loss_pos"], base["loss_neg"])
        assert row["side_effect"] == pytest.approx(pd.Series(utility).groupby(own["topic_idx"]).mean().mean())
    page = (small.folder(done) / "tables" / "index.html").read_text()
    assert "data:image/svg+xml" in page and "<script" not in page and "dW:lora +" in page
    assert "| dW:lora + |" in (small.folder(done) / "tables" / "tables.md").read_text()


def test_validation_ends_a_training_and_gives_the_best(done: families.Base) -> None:
    """The log says where the loss was least; a rate this large does harm soon, so it ends before all steps."""
    for side in ("pos", "neg"):
        rows = [json.loads(line) for line in (small.folder(done) / "adapters" / "lora" / side / "log.jsonl").read_text().splitlines()]
        looked = {row["step"] + 1: row["validation"] for row in rows if "validation" in row}
        notes = manifest.read(small.folder(done) / "adapters" / "lora" / side / "adapter_model.safetensors")["notes"]  # type: ignore[index]
        assert notes["validation"] == min(looked.values()) and notes["validation_rows"] == 1
        assert set(looked) <= {*range(2, 10, 2), len(rows)}


def test_verify_tells_what_is_sound(mine: families.Base) -> None:
    """All of it; a changed byte; what was made of something that is another now."""
    found = list(verify.check(mine.path))
    assert {one.state for one in found} == {verify.OK} and len(found) == 2 + 2 + 3 + 3 + 4
    answers, config = small.folder(mine) / "answers.jsonl", mine.path / "models" / mine.model / "config.json"
    answers.write_bytes(answers.read_bytes() + b" ")
    states = {one.path.name: one.state for one in verify.check(mine.path)}
    assert states["answers.jsonl"] == verify.DAMAGED and states["adapter_model.safetensors"] == verify.STALE
    assert states["personas.json"] == verify.OK
    config.write_text(config.read_text() + " ")
    assert {one.state for one in verify.check(mine.path)} == {verify.DAMAGED, verify.STALE}


def test_again_is_done_and_other_flags_are_refused(mine: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made twice, and nothing stands beside results of another kind unasked."""
    before = small.contents(mine)
    assert small.run(mine, "run") == 0 and small.contents(mine) == before
    refused: list[tuple[str, list[str], str]] = [
        ("data", ["--n-samples", "3"], "n_samples 2 (now 3)"),
        ("adapters", ["--rank", "4"], "rank 2 (now 4)"),
        ("calibrate", ["--target-kl", "1"], "target_kl 0.3 (now 1.0)"),
        ("dw", ["--scale", "2"], "scale 1.0 (now 2.0)"),
        ("calibrate", ["--lr", "1"], "--lr is of the stage adapters, and means nothing to calibrate"),
        ("data", ["--seed", "1"], "seed 0 (now 1)"),
        ("calibrate", ["--dtype", "bfloat16"], "was made in float32, and this is bfloat16"),
        ("adapters", ["--pos", "x"], "--pos is of the stage dw"),
        ("dw", ["--pos", "x"], "--pos and --neg go together"),
    ]
    capsys.readouterr()
    for stage, more, said in refused:
        assert small.run(mine, stage, *more) == 2
        message = capsys.readouterr().err
        assert said in message and "Traceback" not in message
    assert small.contents(mine) == before


@pytest.mark.long
def test_what_was_made_of_something_else_is_refused(mine: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Each link of the chain: other answers, a changed adapter, another model of the name."""
    root = small.folder(mine)
    assert small.run(mine, "data", "--seed", "5", "--force") == 0
    capsys.readouterr()
    assert small.run(mine, "dw") == 2
    assert "was made of another" in (said := capsys.readouterr().err) and "spilt weights adapters" in said
    assert small.run(mine, "adapters") == 0  # other answers: both are trained anew
    assert small.run(mine, "dw") == 0 and small.run(mine, "calibrate") == 0
    path = root / "adapters" / "lora" / "pos" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 64', '"lora_alpha": 32'))
    capsys.readouterr()
    assert small.run(mine, "dw") == 2 and "is not as it was stored" in capsys.readouterr().err
    (root / "answers.jsonl").write_text("")
    assert small.run(mine, "adapters") == 2 and "is damaged, or was changed by hand" in capsys.readouterr().err
    assert small.run(mine, "evaluate") == 2
    other = families.checkpoint("llama")
    shutil.rmtree(mine.path / "models" / mine.model)
    shutil.copytree(other, mine.path / "models" / mine.model)
    capsys.readouterr()
    assert small.run(mine, "calibrate") == 2 and "another model" in capsys.readouterr().err


def row(number: int, split: str, pos: str, neg: str) -> dict[str, Any]:
    return {"split": split, "response_pos": pos, "response_neg": neg, "prompt": f"{number}"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda split: [], "no rows of the split"),
        (lambda split: [row(0, split, "", "b"), row(1, split, "a", "b")], "1 answers of the split"),
        (lambda split: [row(i, split, f"{i}", f"{i}") for i in range(3)], "has the same answer twice"),
        (lambda split: [row(i, split, "a", f"{i}") for i in range(3)], "all 3 answers of the pos side"),
    ],
)
def test_answers_that_teach_nothing_are_refused(make: Callable[[str], list[dict[str, Any]]], said: str) -> None:
    good = {split: [row(i, split, f"a{i}", f"b{i}") for i in range(3)] for split in ("train", "audit")}
    data.gate([*good["train"], *good["audit"]], "here")
    for split, other in (("train", "audit"), ("audit", "train")):
        with pytest.raises(UserError, match=said):
            data.gate([*make(split), *good[other]], "here")
