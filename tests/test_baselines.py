"""Baselines: closed forms against their equations solved another way, ablation, bipo, and all of them through every verb."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import spilt
from spilt import cli, verify
from spilt.engine import train, whole
from spilt.errors import UserError
from spilt.methods import METHODS, Scored
from spilt.methods.scoring import AnswerLogProbs
from spilt.settings import FitSettings
from spilt.steering import anatomy
from spilt.steering.interventions import Ablation

CLOSED = ("pca", "probe", "lda", "mean_centred")
PAIRS = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(6)]
NEUTRAL = ["the sky is grey", "so it goes on", "a lamp"]


def streams(n: int = 14, width: int = 6) -> tuple[Tensor, Tensor]:
    """Pairs whose sides differ by a shift and by noise that is not the same in all coordinates."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, n, width, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 1.0, 2.0, 0.1])
    return noise[0] + torch.tensor([0.5, -1.0, 0.2, 0.0, 1.0, 0.1]), noise[1]


def estimate(method: str, *sides: Tensor) -> Tensor:
    found = METHODS[method].estimate
    assert found is not None
    return found(*sides)


def directions() -> dict[str, Tensor]:
    """Each method's direction [D], by a way of its own, unsigned and unscaled."""
    up, down = (side.double() for side in streams())
    differences = up - down
    values, vectors = torch.linalg.eigh(differences.T @ differences)
    h, y = torch.cat([up, down]), torch.tensor([1.0] * len(up) + [-1.0] * len(down), dtype=torch.float64)
    x = torch.cat([(h - h.mean(0)) / h.var(0, correction=0).mean().sqrt(), torch.ones(len(h), 1)], dim=1)
    w, penalty = torch.zeros(x.shape[1], dtype=torch.float64), torch.tensor([1.0] * h.shape[1] + [0.0], dtype=torch.float64)
    for _ in range(30):  # Newton's method
        p = torch.sigmoid(-y * (x @ w))
        w = w - torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty.diag(), -x.T @ (y * p) + penalty * w)
    scatter = sum((side - side.mean(0)).T @ (side - side.mean(0)) for side in (up, down)) / len(h)
    values_s, axes = torch.linalg.eigh(scatter)
    whitened = axes @ (axes.T @ differences.mean(0) / (values_s + values_s.mean()))
    return {"pca": vectors[:, -1], "probe": w[:-1], "lda": whitened}


@pytest.mark.parametrize("method", ("pca", "probe", "lda"))
def test_a_direction_is_its_equation_solved_another_way(method: str) -> None:
    """Signed so that matching is up, and as long as the means lie apart along it; with the sides exchanged the other way round."""
    up, down = streams()
    r = directions()[method]
    r = r / r.norm()
    want = ((up - down).double().mean(0) @ r) * r
    found = estimate(method, up, down)
    assert found.dtype == torch.float32 and found @ (up - down).mean(0) > 0
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(estimate(method, down, up), -found, atol=1e-5, rtol=1e-5)


def test_mean_centred_subtracts_what_it_is_given_and_the_pairs_own_mean_gives_half_of_caa() -> None:
    up, down = streams()
    other = torch.randn(3, 6)
    torch.testing.assert_close(estimate("mean_centred", up, other), up.mean(0) - other.mean(0))
    torch.testing.assert_close(estimate("mean_centred", up, torch.cat([up, down])), estimate("caa", up, down) / 2)


def test_one_pair_has_no_covariance() -> None:
    with pytest.raises(UserError, match="two pairs or more"):
        estimate("lda", torch.ones(1, 4), torch.zeros(1, 4))


# ---------------------------------------------------------------- ablation


def ablation(width: int = 8) -> Ablation:
    made = Ablation(width)
    made.direction = torch.nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(1)) * 4)
    return made.eval().requires_grad_(False)


def test_ablation_is_a_projection() -> None:
    """h' = h - m r r^T h against the matrix; m = 1 removes the component, 0 is the identity bit for bit, each row has its own m."""
    made, h = ablation(), torch.randn(3, 5, 8)
    r = made.direction / made.direction.norm()
    matrix = torch.outer(r, r)
    for m in (-1.0, 0.5, 1.0, 2.0):
        torch.testing.assert_close(made(h, None, m), h - m * h @ matrix, atol=1e-5, rtol=1e-5)
    assert (made(h, None, 1.0) @ r).abs().max() < 1e-5 and torch.equal(made(h, None, 0.0), h)
    rows = made(h, None, torch.tensor([0.0, 1.0, -2.0])[:, None, None])
    torch.testing.assert_close(rows[2], made(h, None, -2.0)[2])
    assert torch.equal(rows[0], h[0]) and made(h.bfloat16(), None, 1.0).dtype == torch.bfloat16
    assert made.norm() == 1.0 and math.isclose(Ablation.from_direction(torch.zeros(4)).norm(), 0.0)


