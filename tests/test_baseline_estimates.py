"""Baselines by others: each estimate against its equation solved another way, and all of them fitted on a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spilt
from spilt.baselines import BASELINES, prompts
from spilt.baselines import fit as fitting
from spilt.baselines.clusters import chars, k_means, topk_clusters
from spilt.baselines.directions import centred_pca, mean_centred, mean_diff
from spilt.baselines.fit import fit, places_of, streams
from spilt.baselines.planes import angular
from spilt.baselines.singular import Basis, of_linear, of_stream, sspace
from spilt.baselines.transport import linear_act, sinkhorn
from spilt.data.batches import pad
from spilt.data.chat import Chat
from spilt.data.readers import Pair
from spilt.engine import activations, whole
from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.steering.nonlinear import NONLINEAR
from spilt.steering.steering import Site, Steering

PAIRS = [Pair(row["question"], row["matching"], row["not_matching"], None, None, n) for n, row in enumerate(families.pairs(6))]
NEUTRAL = ["the sky is grey", "so it goes on", "a lamp"]
FITTED = [name for name, row in BASELINES.items() if row.estimate is not None]


def sides(n: int = 16, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, n, width, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 1.0, 2.0, 0.1])
    return noise[0] + torch.tensor([0.5, -1.0, 0.2, 0.0, 1.0, 0.1]), noise[1]


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------- directions and planes


def test_directions() -> None:
    up, down = sides()
    torch.testing.assert_close(mean_diff(up, down)["direction"], unit((up - down).mean(0)))
    torch.testing.assert_close(mean_centred(up, torch.cat([up, down]))["direction"], mean_diff(up, down)["direction"])
    assert not torch.allclose(mean_centred(up, down[:3] * 0)["direction"], mean_diff(up, down)["direction"], atol=1e-2)


def test_centred_pca_is_the_covariance_s_first_axis_up_on_most_pairs() -> None:
    up, down = sides()
    rows = (up - down).double().numpy()
    axis = np.linalg.eigh(np.cov(rows.T))[1][:, -1]
    found = centred_pca(up, down)["direction"].double().numpy()
    assert abs(abs(found @ axis) - 1) < 1e-6
    assert ((rows - rows.mean(0)) @ found > 0).sum() >= len(rows) / 2
    shifted = centred_pca(up + torch.tensor([0.0, 50.0, 0, 0, 0, 0]), down)["direction"]  # what all pairs share is taken away
    torch.testing.assert_close(shifted, centred_pca(up, down)["direction"], atol=1e-5, rtol=1e-4)


def test_angular_plane() -> None:
    up, down = sides()
    found = angular(up, down)
    torch.testing.assert_close(found["first"], unit((up - down).mean(0)))
    assert abs(found["first"] @ found["second"]) < 1e-6 and found["second"].norm() == pytest.approx(1)
    rows = unit(up - down).double().numpy()
    axis = np.linalg.eigh(np.cov(rows.T))[1][:, -1]
    axis = axis - (axis @ found["first"].numpy()) * found["first"].numpy()
    assert abs(abs(axis / np.linalg.norm(axis) @ found["second"].numpy()) - 1) < 1e-5


@pytest.mark.parametrize("name", [name for name in FITTED if BASELINES[name].where == "block" and not BASELINES[name].basis])
def test_a_pair_of_the_same_answers_has_no_direction(name: str) -> None:
    """Seen on a real model: both personas say the same. Every parameter stays a number; where the pair has no say nothing changes."""
    up, down = sides()
    same = torch.full((1, 6), 2.0)
    found = BASELINES[name].estimate(torch.cat([up, same]), torch.cat([down, same]))  # type: ignore[misc]
    assert all(torch.isfinite(value).all() for value in found.values())
    if name == "angular_steering":
        axis = angular(torch.cat([up, same]), torch.cat([down, same]))["second"]
        assert abs(axis @ angular(up, down)["second"]) > 1 - 1e-5
        with pytest.raises(UserError, match="2 pairs with answers that differ span no plane"):
            angular(torch.cat([up[:2], same]), torch.cat([down[:2], same]))


# ---------------------------------------------------------------- transport and clusters


def test_linear_act_is_exact_on_samples_that_are_affinely_related() -> None:
    """Whatever the pairing: b is a scaled and shifted, in another order. A coordinate that does not vary goes to the mean of b."""
    _, a = sides()
    a[:, 3] = 2.0
    slope, shift = torch.tensor([2.0, 0.5, 1.0, 3.0, 0.1, 4.0]), torch.tensor([1.0, -1.0, 0.0, 5.0, 2.0, 0.5])
    b = (slope * a + shift)[torch.randperm(len(a), generator=torch.Generator().manual_seed(1))]
    found = linear_act(b, a)
    varies = torch.arange(6) != 3
    torch.testing.assert_close(found["slope"][varies], slope[varies], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["shift"][varies], shift[varies], atol=1e-5, rtol=1e-4)
    assert found["slope"][3] == 0 and found["shift"][3] == pytest.approx(2 * 3 + 5)
    made = NONLINEAR["linear_act"].of_parameters(found)
    torch.testing.assert_close(made(a[None], None, 1.0)[0].sort(0).values, b.sort(0).values, atol=1e-4, rtol=1e-4)
    for one, other in ((a, b[:3]), (a[:1], b[:1])):
        with pytest.raises(UserError, match="two or more"):
            linear_act(one, other)


def test_sinkhorn_has_its_margins_and_the_form_of_the_optimum() -> None:
    """P_ij = u_i exp(-C_ij / eps) v_j: log P + C / eps has rank one differences. The unit of the cost does not matter, however large."""
    generator = torch.Generator().manual_seed(2)
    cost = torch.rand(4, 3, generator=generator, dtype=torch.float64) * 3
    rows, columns = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    plan = sinkhorn(cost, rows, columns)
    torch.testing.assert_close(plan.sum(1), rows)
    torch.testing.assert_close(plan.sum(0), columns, atol=1e-8, rtol=1e-6)
    left = plan.log() + cost / (0.1 * cost.mean())
    mixed = left - left[:1] - left[:, :1] + left[0, 0]
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), atol=1e-8, rtol=0)
    torch.testing.assert_close(sinkhorn(cost * 1e8, rows, columns), plan, atol=1e-9, rtol=1e-6)
    assert (sinkhorn(cost * 0, rows, columns) - rows[:, None] * columns).abs().max() < 1e-9


def test_k_means_finds_what_is_apart_and_no_cluster_is_empty() -> None:
    axes = torch.eye(4, 7)
    rows = torch.cat([axes[i] * (1 + n) + 0.01 * axes[(i + 1) % 4] for n in range(3) for i in range(4)]).view(12, 7)
    for seed in range(4):
        found = k_means(rows, 4, seed)
        assert found.shares.sum() == pytest.approx(1) and (found.shares > 0).all() and torch.isfinite(found.means).all()
    best = max((k_means(rows, 4, seed) for seed in range(8)), key=lambda one: float(one.shares.min()))
    assert sorted(best.shares.tolist()) == pytest.approx([0.25] * 4)
    assert (k_means(torch.ones(5, 3), 4, 0).shares > 0).all()  # all the same: still none is empty
    with pytest.raises(UserError, match="4 clusters of 2 pairs"):
        k_means(rows[:2], 4, 0)


def test_chars_with_one_cluster_is_the_difference_of_means() -> None:
    up, down = sides()
    made = NONLINEAR["chars"].of_parameters(chars(up, down, k=1))
    h = torch.randn(2, 3, 6) * 5
    torch.testing.assert_close(made(h, None, 0.7), h + 0.7 * (up - down).mean(0), atol=1e-5, rtol=1e-4)


def test_topk_clusters_point_as_the_mean_does() -> None:
    up, down = sides()
    found = topk_clusters(up, down)["centroids"]
    assert found.shape == (4, 6) and ((found @ (up - down).mean(0)) >= 0).all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(topk_clusters(up, down, k=1)["centroids"][0], mean_diff(up, down)["direction"], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- singular vectors


def test_s_space_of_an_output_is_that_of_its_input() -> None:
    """z = (y - bias) U / sqrt(S) = x V sqrt(S)."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 6)
    basis, x = of_linear(linear), torch.randn(12, 9)
    U, S, Vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
    made = NONLINEAR["sspace"].of_parameters(sspace(linear(x[:6]).detach(), linear(x[6:]).detach(), basis))
    z = made.coordinates(linear(x).detach()[None])[0].double().detach()
    want = x.double() @ Vh.T * S.sqrt()
    torch.testing.assert_close(z.abs(), want.abs(), atol=1e-4, rtol=1e-3)  # signs of singular vectors are free
    d = want[:6].mean(0) - want[6:].mean(0)
    turned = (z * want).sign()[0]
    torch.testing.assert_close(made.direction.double().detach() * turned, d / d.norm(), atol=1e-4, rtol=1e-3)


