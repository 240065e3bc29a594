"""The decoding step of fixed shapes makes the texts of the plain one; and what is captured of it needs no Python to run again."""

from __future__ import annotations

import weakref
from typing import Any

import families
import pytest
import replay
import torch
from families import EOS, FAMILY_NAMES, FORMS, LAYERS, PAD, SPECIAL, VOCAB, intervention, model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from spilt import cell
from spilt.engine import attention, choice, decode, packing, static
from spilt.engine.decode import Row
from spilt.engine.kv import PreallocatedKV
from spilt.engine.sampling import Decoding
from spilt.steering import post_block
from spilt.steering.interventions import INTERVENTIONS
from spilt.steering.nonlinear import NONLINEAR
from spilt.steering.steering import Steering

LENGTHS = (3, 31, 12, 26, 7)  # some wider than the sliding window
STRENGTHS = (1.0, -1.0, 0.0, 2.5, -0.5)
NEW = 5
ENDS = (EOS, *range(5, 45))  # so many that texts end one after the other


def rows(begin: tuple[int, ...] = (), seed: int = 0) -> list[Row]:
    draw = torch.Generator().manual_seed(seed)
    prompts = [begin + tuple(torch.randint(len(SPECIAL), VOCAB, (n,), generator=draw).tolist()) for n in LENGTHS]
    return [Row(prompt, m, f"{seed}/{i}") for i, (prompt, m) in enumerate(zip(prompts, STRENGTHS, strict=True))]


def how(sample: bool = False, ends: tuple[int, ...] = ENDS) -> Decoding:
    return Decoding(NEW, sample, ends, PAD, [], [])


def texts(tiny: nn.Module, steering: Steering, asked: list[Row], decoding: Decoding, batch: int, step: str) -> dict[int, list[int]]:
    return dict(decode.generate(tiny, steering, asked, decoding, batch, step=step))


def same(tiny: nn.Module, steering: Steering, asked: list[Row], greedy: str = "captured") -> None:
    """Drawn texts that end apart (places are given on), greedy ones that end at once (all places are): those of the plain step."""
    for step, decoding in (("static", how(sample=True)), (greedy, how(ends=()))):
        plain = texts(tiny, steering, asked, decoding, 3, "plain")
        assert len(plain) == len(asked) and len({*map(tuple, plain.values())}) > 2
        assert texts(tiny, steering, asked, decoding, 3, step) == plain, step


