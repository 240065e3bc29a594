"""PEFT adapters of every kind as changes of weights: read exactly, subtracted, taken apart; the model they are read on is left alone."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import families
import peft
import pytest
import torch

import spilt
from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.steering.folding import linear
from spilt.steering.inplace import by_place, change
from spilt.steering.interventions import LocalWeight, LoRA
from spilt.steering.steering import Site, Steering
from spilt.weights import adapters, arithmetic, diagnostics
from spilt.weights.adapters import KINDS, Sizes

LAYERS, RANK = (1, 3), 2
SIZES = Sizes(rank=RANK, alpha=4.0, block_size=8)
IDS, REAL = families.token_rows([9, 6])


class Trained(NamedTuple):
    """An adapter that was trained for some steps: its folder, tau as it was read then, its logits by peft."""

    folder: Path
    tau: Steering
    logits: torch.Tensor


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=REAL.long(), use_cache=False).logits[REAL]


def dense(model: Any, steering: Steering) -> dict[Any, torch.Tensor]:
    """place -> dW as the map keeps it."""
    found = {where: change(linear(model, where), made)[0] for where, made in by_place(model, steering).items()}
    return {where: weight for where, weight in found.items() if weight is not None}


@cache
def trained(kind: str, seed: int, family: str = "llama") -> Trained:
    """Six steps toward random tokens; stored by peft."""
    import tempfile

    model = families.model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = adapters.config(model, kind, adapters.maps(model, LAYERS, kind=kind), SIZES)
    folder = Path(tempfile.mkdtemp(prefix="spilt-adapters-")) / f"{kind}{seed}"
    plain = logits(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with adapters.wrapped(model, lambda: peft.get_peft_model(model, config)) as held:
            torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)  # untrained it changes nothing
            optimizer = torch.optim.AdamW(held.trained().values(), lr=0.03)
            target = torch.randint(5, families.VOCAB, IDS.shape, generator=torch.Generator().manual_seed(seed))
            for _ in range(6):
                out = model(input_ids=IDS, attention_mask=REAL.long(), use_cache=False).logits
                torch.nn.functional.cross_entropy(out[REAL], target[REAL]).backward()
                optimizer.step()
                optimizer.zero_grad()
            held.model.save_pretrained(folder)
            theirs = logits(model)
            tau = adapters.update(model, held, kind)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not hasattr(model, "peft_config")
    return Trained(folder, tau, theirs)


def test_the_environment_stays_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """boft's CUDA extension is built with CC and CXX of its own, which peft leaves there where that fails."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    model = families.model("llama")
    spilt.read_adapter(model, trained("boft", 1).folder)
    assert dict(os.environ) == before


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "family"), [*((kind, "llama") for kind in KINDS), ("ia3", "gpt2"), ("dora", "gpt2")])
def test_every_kind(kind: str, family: str) -> None:
    """Trained, stored, read again: tau is merged minus base by peft itself, and steers to the adapter's logits."""
    made, model = trained(kind, 1, family), families.model(family)
    read = spilt.read_adapter(model, made.folder)
    maps = {"llama": 3 if kind == "ia3" else 7, "gpt2": 2 if kind == "ia3" else 4}
    assert {site.layer for site, _ in read} == set(LAYERS) and len(read) == maps[family] * len(LAYERS)
    assert set(read.forms) == {"lora" if kind == "lora" else "local_weight"}
    assert [site for site, _ in read] == [site for site, _ in made.tau]
    base = families.build(family)
    merged: Any = peft.PeftModel.from_pretrained(families.build(family), str(made.folder)).merge_and_unload()  # type: ignore[arg-type]
    tau = dense(model, read)
    for where, weight in tau.items():
        theirs, before = (anatomy.block(one, where[0]).get_submodule(where[1]).weight for one in (merged, base))
        assert (weight - (theirs - before)).abs().max() <= 4e-7, where
    blocks, own = anatomy.of(base).blocks, ("weight", "bias")
    for name in base.state_dict().keys() - {f"{blocks}.{layer}.{path}.{side}" for layer, path in tau for side in own}:
        assert torch.equal(merged.state_dict()[name], base.state_dict()[name]), name
    assert (made.logits - logits(model)).abs().max() > 0.05
    for steered in (spilt.in_place(model, read), spilt.steer(model, read)):
        with steered:
            torch.testing.assert_close(logits(model), made.logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "oft"])
