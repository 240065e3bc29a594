"""The suffix path equals hooks on the whole model, in every family, form, read point and place; the model comes back untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, HIDDEN, LAYERS, PLACES, build, has_down_proj, intervention, model, reads_of, token_rows
from torch import Tensor, nn

from spilt.data.batches import pad, position_mask
from spilt.data.chat import Encoded
from spilt.engine import activations, passes, score, suffix
from spilt.engine import train as training
from spilt.methods import METHODS
from spilt.methods.scoring import answer_logprobs, scored_positions
from spilt.settings import FitSettings
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import INTERVENTIONS, Intervention
from spilt.steering.steering import Steering

ATOL = 1e-6
LENGTHS, PROMPTS = [9, 30, 14], [4, 9, 13]  # the longest is wider than the sliding window
ATTENTION = ("eager", "sdpa")


Masks = tuple[Tensor, Tensor, Tensor]


def masks() -> Masks:
    """ids, real, answer [B, T], padded on the right."""
    ids, real = token_rows(LENGTHS, seed=2)
    return ids, real, real & (torch.arange(ids.shape[1]) >= torch.tensor(PROMPTS)[:, None])


def sequences_of(ids: Tensor) -> list[Encoded]:
    return [Encoded(tuple(row[:n].tolist()), p, 0) for row, n, p in zip(ids, LENGTHS, PROMPTS, strict=True)]


def answer_pairs() -> list[Encoded]:
    """Two answers each of three questions behind a common prefix, as the stages record them; some wider than the window."""
    generator = torch.Generator().manual_seed(4)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 250, (count,), generator=generator).tolist())

    prefix = some(4)
    questions = [prefix + some(n) for n in (3, 25, 9)]
    sizes = [(2, 5), (4, 1), (7, 7)]
    return [Encoded(q + some(n), len(q), 1 if n > 1 else 0) for q, pair in zip(questions, sizes, strict=True) for n in pair]


def masks_of(sequences: list[Encoded]) -> Masks:
    batch = pad(sequences, 0)
    return batch.input_ids, batch.attention_mask, batch.answer_mask


# what is recorded: sequences that share nothing, and answers of common questions, which share prefix and prompt
LAYOUTS: dict[str, tuple[Callable[[], list[Encoded]], int]] = {"alone": (lambda: sequences_of(masks()[0]), 1), "pairs": (answer_pairs, 2)}


Result = tuple[Tensor, Tensor, list[Tensor]]


def by_hooks(
    tiny: nn.Module, layer: int, made: Intervention, multiplier: Any, positions: Tensor | None, given: Masks | None = None
) -> Result:
    """Logits at the scored positions, losses [B] and gradients of their sum, from whole forwards with hooks."""
    ids, real, answer = given or masks()
    with hooks.attach(tiny, [hooks.Applied(layer, made, multiplier, positions)]):
        logits = tiny(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[scored_positions(answer)]
    return finish(made, logits, ids, answer, real)


def by_suffix(tiny: nn.Module, layer: int, made: Intervention, multiplier: Any, positions: Tensor | None) -> Result:
    """The same through `record`, `steer` and `logits`."""
    ids, real, answer = masks()
    seen = suffix.record(tiny, layer, ids, (made.read_point,) if made.read_point else ())
    stream = hooks.steer(hooks.Applied(layer, made, multiplier, positions), seen.h, seen.x.get(made.read_point or ""))
    return finish(made, suffix.logits(tiny, layer, stream, scored_positions(answer)), ids, answer, real)


def finish(made: Intervention, logits: Tensor, ids: Tensor, answer: Tensor, real: Tensor) -> Result:
    losses = answer_logprobs(logits, ids, answer, real.sum(1)).losses()
    made.zero_grad()
    losses.sum().backward()
    grads = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    assert len(grads) == len(list(made.parameters()))
    return logits.detach(), losses.detach(), grads


def assert_same(one: Result, other: Result) -> None:
    torch.testing.assert_close(one[0], other[0], atol=ATOL * max(1.0, float(other[0].abs().max())), rtol=0)
    torch.testing.assert_close(one[1], other[1], atol=ATOL, rtol=0)
    for a, b in zip(one[2], other[2], strict=True):
        assert b.abs().max() > 1e-4  # there is a gradient to compare
        torch.testing.assert_close(a, b, atol=ATOL * max(1.0, float(b.abs().max())), rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_suffix_equals_hooks(family: str, place: str, attention: str) -> None:
    """Logits, losses and gradients of every form and read point, rows with multipliers of their own."""
    if attention == "sdpa" and not type(model(family))._supports_sdpa:
        pytest.skip(f"the library has no sdpa attention for {family}")
    tiny, layer = model(family, attention), PLACES[place]
    assert tiny.config._attn_implementation == attention
    factors = torch.tensor([1.5, -0.7, 0.4])[:, None, None]
    for number, (form, read_point) in enumerate(reads_of(family)):
        made = intervention(form, read_point, seed=number)
        positions = position_mask([Encoded(tuple(range(n)), p, 0) for n, p in zip(LENGTHS, PROMPTS, strict=True)], "skip_prefix", 2)
        for where in (None, positions) if form == "vector" else (None,):
            whole = by_hooks(tiny, layer, made, factors, where)
            assert_same(by_suffix(tiny, layer, made, factors, where), whole)
        assert (whole[0] - by_hooks(tiny, layer, made, 0.0, None)[0]).abs().max() > 0.01  # it does something


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_down_proj_site_adds_to_the_down_projection(family: str) -> None:
    """Hooks: adding to the output of the MLP's last projection. Equal to the block's output but where a norm follows."""
    if not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny, layer = model(family), PLACES["middle"]
    for form, read_point in reads_of(family):
        at_block, at_down = (intervention(form, read_point, write_point=site, scale=0.2) for site in ("block", "down_proj"))
        whole, inner = by_hooks(tiny, layer, at_block, 1.0, None), by_hooks(tiny, layer, at_down, 1.0, None)
        difference = (whole[0] - inner[0]).abs().max()
        assert difference > 0.01 if anatomy.FAMILIES[family].norm_after_mlp else difference < 2e-5, (form, read_point)


def fit_settings(form: str, read_point: str | None, **more: Any) -> FitSettings:
    read = {"intervention_components": read_point} if read_point else {}
    given = {"layers": (2,), "dropout": 0.0, "batch_size": 3, "steering_factors": (1.0,), **read, **more}
    return FitSettings(method="sft", intervention_method=form, **given)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", ["block", "down_proj"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_measuring_equals_hooks_at_either_site(family: str, site: str, layout: str) -> None:
    """A stored intervention has the losses of the text model that it steers: `site` means the same in loss mode and apply."""
    if site == "down_proj" and not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny, layer = model(family), PLACES["middle"]
    sequences, together = LAYOUTS[layout][0](), LAYOUTS[layout][1]
    caches: dict[int, activations.Activations] = {}
    given = masks_of(sequences)
    unsteered = plain_losses(tiny, given)
    for form, read_point in reads_of(family):
        made = intervention(form, read_point, write_point=site, scale=0.2)
        below = hooks.base(layer, made)
        if below not in caches:
            caches[below] = activations.record(tiny, below, sequences, tuple(anatomy.read_widths(tiny, below)), 0, together)
        for positions, prefix in (("all", 4), ("skip_prefix", 4), ("skip_prefix", 6), ("f2+l1", 4)):
            scorer = score.Recorded(tiny, Steering.of({layer: made}), caches[below], positions, prefix)
            strengths = [1.0, 0.0, -0.5] if positions == "all" else [1.0, -0.5] if prefix == 6 else [1.0]
            found = score.losses(scorer, strengths)
            where = None if positions == "all" else position_mask(sequences, positions, prefix)
            for k, m in enumerate(strengths):
                wanted = plain_losses(tiny, given, hooks.Applied(layer, made, m, where)) if m else unsteered
                losses = torch.tensor(found.total[k] / found.tokens).float()
                torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=0, msg=f"{form} {read_point} {positions} {prefix} {m}")


@torch.no_grad()
def plain_losses(tiny: nn.Module, given: Masks, *sites: hooks.Applied) -> Tensor:
    """Losses [B] of whole forwards with these hooks and no graph; of none: without any intervention."""
    ids, real, answer = given
    with hooks.attach(tiny, list(sites)):
        logits = tiny(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[scored_positions(answer)]
    return answer_logprobs(logits, ids, answer, real.sum(1)).losses()


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", ["block", "down_proj"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fitting_equals_hooks_at_either_site(family: str, site: str, layout: str) -> None:
    """What is fitted is what is applied: losses and gradients of a fit are those of hooks on the whole model."""
    if site == "down_proj" and not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny, layer = model(family), PLACES["middle"]
    sequences, together = LAYOUTS[layout][0](), LAYOUTS[layout][1]
    caches: dict[int, activations.Activations] = {}
    for form, read_point in reads_of(family):
        made = intervention(form, read_point, write_point=site, scale=0.2)
        below = hooks.base(layer, made)
        if below not in caches:
            caches[below] = activations.record(tiny, below, sequences, tuple(anatomy.read_widths(tiny, below)), 0, together)
        for prefix in (0, 4, 6) if form == "vector" else (0,):
            settings = fit_settings(form, read_point, site=site)
            job = training.Fit(tiny, Steering.of({layer: made}), caches[below], settings, METHODS["sft"], prefix)
            numbers = list(range(len(sequences)))[::-1]
            factors = torch.linspace(-1, 1.5, len(numbers))
            rows = training.Rows(numbers, factors, torch.zeros(len(numbers), dtype=torch.bool))
            scored, steered, slope = passes.forward_backward(job.forward_input(rows))
            if site == "block":  # each block run again in the backward pass
                assert torch.equal(slope, passes.forward_backward(job.forward_input(rows)._replace(checkpointed=True)).slope)
            slope = slope / -scored.tokens[:, None, None]  # of the losses, not of log p
            grads = torch.autograd.grad([steered], list(made.parameters()), [slope])
            shown = [sequences[i] for i in numbers]
            where = position_mask(shown, "skip_prefix", prefix) if form == "vector" else None
            whole = by_hooks(tiny, layer, made, factors[:, None, None], where, masks_of(shown))
            name = f"{form} {read_point} {prefix}"
            torch.testing.assert_close(scored.losses().detach(), whole[1], atol=1e-5, rtol=0, msg=name)
            assert len(grads) == len(whole[2]) > 0
            for a, b in zip(grads, whole[2], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0, msg=name)


# ---------------------------------------------------------------- padding, and what block `layer` means


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_padding_changes_nothing(family: str) -> None:
    """Recorded streams and scored logits of a row are those of the row alone, whatever stands in the padding."""
    tiny, layer = model(family), PLACES["middle"]
    ids, real, answer = masks()
    other = torch.where(real, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    components = tuple(anatomy.read_widths(tiny, layer))
    seen, again = suffix.record(tiny, layer, ids, components), suffix.record(tiny, layer, other, components)
    assert set(seen.x) == set(components)
    logits = suffix.logits(tiny, layer, seen.h, scored_positions(answer))
    start = 0
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        alone = suffix.record(tiny, layer, ids[row : row + 1, :length], components)
        torch.testing.assert_close(seen.h[row, :length], alone.h[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.h[row, :length], again.h[row, :length], atol=1e-5, rtol=0)
        for name in components:
            torch.testing.assert_close(seen.x[name][row, :length], alone.x[name][0], atol=1e-5, rtol=0)
        keep = scored_positions(answer[row : row + 1, :length])
        own = suffix.logits(tiny, layer, alone.h, keep)
        count = length - prompt
        assert len(own) == count
        torch.testing.assert_close(logits[start : start + count], own, atol=1e-5, rtol=0)
        start += count
    assert start == len(logits)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_recorded_stream_is_the_block_output(family: str) -> None:
    """hidden_states[layer + 1], but for the last block: there it is the stream before the final norm."""
    tiny = model(family)
    ids, _ = token_rows([8, 8])
    with torch.no_grad():
        states = tiny(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == LAYERS + 1
    for layer in range(LAYERS - 1):
        assert torch.equal(suffix.record(tiny, layer, ids).h, states[layer + 1])
    last = suffix.record(tiny, LAYERS - 1, ids).h
    assert (last - states[-1]).abs().max() > 0.1
    norms = [m for name, m in tiny.named_modules() if name.endswith(("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"))]
    assert len(norms) == 1
    with torch.no_grad():
        torch.testing.assert_close(norms[0](last), states[-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_recording_reads_the_inputs_of_the_named_modules(family: str) -> None:
    """mlp_mid is what the down projection turns into the MLP's output; block is the stream that enters."""
    tiny, layer = model(family), PLACES["middle"]
    ids, _ = token_rows([8])
    widths = anatomy.read_widths(tiny, layer)
    seen, before = suffix.record(tiny, layer, ids, tuple(widths)), suffix.record(tiny, layer - 1, ids)
    assert torch.equal(seen.x["block"], before.h)
    mlp = anatomy.read_point(tiny, layer, "mlp")
    if not has_down_proj(family):
        assert "mlp_mid" not in widths and widths["mlp"] == HIDDEN
        return
    with torch.no_grad():
        torch.testing.assert_close(anatomy.down_proj(tiny, layer)(seen.x["mlp_mid"]), mlp(seen.x["mlp"]), atol=1e-6, rtol=0)
    assert {name: value.shape[-1] for name, value in seen.x.items()} == widths
    assert widths["mlp_mid"] != widths["mlp"] == HIDDEN