def steering_of(form: str, family: str, **more: Any) -> Steering:
    read = None if not INTERVENTIONS[form].reads else "mlp_mid" if families.has_down_proj(family) else "mlp"
    return Steering.of({LAYERS // 2: intervention(form, read, scale=0.5, **more)})


@pytest.fixture(autouse=True)
def a_graph_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """captured: its operations are recorded once, then only done again on the same tensors, whatever comes and goes."""
    monkeypatch.setitem(static.RUN, choice.CAPTURED, replay.replayed)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_texts_are_those_of_the_plain_step(family: str, form: str) -> None:
    same(model(family), steering_of(form, family), rows())


def test_the_steering_acts_and_any_number_of_places_does() -> None:
    tiny, steering, asked = model("qwen2"), steering_of("lora", "qwen2"), rows()
    plain = texts(tiny, steering, asked, how(), 3, "plain")
    for batch in (1, 4, 50):
        assert texts(tiny, steering, asked, how(), batch, "static") == plain
    assert texts(tiny, steering, [row._replace(multiplier=0.0) for row in asked], how(), 5, "static") != plain


@pytest.mark.long
@pytest.mark.parametrize("family", [name for name in families.EVERY if name not in FAMILY_NAMES])
def test_of_every_family_with_a_fast_engine(family: str) -> None:
    if why := choice.why_plain([(1, "block")], "generate", family=family):
        pytest.skip(why)
    same(model(family), steering_of("vector", family), rows(), greedy="static")


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_long_beginning_lies_in_every_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2: soft cap and two kinds of layers, by the attention that the rows share."""
    tiny = model(family, "eager" if family in attention.ARGUMENTS else None)
    monkeypatch.setattr(attention, "MANY", 64)
    begin = tuple(range(50, 50 + 64))
    assert attention.replaceable(tiny)
    same(tiny, steering_of("lora", family), rows(begin))


def test_several_layers_and_adapters_behind_every_block() -> None:
    tiny = model("gemma2")
    several = Steering.of({1: intervention("vector", scale=0.4), LAYERS - 1: intervention("local_weight", "mlp_mid", scale=0.2)})
    adapters = post_block.build(tiny, sites=("attn", "mlp_input"), rank=2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    same(tiny, several + adapters, rows())


@pytest.mark.few(3)
@pytest.mark.parametrize("form", sorted(NONLINEAR))
def test_nonlinear_forms_ask_for_no_numbers(form: str) -> None:
    draw = torch.Generator().manual_seed(1)
    sizes = {"D": families.HIDDEN, "F": families.HIDDEN, "r": 4, "k": 3}
    shapes = {name: [sizes[axis] for axis in axes] for name, axes in cell.NONLINEAR[form].tensors.items()}
    parameters = {name: torch.rand(shape, generator=draw) + 0.1 for name, shape in shapes.items()}
    steering = Steering.of({2: NONLINEAR[form](parameters | {"scale": torch.ones(())})})
    asked, tiny = rows(), model("qwen2")
    assert texts(tiny, steering, asked, how(), 3, "captured") == texts(tiny, steering, asked, how(), 3, "plain")


# ---------------------------------------------------------------- what a capture needs


class OnOneDevice(TorchDispatchMode):
    """Every tensor is made on `meta`, where there are no numbers: nothing can be asked of them, and nothing comes from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert {t.device.type for t in replay.tensors(made)} <= {"meta"}, f"{func} has a tensor of the host"
        return made


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_nothing_goes_between_host_and_device(family: str) -> None:
    tiny = families.build(family).to("meta")
    steering = Steering(steering_of("lora", family)).to(tiny)
    cache, seen = DynamicCache(), model(family)(input_ids=torch.full((4, 5), 9)).past_key_values
    cache.layers = [PreallocatedKV(4, 40) for _ in range(LAYERS)]
    for layer, (keys, values) in zip(cache.layers, packing.pairs_of(seen).values(), strict=True):
        layer.join(keys.to("meta"), values.to("meta"), 0)  # type: ignore[union-attr]
    step = static.StaticStep(tiny, steering.at, cache, 4, 40, "static")
    inner = step.run

    def watched() -> torch.Tensor:
        with OnOneDevice():
            return inner()

    step.run = watched
    assert step(torch.ones(3, 1, 1, device="meta"), torch.zeros(3, dtype=torch.long, device="meta"), [5, 6, 7]).shape == (3, VOCAB)


def test_places_and_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step and one set of stores for all rows of a stream, also when all places were empty in between; then they are given back."""
    given: list[tuple[Any, ...]] = []
    steps: list[weakref.ref[static.StaticStep]] = []
    calls: list[tuple[int, ...]] = []
    begin, call = static.StaticStep.__init__, static.StaticStep.__call__

    def begun(self: static.StaticStep, *how: Any) -> None:
        given.append(how)
        steps.append(weakref.ref(self))
        begin(self, *how)

    def called(self: static.StaticStep, *step: Any) -> torch.Tensor:
        stores = [store for layer in given[0][2].layers for store in layer.stores]
        calls.append(tuple(t.data_ptr() for t in (*stores, self.tokens, self.lengths, self.multiplier)))
        return call(self, *step)

    monkeypatch.setattr(static.StaticStep, "__init__", begun)
    monkeypatch.setattr(static.StaticStep, "__call__", called)
    texts(model("qwen2"), steering_of("vector", "qwen2"), rows(), how(ends=()), 3, "static")
    assert [how[3:] for how in given] == [(3, max(LENGTHS) + NEW, "static")]
    assert len(calls) == 2 * (NEW - 1) and len({*calls}) == 1
    assert steps[0]() is None


def test_the_model_is_given_back() -> None:
    tiny = families.build("gemma2", attention="eager")
    stream = decode.generate(tiny, steering_of("lora", "gemma2"), rows(), how(), 3, step="static")
    next(stream)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())
    assert tiny.config.get_text_config()._attn_implementation == "eager"  # type: ignore[union-attr,operator]
    assert attention.NAME not in attention.ALL_ATTENTION_FUNCTIONS


def test_with_little_memory_it_begins_again_with_half(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def small(scores: static.Scores, device: torch.device) -> static.Scores:
        def step() -> torch.Tensor:
            found = scores()
            sizes.append(len(found))
            if len(found) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return found

        return step

    monkeypatch.setitem(static.RUN, choice.COMPILED, small)
    tiny, steering, asked = model("qwen2"), steering_of("vector", "qwen2"), rows()
    assert texts(tiny, steering, asked, how(), 5, "compiled") == texts(tiny, steering, asked, how(), 5, "plain")
    assert sizes[:2] == [5, 2] and {*sizes[1:]} == {2}
