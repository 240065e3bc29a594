"""Equal disturbance: KL along the steered path against a loop over the library's own generate, the root finder, spilt strength."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import pytest
import torch

import spilt
from spilt import cli
from spilt.analysis import calibrate as c
from spilt.data.chat import Chat, Encoded
from spilt.engine import decode, divergence, sampling, whole
from spilt.errors import UserError
from spilt.steering.steering import Site, Steering

PROMPTS = ["abc", "a longer one?", "XYZ", "what now"]
LAYER = 2


def steering(form: str = "vector", scale: float = 0.3) -> Steering:
    return Steering([(Site(LAYER, "mlp_mid" if form != "vector" else None), families.intervention(form, scale=scale))])


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize(("family", "form"), [("qwen2", "vector"), ("llama", "lora"), ("gemma2", "vector"), ("gpt2", "local_weight")])
@pytest.mark.few(2)
def test_kl_is_that_of_a_loop_over_the_library(family: str, form: str) -> None:
    """One prompt at a time: generate keeps its scores under steering, the unsteered model reads the same tokens once."""
    model, tokenizer, value, m, new = families.model(family), families.tokenizer(), steering(form), 1.5, 9
    chat, wanted = Chat.of(tokenizer, True, ""), []
    for text in PROMPTS:
        ids = chat.prompt_ids(text)
        told = torch.tensor([list(ids)])
        with whole.steer(model, value, m), torch.no_grad():
            made = model.generate(
                input_ids=told, attention_mask=torch.ones_like(told), max_new_tokens=new, do_sample=False, output_logits=True,
                return_dict_in_generate=True, pad_token_id=families.PAD,
            )  # fmt: skip
        with torch.no_grad():
            base = model(made.sequences).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        for t, scores in enumerate(made.logits):
            p = scores[0].log_softmax(-1)
            wanted.append(float((p.exp() * (p - base[t])).sum()))
    found = spilt.divergence(model, tokenizer, value, PROMPTS, m, max_new_tokens=new).iloc[0]
    assert found["tokens"] == len(wanted) and found["kl_mean"] > 0.01
    assert found["kl_mean"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert found["kl_p95"] == pytest.approx(np.quantile(wanted, 0.95), rel=1e-4) and found["kl_max"] == pytest.approx(max(wanted), rel=1e-4)


def test_no_steering_is_no_kl_and_more_is_more() -> None:
    table = spilt.divergence(families.model("qwen2"), families.tokenizer(), steering(), PROMPTS, [0, -1, 1, 2], max_new_tokens=6)
    assert table.loc[0, ["kl_mean", "kl_p95", "kl_max"]].tolist() == [0, 0, 0]
    assert table["kl_mean"][3] > table["kl_mean"][2] > 0 and table["kl_mean"][1] > 0
    with pytest.raises(UserError, match="there are no prompts"):
        spilt.divergence(families.model("qwen2"), families.tokenizer(), steering(), [])


@pytest.mark.few(2)
@pytest.mark.parametrize(("family", "form"), [("qwen2", "vector"), ("gemma2", "lora"), ("llama", "local_weight")])
def test_while_decoding_is_the_answer_read_again(family: str, form: str) -> None:
    """Answers that end at different times, more rows than places: the nats of decoding first and reading twice afterwards."""
    model, tokenizer, value = families.model(family), families.tokenizer(), steering(form)
    chat = Chat.of(tokenizer, True, "")
    rows = [decode.Row(tuple(chat.prompt_ids(text)), m, "") for m in (1.5, -2.0) for text in [*PROMPTS, PROMPTS[0]]]
    long = sampling.decoding({"do_sample": False, "max_new_tokens": 9}, model, tokenizer)
    free = dict(decode.generate(model, value, rows, long._replace(eos=()), 8))
    how = long._replace(eos=(free[0][2], free[6][5]))
    made = dict(decode.generate(model, value, rows, how, 8))
    assert len({len(tokens) for tokens in made.values()}) > 1
    found = list(divergence.while_decoding(model, value, rows, how, 6))
    told = [Encoded((*row.prompt, *made[i]), len(row.prompt), 0) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        (wanted,) = divergence.along_path(model, value, row.multiplier, [told[i]], families.PAD)
        assert torch.allclose(found[i], wanted, rtol=1e-4, atol=1e-7) and wanted.max() > 0.01


# ---------------------------------------------------------------- the root


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
@pytest.mark.parametrize("budget", [0.01, 1.0, 40.0])
def test_a_power_law_is_met_wherever_the_search_begins(power: float, budget: float) -> None:
    for start in (0.01, 1.0, 200.0):
        found = c.solve(lambda x: 0.3 * x**power, budget, start, high=1e5)
        wanted = (budget / 0.3) ** (1 / power)
        if wanted < 1e5:
            assert found.status == c.CONVERGED and abs(found.statistic - budget) <= 0.05 * budget and len(found.probes) < 25
        else:
            assert found.status == c.BELOW and found.size == 1e5


@pytest.mark.parametrize(
    ("statistic", "status"),
    [
        (lambda x: 0.2, c.BELOW),
        (lambda x: 3.0, c.ABOVE),
        (lambda x: 0.0, c.BELOW),
        (lambda x: 0.1 if x < 3.3 else 5.0, c.JUMPS),
        (lambda x: x if x < 0.7 else math.inf, c.JUMPS),
        (lambda x: math.nan, c.ABOVE),
        (lambda x: 2 + 1.9 * math.sin(math.log(x) * 9), c.NOT_MONOTONE),
        (lambda x: math.expm1(x), c.CONVERGED),
        (lambda x: 8 / (1 + math.exp(-(x - 6) * 3)), c.CONVERGED),
    ],
)
def test_how_a_search_ends_is_named(statistic: Callable[[float], float], status: str) -> None:
    found = c.solve(statistic, 1.0, 4.0)
    assert found.status == status and len(found.probes) < 40
    nearest = min((p.statistic for p in found.probes), key=lambda v: abs(math.log(v)) if 0 < v < math.inf else math.inf)
    assert found.statistic == nearest or not 0 < nearest < math.inf


# ---------------------------------------------------------------- on a model


@pytest.mark.long
def test_both_sides_meet_the_budget_and_methods_compare_there() -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    for form in ("vector", "lora"):
        table = spilt.calibrate(model, tokenizer, steering(form), PROMPTS, 0.5, audit=["other", "words"], max_new_tokens=8)
        assert table["side"].tolist() == ["positive", "negative"] and (table["multiplier"] > 0).tolist() == [True, False]
        for row in table.to_dict("records"):
            assert row["status"] in (c.CONVERGED, c.NOT_MONOTONE, c.JUMPS)  # of a tiny model another first token may jump
            again = spilt.divergence(model, tokenizer, steering(form), PROMPTS, row["multiplier"], max_new_tokens=8).iloc[0]
            # the search decodes several strengths in one batch, and a matrix product's last digit is its batch's on some processors
            assert again["kl_p95"] == pytest.approx(row["kl_p95"], rel=1e-5)
            assert row["status"] != c.CONVERGED or abs(row["kl_p95"] - 0.5) <= 0.025
            other = spilt.divergence(model, tokenizer, steering(form), ["other", "words"], row["multiplier"], max_new_tokens=8).iloc[0]
            assert other["kl_p95"] == pytest.approx(row["audit_kl_p95"], rel=1e-5)
        probes = table.attrs["probes"]
        assert set(probes["side"]) == {"none", "positive", "negative"} and probes["kl_max"][0] == 0
    with pytest.raises(UserError, match="budget is 0; wanted nats above 0"):
        spilt.calibrate(model, tokenizer, steering(), PROMPTS, 0)


def test_what_does_something_at_zero_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    value = steering()
    made = type(next(iter(value))[1])
    delta = made.delta
    monkeypatch.setattr(made, "delta", lambda self, h, x, m: delta(self, h, x, m) + 0.3)
    table = spilt.calibrate(families.model("qwen2"), families.tokenizer(), value, PROMPTS[:1], 2.0, max_new_tokens=3)
    assert set(table["status"]) == {c.NOT_ZERO}
    fast, plain = (  # beside an unsteered model, not beside one that is steered at 0
        spilt.divergence(families.model("qwen2"), families.tokenizer(), value, PROMPTS, 1.0, max_new_tokens=5, engine=engine)
        for engine in ("fast", "plain")
    )
    assert fast["kl_mean"][0] == pytest.approx(plain["kl_mean"][0], rel=1e-4) and fast["tokens"].equals(plain["tokens"])


# ---------------------------------------------------------------- the command


@pytest.mark.long
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=6, test=8)
    assert cli.main(base.argv("caa", "vector", "--mode", "generate", "--quiet")) == 0
    words = ["strength", "--base_dir", str(base.path), "--model_name", base.model, "--max_new_tokens", "4", "--prompts", "3"]
    cell = ["--dataset", base.one, "--method", "caa", "--intervention_method", "vector"]
    capsys.readouterr()
    assert cli.main([*words, *cell, "--budget", "0.3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["side"] for row in told["sides"]] == ["positive", "negative"] and told["budget"] == 0.3
    assert told["prompts"] == 3 and told["audit"] == 3 and len(told["probes"]) > 2 and {row["status"] for row in told["sides"]}
    assert cli.main([*words, *cell]) == 0
    said = capsys.readouterr().out
    assert "kl p95" in said and "negative" in said and "other prompts" in said
    stored = base.path / "vectors" / base.model / "caa" / base.one / "caa_vector" / f"layer_{base.layer}.pt"
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    assert cli.main([*words, "--steering", str(stored), "--prompts_file", str(lines)]) == 0
    assert cli.main([*words, "--steering", str(stored)]) == 2
    assert "--prompts_file" in capsys.readouterr().err
    assert cli.main([*words, *cell, "--budget", "nan"]) == 2
    assert "wanted nats above 0" in capsys.readouterr().err
