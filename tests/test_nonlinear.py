"""Forms that are not linear in their strength, against their equations; all stored, scaled, and the model given back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import spilt
from spilt.cell import NONLINEAR as ROWS
from spilt.engine import whole
from spilt.errors import UserError
from spilt.steering.nonlinear import NONLINEAR
from spilt.steering.steering import Site, Steering

WIDTH, RANK = families.HIDDEN, 3
every = pytest.mark.parametrize("form", NONLINEAR)


def made(form: str, width: int = WIDTH, **given: Tensor) -> Any:
    """A form with random parameters that mean something; `given` in place of some."""
    generator = torch.Generator().manual_seed(3)
    size = {"D": width, "r": RANK}
    tensors = {n: torch.randn([size[a] for a in axes], generator=generator) for n, axes in ROWS[form].tensors.items()}
    basis = torch.linalg.qr(torch.randn(width, RANK, generator=generator)).Q
    known = {"scale": torch.ones(()), "gate": torch.zeros(()), "bandwidth": torch.zeros(()), "basis": basis}
    known["root"] = torch.tensor([2.0, 1.0, 0.5])
    known["plan"] = torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.2, 0.1], [0.1, 0.0, 0.2]])
    tensors |= {n: value for n, value in known.items() if n in tensors} | given
    return NONLINEAR[form].of_parameters(tensors).eval().requires_grad_(False)


def streams(width: int = WIDTH) -> Tensor:
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(8)) * 4


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


@every
def test_rows_have_their_own_strength_and_a_factor_is_a_strength(form: str) -> None:
    one, h = made(form), streams()
    rows = one(h, None, torch.tensor([0.0, 0.5, -0.3])[:, None, None])
    for i, m in enumerate((0.0, 0.5, -0.3)):
        torch.testing.assert_close(rows[i], one(h, None, m)[i])
    twice = (Steering([(Site(1), one)]) * -2.0).entries[0][1]
    torch.testing.assert_close(twice(h, None, 0.25), one(h, None, -0.5))
    assert one(h.bfloat16(), None, 0.3).dtype == torch.bfloat16 and one.norm() > 0
    assert not torch.equal(one(h, None, 0.4), one(h, None, -0.4)) and torch.isfinite(rows).all()


@every
def test_no_strength_is_no_change_or_it_is_said(form: str) -> None:
    one, h = made(form), streams()
    assert torch.equal(one(h, None, 0.0), h) == one.identity
    assert one.identity == (form not in ("directional_ablation", "angular", "sspace_ablate"))


@every
def test_in_a_model_it_has_an_effect_is_stored_and_leaves_no_trace(form: str, tmp_path: Path) -> None:
    model, steering = families.model("qwen2"), Steering([(Site(2), made(form))])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 9, 31, 77]])
    with torch.no_grad():
        base = model(ids).logits
        with whole.steer(model, steering.to(model), 0.7):
            steered = model(ids).logits
        assert (steered - base).abs().max() > 1e-6
        assert torch.equal(model(ids).logits, base)
        again = Steering.load(steering.save(tmp_path / f"{form}.safetensors"))
        with whole.steer(model, again.to(model), 0.7):
            assert torch.equal(model(ids).logits, steered)
    assert again == steering and again.forms == (form,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="not linear in the stream"):
        steering.entries[0][1].folded()
    with pytest.raises(UserError, match="wants"):
        Steering([(Site(2), made(form, width=WIDTH + 2))]).check(model)


@pytest.mark.parametrize("form", ["spherical", "directional_ablation", "chars"])
def test_text_is_made_fast_as_it_is_plain(form: str) -> None:
    """Several strengths side by side, 0 among them, which is not the unsteered model for all."""
    model, steering = families.model("llama"), Steering([(Site(2), made(form))])
    texts = [
        spilt.generate(model, families.tokenizer(), steering, ["abc", "so?"], [0, 0.5, 2], max_new_tokens=6, engine=engine)["text"]
        for engine in ("fast", "plain")
    ]
    assert list(texts[0]) == list(texts[1])


# ---------------------------------------------------------------- the equations


def test_directional_ablation_replaces_a_component() -> None:
    one, h = made("directional_ablation"), streams()
    v = unit(one.direction)
    gone = one(h, None, 0.0)
    torch.testing.assert_close(gone, h - (h @ v)[..., None] * v)
    torch.testing.assert_close(one(gone, None, 0.0), gone, atol=1e-5, rtol=1e-5)  # idempotent
    torch.testing.assert_close(one(one(h, None, 3.0), None, 3.0) @ v, torch.full((3, 5), 3.0))


def test_cosine_gate_does_not_see_the_sign() -> None:
    one, h = made("cosine_gated"), streams()
    v = unit(one.direction)
    torch.testing.assert_close(one.delta(h, None, 2.0), 2 * (unit(h) @ v).abs()[..., None] * v)
    torch.testing.assert_close(one.delta(-h, None, 2.0), one.delta(h, None, 2.0))
    closed = made("cosine_gated", gate=torch.tensor(0.999))
    assert torch.equal(closed(h, None, 5.0), h)


def test_angular_sets_the_angle_in_the_plane_and_keeps_the_length() -> None:
    one, h = made("angular"), streams()
    b1 = unit(one.first)
    b2 = unit(one.second - (one.second @ b1) * b1)
    for c in (-2.0, 0.0, 0.4, math.pi):
        turned = one(h, None, c)
        torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(torch.cos(torch.atan2(turned @ b2, turned @ b1) - c), torch.ones(3, 5))
        rest = [x - (x @ b1)[..., None] * b1 - (x @ b2)[..., None] * b2 for x in (h, turned)]
        torch.testing.assert_close(*rest, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one(h, None, c + 2 * math.pi), turned, atol=1e-4, rtol=1e-4)
    twice = Steering([(Site(0), one)]) * 2.0
    assert one.furthest() == pytest.approx(math.pi) and twice.entries[0][1].furthest() == pytest.approx(math.pi / 2)


def test_spherical_is_slerp_and_sound_where_arccos_is_not() -> None:
    one, h = made("spherical"), streams()
    v = unit(one.direction)
    W = torch.arccos(unit(h) @ v)[..., None]
    for c in (-0.5, 0.04, 0.5, 1.0, 1.5):
        want = h.norm(dim=-1, keepdim=True) * (torch.sin((1 - c) * W) * unit(h) + torch.sin(c * W) * v) / torch.sin(W)
        torch.testing.assert_close(one(h, None, c), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one(h, None, c).norm(dim=-1), h.norm(dim=-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(unit(one(h, None, 1.0)), v.expand_as(h), atol=1e-5, rtol=1e-4)
    for edge in (3 * v, -3 * v, torch.zeros_like(v), 3 * v + 1e-7 * h[0, 0]):
        found = one(edge[None, None], None, 0.3)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.norm(), edge.norm(), atol=1e-5, rtol=1e-5)


def test_linear_act_is_affine() -> None:
    one, h = made("linear_act"), streams()
    torch.testing.assert_close(one(h, None, 1.0), one.slope * h + one.shift, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one(h, None, 0.25), 0.75 * h + 0.25 * (one.slope * h + one.shift), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bandwidth", [0.0, 7.0])
def test_chars_is_its_sum_written_out(bandwidth: float) -> None:
    one, h = made("chars", bandwidth=torch.tensor(bandwidth)), streams().double()
    a, b, P = one.source.double(), one.target.double(), one.plan.double()
    for token in (h[0, 0], h[2, 4]):
        far = [float((token - a[i]).pow(2).sum()) for i in range(RANK)]
        s2 = bandwidth**2 or sorted(far)[(RANK - 1) // 2]
        k = [math.exp(-(d - min(far)) / (2 * s2)) for d in far]
        total = sum(k[i] * float(P[i, j]) for i in range(RANK) for j in range(RANK))
        want = sum((k[i] * P[i, j] / total * (b[j] - a[i]) for i in range(RANK) for j in range(RANK)), torch.zeros_like(token))
        torch.testing.assert_close(one.delta(token.float()[None, None], None, 1.5)[0, 0].double(), 1.5 * want, atol=1e-5, rtol=1e-4)


def test_far_from_all_clusters_chars_still_moves() -> None:
    """exp(-|h - a|^2 / 2 s^2) of each cluster is 0 in float32; their ratio is not."""
    one = made("chars", bandwidth=torch.tensor(1.0))
    found = one.delta(torch.full((1, 1, WIDTH), 1e3), None, 1.0)
    assert torch.isfinite(found).all() and found.norm() > 1e-3


def test_clusters_take_the_nearest() -> None:
    one, h = made("clusters"), streams()
    added = one.delta(h, None, 2.0)
    for token, delta in zip(h.flatten(0, 1), added.flatten(0, 1), strict=True):
        cosines = [float(unit(token) @ unit(r)) for r in one.centroids]
        torch.testing.assert_close(delta, 2 * unit(one.centroids[cosines.index(max(cosines))]))


def test_s_space_moves_its_own_coordinate() -> None:
    """In z = (y - bias) U / root the gate's change is along d; ablation sets z . d to c, twice as once."""
    gated, ablated, y = made("sspace"), made("sspace_ablate"), streams()
    d, z = unit(gated.direction), gated.coordinates(streams())
    moved = gated.coordinates(gated(y, None, 2.0)) - z
    torch.testing.assert_close(moved, 2 * (unit(z) @ d).abs()[..., None] * d, atol=1e-4, rtol=1e-4)
    for c in (0.0, 1.5):
        once = ablated(y, None, c)
        torch.testing.assert_close(ablated.coordinates(once) @ d, torch.full((3, 5), c), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ablated(once, None, c), once, atol=1e-4, rtol=1e-4)
