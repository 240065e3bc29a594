"""`import spilt`: the Python face. Equal to the command line, usable with the library's own generate and pipelines, no side effects."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import PAIRS as CELLS
from families import Base, build, make_base, pairs, tokenizer
from test_identity import run, vector

import spilt
from spilt.errors import UserError
from spilt.methods import METHODS

PAIRS = pairs(6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("api"), train=6, test=2)


@pytest.fixture(scope="module")
def loaded(base: Base) -> Any:
    return spilt.load(base.path / "models" / base.model)


@pytest.mark.parametrize(("method", "form"), CELLS)
@pytest.mark.few(3)
def test_a_fit_is_that_of_the_command_line(base: Base, loaded: Any, method: str, form: str) -> None:
    assert run(base, "--mode", "generate", "--quiet", method=method, form=form) == 0
    how = {"batch_size": 4, "gradient_accumulation_steps": 2, "n_epochs": 1, "lr": 0.01, "seed": 42} if METHODS[method].loss else {}
    value = spilt.fit(*loaded, PAIRS, layer=2, method=method, intervention=form, **how)
    assert value == spilt.Steering.load(vector(base, method, form))
    assert value.about["method"] == method


def test_texts_are_those_of_the_command_line(base: Base, loaded: Any) -> None:
    assert run(base, "--mode", "both", "--multipliers", "-2", "0", "2", "--quiet", form="lora") == 0
    value = spilt.Steering.load(vector(base, form="lora"))
    table = spilt.generate(*loaded, value, [row["question"] for row in pairs(2)], [-2, 0, 2], max_new_tokens=5, do_sample=False)
    for m, rows in table.groupby("multiplier"):
        folder = base.path / "generation" / base.model / "sft" / base.one / "sft_lora" / f"m{m}"
        assert [row["pred"][0] for row in json.loads((folder / f"{base.one}_results.json").read_text())] == list(rows["text"])


@pytest.mark.parametrize("positions", ["all", "skip_prefix"])
@pytest.mark.few(1)
@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_measured_preference_and_utility_are_those_of_the_command_line(base: Base, loaded: Any, positions: str) -> None:
    """As text is made (the table of losses), and in the released positions (the released files)."""
    import pandas as pd

    assert run(base, "--mode", "generate", "--quiet") == 0
    words = ["-2", "-1", "1", "2", "--no-released_files"] if positions == "all" else ["0", "1", "2"]
    folder = base.path / "vectors" / base.model / "get_sft_loss" / "sft" / base.one / "sft_vector"
    shutil.rmtree(folder, ignore_errors=True)
    assert run(base, "--mode", "loss", "--multipliers", *words, "--quiet") == 0
    told = pd.read_csv(folder / "preference_utility.csv").query("split == 'train'").sort_values("multiplier")
    table = spilt.measure(*loaded, spilt.Steering.load(vector(base)), PAIRS, [-2, -1, 1, 2], positions=positions)
    for name in ("multiplier", "preference", "utility", "n"):
        assert table[name].to_numpy() == pytest.approx(told[name].to_numpy(), abs=1e-5), name
    plain = spilt.measure(*loaded, spilt.Steering.load(vector(base)), PAIRS, [-2, -1, 1, 2], engine="plain", positions=positions)
    assert plain["preference"].to_numpy() == pytest.approx(table["preference"].to_numpy(), abs=1e-5)


def test_steer_with_the_librarys_generate_and_a_pipeline(loaded: Any) -> None:
    from transformers import pipeline

    model, tokens = loaded
    value = spilt.fit(model, tokens, PAIRS, layer=2, method="caa") * 20
    ids = torch.tensor([tokens("is 3 odd?")["input_ids"]] * 2)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base_text = model.generate(input_ids=ids, **how)
    with spilt.steer(model, value, torch.tensor([0.0, 1.0])):
        rows = model.generate(input_ids=ids, **how)
    assert torch.equal(rows[0], base_text[0]) and not torch.equal(rows[1], base_text[1])
    # transformers 4.57 takes no device for a model that was loaded onto one
    device = None if hasattr(model, "hf_device_map") else "cpu"
    talk = pipeline("text-generation", model=model, tokenizer=tokens, device=device)
    plain = talk("is 3 odd?", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    with spilt.steer(model, value, 1.0):
        steered = talk("is 3 odd?", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert steered != plain == talk("is 3 odd?", max_new_tokens=6, do_sample=False)[0]["generated_text"]


def test_layers_apart_and_jointly(loaded: Any) -> None:
    how = {"method": "sft", "intervention": "vector", "n_epochs": 2, "dropout": 0.0}
    apart, joint = (spilt.fit(*loaded, PAIRS, layer=[1, 3], joint=joint, **how) for joint in (False, True))
    assert apart.layers == joint.layers == (1, 3) and apart != joint
    alone = spilt.fit(*loaded, PAIRS, layer=3, **how)
    assert torch.equal(alone.entries[0][1].v, apart.entries[1][1].v)
    table = spilt.measure(*loaded, joint, PAIRS, [1.0])
    assert len(table) == 2 and table["preference"].notna().all()


def state() -> tuple[Any, ...]:
    log = logging.getLogger("spilt")
    root = logging.getLogger()
    return (
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(), random.getstate(),
        log.level, list(log.handlers), root.level, len(root.handlers), torch.is_grad_enabled(),
    )  # fmt: skip


def test_nothing_of_the_callers_is_changed() -> None:
    """A model in training mode with gradients on comes back so; seeds, threads, log levels and deterministic mode stay."""
    model, tokens = build("qwen2").train().requires_grad_(True), tokenizer()
    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    value = spilt.fit(model, tokens, PAIRS, layer=2, n_epochs=1)
    spilt.measure(model, tokens, value, PAIRS, [1.0])
    spilt.generate(model, tokens, value, "is 1 odd?", 1.0, max_new_tokens=3)
    assert state() == before
    assert all(module.training for module in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": "sptl"}, "unknown method 'sptl'; did you mean 'spilt'"),
        ({"intervention": "vectr"}, "unknown intervention 'vectr'; did you mean 'vector'"),
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
        ({"lr": -1}, "lr = -1 is too small"),
        ({"layer": 50}, "layer 50 does not exist: the model has 5 blocks"),
        ({"method": "caa", "intervention": "lora"}, "caa . lora does not exist"),
        ({"pairs": []}, "there are no pairs"),
        ({"pairs": [{"question": "x"}]}, "pair 0 is .* wanted the texts question, matching, not_matching"),
    ],
)
def test_mistakes_are_messages(loaded: Any, words: dict[str, Any], said: str) -> None:
    given = {"layer": 2, **words}
    with pytest.raises(UserError, match=said):
        spilt.fit(*loaded, given.pop("pairs", PAIRS), **given)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "there are no prompts; give at least one"),
        (None, "prompts are a NoneType; wanted texts, or conversations"),
        (3, "prompts are a int; wanted texts"),
        ([3], "prompt 0"),
        ([("user",)], "prompt 0"),
        ([("user", "hi", "more")], "prompt 0"),
        ([{"role": "user"}], "prompt 0"),
    ],
)
def test_wrong_prompts_are_messages(loaded: Any, prompts: Any, said: str) -> None:
    value = spilt.fit(*loaded, PAIRS, layer=2, method="caa")
    for call in (spilt.generate, spilt.divergence):
        with pytest.raises(UserError, match=said):
            call(*loaded, value, prompts)


def test_a_conversation_is_a_prompt(loaded: Any) -> None:
    """As lists of role and content and as pairs of them, alone and among others."""
    value = spilt.fit(*loaded, PAIRS, layer=2, method="caa")
    turns = [("user", "one"), ("assistant", "two"), ("user", "three")]
    said = [{"role": role, "content": text} for role, text in turns]
    wanted = list(spilt.generate(*loaded, value, [said], max_new_tokens=3)["text"])
    for prompts in (said, tuple(turns), turns, [tuple(turns)], [turns]):
        assert list(spilt.generate(*loaded, value, prompts, max_new_tokens=3)["text"]) == wanted, prompts
    assert len(spilt.generate(*loaded, value, ["one", tuple(turns)], max_new_tokens=3)) == 2


def test_what_is_no_steering_and_what_are_no_pairs(loaded: Any, tmp_path: Path) -> None:
    value = spilt.fit(*loaded, PAIRS, layer=2, method="caa")
    where = value.save(tmp_path / "a.safetensors")
    for wrong in (where, str(where), None, [value], {"layer": 2}):
        said = pytest.raises(UserError, match=f"steering is a {type(wrong).__name__}; wanted a Steering")
        with said, spilt.steer(loaded[0], wrong):
            pass
        with said, spilt.in_place(loaded[0], wrong):
            pass
        with said:
            spilt.generate(*loaded, wrong, "one")
        with said:
            spilt.divergence(*loaded, wrong, "one")
        with said:
            spilt.calibrate(*loaded, wrong, "one")
        with said:
            spilt.measure(*loaded, wrong, PAIRS)
    for wrong in (None, 3, "abc", value, PAIRS[0] if isinstance(PAIRS[0], dict) else {"question": "x"}):
        with pytest.raises(UserError, match=f"pairs are a {type(wrong).__name__}; wanted a list of"):
            spilt.fit(*loaded, wrong, layer=2)
        with pytest.raises(UserError, match="pairs are"):
            spilt.measure(*loaded, value, wrong)
    with pytest.raises(UserError, match="pair 0 is 3; wanted the texts"):
        spilt.fit(*loaded, [3], layer=2)


@pytest.mark.filterwarnings("error")
def test_numbers_are_those_of_any_library(loaded: Any) -> None:
    """Settings, layers and multipliers as numpy, pandas and torch hold them; what is no number is refused as before."""
    how: dict[str, Any] = {"method": "sft", "intervention": "lora", "seed": 3}
    plain = spilt.fit(*loaded, PAIRS, layer=[1, 2], **how, n_epochs=1, lr=0.5, rank=2, steering_factors=[1.0, 2.0], batch_size=4)
    numbers: dict[str, Any] = {"n_epochs": np.int64(1), "lr": np.float32(0.5), "rank": torch.tensor(2), "batch_size": np.array(4)}
    for layers, factors in ((np.array([1, 2]), np.array([1.0, 2.0])), (torch.tensor([1, 2]), [np.float32(1), torch.tensor(2.0)])):
        assert spilt.fit(*loaded, PAIRS, layer=layers, **how, **numbers, steering_factors=factors) == plain
    assert spilt.fit(*loaded, PAIRS, layer=np.int64(1), method="caa") == spilt.fit(*loaded, PAIRS, layer=1, method="caa")
    for name, value in {"n_epochs": np.float64(1.5), "lr": np.array([0.1, 0.2]), "rank": np.bool_(True)}.items():
        with pytest.raises(UserError, match=name):
            spilt.fit(*loaded, PAIRS, layer=1, **how, **{name: value})
    filtered = pd.Series([0.0, 1.0, 2.0])[lambda m: m > 0]  # its index begins at 1
    wanted = spilt.measure(*loaded, plain, PAIRS, [1.0, 2.0])
    pd.testing.assert_frame_equal(spilt.measure(*loaded, plain, PAIRS, filtered), wanted)
    for wrong in (pd.Series(["1"]), "1", pd.Series([], dtype=float)):
        with pytest.raises(UserError, match="multipliers are"):
            spilt.measure(*loaded, plain, PAIRS, wrong)


def test_importing_is_fast_and_lists_the_face() -> None:
    code = "import sys, spilt; print('torch' in sys.modules, sorted(set(spilt.__all__) - {'__version__'}), len(dir(spilt)) > 6)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    face = ["Steering", "calibrate", "divergence", "fit", "generate", "in_place", "lm_eval_model", "load", "measure"]
    face += ["read_adapter", "read_post_block", "steer"]
    assert told.stdout.strip() == f"False {face} True"
    with pytest.raises(AttributeError, match="has no attribute 'generat'; have: calibrate, divergence, fit, generate"):
        spilt.generat  # noqa: B018
