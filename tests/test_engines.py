"""The fast engine equals the plain one (engine/whole.py, the spec): losses, gradients, texts; for every form, read point and family."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from families import EOS, FAMILY_NAMES, LAYERS, build, has_down_proj, intervention, model, reads_of
from test_generation import how, rows
from test_suffix import answer_pairs

from spilt.data.batches import pad
from spilt.data.chat import Encoded
from spilt.engine import activations, choice, score, whole
from spilt.engine import decode as generation
from spilt.engine import train as training
from spilt.methods import METHODS
from spilt.settings import FitSettings
from spilt.steering import anatomy
from spilt.steering.steering import Steering

LAYER, PREFIX, PAD = LAYERS // 2, 2, 0
STRENGTHS = [0.0, 1.0, -0.7]


def settings(method: str, form: str, **changes: Any) -> FitSettings:
    given = {"batch_size": 3, "n_epochs": 1, "dropout": 0.0, "lr": 0.01, "steering_factors": (0.5, 1.0), **changes}
    return FitSettings(method=method, intervention_method=form, layers=(LAYER,), **given)


def steering(form: str, read_point: str | None = None, layer: int = LAYER, **more: Any) -> Steering:
    return Steering.of({layer: intervention(form, read_point, **more)})


@lru_cache(maxsize=8)
def recorded(tiny: Any, base: int, read: str | None) -> activations.Activations:
    return activations.record(tiny, base, answer_pairs(), [read] if read else [], PAD, together=2)


def fast_losses(tiny: Any, value: Steering, positions: str = "skip_prefix") -> Any:
    kept = recorded(tiny, *score.recorded_at(value))
    return torch.as_tensor(score.losses(score.Recorded(tiny, value, kept, positions, PREFIX), STRENGTHS).total)


@cache
def rough(family: str) -> Any:
    """The family's shared model in bfloat16."""
    return build(family).to(torch.bfloat16)


@cache
def unsteered(tiny: Any) -> torch.Tensor:
    """Losses [1, S] of a shared model by the plain engine, at m = 0."""
    return whole.losses(tiny, steering("vector"), STRENGTHS[:1], answer_pairs(), PAD)


@cache
def plain_losses(tiny: Any, form: str, read_point: str | None, write_point: str = "block") -> torch.Tensor:
    """Losses of a shared model by the plain engine, at STRENGTHS: several tests compare with them."""
    value = steering(form, read_point, write_point=write_point, scale=0.2)
    return torch.cat([unsteered(tiny), whole.losses(tiny, value, STRENGTHS[1:], answer_pairs(), PAD, "skip_prefix", PREFIX)])


