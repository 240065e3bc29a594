"""Steering as a value: stored and reloaded exactly, from our file, the released layer_{id}.pt or a folder of them; sums and multiples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import HIDDEN, LAYERS, READS, intervention, make_base, model, token_rows
from safetensors.torch import load_file, save_file
from test_identity import run, vector

from spilt.engine import whole
from spilt.errors import UserError
from spilt.model.identity import model_hash
from spilt.steering.steering import Site, Steering


def every() -> Steering:
    """Every form and read point, at a layer each, one of them at the down projection."""
    made = [intervention(form, read_point, seed=i) for i, (form, read_point) in enumerate(READS)]
    entries = [(Site(i % LAYERS, one.read_point, one.write_point), one) for i, one in enumerate(made)]
    inner = intervention("vector", write_point="down_proj")
    return Steering([*entries, (Site(1, None, "down_proj"), inner)], {"method": "spilt", "recommended_multiplier": 3.5})


def logits(value: Steering, multiplier: Any) -> torch.Tensor:
    ids, _ = token_rows([9, 9])
    with torch.no_grad(), whole.steer(model("gemma2"), value, multiplier):
        return torch.as_tensor(model("gemma2")(input_ids=ids, use_cache=False).logits)


def test_a_stored_steering_needs_nothing_else(tmp_path: Path) -> None:
    value = every()
    again = Steering.load(value.save(tmp_path / "any-name.safetensors"))
    assert again == value and again.about == value.about and repr(again) == repr(value)
    assert torch.equal(logits(again, 0.7), logits(value, 0.7))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "any-name.safetensors").read_bytes()
    # another program reads it: plain safetensors
    tensors = load_file(tmp_path / "any-name.safetensors")
    assert set(tensors) >= {"0.v", "1.lora_A", "1.lora_B"} and tensors["0.v"].shape == (HIDDEN,)


@pytest.mark.parametrize("form", ["vector", "lora", "local_weight"])
def test_the_command_lines_file_is_a_steering(tmp_path: Path, form: str) -> None:
    base = make_base(tmp_path / "base", train=4, test=2)
    assert run(base, "--mode", "generate", "--quiet", form=form) == 0
    path = vector(base, form=form)
    value = Steering.load(path)
    ((site, made),) = value
    stored = torch.load(path, weights_only=True)
    assert site.layer == 2 and made.form == form and value.about["method"] == "sft"
    assert value.about["base_model"] == {"checkpoint": model_hash(base.path / "models" / base.model)}
    assert torch.equal(made.state() if form == "vector" else made.state()["weight" if form == "local_weight" else "lora_B"],
                       stored if form == "vector" else stored["weight" if form == "local_weight" else "lora_B"])  # fmt: skip
    assert run(base, "--mode", "generate", "--set", "layers=1", "--quiet", form=form) == 0
    assert Steering.load(path.parent).layers == (1, 2)
    path.with_name("layer_2.manifest.json").unlink()  # as the released code leaves it
    assert Steering.load(path).entries[0][0] == site


def test_sums_and_multiples_are_exact() -> None:
    value = every()
    torch.testing.assert_close(logits(value * 0.5, 1.4), logits(value, 0.7), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits(-value, 1.0), logits(value, -1.0), atol=1e-4, rtol=1e-5)
    one, other = Steering([value.entries[0]]), Steering([value.entries[1]])
    both = logits(one + other, 1.0)
    with torch.no_grad(), whole.steer(model("gemma2"), one, 1.0), whole.steer(model("gemma2"), other, 1.0):
        ids, _ = token_rows([9, 9])
        assert torch.equal(both, model("gemma2")(input_ids=ids, use_cache=False).logits)
    assert torch.equal(logits(value, 0.0), logits(value * 0.0, 1.0))
    before = [p.clone() for p in value.parameters()]
    (value * 3 + value).entries[0][1].scaled(5)
    assert all(torch.equal(a, b) for a, b in zip(before, value.parameters(), strict=True))  # a value: nothing is shared


def test_a_multiplier_per_row() -> None:
    value = every()
    apart = [logits(value, m)[row] for row, m in enumerate((0.0, 1.3))]
    torch.testing.assert_close(logits(value, torch.tensor([0.0, 1.3])), torch.stack(apart), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_the_model_is_named() -> None:
    with pytest.raises(UserError, match=r"v of Site\(layer=1.*shape \[7\]; this model wants \[32\]"):
        Steering.of({1: intervention("vector", hidden=7)}).check(model("qwen2"))
    with pytest.raises(UserError, match="layer 9 does not exist: the model has 5 blocks"):
        Steering.of({9: intervention("vector")}).check(model("qwen2"))
    with pytest.raises(UserError, match="reads at"):
        Steering([(Site(1, "mlp"), intervention("vector"))])


def words(**changes: Any) -> dict[str, str]:
    entry = {"form": "vector", "layer": 1, "read_point": None, "write_point": "block", "alpha": None, **changes}
    return {"steering": json.dumps({"format": 1, "entries": [entry], "about": {}})}


@pytest.mark.parametrize(
    ("name", "tensors", "metadata", "said"),
    [
        ("a.pt", {}, {}, "cannot be read .*; wanted a stored Steering"),
        ("a.safetensors", {"weight": torch.ones(3)}, {}, "a vector, which does not say where it acts; give the layer"),
        ("a.safetensors", {"0.v": torch.ones(3)}, words(form="vectr"), "has the form 'vectr'; have: vector, lora, local_weight"),
        ("a.safetensors", {"0.v": torch.ones(3)}, words(form="lora"), "a lora, wants the tensors lora_A, lora_B; found: v"),
        ("a.safetensors", {"0.v": torch.ones(3, 3)}, words(), r"wants the tensors v; found: v \[3, 3\]"),
        ("a.safetensors", {"0.v": torch.tensor([1.0, float("nan")])}, words(), "not finite"),
        ("a.safetensors", {"0.v": torch.ones(3)}, words(write_point="../x"), "no usable site"),
        ("a.safetensors", {"0.v": torch.ones(3)}, words(layer="x"), "its metadata is not that of a Steering"),
    ],
)
def test_other_files_are_told_what_they_are(tmp_path: Path, name: str, tensors: Any, metadata: Any, said: str) -> None:
    save_file(tensors, tmp_path / name, metadata)
    with pytest.raises(UserError, match=said):
        Steering.load(tmp_path / name)


def test_sum_begins_with_nothing() -> None:
    """0 + s = s, exactly; of any other number there is no Steering."""
    one, other = every() * 2.0, every()
    one.about["recommended_multiplier"] = 3.0
    assert sum([one, other]) == one + other and sum([one]) == one and sum([one]).about == one.about and 0.0 + one == one
    assert sum([one]).entries[0][1] is not one.entries[0][1]  # a value: no tensor is shared
    for wrong in (1, -0.5, None):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong + one  # type: ignore[operator]


@pytest.mark.parametrize("half", [np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5], ids=lambda x: type(x).__name__)
def test_a_factor_is_a_number_of_any_library(half: Any) -> None:
    """On either side; an array of several is none."""
    value = every()
    assert value * half == value * 0.5 and half * value == value * 0.5
    for several in (np.ones(2), torch.ones(2), "2", None):
        with pytest.raises(TypeError):
            value * several


def test_what_is_recommended_for_the_whole_is_not_for_a_part() -> None:
    value = every()
    assert value.about == value.on(1).about | {"recommended_multiplier": 3.5} != value.on(1).about
    alone = Steering([value.entries[0]], value.about)
    assert alone.on(alone.layers[0]).about == value.about


def test_the_norm_is_that_of_the_lowest_layer() -> None:
    low, high = Steering([(Site(1), intervention("vector", seed=1))]), Steering([(Site(3), intervention("vector", seed=2))]) * 5
    assert (low + high).norm() == (high + low).norm() == low.norm() != high.norm()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path = every().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Steering.load(path)
    with pytest.raises(UserError, match="no such file"):
        Steering.load(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds neither layer_{id}.pt nor"):
        Steering.load(tmp_path)
    with pytest.raises(UserError, match="is stored as a .safetensors file"):
        every().save(tmp_path / "a.pt")