@pytest.mark.few(1)
def test_the_difference_of_two(kind: str) -> None:
    """dW(pos, pos) = 0; antisymmetric; theta_neg + dW = theta_pos; low-rank where both are, of rank 2 r at most."""
    model, pos, neg = families.model("llama"), trained(kind, 1).tau, trained(kind, 2).tau
    dW = arithmetic.difference(pos, neg)
    assert arithmetic.norm(arithmetic.difference(pos, pos)) == 0 < arithmetic.norm(dW)
    assert arithmetic.norm(arithmetic.difference(neg, pos) + dW) <= 1e-6 * arithmetic.norm(dW)
    with spilt.in_place(model, neg), spilt.in_place(model, dW):
        torch.testing.assert_close(logits(model), trained(kind, 1).logits, atol=2e-5, rtol=1e-5)
    if kind == "lora":
        assert all(isinstance(made, LoRA) and made.rank <= 2 * RANK for _, made in dW)
        assert all(torch.linalg.matrix_rank(weight) <= 2 * RANK for weight in dense(model, dW).values())
    both = arithmetic.combined(pos - neg * 0.5)
    for where, weight in dense(model, both).items():
        torch.testing.assert_close(weight, dense(model, pos)[where] - 0.5 * dense(model, neg)[where], atol=1e-6, rtol=1e-5)


def test_kinds_can_be_mixed() -> None:
    """The factors of one, the dense change of the other."""
    model, a, b = families.model("llama"), trained("lora", 1).tau, trained("ia3", 2).tau
    dW, flat = arithmetic.difference(a, b), {name: dense(families.model("llama"), one) for name, one in (("a", a), ("b", b))}
    assert sorted(set(dW.forms)) == ["local_weight", "lora"]
    for where, weight in dense(model, dW).items():
        torch.testing.assert_close(weight, flat["a"][where] - flat["b"].get(where, torch.zeros(())), atol=1e-6, rtol=1e-5)


def test_geometry_is_that_of_the_flat_vectors() -> None:
    model, pos, neg = families.model("llama"), trained("lora", 1).tau, trained("dora", 2).tau
    plus, minus = (torch.cat([weight.double().flatten() for _, weight in sorted(dense(model, tau).items())]) for tau in (pos, neg))
    dW, M = plus - minus, (plus + minus) / 2
    wanted = {
        "norm_pos": plus.norm(),
        "norm_neg": minus.norm(),
        "norm_dW": dW.norm(),
        "cos_anti": -(plus @ minus) / plus.norm() / minus.norm(),
        "asymmetry": plus.norm() / minus.norm(),
        "drift": M.norm() / (dW / 2).norm(),
        "cos_dW_M": (dW @ M).abs() / dW.norm() / M.norm(),
    }
    assert diagnostics.geometry(pos, neg) == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5)
    assert arithmetic.cosine(pos, neg) == pytest.approx(-float(wanted["cos_anti"]), rel=1e-5)
    bisector = arithmetic.bisector(pos, neg)
    unit = plus / plus.norm() - minus / minus.norm()
    found = torch.cat([weight.double().flatten() for _, weight in sorted(dense(model, bisector).items())])
    torch.testing.assert_close(found, unit / unit.norm() * dW.norm(), atol=1e-6, rtol=1e-4)


def test_shares_and_spectra() -> None:
    """Of the factors as of the product; shares add up to 1."""
    model, tau = families.model("llama"), trained("lora", 1).tau
    table = diagnostics.by_module(tau, model)
    assert math.isclose(table["share"].sum(), 1, rel_tol=1e-6) and list(table["layer"]) == [site.layer for site, _ in tau]
    for (site, made), row in zip(tau, table.to_dict("records"), strict=True):
        sigma = torch.linalg.svdvals(made.update().double())
        torch.testing.assert_close(diagnostics.spectrum(made).double(), sigma[:RANK], atol=1e-6, rtol=1e-4)
        p = sigma**2 / (sigma**2).sum()
        assert row["effective_rank"] == pytest.approx(float(torch.exp(-(p[:RANK] * p[:RANK].log()).sum())), rel=1e-3)
        (where,) = by_place(model, Steering([(site, made)]))
        weight = anatomy.block(model, where[0]).get_submodule(where[1]).weight
        assert row["relative"] == pytest.approx(float(sigma.norm() / weight.norm()), rel=1e-4)


def test_parts() -> None:
    """By block and by map; the constants alone; what is not there is told with what is."""
    tau = trained("lora", 1).tau
    assert {site.layer for site, _ in arithmetic.part(tau, layers=[3])} == {3}
    some = arithmetic.part(tau, modules=["q_proj", "down_proj"])
    assert {site.write_point for site, _ in some} == {"self_attn.q_proj", "down_proj"} and len(some) == 4
    with pytest.raises(UserError, match="layers 1, 3; down_proj, mlp.gate_proj"):
        arithmetic.part(tau, layers=[0])
    with pytest.raises(UserError, match="no constant part"):
        arithmetic.constants(tau)
    made = families.intervention("local_weight", "self_attn.q_proj", write_point="self_attn.q_proj")
    ((site, vector),) = arithmetic.constants(Steering([(Site(1, made.read_point, made.write_point), made)]))
    assert site == Site(1, None, "self_attn.q_proj") and torch.equal(vector.get_parameter("v"), made.get_parameter("bias"))


