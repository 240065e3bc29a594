"""Changes of any linear map as a Steering: attached by hooks, put into the weights and taken out again, stored, measured, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch

import spilt
from spilt import cli
from spilt.errors import UserError
from spilt.export import folding
from spilt.steering import anatomy, inplace
from spilt.steering.interventions import LocalWeight, LoRA, Vector
from spilt.steering.steering import Site, Steering
from spilt.weights.adapters import maps

LAYERS, M = (1, 3), 0.4
IDS, REAL = families.token_rows([9, 6])


def everywhere(model: Any, layers: tuple[int, ...] = LAYERS, biases: bool = True) -> Steering:
    """All three forms in turn, at every linear map of the blocks."""
    entries = []
    for number, (layer, path) in enumerate(maps(model, layers)):
        read, write = ("mlp_mid", "down_proj") if path == anatomy.of(model).parts[layer].mlp_mid else (path, path)
        wide, out = anatomy.read_width(model, layer, read), anatomy.write_width(model, layer, write)
        form = ("lora", "local_weight", "vector")[number % 3] if biases else "lora"
        made = families.intervention(form, read, out, wide, seed=number, scale=0.05, write_point=write)
        made.write_point = write
        entries.append((Site(layer, made.read_point, write), made))
    return Steering(entries)


def logits(model: Any, rows: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows, attention_mask=REAL.long()[: len(rows)], use_cache=False).logits[REAL[: len(rows)]]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "qwen3"])
@pytest.mark.few(4)
def test_weights_are_as_hooks_and_are_given_back(family: str) -> None:
    """Same logits; every bit of every weight is as before, and no bias is left where there was none."""
    model = families.model(family)
    steering, plain, before = everywhere(model), logits(model), weights(model)
    with spilt.steer(model, steering, M):
        wanted = logits(model)
    with spilt.in_place(model, steering, M) as steered:
        found = logits(steered)
        assert not same(model, before)
    for number in (np.float32(M), torch.tensor(M), np.array(M)):  # as tables and tensors give them
        with spilt.in_place(model, steering, number) as steered:  # type: ignore[arg-type]
            assert torch.equal(logits(steered), found)
    assert (wanted - plain).abs().max() > 0.1  # it does something
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert same(model, before) and torch.equal(logits(model), plain)


def test_they_are_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One inside the `with`; one half way through the changes; nested uses."""
    model = families.model("qwen2")
    steering, before = everywhere(model), weights(model)
    with pytest.raises(ZeroDivisionError), spilt.in_place(model, steering, M), spilt.in_place(model, steering, -1):
        raise ZeroDivisionError
    assert same(model, before)
    done, change = [], inplace.change

    def fails(*given: Any) -> Any:
        done.append(1)
        if len(done) == 5:
            raise MemoryError
        return change(*given)

    monkeypatch.setattr(inplace, "change", fails)
    with pytest.raises(MemoryError), spilt.in_place(model, steering, M):
        raise AssertionError("not reached")
    assert same(model, before)


def test_each_row_has_its_multiplier() -> None:
    """By hooks: each row as alone at its own strength, m = 0 as unsteered. In the weights that cannot be, and it is said."""
    model = families.model("llama")
    steering, plain = everywhere(model), logits(model)
    with spilt.steer(model, steering, torch.tensor([0.0, M])):
        both = logits(model)
    with spilt.steer(model, steering, M):
        steered = logits(model)
    first = REAL[0].sum()
    torch.testing.assert_close(both, torch.cat([plain[:first], steered[first:]]), atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="one strength for all rows"), spilt.in_place(model, steering, torch.tensor([0.0, M])):
        pass


def test_it_is_stored_with_its_places(tmp_path: Path) -> None:
    model = families.model("qwen2")
    steering = everywhere(model)
    again = Steering.load(steering.save(tmp_path / "dW.safetensors"))
    assert again == steering and {site.write_point for site, _ in again} >= {"self_attn.q_proj", "mlp.gate_proj", "down_proj"}
    with pytest.raises(UserError, match="self_attn.q_proj"):  # another model's widths
        again.check(families.build("qwen2", hidden_size=16))


