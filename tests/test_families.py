"""Every family of the table, and what is found where no row names a model: the contract, small, and the finder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counts import count
from families import EOS, EVERY, FAMILY_NAMES, LAYERS, build, has_down_proj, intervention, model, reads_of
from test_engines import LAYER, PAD, PREFIX, STRENGTHS, fast_losses, plain_losses, rough, settings, steering
from test_generation import how, rows
from test_suffix import answer_pairs, hook_count
from torch import nn

from spilt.engine import activations, choice, suffix, whole
from spilt.engine import decode as generation
from spilt.engine import train as training
from spilt.errors import UserError
from spilt.methods import METHODS
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering

# test_engines.py and the like have the others
REST = count(tuple(name for name in EVERY if name not in FAMILY_NAMES), ("gpt_neox", "gemma3", "qwen3_moe", "bamba"))
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": EOS}


def plain(family: str) -> bool:
    return bool(anatomy.FAMILIES[family].plain)


@pytest.mark.parametrize("family", REST)
def test_losses(family: str) -> None:
    """m = 0 is the identity bit for bit; fast = plain, or refused with the reason; alone = side by side."""
    tiny, sequences = model(family), answer_pairs()
    with hooks.attach(tiny, []), torch.no_grad():
        none = whole.score(tiny, None, 0.0, sequences, PAD).total
    for number, (form, read_point) in enumerate(reads_of(family)):
        value, found = steering(form, read_point, scale=0.2), plain_losses(tiny, form, read_point)
        with torch.no_grad():
            at_zero = whole.score(tiny, value, 0.0, sequences, PAD).total
        assert torch.equal(none, at_zero)
        assert (found[0] - found[1]).abs().max() > 0.01  # it does something
        some = slice(0 if number == 0 else 1, 2)  # m = 0 is no form's own
        alone = whole.losses(tiny, value, STRENGTHS[some], sequences, PAD, "skip_prefix", PREFIX, 1)
        torch.testing.assert_close(alone, found[some], atol=1e-4, rtol=1e-5)
        if plain(family):
            assert choice.why_plain(value.places, "measure", family=family) == anatomy.FAMILIES[family].plain
        else:
            torch.testing.assert_close(fast_losses(tiny, value), found, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", REST)
def test_greedy_texts(family: str) -> None:
    """The engine that runs the family says what the library's own `generate` says under hooks, with its cache and without."""
    tiny, wanted = model(family), rows(1)
    form, read_point = reads_of(family)[-1]
    value, decoding = steering(form, read_point), how()._replace(max_new_tokens=6)
    made = dict(whole.texts(tiny, value, wanted, decoding) if plain(family) else generation.generate(tiny, value, wanted, decoding, 2))
    for cache in (True, False):
        for i, row in enumerate(wanted):
            assert whole.generate(tiny, value, [row.multiplier], [row.prompt], PAD, **GREEDY, use_cache=cache) == [made[i]], (cache, i)