def test_the_sign_of_a_singular_vector_does_not_matter_and_r_keeps_the_largest() -> None:
    torch.manual_seed(1)
    up, down = sides()
    U, S, _ = torch.linalg.svd(torch.randn(6, 8).double(), full_matrices=False)
    S[-1] = 1e-9  # has a floor: its coordinate does not take over
    flip = torch.tensor([1.0, -1, 1, -1, -1, 1]).double()
    h = torch.randn(2, 3, 6)
    one, other = (NONLINEAR["sspace"].of_parameters(sspace(up, down, Basis(u, S, torch.zeros(6).double()))) for u in (U, U * flip))
    torch.testing.assert_close(one(h, None, 2.0), other(h, None, 2.0), atol=1e-5, rtol=1e-4)
    assert math.sqrt(1e-4 * float(S.max())) == pytest.approx(float(one.root.detach().min()), rel=1e-4)  # type: ignore[operator]
    whole_one, some = (sspace(up, down, Basis(U, S, torch.zeros(6).double()), r) for r in (None, 2))
    largest = whole_one["direction"].abs().topk(2).indices.sort().values
    torch.testing.assert_close(some["direction"], unit(whole_one["direction"][largest]))
    assert some["basis"].shape == (6, 2)


def test_the_gram_matrix_has_the_singular_vectors_of_all_weights_beside_each_other() -> None:
    torch.manual_seed(2)
    writer, reader, square = nn.Linear(9, 6), nn.Linear(6, 11), nn.Linear(6, 6)
    basis = of_stream([writer, reader, square, nn.Linear(5, 4)], 6)
    U, S, _ = torch.linalg.svd(torch.cat([writer.weight, reader.weight.T], 1).detach().double(), full_matrices=False)
    torch.testing.assert_close(basis.S, S)
    torch.testing.assert_close((basis.U.T @ U).abs(), torch.eye(6).double(), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="no linear map"):
        of_stream([square], 6)