def test_recording_stops_at_the_layer() -> None:
    tiny = model("llama")
    reached: list[int] = []
    handles = [block.register_forward_pre_hook(lambda *_, i=i: reached.append(i)) for i, block in enumerate(anatomy.blocks(tiny))]
    try:
        suffix.record(tiny, 1, torch.tensor([[5, 6, 7]]))
    finally:
        for handle in handles:
            handle.remove()
    assert reached == [0, 1]


def test_replay_computes_no_earlier_block() -> None:
    """The blocks up to `layer` do no arithmetic: their attention and MLP are never entered, and the head sees scored rows only."""
    tiny, layer = model("gemma2"), 2
    ids, _, answer = masks()
    h = suffix.record(tiny, layer, ids).h
    reached, rows = [], []
    handles = [
        anatomy.read_point(tiny, i, name).register_forward_pre_hook(lambda *_, i=i: reached.append(i))
        for i in range(LAYERS)
        for name in ("mlp", "attn")
    ]
    handles.append(tiny.get_output_embeddings().register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel())))
    try:
        suffix.logits(tiny, layer, h, scored_positions(answer))
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(set(reached)) == list(range(layer + 1, LAYERS))
    assert rows == [int(answer.sum())]


def test_gradients_stop_at_the_stream() -> None:
    tiny = model("gemma2")
    ids, _, answer = masks()
    stream = suffix.record(tiny, 2, ids).h.requires_grad_(True)
    suffix.logits(tiny, 2, stream, scored_positions(answer)).pow(2).sum().backward()
    assert stream.grad is not None and stream.grad.abs().sum() > 0
    assert all(p.grad is None for p in tiny.parameters())