@pytest.mark.matrix
@pytest.mark.parametrize("write_point", ["block", "down_proj"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_losses(family: str, write_point: str) -> None:
    if write_point == "down_proj" and not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny = model(family)
    for form, read_point in reads_of(family):
        value = steering(form, read_point, write_point=write_point, scale=0.2)
        plain = plain_losses(tiny, form, read_point, write_point)
        torch.testing.assert_close(fast_losses(tiny, value), plain, atol=1e-4, rtol=1e-5)
        assert (plain[0] - plain[1]).abs().max() > 0.01  # it does something


@pytest.mark.parametrize("positions", ["all", "skip_prefix", "all_prompt", "all_generation", "f1+l1"])
@pytest.mark.parametrize("form", ["vector", "lora"])
def test_losses_where_tokens_are_steered(form: str, positions: str) -> None:
    tiny, value = model("qwen2"), steering(form)
    plain = whole.losses(tiny, value, STRENGTHS, answer_pairs(), PAD, positions, PREFIX)
    torch.testing.assert_close(fast_losses(tiny, value, positions), plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.few(1)
def test_losses_in_bfloat16(family: str) -> None:
    """Equal up to that dtype's rounding: as far from each other as either is from float32."""
    for form, read_point in reads_of(family):
        plain, exact = (plain_losses(one, form, read_point) for one in (rough(family), model(family)))
        fast, rounding = fast_losses(rough(family), steering(form, read_point, scale=0.2)), (plain - exact).abs().max()
        assert (fast - plain).abs().max() < 2 * rounding + 0.05, (form, read_point)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.few(3)
def test_gradients_of_a_minibatch(family: str) -> None:
    tiny, sequences = model(family), answer_pairs()
    cache = activations.record(tiny, LAYER, sequences, [*anatomy.read_widths(tiny, LAYER)], PAD, together=2)
    for form, read_point in reads_of(family):
        for method in ("sft", "spilt", "reps") if read_point in (None, "mlp_mid") else ("sft",):
            s = settings(method, form, **({"intervention_components": read_point} if read_point else {}))
            made = intervention(form, read_point, scale=0.2)
            made.requires_grad_(True)
            fast = training.Fit(tiny, Steering.of({LAYER: made}), cache, s, METHODS[method], PREFIX)
            plain = whole.Fit(tiny, Steering.of({LAYER: made}), sequences, s, METHODS[method], PREFIX, PAD)
            minibatch = [entry for row in range(len(sequences) // 2) for entry in training.entries(row, s)]
            ours, theirs = fast.gradients(minibatch, 2), plain.gradients(minibatch, 2)
            assert ours[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-5), (form, read_point, method)
            for a, b in zip(ours[1], theirs[1], strict=True):
                assert b.abs().max() > 1e-6
                torch.testing.assert_close(a, b, atol=2e-4 * max(1.0, float(b.abs().max())), rtol=1e-3)


@cache
def fast_texts(family: str, form: str, read_point: str | None) -> list[list[int]]:
    found = dict(generation.generate(model(family), steering(form, read_point), rows(), how(), 4))
    return [found[i] for i in range(len(rows()))]


@pytest.mark.matrix
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_texts(family: str, use_cache: bool) -> None:
    """The library's own `generate` under hooks, with and without its cache: the same tokens."""
    prompts, strengths = [row.prompt for row in rows()], [row.multiplier for row in rows()]
    greedy = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": EOS, "use_cache": use_cache}
    for form, read_point in reads_of(family):
        plain = whole.generate(model(family), steering(form, read_point), strengths, prompts, PAD, **greedy)
        assert fast_texts(family, form, read_point) == plain, (form, read_point)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.few(1)
def test_greedy_texts_in_bfloat16(family: str) -> None:
    """Each token is the likeliest of a plain uncached forward over what came before it, up to what that dtype rounds."""
    wanted = rows()
    for form, read_point in reads_of(family):
        value = steering(form, read_point)
        made = dict(generation.generate(rough(family), value, wanted, how(), 4))
        texts = [(*row.prompt, *made[i]) for i, row in enumerate(wanted)]
        plain, exact = (_logits(one, value, [row.multiplier for row in wanted], texts) for one in (rough(family), model(family)))
        for i, row in enumerate(wanted):
            scored = slice(len(row.prompt) - 1, len(texts[i]) - 1)
            short = plain[i, scored].amax(-1) - plain[i, scored][range(len(made[i])), made[i]]
            rounding = (plain[i, scored] - exact[i, scored]).abs().max()
            assert (short <= 2 * rounding + 0.05).all(), (form, read_point, short)


@torch.no_grad()
def _logits(one: Any, value: Steering, multipliers: list[float], texts: list[tuple[int, ...]]) -> torch.Tensor:
    """[B, T, V] of one plain forward over all texts, padded on the right, where no token before sees it."""
    batch = pad([Encoded(text, 0, 0) for text in texts], PAD)
    with whole.steer(one, value, torch.tensor(multipliers)):
        return one(**batch.inputs(torch.device("cpu"))).logits.float()


def test_a_joint_steering_with_one_silent_half_is_the_other_half() -> None:
    tiny = model("qwen2")
    low, high = steering("lora", layer=1, seed=1), steering("vector", layer=3, seed=2)
    for loud, both in ((low, low + high * 0.0), (high, low * 0.0 + high)):
        assert torch.equal(
            whole.losses(tiny, both, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX),
            whole.losses(tiny, loud, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX),
        )
    both = whole.losses(tiny, low + high, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX)
    assert (both[1] - whole.losses(tiny, low, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX)[1]).abs().max() > 0.01


def test_a_joint_fit_trains_every_site() -> None:
    """Two layers by one loss: it falls below what either reaches alone after as many steps, and both parameters move."""
    tiny, sequences = model("qwen2"), answer_pairs()
    s = settings("sft", "vector", n_epochs=20, lr=0.05, preference_pairs=("orig_add",), steering_factors=(1.0,))

    def last(layers: tuple[int, ...]) -> float:
        fresh = Steering.of({n: training.new_intervention(tiny, n, s) for n in layers})
        before = [p.detach().clone() for p in fresh.parameters()]
        log = training.fit(whole.Fit(tiny, fresh, sequences, s, METHODS["sft"], PREFIX, PAD))
        assert all(not torch.equal(a, b) for a, b in zip(before, fresh.parameters(), strict=True))
        return log[-1]["loss"]

    assert last((1, 3)) < min(last((1,)), last((3,)))


def test_a_plain_fit_is_a_fast_fit() -> None:
    """The same draws, order and schedule, so the same parameters up to what AdamW makes of rounding."""
    tiny, sequences = model("qwen2"), answer_pairs()
    cache = activations.record(tiny, LAYER, sequences, ["mlp_mid"], PAD, together=2)
    for method, form in (("sft", "lora"), ("spilt", "vector"), ("reps", "vector")):
        s = settings(method, form, n_epochs=3)
        one, other = (training.new_intervention(tiny, LAYER, s) for _ in range(2))
        fast = training.fit(training.Fit(tiny, Steering.of({LAYER: one}), cache, s, METHODS[method], PREFIX))
        plain = training.fit(whole.Fit(tiny, Steering.of({LAYER: other}), sequences, s, METHODS[method], PREFIX, PAD))
        assert [row["loss"] for row in fast] == pytest.approx([row["loss"] for row in plain], rel=1e-3, abs=1e-4)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


def test_which_engine_and_why() -> None:
    one = steering("vector")
    assert choice.why_plain(one.places, "fit") == choice.why_plain(one.places, "measure") == ""
    assert "twice" in choice.why_plain((one + one).places, "generate")
    assert "jointly" in choice.why_plain((one + steering("vector", layer=0)).places, "fit", joint=True)
    assert "block 0" in choice.why_plain(steering("vector", layer=0, write_point="down_proj").places, "measure")
    assert choice.why_plain(steering("vector", layer=0, write_point="down_proj").places, "generate") == ""
    assert choice.why_plain(one.places, "generate", engine="plain") == choice.ASKED
    assert "skip_prefix" in choice.why_plain(one.places, "generate", positions="skip_prefix")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_inside_of_block_0_by_the_plain_engine(family: str) -> None:
    """What the fast path refuses runs; where no norm follows the MLP, it is steering the block's output."""
    if not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny = model(family)
    inside, outside = steering("vector", layer=0, write_point="down_proj"), steering("vector", layer=0)
    found = whole.losses(tiny, inside, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX)
    at_block = whole.losses(tiny, outside, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX)
    assert torch.equal(found[0], at_block[0])
    if not anatomy.FAMILIES[family].norm_after_mlp:
        torch.testing.assert_close(found, at_block, atol=1e-3, rtol=1e-4)


def hooks_of(tiny: Any) -> list[tuple[int, ...]]:
    """The library's own among them: it leaves some when it was asked for hidden states."""
    return [(*module._forward_hooks, *module._forward_pre_hooks) for module in tiny.modules()]


def test_the_model_comes_back_bit_identical() -> None:
    tiny = model("gemma2")
    before, hooked = {name: value.clone() for name, value in tiny.state_dict().items()}, hooks_of(tiny)
    value = steering("vector") + steering("lora", layer=1)
    with pytest.raises(RuntimeError, match="half way"), whole.steer(tiny, value, 1.0):
        raise RuntimeError("half way")
    whole.losses(tiny, value, STRENGTHS, answer_pairs(), PAD)
    assert all(torch.equal(before[name], now) for name, now in tiny.state_dict().items())
    assert hooks_of(tiny) == hooked
