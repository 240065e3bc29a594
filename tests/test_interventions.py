"""The contract matrix of the forms: every form x family x read point, against the equations written out naively."""

from __future__ import annotations

from typing import Any

import golden
import pytest
import torch
from families import FAMILY_NAMES, FORMS, LAYERS, READS, has_down_proj, intervention, model, token_rows
from torch import Tensor, nn

from spilt import cell
from spilt.engine import suffix
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import INTERVENTIONS, Intervention, Vector

ROWS, TOKENS, HIDDEN, WIDTH = 3, 5, 6, 7
MULTIPLIERS = (-2.0, -0.5, 0.3, 1.0, 4.0)
every_form = pytest.mark.parametrize("form", FORMS)


def streams(width: int = WIDTH, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(ROWS, TOKENS, hidden, generator=generator)
    return h.to(dtype), torch.randn(ROWS, TOKENS, width, generator=generator).to(dtype)


def example(form: str, **more: Any) -> Intervention:
    """A form with odd sizes D = 6, F = 7, so that no transposed weight fits by accident."""
    return intervention(form, hidden=HIDDEN, width=WIDTH, **more)


def expected_delta(made: Any, x: Tensor | None, multiplier: Tensor) -> Tensor:
    """delta = m (dW x + db) with the weight m dW really built for each row [B, F, D]: the equation, slow and plain."""
    form = next(name for name, kind in INTERVENTIONS.items() if type(made) is kind)
    rows = multiplier.expand(ROWS, 1, 1).double()
    state = made.state()
    if form == "vector":
        return rows * state.double()
    assert x is not None
    weight = state["lora_A"].double() @ state["lora_B"].double() if form == "lora" else state["weight"].double()
    bias = torch.zeros(weight.shape[1], dtype=torch.float64) if form == "lora" else state["bias"].double()
    return torch.einsum("btf,bfd->btd", x.double(), rows * weight) + rows * bias


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiplier_zero_is_the_identity_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    h, x = streams(dtype=dtype)
    for zero in (0.0, torch.zeros(ROWS, 1, 1)):
        assert torch.equal(bits(example(form)(h, x, zero)), bits(h))
    assert not torch.equal(example(form)(h, x, 1.0), h)


@every_form
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_delta_is_the_equation(form: str, multiplier: float) -> None:
    made = example(form)
    h, x = streams()
    delta = made(h, x, multiplier).double() - h.double()
    assert delta.abs().max() > 0.01
    torch.testing.assert_close(delta, expected_delta(made, x, torch.tensor([[[multiplier]]])).expand_as(delta), atol=2e-6, rtol=1e-6)


@every_form
def test_the_opposite_multiplier_gives_the_opposite_delta(form: str) -> None:
    made = example(form)
    h, x = streams()
    up, down = made.delta(h, x, 1.5), made.delta(h, x, -1.5)
    assert torch.equal(up, -down) and not torch.equal(up, down)
    assert not torch.equal(made(h, x, 1.5), made(h, x, -1.5))


@every_form
def test_a_multiplier_per_row_equals_single_rows(form: str) -> None:
    made = example(form)
    h, x = streams()
    factors = torch.tensor([-2.0, 0.0, 0.7])[:, None, None]
    together = made(h, x, factors)
    for row in range(ROWS):
        alone = made(h[row : row + 1], x[row : row + 1], float(factors[row]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=0)
    assert torch.equal(together[1], h[1])
    torch.testing.assert_close(together.double() - h.double(), expected_delta(made, x, factors).expand_as(h), atol=2e-6, rtol=1e-6)


@every_form
@pytest.mark.parametrize("multiplier", [0.0, 2.0])
def test_a_new_tensor_comes_out_and_the_input_stays(form: str, multiplier: float) -> None:
    h, x = streams()
    kept_h, kept_x = h.clone(), x.clone()
    out = example(form)(h, x, multiplier)
    out.detach().add_(1.0)
    assert torch.equal(h, kept_h) and torch.equal(x, kept_x)
    assert out.data_ptr() != h.data_ptr()


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_stream_keeps_its_dtype_and_the_parameters_are_float32(form: str, dtype: torch.dtype) -> None:
    made = example(form)
    h, x = streams(dtype=dtype)
    delta = made.delta(h, x, 1.0)
    assert delta.dtype == torch.float32 and made(h, x, 1.0).dtype == dtype
    assert made(h, x, torch.ones(ROWS, 1, 1)).dtype == dtype
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    # computed in float32 from the values of the stream, cast once, then added
    expected = expected_delta(made, x, torch.ones(1, 1, 1)).expand(h.shape)
    torch.testing.assert_close(delta.double().expand(h.shape), expected, atol=2e-6, rtol=1e-6)
    assert torch.equal(made(h, x, 1.0), h + delta.to(dtype))


@every_form
def test_parameters_stay_float32_when_made_under_another_default(form: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = INTERVENTIONS[form](HIDDEN, WIDTH, read_point="mlp_mid")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


@every_form
def test_state_and_back_is_exact(form: str) -> None:
    made = example(form)
    state = made.state()
    kwargs = {"read_point": made.read_point}
    again = INTERVENTIONS[form].from_state(state, **kwargs)
    assert again.read_point == made.read_point
    h, x = streams()
    assert torch.equal(again.eval()(h, x, 1.7), made(h, x, 1.7))
    first, second = made.state(), again.state()
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor) and torch.equal(first, second)
    else:
        assert isinstance(second, dict) and first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key], key


@every_form
def test_a_state_shares_no_memory_with_the_parameters(form: str) -> None:
    made = example(form)
    state = made.state()
    tensors = [state] if isinstance(state, Tensor) else [v for v in state.values() if isinstance(v, Tensor)]
    assert len(tensors) == len(list(made.parameters()))
    kept = [t.clone() for t in tensors]
    again = INTERVENTIONS[form].from_state(state, read_point=made.read_point)
    with torch.no_grad():
        for parameter in (*made.parameters(), *again.parameters()):
            parameter.zero_()
    assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))