# ---------------------------------------------------------------- the model is given back as it was


def hook_count(tiny: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in tiny.modules() for table in tables)


@contextmanager
def untouched(tiny: nn.Module) -> Iterator[None]:
    """Weights bit for bit, no hook left, no instance `forward` left, training mode and gradients as before."""
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    hooks_before, dicts = hook_count(tiny), {name: set(module.__dict__) for name, module in tiny.named_modules()}
    modes = [module.training for module in tiny.modules()]
    yield
    after = tiny.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert hook_count(tiny) == hooks_before
    assert {name: set(module.__dict__) for name, module in tiny.named_modules()} == dicts
    # transformers 4 leaves a `forward` on a block whose output it was asked to return; what matters is that none of ours stays
    assert not any(getattr(block.__dict__.get("forward"), "__module__", "") == suffix.__name__ for block in anatomy.blocks(tiny))
    assert [module.training for module in tiny.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in tiny.parameters())


class Broken(Exception):
    pass


class Fails(INTERVENTIONS["vector"]):  # type: ignore[misc, valid-type]
    """An intervention that raises in the middle of a forward."""

    def delta(self, *_: Any) -> Tensor:
        raise Broken


def uses(tiny: nn.Module) -> dict[str, Callable[[], Any]]:
    """Every function that borrows the model, by name."""
    ids, real, answer = masks()
    made, layer, keep = intervention("lora", "attn"), 2, scored_positions(answer)
    h = suffix.record(tiny, layer, ids).h
    sequences = sequences_of(ids)
    settings = fit_settings("lora", "attn", batch_size=1, n_epochs=1)
    cache = activations.record(tiny, layer, sequences[:2], ("attn",), 0)

    fresh = Steering.of({layer: intervention("lora", "attn")})

    def attached() -> None:
        with hooks.attach(tiny, [hooks.Applied(layer, made, 1.0), hooks.Applied(layer + 1, made, 1.0)]):
            tiny(input_ids=ids)

    return {
        "record": lambda: suffix.record(tiny, layer, ids, tuple(anatomy.read_widths(tiny, layer))),
        "logits": lambda: suffix.logits(tiny, layer, h, keep),
        "attach": attached,
        "activations": lambda: activations.record(tiny, layer, sequences, ("mlp",), 0),
        "fit": lambda: training.fit(training.Fit(tiny, fresh, cache, settings, METHODS["sft"], 0)),
        "measure": lambda: score.losses(score.Recorded(tiny, Steering.of({layer: made, layer + 1: made}), cache, "all", 0), [1.0, 0.0]),
    }


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_is_given_back_after_every_use(family: str) -> None:
    tiny = model(family)
    for name, use in uses(tiny).items():
        with untouched(tiny):
            use()
        assert name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_is_given_back_after_an_exception(family: str) -> None:
    """Raised inside the with, inside an intervention, and inside a block after the replayed ones."""
    tiny, made = model(family), intervention("local_weight", "mlp")
    ids, _, answer = masks()
    h = suffix.record(tiny, 2, ids).h
    with untouched(tiny), pytest.raises(Broken):
        with hooks.attach(tiny, [hooks.Applied(2, made, 1.0)]):
            raise Broken
    with untouched(tiny), pytest.raises(Broken):
        with hooks.attach(tiny, [hooks.Applied(1, made, 1.0), hooks.Applied(2, Fails(HIDDEN), 1.0)]):
            tiny(input_ids=ids)
    with untouched(tiny), pytest.raises(Broken):
        with suffix.replay(tiny, 2, h), suffix.head_rows(tiny, answer):
            raise Broken

    def fail(*_: Any) -> None:
        raise Broken

    for broken_at, use in ((LAYERS - 1, lambda: suffix.logits(tiny, 2, h, answer)), (0, lambda: suffix.record(tiny, 2, ids, ("attn",)))):
        handle = anatomy.block(tiny, broken_at).register_forward_hook(fail)
        try:
            with untouched(tiny), pytest.raises(Broken):
                use()
        finally:
            handle.remove()
    # a later site that cannot be attached (no such layer) takes the earlier ones with it
    with untouched(tiny), pytest.raises(Exception, match="does not exist"):
        with hooks.attach(tiny, [hooks.Applied(2, made, 1.0), hooks.Applied(LAYERS, made, 1.0)]):
            pass
    # and it still works
    whole, again = by_hooks(tiny, 2, made, 1.0, None), by_suffix(tiny, 2, made, 1.0, None)
    assert_same(again, whole)