# ---------------------------------------------------------------- on a model


def test_streams_are_those_that_caa_reads() -> None:
    model, chat = families.model("qwen2"), Chat.of(families.tokenizer(), True)
    tokens = [chat.encode(question, text) for pair in PAIRS for question, text in pair.sides]
    found = streams(model, [(1, "block"), (3, "block")], tokens, families.PAD)
    plain = [one._replace(input_ids=one.input_ids[: len(one.input_ids) - one.suffix_length], suffix_length=0) for one in tokens]
    want = activations.answer_means(model, [1, 3], plain, False, families.PAD)
    for layer in (1, 3):
        torch.testing.assert_close(found[layer, "block"], want[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streams_of_a_linear_map_are_its_outputs(family: str) -> None:
    """Against the map itself, on the input that the library hands it."""
    model = families.model(family)
    (_, out), (_, down) = places = places_of(model, BASELINES["sspace"], [2])
    tokens = [Chat.of(families.tokenizer(), True).encode(PAIRS[0].question, text) for text in (" yes", " not")]
    found = streams(model, places, tokens, families.PAD)
    batch, seen = pad(tokens, families.PAD), {}
    for path in (out, down):
        handle = anatomy.block(model, 2).get_submodule(path).register_forward_hook(lambda _, args, y, p=path: seen.update({p: y}))  # type: ignore[misc]
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
        handle.remove()
        for row, mask in enumerate(batch.text_mask):
            torch.testing.assert_close(found[2, path][row], seen[path][row][mask].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", FITTED)
def test_each_is_fitted_stored_attached_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steering = fit(name, model, tokenizer, PAIRS, [1, 3], neutral=NEUTRAL)
    assert steering.layers == (1, 3) and steering.about["method"] == name
    assert fit(name, model, tokenizer, PAIRS, [1, 3], neutral=NEUTRAL) == steering
    again = Steering.load(steering.save(tmp_path / "s.safetensors"))
    ids = torch.tensor([[5, 9, 31, 77, 12]])
    with torch.no_grad():
        base = model(ids).logits
        c = 0.5 if name != "angular_steering" else 1.5
        with whole.steer(model, steering.to(model), c):
            steered = model(ids).logits
        with whole.steer(model, again.to(model), c):
            torch.testing.assert_close(model(ids).logits, steered, atol=1e-4, rtol=0)
        assert (steered - base).abs().max() > 1e-6 and torch.isfinite(steered).all()
        assert torch.equal(model(ids).logits, base)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_closed_forms_of_the_house_and_of_the_baselines_are_one() -> None:
    """mean_diff is caa, of length 1; super_sspace acts at the block with one basis for all of them; sspace at two maps of each block."""
    model, tokenizer = families.model("llama"), families.tokenizer()
    v = next(fit("mean_diff", model, tokenizer, PAIRS, [2]).parameters())
    pairs = [(pair.question, pair.matching, pair.not_matching) for pair in PAIRS]
    caa = next(spilt.fit(model, tokenizer, pairs, layer=2, method="caa").parameters())
    assert float(unit(caa.detach()) @ v) > 0.9  # caa is read as released, with a space before the answer
    one = fit("super_sspace", model, tokenizer, PAIRS, [1, 2])
    bases: list[Any] = [made.basis for _, made in one]  # type: ignore[union-attr]
    assert torch.equal(*bases) and one.places == [(1, "block"), (2, "block")]
    assert [at for _, at in fit("sspace", model, tokenizer, PAIRS, [1]).places] == ["self_attn.o_proj", "mlp.down_proj"]


def test_what_cannot_be_fitted_is_refused() -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    for name, how, message in (
        ("sspac", {}, "did you mean 'sspace'"), ("prompt_only", {}, "is a system prompt"), ("mean_centred", {}, "give neutral"),
        ("chars", {"pairs": PAIRS[:2]}, "4 clusters of 2 pairs"), ("mean_diff", {"pairs": []}, "nothing to fit"),
    ):  # fmt: skip
        given: dict[str, Any] = {"pairs": PAIRS, **how}
        with pytest.raises(UserError, match=message):
            fit(name, model, tokenizer, given["pairs"], [2])
    with pytest.raises(UserError, match="by known names"):
        fit("sspace", families.model("mixtral"), tokenizer, PAIRS, [2])


def test_floors_and_periods_are_told_by_the_calibration() -> None:
    """kl_floor is 0 of what is the identity at 0; an angle is not looked for beyond half a turn."""
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    floors, tried = {}, {}
    for name in ("spherical", "angular_steering"):
        table = spilt.calibrate(model, tokenizer, fit(name, model, tokenizer, PAIRS, [2]), ["abc"], 0.5, max_new_tokens=4)
        floors[name], tried[name] = float(table["kl_floor"].max()), float(table.attrs["probes"]["multiplier"].abs().max())
    assert floors["spherical"] == 0 < floors["angular_steering"]
    assert tried["angular_steering"] <= math.pi + 1e-9 and tried["spherical"] <= 2


def test_a_site_of_an_entry_is_where_it_was_fitted() -> None:
    found = fit("sspace_ablate", families.model("llama"), families.tokenizer(), PAIRS, [3], r=4)
    assert [site for site, _ in found] == [Site(3, None, "self_attn.o_proj"), Site(3, None, "mlp.down_proj")]
    assert all(made.describe()["rank"] == 4 for _, made in found) and fitting.OUT.fullmatch("o_proj")


def test_engineered_prompts_are_a_pair_for_either_side(tmp_path: Path) -> None:
    less, more = prompts.engineered("Authority", -1)
    assert prompts.engineered("Authority", 1) == (more, less) and less != more
    assert not any(word in (less + more).lower() for word in ("judge", "score", "scene", "rate", "json"))
    file = tmp_path / "p.yaml"
    for text, message in (("Care: {less: a}", "Care: wanted the texts less and more"), ("[", "cannot be read"), ("", "wanted a name")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            prompts.read(file)
    with pytest.raises(UserError, match="unknown foundation with prompts in engineered.yaml 'Care'"):
        prompts.engineered("Care", 1)
