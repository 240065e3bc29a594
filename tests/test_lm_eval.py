"""lm-evaluation-harness on a steered model: tasks with data of their own, by Python and by `spilt lm_eval`; skipped where it is missing."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import spilt
from spilt import cli
from spilt.errors import UserError
from spilt.lm_eval import rows

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{target}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
TASKS = {
    "choice": ("multiple_choice", 'doc_to_target: label\ndoc_to_choice: "{{[yes, no]}}"', "acc"),
    "written": ("generate_until", 'doc_to_target: "{{yes}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 4}', "exact_match"),
}


def write_tasks(folder: Path) -> Path:
    """Words of three letters each: which is likelier to a random model is anybody's guess."""
    draw = random.Random(1)
    words = ["".join(draw.sample("abcdefghijklmnop", 3)) for _ in range(32)]
    rows = [{"question": f"is {i} so?", "yes": f" {words[2 * i]}", "no": f" {words[2 * i + 1]}", "label": i % 2} for i in range(16)]
    families.write_jsonl(folder / "rows.jsonl", rows)
    for name, (kind, target, metric) in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, path=folder / "rows.jsonl", kind=kind, target=target, metric=metric))
    return folder


def steering() -> tuple[Any, Any, spilt.Steering]:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    pairs = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(6)]
    return model, tokenizer, spilt.fit(model, tokenizer, pairs, layer=2, method="caa")


def test_loglikelihoods_and_texts_are_those_of_the_steered_model(tmp_path: Path) -> None:
    """Against a loop over the steered model; at m = 0 those of the unsteered one; outside the harness nothing is steered."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model, tokenizer, value = steering()
    asked = [(f"is {i} so?", f" yes{i}") for i in range(3)]
    found = {}
    for m in (0.0, 40.0):
        lm = spilt.lm_eval_model(model, tokenizer, value, m, batch_size=2)
        requests = [Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(asked)]
        found[m] = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        for (context, answer), score in zip(asked, found[m], strict=True):
            before, whole = (lm.tok_encode(text) for text in (context, context + answer))
            with spilt.steer(model, value, m), torch.no_grad():
                told = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            wanted = sum(told[t - 1, whole[t]].item() for t in range(len(before), len(whole)))
            assert score == pytest.approx(wanted, abs=1e-4)
        texts = lm.generate_until([Instance("generate_until", {}, ("is 1 so?", {"until": ["."], "max_gen_toks": 4}), 0)], disable_tqdm=True)
        ids = torch.tensor([lm.tok_encode("is 1 so?")])
        with spilt.steer(model, value, m):
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=families.PAD)
        assert texts[0] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split(".")[0]
    assert found[0.0] != found[40.0]


def test_tasks_with_local_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored vector by `spilt lm_eval`: the steered model answers otherwise than the unsteered one."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(tmp_path / "tasks")
    base = families.make_base(tmp_path / "base", train=6)
    assert cli.main([*base.argv("caa"), "--mode", "generate", "--quiet"]) == 0
    words = [
        "lm_eval",
        *base.argv("caa"),
        "--tasks",
        *TASKS,
        "--include_path",
        str(folder),
        "--multipliers",
        "-40",
        "40",
        "--batch_size",
        "16",
    ]
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert list(found) == ["-40.0", "0.0", "40.0"]
    assert all(f"{metric},none" in at[name] for at in found.values() for name, (_, _, metric) in TASKS.items())
    assert len({at["choice"]["acc,none"] for at in found.values()}) > 1
    assert cli.main([*words, "--set", "steer_positions=f5"]) == 2 and "every token is steered" in capsys.readouterr().err
    assert cli.main([*words, "--include_path", str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err


def test_without_it_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def none(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(UserError, match="pip install lm_eval"):
        spilt.lm_eval_model(None, None, None)
    assert cli.main(["lm_eval", "--model_name", "x", "--tasks", "y"]) == 2 and "pip install lm_eval" in capsys.readouterr().err


def test_a_row_for_each_task_and_measure() -> None:
    values = {"acc,none": 0.5, "acc_stderr,none": 0.12, "alias": "colours", "exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A"}
    assert rows({0.0: {"colours": values}, 2.0: {"colours": values}}) == [
        "task     measure               m = 0       m = 2",
        "colours  acc                   0.5 ± 0.12  0.5 ± 0.12",
        "colours  exact_match (strict)  1           1",
    ]
