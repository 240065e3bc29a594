"""The Python face, tried from outside: every kind of number, every mistake a message, nothing of the caller's moved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import LAYERS, intervention, model, pairs, tokenizer

import spilt
from spilt.errors import NotFinite, UserError
from spilt.steering.steering import Steering

PAIRS = pairs(4)
HOW: dict[str, Any] = {"n_epochs": 1, "lr": 0.01}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return model("qwen2"), tokenizer()


@pytest.fixture
def vector() -> Steering:
    return Steering.of({1: intervention("vector")}, {"method": "sft", "recommended_multiplier": 4.0, "settings": {"lr": 1}})


def test_no_random_number_of_the_callers_is_drawn(loaded: Any, vector: Steering, tmp_path: Path) -> None:
    path = vector.save(tmp_path / "v.safetensors")
    before = torch.get_rng_state()
    for method, form in (("caa", "vector"), ("sft", "vector"), ("spilt", "lora")):
        spilt.fit(*loaded, PAIRS, layer=1, method=method, intervention=form, **({} if method == "caa" else HOW))
    again = Steering.load(path)
    spilt.generate(*loaded, again, "why", [0, 1], max_new_tokens=2)
    spilt.measure(*loaded, again, PAIRS, [1])
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_of_numpy_and_torch_are_numbers(loaded: Any, vector: Steering) -> None:
    plain = spilt.fit(*loaded, PAIRS, layer=1, method="caa")
    assert spilt.fit(*loaded, PAIRS, layer=np.int64(1), method="caa") == plain
    assert spilt.fit(*loaded, PAIRS, layer=[torch.tensor(1)], method="caa") == plain
    wanted = spilt.measure(*loaded, vector, PAIRS, [2.0])
    for given in (2, np.float32(2), torch.tensor(2.0), np.array([2.0]), torch.tensor([2])):
        assert spilt.measure(*loaded, vector, PAIRS, given).equals(wanted)
        assert list(spilt.generate(*loaded, vector, "why", given, max_new_tokens=2)["multiplier"]) == [2.0]


def test_a_list_of_strengths_is_one_for_each_row(loaded: Any, vector: Steering) -> None:
    tiny, ids = loaded[0], torch.tensor([[5, 6, 7]] * 3)
    rows = []
    for m in (0.0, 5.0, 10.0):
        with spilt.steer(tiny, vector, m):
            rows.append(tiny(ids[:1]).logits)
    for given in ([0.0, 5, 10], np.array([0, 5, 10]), torch.tensor([0.0, 5.0, 10.0])):
        with spilt.steer(tiny, vector, given):
            torch.testing.assert_close(tiny(ids).logits, torch.cat(rows))


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda m, v: spilt.fit(*m, PAIRS, layer="2"), "layer is '2'; wanted a whole number"),
        (lambda m, v: spilt.fit(*m, PAIRS, layer=2.0), "layer is 2.0; wanted a whole number"),
        (lambda m, v: spilt.fit(*m, PAIRS, layer=1, method="caa", engine="plian"), "unknown engine 'plian'; did you mean 'plain'"),
        (lambda m, v: spilt.fit(*m, PAIRS, layer=1, engine="plian", **HOW), "unknown engine 'plian'"),
        (lambda m, v: spilt.generate(*m, v, "why", engine="pl"), "unknown engine 'pl'"),
        (lambda m, v: spilt.measure(*m, v, PAIRS, engine="pl"), "unknown engine 'pl'"),
        (lambda m, v: spilt.fit(*m, [("a", "b", "b")], layer=1, method="caa"), "the same answer twice"),
        (lambda m, v: spilt.fit(*m, [("a", "", "b")], layer=1, method="caa"), "pair 0 has an empty answer"),
        (lambda m, v: spilt.fit(*m, PAIRS, layer=1, method="sft", intervention="lora", lr=1e-38, n_epochs=1), "the fitted lora is zero"),
        (lambda m, v: spilt.fit(*m, PAIRS, layer=1, method="sft", joint=True), "joint: several layers .* there is one"),
        (lambda m, v: spilt.fit(*m, PAIRS, layer=[1, 2], method="caa", joint=True), "joint: .* caa has a closed form"),
        (lambda m, v: spilt.generate(*m, v, "why", float("nan")), "multipliers are nan; wanted one finite number"),
        (lambda m, v: spilt.generate(*m, v, "why", 1e38), "within"),
        (lambda m, v: spilt.generate(*m, v, "why", "x"), "multipliers are x"),
        (lambda m, v: spilt.generate(*m, v, "why", batch_size=0), "batch_size is 0"),
        (lambda m, v: spilt.measure(*m, v, PAIRS, [float("inf")]), "multipliers are"),
        (lambda m, v: v * float("nan"), "times nan"),
        (lambda m, v: spilt.load("nowhere", dtype="bf61"), "unknown dtype 'bf61'"),
        (lambda m, v: _steered(m[0], torch.zeros(8), 1.0), "steering is a Tensor; wanted a Steering"),
        (lambda m, v: _steered(m[0], v, "x"), "multipliers are x"),
        (lambda m, v: _steered(m[0], v, [1.0, 2.0]), "2 multipliers, one for each row, and a batch of 1 rows"),
    ],
)
def test_a_mistake_is_a_message(loaded: Any, vector: Steering, work: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        work(loaded, vector)


def _steered(tiny: Any, steering: Any, multiplier: Any) -> Any:
    with spilt.steer(tiny, steering, multiplier):
        return tiny(torch.tensor([[5, 6, 7]]))


def test_a_text_beyond_the_context_is_told_or_refused(vector: Steering, caplog: pytest.LogCaptureFixture) -> None:
    """As on the command line: a table of positions that ends is an error, elsewhere it is a warning."""
    long, words = [("why " * 3000, "a", "b")], {"max_new_tokens": 2}
    for family, refused in (("gpt2", True), ("qwen2", False)):
        tiny = model(family), tokenizer()
        work = (
            lambda tiny=tiny: spilt.fit(*tiny, long, layer=1, method="caa"),
            lambda tiny=tiny: spilt.fit(*tiny, long, layer=1, method="sft", output_length=20_000, **HOW),
            lambda tiny=tiny: spilt.generate(*tiny, vector, long[0][0], 1.0, **words),
            lambda tiny=tiny: spilt.measure(*tiny, vector, long, [1.0], output_length=20_000),
        )
        for one in work if refused else work[:1]:
            caplog.clear()
            if refused:
                with pytest.raises(UserError, match="longer than the model's context of .* tokens"):
                    one()
            else:
                one()
                assert "longer than the model's context of" in caplog.text


def test_a_fit_that_went_to_infinity_is_no_steering(loaded: Any) -> None:
    with pytest.raises(NotFinite, match="NaN or infinite values; .* smaller lr"):
        spilt.fit(*loaded, PAIRS, layer=1, method="sft", lr=1e30, n_epochs=1)


def test_what_is_known_of_a_steering_stays_true(vector: Steering, loaded: Any) -> None:
    """A recommended multiplier is a strength: twice the update wants half of it; what two terms do not share, their sum does not say."""
    assert (vector * 2).about["recommended_multiplier"] == 2.0 and (-vector).about["recommended_multiplier"] == -4.0
    assert (vector + vector).about == {"method": "sft", "settings": {"lr": 1}}
    tiny, ids = loaded[0], torch.tensor([[5, 6, 7]])
    with spilt.steer(tiny, vector - vector, 3.0):
        nothing = tiny(ids).logits
    torch.testing.assert_close(nothing, tiny(ids).logits)


def test_another_base_model_is_a_warning(loaded: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    value = spilt.fit(*loaded, PAIRS, layer=1, method="caa")
    assert value.about["base_model"] == {"model_type": "qwen2", "hidden_size": 32, "layers": LAYERS}
    again = Steering.load(value.save(tmp_path / "v.safetensors"))
    with caplog.at_level(logging.WARNING), spilt.steer(loaded[0], again):
        assert not caplog.records
    with caplog.at_level(logging.WARNING), spilt.steer(model("llama"), again):
        assert "fitted on another base model: {'model_type': 'qwen2'}" in caplog.text