def test_an_ablation_is_stored_scaled_and_refused_as_weights(tmp_path: Path) -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    steering = spilt.fit(model, tokenizer, PAIRS, layer=2, method="caa", intervention="ablation")
    assert steering.forms == ("ablation",)
    v = next(spilt.fit(model, tokenizer, PAIRS, layer=2, method="caa").parameters())
    assert torch.equal(steering.entries[0][1].direction, v)  # type: ignore[arg-type]
    assert spilt.Steering.load(steering.save(tmp_path / "a.safetensors")) == steering
    h = torch.randn(1, 2, families.HIDDEN)
    torch.testing.assert_close((steering * -0.5).entries[0][1](h, None, 2.0), steering.entries[0][1](h, None, -1.0))
    with pytest.raises(UserError, match="no weight of the model"):
        steering.entries[0][1].folded()


@pytest.mark.parametrize("family", ("llama", "gemma2"))
@pytest.mark.few(1)
def test_an_ablation_is_fast_as_it_is_plain(family: str) -> None:
    """Fitted (it can be trained too), measured, and in texts at several strengths side by side."""
    model, tokenizer = families.model(family), families.tokenizer()
    how: dict[str, Any] = {
        "layer": 2,
        "method": "sft",
        "intervention": "ablation",
        "n_epochs": 1,
        "dropout": 0.0,
        "batch_size": 3,
        "lr": 0.3,
    }
    fast, plain = (spilt.fit(model, tokenizer, PAIRS, **how, engine=engine) for engine in ("fast", "plain"))
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    measured = [spilt.measure(model, tokenizer, fast, PAIRS, [-1.0, 1.0], engine=engine) for engine in ("fast", "plain")]
    assert abs(measured[0]["preference"] - measured[1]["preference"]).max() < 1e-4 and measured[0]["preference"].nunique() == 3
    texts = [
        spilt.generate(model, tokenizer, fast, ["abc", "so?"], [0, 1, 3], max_new_tokens=6, engine=e)["text"] for e in ("fast", "plain")
    ]
    assert list(texts[0]) == list(texts[1])