@pytest.mark.parametrize("family", REST)
def test_a_step_of_a_fit(family: str) -> None:
    """Gradients reach the intervention through every kind of block; fast = plain where both run."""
    tiny, sequences = model(family), answer_pairs()
    form, read_point = reads_of(family)[0]
    s = settings("spilt", form, **({"intervention_components": read_point} if read_point else {}))
    made = intervention(form, read_point, scale=0.2)
    made.requires_grad_(True)
    value = Steering.of({LAYER: made})
    job = whole.Fit(tiny, value, sequences, s, METHODS["spilt"], PREFIX, PAD)
    minibatch = [entry for row in range(len(sequences) // 2) for entry in training.entries(row, s)]
    loss, slopes = job.gradients(minibatch, 2)
    assert all(slope.abs().max() > 1e-6 for slope in slopes)
    if plain(family):
        return
    cache = activations.record(tiny, LAYER, sequences, [read_point] if read_point else [], PAD, together=2)
    ours = training.Fit(tiny, value, cache, s, METHODS["spilt"], PREFIX).gradients(minibatch, 2)
    assert ours[0] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    for a, b in zip(ours[1], slopes, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * max(1.0, float(b.abs().max())), rtol=1e-3)


@pytest.mark.parametrize("family", REST)
def test_means_of_a_closed_form(family: str) -> None:
    """What is recorded together is what whole forwards give."""
    tiny, sequences = model(family), answer_pairs()
    found = activations.answer_means(tiny, [LAYER], sequences, False, PAD)[LAYER]
    for mean, s in zip(found, sequences, strict=True):
        alone = suffix.record(tiny, LAYER, torch.tensor([s.input_ids])).h[0]
        torch.testing.assert_close(mean, alone[s.prompt_length :].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REST)
def test_bfloat16(family: str) -> None:
    """As far from float32 as the unsteered model is; m = 0 is the identity bit for bit."""
    form, read_point = reads_of(family)[0]
    found, exact = (plain_losses(one, form, read_point) for one in (rough(family), model(family)))
    rounding = (found - exact).abs().max(1).values
    assert rounding.max() < 3 * rounding[0] + 0.5
    if not plain(family):
        assert (fast_losses(rough(family), steering(form, read_point, scale=0.2)) - found).abs().max() < 2 * rounding.max() + 0.05


@pytest.mark.parametrize("family", REST)
def test_both_attentions_and_the_model_as_it_was(family: str) -> None:
    """eager = sdpa where the library has both; every parameter, buffer and hook is as before, bit for bit."""
    value, sequences, found = steering(*reads_of(family)[-1], scale=0.2), answer_pairs(), []
    for attention in ("eager", "sdpa"):
        try:
            tiny = build(family, attention=attention)
        except ValueError as error:
            assert "does not support an attention implementation" in str(error) and attention == "sdpa"
            continue
        before = {name: part.clone() for name, part in tiny.state_dict().items()}
        hooked, replaced = hook_count(tiny), {name: set(module.__dict__) for name, module in tiny.named_modules()}
        found.append(whole.losses(tiny, value, STRENGTHS, sequences, PAD, "skip_prefix", PREFIX))
        if not plain(family):
            torch.testing.assert_close(fast_losses(tiny, value), found[-1], atol=1e-4, rtol=1e-5)
        assert all(torch.equal(part, before[name]) for name, part in tiny.state_dict().items())
        assert hook_count(tiny) == hooked and {name: set(module.__dict__) for name, module in tiny.named_modules()} == replaced
    torch.testing.assert_close(found[-1], found[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *(name for name in REST if name not in FAMILY_NAMES)])
def test_what_the_table_says_of_the_block(family: str) -> None:
    """Added to the down projection is added to the block's output, but where a norm or a factor follows."""
    if not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny = model(family)
    at = [
        whole.losses(tiny, steering("vector", write_point=site, scale=0.2), STRENGTHS, answer_pairs(), PAD)
        for site in ("block", "down_proj")
    ]
    same = (at[0] - at[1]).abs().max() < 1e-3
    assert bool(same) != anatomy.FAMILIES[family].norm_after_mlp


@pytest.mark.parametrize("family", [name for name in EVERY if name not in ("gpt2",)])
def test_only_gpt2_has_a_table_of_positions(family: str) -> None:
    assert anatomy.of(model("gpt2")).absolute_positions and not anatomy.of(model(family)).absolute_positions


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_have_no_down_projection(family: str) -> None:
    tiny = model(family)
    with pytest.raises(UserError, match="mixture of experts; set intervention_components to mlp, attn or block"):
        training.new_intervention(tiny, LAYER, settings("sft", "lora"))
    training.new_intervention(tiny, LAYER, settings("sft", "lora", intervention_components="attn"))
    training.new_intervention(tiny, LAYER, settings("sft", "vector"))


# ---------------------------------------------------------------- models that no row names


def renamed(tiny: nn.Module, names: dict[str, str]) -> nn.Module:
    """The same arithmetic under other names: the modules answer to both, but only the new ones are listed."""
    for module in list(tiny.modules()):
        if old := [name for name in names if name in module._modules]:
            both = {name: property(lambda self, n=names[name]: self._modules[n]) for name in old}
            made = type(f"Other{type(module).__name__}", (type(module),), both)
            module._modules = {names.get(name, name): child for name, child in module._modules.items()}
            object.__setattr__(module, "__class__", made)
    tiny.config.model_type = "nobody-knows"
    return tiny


LLAMA = {
    "layers": "stack",
    "self_attn": "look",
    "mlp": "think",
    "down_proj": "back",
    "gate_proj": "door",
    "up_proj": "out",
    "o_proj": "join",
}
NEOX = {"layers": "rungs", "attention": "gaze", "mlp": "inner", "dense_4h_to_h": "narrow", "dense_h_to_4h": "widen", "dense": "mixdown"}


@pytest.mark.parametrize(
    ("family", "names", "wanted"),
    [
        ("qwen2", LLAMA, ("model.stack", "look", "think", "think.back")),
        ("gpt_neox", NEOX, ("gpt_neox.rungs", "gaze", "inner", "inner.narrow")),
    ],
)
def test_a_family_that_no_row_names_is_found_by_structure(family: str, names: dict[str, str], wanted: tuple[str, ...]) -> None:
    strange = renamed(build(family), names)
    found = anatomy.of(strange)
    assert (found.blocks, *found.parts[LAYER][:3]) == wanted and len(set(found.parts)) == 1
    assert len(anatomy.blocks(strange)) == LAYERS
    for form, read_point in (("vector", None), ("lora", "mlp_mid"), ("lora", "mlp"), ("local_weight", "attn")):
        value = steering(form, read_point, scale=0.2)
        ours, theirs = (whole.losses(one, value, STRENGTHS, answer_pairs(), PAD) for one in (strange, model(family)))
        assert torch.equal(ours, theirs)
    assert "nobody-knows" in choice.why_plain(steering("vector").places, "fit", family="nobody-knows")


# ---------------------------------------------------------------- the override


def test_what_is_said_goes_before_what_is_found() -> None:
    tiny = build("llama")
    found = anatomy.declare(tiny, "attn=self_attn.o_proj, mlp_mid=mlp.up_proj")
    assert found.parts[0] == anatomy.Parts("self_attn.o_proj", "mlp", "mlp.up_proj")
    assert anatomy.of(tiny) is found and anatomy.declare(tiny, "").parts[0].mlp_mid == "mlp.down_proj"


@pytest.mark.parametrize(
    ("said", "needle"),
    [
        ("blokcs=model.layers", "did you mean 'blocks'"),
        ("blocks", "wanted blocks=PATH"),
        ("blocks=model.norm", "no list of blocks 'model.norm'"),
        ("blocks=model.rungs", "no list of blocks 'model.rungs'"),
        ("mlp=moe", "no block of model.layers has 'moe', which --anatomy calls mlp"),
    ],
)
def test_a_wrong_override_is_told(said: str, needle: str) -> None:
    with pytest.raises(UserError) as told:
        anatomy.find(model("llama"), said)
    assert needle in str(told.value)


def test_what_cannot_be_found_is_said_with_the_way_out() -> None:
    class Lone(nn.Module):
        config: Any = build("llama").config

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    with pytest.raises(UserError, match=rf"no list of {LAYERS} blocks .* --anatomy blocks=PATH"):
        anatomy.of(Lone())


def test_two_lists_are_one_too_many() -> None:
    tiny: Any = build("llama")
    tiny.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    with pytest.raises(UserError, match=r"model\.layers, model\.others are lists of 5 blocks each.*--anatomy"):
        anatomy.find(tiny)
    assert anatomy.find(tiny, "blocks=model.layers").blocks == "model.layers"