@every_form
def test_what_is_trained_is_what_is_stored(form: str) -> None:
    """Every parameter is in the state, and a change of it changes the state (no parameter that is trained and then lost)."""
    names = [name for name, _ in example(form).named_parameters()]
    assert names
    for name in names:
        made, plain = example(form), example(form).state()
        with torch.no_grad():
            dict(made.named_parameters())[name].add_(1.0)
        changed = made.state()
        if isinstance(plain, Tensor):
            assert not torch.equal(plain, changed)  # type: ignore[arg-type]
        else:
            assert [key for key, value in plain.items() if isinstance(value, Tensor) and not torch.equal(value, changed[key])] == [name]  # type: ignore[index]


@every_form
def test_the_start_changes_the_stream_only_for_a_vector(form: str) -> None:
    """lora (B = 0) and local_weight (0) start at the base model; v starts uniform within 1/sqrt(D)."""
    torch.manual_seed(3)
    made = INTERVENTIONS[form](400, WIDTH, read_point="mlp_mid")
    h, x = streams(hidden=400)
    if form == "vector":
        v = made.v.detach()
        assert v.abs().max() <= 1 / 20 and v.abs().max() > 0.9 / 20 and abs(v.mean()) < 0.01
    else:
        assert torch.equal(made(h, x, 3.0), h)


def test_lora_starts_as_the_released_layer_does() -> None:
    """A ~ kaiming_uniform(a = sqrt 5) on [F, r] with fan_in = r: bound 1/sqrt(r); alpha scales nothing."""
    torch.manual_seed(3)
    made = INTERVENTIONS["lora"](HIDDEN, 500, read_point="mlp_mid", rank=4, alpha=32.0)
    a = made.lora_A.detach()
    assert a.shape == (500, 4) and made.lora_B.shape == (4, HIDDEN) and not made.lora_B.any()
    assert 0.45 < a.abs().max() <= 0.5 and abs(a.mean()) < 0.05
    one, other = example("lora", alpha=1.0), example("lora", alpha=64.0)
    h, x = streams()
    assert torch.equal(one(h, x, 1.0), other(h, x, 1.0)) and one.state()["alpha"] != other.state()["alpha"]  # type: ignore[index, call-overload]


@every_form
def test_dropout_acts_only_while_fitting_and_where_the_method_says(form: str) -> None:
    """On v itself for a vector (whole coordinates, everywhere alike), on the delta elsewhere (each position its own)."""
    torch.manual_seed(0)
    made = example(form, dropout=0.5)
    h, x = streams(hidden=HIDDEN)
    plain = made(h, x, 1.0)
    assert torch.equal(plain, made(h, x, 1.0))
    delta = made.train().delta(h, x, 1.0).expand(ROWS, TOKENS, HIDDEN)
    full = made.eval().delta(h, x, 1.0).expand(ROWS, TOKENS, HIDDEN)
    dropped = delta == 0
    assert 0 < dropped.sum() < dropped.numel()
    torch.testing.assert_close(delta[~dropped], 2 * full[~dropped])  # 1 / (1 - p)
    alike = bool((dropped == dropped[:1, :1]).all())
    assert alike == (form == "vector")


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("form", "read_point"), READS)
def test_in_every_family_the_stream_moves_by_the_equation(family: str, form: str, read_point: str | None) -> None:
    """Attached to a real block: the delta has the read point's own input in it; gradients reach the intervention alone."""
    if read_point == "mlp_mid" and not has_down_proj(family):
        pytest.skip("experts: no down projection")
    tiny, layer = model(family), LAYERS // 2
    ids, _ = token_rows([6, 6, 6], seed=1)
    width = anatomy.read_width(tiny, layer, read_point) if read_point else None
    made = intervention(form, read_point, anatomy.hidden_size(tiny), width)
    wanted = (read_point,) if read_point else ()
    base = suffix.record(tiny, layer, ids, wanted)
    assert read_point is None or base.x[read_point].shape == (3, 6, width)
    factors = torch.tensor([1.5, -1.5, 0.0])[:, None, None]
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(hooks.input_of(args, kwargs))

    after = anatomy.block(tiny, layer + 1).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with hooks.attach(tiny, [hooks.Applied(layer, made, factors)]):
            loss = tiny(input_ids=ids, use_cache=False).logits.pow(2).sum()
    finally:
        after.remove()
    delta = seen[0].double() - base.h.double()
    expected = expected_delta(made, base.x.get(read_point or ""), factors).expand_as(delta)
    assert expected[:2].abs().max() > 0.05
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(bits(seen[0][2]), bits(base.h[2]))  # m = 0
    assert not torch.equal(seen[0][0], seen[0][1])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    assert all(p.grad is None for p in tiny.parameters())