def test_one_direction_is_removed_after_every_block() -> None:
    """`direction_layer`: r of one block, at all of them: nothing that the model writes to the stream points along it."""
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    every = range(families.LAYERS)
    steering = spilt.fit(model, tokenizer, PAIRS, layer=list(every), method="pca", intervention="ablation", direction_layer=2)
    v = next(spilt.fit(model, tokenizer, PAIRS, layer=2, method="pca").parameters())
    assert steering.layers == tuple(every)
    assert all(torch.equal(made.direction, v) for _, made in steering)
    seen: list[Tensor] = []

    def watch(_: Any, __: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    watches = [block.register_forward_hook(watch) for block in anatomy.blocks(model)]
    try:
        with spilt.steer(model, steering, 1.0), torch.no_grad():
            watches += [block.register_forward_hook(watch) for block in anatomy.blocks(model)]
            model(torch.tensor([[5, 9, 30]]))
    finally:
        for handle in watches:
            handle.remove()
    after = seen[1::2]  # a block's hooks run in the order in which they were made: before and after the steering
    assert len(after) == families.LAYERS and all((h @ v / v.norm()).abs().max() < 1e-4 for h in after)
    with pytest.raises(UserError, match="trained at its layers"):
        spilt.fit(model, tokenizer, PAIRS, layer=2, method="sft", direction_layer=1)


# ---------------------------------------------------------------- bipo


def of(total: float) -> AnswerLogProbs:
    return AnswerLogProbs(torch.tensor([total]), torch.tensor([2]), torch.tensor([7]))


def test_bipo_is_its_equation_for_both_signs() -> None:
    """d = -1: the not-matching answer wins, so that the sign in the paper's formula is that of the roles."""
    s = FitSettings(method="bipo", intervention_method="vector", layers=(2,))
    assert (s.beta, s.lr, s.n_epochs, s.steering_factors) == (0.1, 5e-4, 20, (1.0,)) and s.substraction_type == "normal"
    matching, other, ref_matching, ref_other = -3.0, -8.0, -4.0, -7.0
    loss = METHODS["bipo"].loss
    assert loss is not None
    for d in (1, -1):
        sides = (of(matching), of(other), of(ref_matching), of(ref_other))
        roles = sides if d == 1 else (sides[1], sides[0], sides[3], sides[2])
        want = -math.log(1 / (1 + math.exp(-d * 0.1 * ((matching - ref_matching) - (other - ref_other)))))
        assert loss(Scored(*roles), s).item() == pytest.approx(want, rel=1e-6)


def test_bipo_shows_a_pair_in_one_direction_drawn_each_time() -> None:
    s = FitSettings(method="bipo", intervention_method="vector", layers=(2,))
    job = train.Job(s, METHODS["bipo"])
    drawn = [job.entries(3) for _ in range(200)]
    assert {len(entries) for entries in drawn} == {1}
    assert 70 < sum(entries == [(6, 7, 1)] for entries in drawn) < 130 and all(e in ([(6, 7, 1)], [(7, 6, -1)]) for e in drawn)
    assert train.Job(s, METHODS["sft"]).entries(3) == [(6, 7, 1), (7, 6, -1)]


def test_bipo_raises_the_preference_and_is_fast_as_it_is_plain() -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    how: dict[str, Any] = {"layer": 2, "method": "bipo", "n_epochs": 3, "dropout": 0.0, "lr": 0.05}
    fast, plain = (spilt.fit(model, tokenizer, PAIRS, **how, engine=engine) for engine in ("fast", "plain"))
    torch.testing.assert_close(next(fast.parameters()), next(plain.parameters()), atol=1e-4, rtol=1e-3)
    curve = spilt.measure(model, tokenizer, fast, PAIRS, [-1.0, 1.0])["preference"]
    assert curve[0] < curve[1] < curve[2]


# ---------------------------------------------------------------- through everything


@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_baselines_run_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, with the settings of caa for where they act; texts, losses, the page, verify; a rerun does nothing."""
    base = families.make_base(tmp_path / "base", train=8)
    path = base.path / "hparams" / "Steer" / "dataset_format.yaml"
    families.write_jsonl(base.path / "data" / "plain.jsonl", [{"input": "", "text": text} for text in NEUTRAL])
    entry = {"file_path": "data/plain.jsonl", "field_names": {"input": "input", "reference_response": "text"}}
    with path.open("a") as file:
        file.write(f"neutral: {{{base.one}: {entry}}}\n".replace("'", '"'))
    words = ["--method", *CLOSED, "bipo", "caa_ablation", "--multipliers", "-1", "1", "--set", "seed=3"]
    assert cli.main([*base.argv(), *words, "--mode", "both", "--dry_run"]) == 0
    assert "pca vector has no settings of its own" in (said := capsys.readouterr().out) and "generate_caa_vector.yaml" in said
    for mode in ("both", "loss"):
        for _ in range(2):
            assert cli.main([*base.argv(), *words, "--mode", mode, *(["--no-released_files"] if mode == "loss" else [])]) == 0
        assert " 0 done" in (said := capsys.readouterr().out) or "already done" in said
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    (page,) = base.path.glob("vectors/*/get_sft_loss/report/*/report.html")
    assert all(name in page.read_text() for name in (*CLOSED, "bipo", "caa ablation"))
    stored = {name: spilt.Steering.load(base.path / "vectors" / base.model / name / base.one / f"{name}_vector") for name in CLOSED}
    assert len({tuple(next(one.parameters()).tolist()) for one in stored.values()}) == len(CLOSED)


def test_neutral_text_decides_mean_centred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    with pytest.raises(UserError, match="neutral="):
        spilt.fit(model, tokenizer, PAIRS, layer=2, method="mean_centred")
    v = next(spilt.fit(model, tokenizer, PAIRS, layer=2, method="mean_centred", neutral=NEUTRAL).parameters())
    h = []
    for text in NEUTRAL:
        with torch.no_grad():
            found = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[3][0]
        h.append(found[1:].mean(0))
    matching = next(spilt.fit(model, tokenizer, PAIRS, layer=2, method="mean_centred", neutral=NEUTRAL[:1]).parameters()) + h[0]
    torch.testing.assert_close(v, matching - torch.stack(h).mean(0), atol=1e-5, rtol=1e-4)
    base = families.make_base(tmp_path / "base", train=4)
    assert cli.main([*base.argv("mean_centred"), "--mode", "generate"]) == 2
    assert "neutral" in capsys.readouterr().err


def test_all_positions_are_ablated_while_text_is_made() -> None:
    """Prompt and new tokens alike: a text at m = 1 is that of a model whose block writes nothing along r."""
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    steering = spilt.fit(model, tokenizer, PAIRS, layer=2, method="lda", intervention="ablation")
    ids = torch.tensor([[5, 9, 30, 7]])
    r = steering.entries[0][1].direction / steering.entries[0][1].direction.norm()  # type: ignore[union-attr]
    with whole.steer(model, steering, 1.0), torch.no_grad():
        steered = model(ids).logits
    hook = anatomy.blocks(model)[2].register_forward_hook(
        lambda _, __, out: (out[0] - (out[0] @ r)[..., None] * r, *out[1:]) if isinstance(out, tuple) else out - (out @ r)[..., None] * r
    )
    with torch.no_grad():
        by_hand = model(ids).logits
    hook.remove()
    torch.testing.assert_close(steered, by_hand, atol=1e-4, rtol=1e-4)