def test_a_sum_is_taken_apart_again() -> None:
    """Least squares: the strengths of what a change is made of, and what is left of it."""
    a, b, c = trained("lora", 1).tau, trained("lora", 2).tau, trained("oft", 1).tau
    found = diagnostics.explained([arithmetic.combined(a * 0.7 - b * 1.5)], [a, b])
    assert found.strengths == pytest.approx([0.7, -1.5], abs=1e-4) and found.left < 1e-3
    assert found.cosines[0] == pytest.approx(arithmetic.cosine(a, a * 0.7 - b * 1.5), rel=1e-4)
    twice = diagnostics.explained([arithmetic.part(c, layers=[n]) for n in LAYERS], [c, c])  # two the same: shared out, nothing left
    assert twice.strengths == pytest.approx([0.5, 0.5], abs=1e-4) and twice.left < 1e-3
    assert twice.norm == pytest.approx(arithmetic.norm(c)) and diagnostics.explained([c], [a]).left > 0.9


@pytest.mark.parametrize(("size", "error"), [(0.02, 0.12), (0.01, 0.23), (0.002, 1.0)])
def test_what_bfloat16_takes_from_a_difference(size: float, error: float) -> None:
    """Merging in bfloat16 and subtracting loses `error` of a dW of `size` |W|, Gaussian both; rounding dW itself loses little."""
    model = families.build("llama", hidden_size=128, head_dim=32)
    where = "self_attn.q_proj"
    weight = anatomy.block(model, 1).get_submodule(where).weight
    generator = torch.Generator().manual_seed(3)

    def drawn() -> Steering:
        made = LocalWeight(len(weight), weight.shape[1], read_point=where, write_point=where)
        noise = torch.randn(made.weight.shape, generator=generator)
        made.weight.data = noise / noise.norm() * weight.norm() * size / math.sqrt(2)
        return Steering([(Site(1, where, where), made)])

    found = diagnostics.rounding(model, drawn(), drawn())
    assert found["merged"] == pytest.approx(error, rel=0.15)
    assert found["stored"] < 0.003 < found["applied"]
    assert diagnostics.rounding(model, drawn(), drawn(), torch.float32)["merged"] < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_read_on_a_model_of_another_dtype(dtype: torch.dtype) -> None:
    """tau of a bfloat16 model is not rounded to bfloat16: its base weights are, and nothing else."""
    made = trained("oft", 1)
    model = families.build("llama").to(dtype)
    read = spilt.read_adapter(model, made.folder)
    assert all(parameter.dtype == torch.float32 for parameter in read.parameters())
    left = diagnostics.explained([made.tau], [read]).left
    assert left < (1e-5 if dtype == torch.float32 else 5e-3)


def test_what_is_no_sum_is_refused_as_a_file_and_read_on_its_model(tmp_path: Path) -> None:
    """PiSSA takes part of the weights away when it is put in: W + s B A would be wrong."""
    folder = trained("pissa", 1).folder
    with pytest.raises(UserError, match="begins with 'pissa'.*read_adapter"):
        Steering.load(folder)
    with pytest.raises(UserError, match="adapter_config.json"):
        spilt.read_adapter(families.model("llama"), tmp_path)


def test_wrong_words(tmp_path: Path) -> None:
    model = families.model("llama")
    with pytest.raises(UserError, match="unknown adapter 'lra'; did you mean 'lora'"):
        adapters.config(model, "lra", [(1, "mlp.up_proj")], SIZES)
    with pytest.raises(UserError, match="unknown linear map 'q_poj'"):
        adapters.maps(model, LAYERS, ["q_poj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outside = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="outside the decoder blocks"), adapters.wrapped(model, lambda: peft.get_peft_model(model, outside)):  # type: ignore[arg-type]
        pass
    assert model.state_dict().keys() == before.keys()
    wrong = peft.LoraConfig(target_modules=["mlp"])
    with pytest.raises(UserError, match="peft cannot put"), adapters.wrapped(model, lambda: peft.get_peft_model(model, wrong)):  # type: ignore[arg-type]
        pass
    assert model.state_dict().keys() == before.keys()


STARTS = ("pissa", "olora", "orthogonal", "gaussian")


@pytest.mark.parametrize("start", STARTS)
def test_starts_of_lora_leave_the_model_and_its_random_numbers_alone(start: str, tmp_path: Path) -> None:
    """Each start is drawn and put in place by peft; olora subtracts it from the very weights that are lent. tau is what peft gives."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start)  # type: ignore[arg-type]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(families.build("llama"), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    wanted = logits(peft.PeftModel.from_pretrained(families.build("llama"), tmp_path).eval())
    model = families.build("llama")
    plain, before = logits(model), {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    random = torch.get_rng_state()
    tau = spilt.read_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.named_parameters():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name
    with spilt.steer(model, tau, 1.0):
        torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-4)
    assert (wanted - plain).abs().max() > 0.01