def test_it_is_measured_by_the_plain_engine() -> None:
    """Losses at m by hooks are those of the model with the change in its weights."""
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    steering = everywhere(model)
    pairs = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(3)]
    hooks = spilt.measure(model, tokenizer, steering, pairs, [0.0, M])
    with spilt.in_place(model, steering, M):
        weights_ = spilt.measure(model, tokenizer, steering, pairs, [0.0])
    for name in ("preference", "loss_matching", "loss_not_matching"):
        found, wanted = (float(table.loc[table["multiplier"] == m, name].iloc[0]) for table, m in ((weights_, 0.0), (hooks, M)))
        assert abs(found - wanted) < 1e-5


def test_what_cannot_be_weights_is_told() -> None:
    """Before any weight is touched: another read point, a norm in between, quantised weights."""
    gemma, model = families.model("gemma2"), families.build("llama")
    with pytest.raises(UserError, match="a norm follows the down projection.*by hooks"), spilt.in_place(
        gemma, Steering.of({2: families.intervention("lora")}), 1.0
    ):  # fmt: skip
        pass
    with pytest.raises(UserError, match="no weight of the model goes"), spilt.in_place(
        model, Steering.of({2: families.intervention("lora", "attn")}), 1.0
    ):  # fmt: skip
        pass
    down = anatomy.down_proj(model, 2)
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"), spilt.in_place(model, Steering.of({2: families.intervention("lora")}), 1.0):
        pass


def test_rounding_is_measured() -> None:
    """Small changes are lost in bfloat16 weights, and none in float32 ones; a change that bfloat16 holds exactly stays whole."""
    before, change = torch.ones(4, 4), torch.full((4, 4), 1e-3)
    assert inplace.lost(before, change, torch.bfloat16) == pytest.approx((16e-6, 16e-6))  # 1 + 1e-3 is 1 there
    wrong, whole = inplace.lost(before, change, torch.float32)
    assert wrong < 1e-8 * whole
    assert inplace.lost(before, torch.ones(4, 4), torch.bfloat16)[0] == 0


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_it_is_exported(kind: str, tmp_path: Path) -> None:
    """LoRA of every linear map as an adapter and as a checkpoint: reloaded by their libraries, the logits of the hooks."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(families.checkpoint("qwen2"))
    path = everywhere(families.model("qwen2"), biases=False).save(tmp_path / "dW.safetensors")
    words = ["export", "--format", kind, "--output", str(tmp_path / "out"), "--multiplier", str(M), "--steering", str(path)]
    assert cli.main([*words, "--base_dir", str(tmp_path), "--model_name", "tiny", "--device", "cpu"]) == 0
    loader: Any = AutoPeftModelForCausalLM if kind == "peft" else AutoModelForCausalLM
    theirs = loader.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with spilt.steer(families.model("qwen2"), Steering.load(path), M) as model:
        wanted = logits(model)
    assert (logits(theirs) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_several_changes_of_one_map_are_summed() -> None:
    model = families.model("llama")
    site = ("self_attn.q_proj",) * 2
    wide = anatomy.read_width(model, 1, site[0])
    one = LoRA(wide, wide, read_point=site[0], write_point=site[1], rank=2)
    torch.nn.init.normal_(one.lora_B)
    dense = LocalWeight(wide, wide, read_point=site[0], write_point=site[1])
    torch.nn.init.normal_(dense.weight, std=0.1)
    vector = Vector(wide, write_point=site[1])
    both = Steering([(Site(1, *site), one), (Site(1, *site), dense), (Site(1, None, site[1]), vector)])
    ((weight, bias),) = (inplace.change(anatomy.read_point(model, 1, site[0]), made) for made in inplace.by_place(model, both).values())
    assert weight is not None and bias is not None
    torch.testing.assert_close(weight, (one.lora_A @ one.lora_B + dense.weight).T)
    torch.testing.assert_close(bias, vector.v.detach())
    assert folding.name_of(model, (1, site[0])) == "model.layers.1.self_attn.q_proj"