# ---------------------------------------------------------------- null it out


def test_null_it_out_closed_form() -> None:
    """v = (3, 4): h . v = 5 * (component along v); a positive component goes, a negative one stays."""
    made = Vector.from_state(torch.tensor([3.0, 4.0]))
    h = torch.tensor([[[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0], [7.0, 1.0]]])
    # (7, 1) . (3, 4) = 25, so 25/25 v goes: (4, -3)
    expected = torch.tensor([[[0.0, 0.0], [-3.0, -4.0], [4.0, -3.0], [4.0, -3.0]]])
    torch.testing.assert_close(made.without_component(h), expected, atol=1e-6, rtol=0)


def test_null_it_out_leaves_no_positive_component() -> None:
    made = Vector.from_state(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5)))
    h, _ = streams()
    kept = h.clone()
    before, after = h @ made.v, made.without_component(h) @ made.v
    assert (before > 0.1).any() and (before < -0.1).any()
    torch.testing.assert_close(after, before.clamp(max=0), atol=1e-5, rtol=0)
    assert torch.equal(h, kept)
    assert made.without_component(h.bfloat16()).dtype == torch.bfloat16


def _released_null_it_out() -> list[Any]:
    found = golden.GOLDEN / "null_it_out.pt"
    if not found.is_file():
        return []
    return [pytest.param(key, id=key.replace("/", "-")) for key in torch.load(found, weights_only=True) if float(key.split("bias")[1]) == 0]


def test_the_released_null_it_out_numbers_are_there() -> None:
    assert len(_released_null_it_out()) == 2


@pytest.mark.parametrize("key", _released_null_it_out())
def test_null_it_out_equals_the_released_code(key: str) -> None:
    """Outputs and gradients; the released file also has a bias, which is never stored there: only its zero is compared."""
    want = torch.load(golden.GOLDEN / "null_it_out.pt", weights_only=True)[key]
    made = Vector.from_state(want["vector"])
    base = want["base"].clone().requires_grad_(True)
    factors = torch.as_tensor(want["factors"], dtype=torch.float32).reshape(-1)
    positions, times = None, torch.ones(base.shape[:2])
    if want["locations"] is not None:
        # [B, 1, n] places; the released padding repeats some, and its gradient counts a place as often as it is named
        times = torch.zeros(base.shape[:2]).scatter_add(1, want["locations"][:, 0], torch.ones(want["locations"][:, 0].shape))
        positions = times > 0
        assert not positions.all() and (times > 1).any()
    assert (factors == 0).any() and (factors != 0).any()
    out = torch.where((factors == 0)[:, None, None], made.without_component(base), made(base, None, factors[:, None, None]))
    out = out if positions is None else torch.where(positions[..., None], out, base)
    torch.testing.assert_close(out, want["output"], atol=1e-6, rtol=1e-6)
    (out.pow(2) * times.clamp(min=1)[..., None]).sum().backward()
    assert made.v.grad is not None
    torch.testing.assert_close(base.grad, want["grad_base"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.v.grad, want["grad_vector"].reshape(-1), atol=1e-4, rtol=1e-5)


def test_every_form_is_a_module_that_says_what_it_is() -> None:
    assert tuple(INTERVENTIONS) == tuple(cell.FORMS)
    for form, kind in INTERVENTIONS.items():
        made = intervention(form)
        assert isinstance(made, nn.Module) and kind.__doc__ and (made.read_point is None) == (not kind.reads)
        assert set(made.describe()) == {"intervention_components", "rank", "alpha", *kind.named}
        assert len(kind.factors) == 10 and min(kind.factors) > 0