def test_a_forward_put_on_a_block_by_others_is_kept() -> None:
    """accelerate sets `forward` on the instance when it places a model on several devices."""
    tiny = build("llama")
    placed = anatomy.block(tiny, 1)
    own = placed.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    placed.forward = theirs  # type: ignore[method-assign]
    ids, _, answer = masks()
    suffix.logits(tiny, 2, suffix.record(tiny, 2, ids).h, scored_positions(answer))
    assert placed.__dict__["forward"] is theirs
    assert [i for i, block in enumerate(anatomy.blocks(tiny)) if "forward" in block.__dict__] == [1]


def test_several_sites_act_together() -> None:
    """Two layers at once: the second reads the stream that the first has changed."""
    tiny = model("qwen2")
    ids, _ = token_rows([7, 7])
    first, second = intervention("vector", seed=1), intervention("lora", "block", seed=2)
    with torch.no_grad():
        with hooks.attach(tiny, [hooks.Applied(1, first, 1.0), hooks.Applied(2, second, -0.5)]):
            both = tiny(input_ids=ids).logits
        with hooks.attach(tiny, [hooks.Applied(1, first, 1.0)]), hooks.attach(tiny, [hooks.Applied(2, second, -0.5)]):
            nested = tiny(input_ids=ids).logits
        alone = []
        for site in (hooks.Applied(1, first, 1.0), hooks.Applied(2, second, -0.5)):
            with hooks.attach(tiny, [site]):
                alone.append(tiny(input_ids=ids).logits)
    assert torch.equal(both, nested)
    assert all((both - one).abs().max() > 1e-3 for one in alone)
