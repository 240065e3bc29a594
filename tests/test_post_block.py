"""Post-block adapters: the equation, where it acts, how it is stored, trained and refused (arXiv 2603.00425)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from counts import count
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spilt
from spilt.cell import NONLINEARITIES
from spilt.engine import whole
from spilt.errors import UserError
from spilt.settings.fields import PASSED, POINTS, WRITE_POINTS, FitSettings
from spilt.steering import anatomy, hooks, layer_file, post_block
from spilt.steering.interventions import LoRA, PostBlock, Vector
from spilt.steering.steering import Site, Steering

SITES = ("block", "mlp", "attn", "mlp_input")
PAIRS = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(6)]


ACTS = {  # each by its formula
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "tanh": np.tanh,
    "linear": lambda x: x,
}


def filled(steering: Steering, scale: float = 0.12, seed: int = 3) -> Steering:
    """Every parameter random, as a trained one has them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return steering


def run(model: nn.Module, steering: Steering | None = None, m: float = 1.0) -> Tensor:
    ids, real = families.token_rows([7, 5])
    with torch.no_grad(), hooks.attach(model, [] if steering is None else steering.at(m)):
        return model(input_ids=ids, attention_mask=real.long()).logits[real]


# ---------------------------------------------------------------- the equation


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_equation_number_by_number(nonlinearity: str) -> None:
    """h_k + m alpha sum_j U_kj act(sum_i D_ji h_i), written out; each row has its own m, and m = 0 is h bit for bit."""
    made = PostBlock(6, rank=3, alpha=0.7, nonlinearity=nonlinearity)
    filled(Steering([(Site(0), made)]), 0.8)
    h = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    down, up, wanted = made.down.detach().double().numpy(), made.up.detach().double().numpy(), h.double().numpy().copy()
    strengths = (0.0, -1.5)
    for row, m in enumerate(strengths):
        for t in range(4):
            read = [sum(down[j, i] * float(h[row, t, i]) for i in range(6)) for j in range(3)]
            act = ACTS[nonlinearity](np.array(read))
            for k in range(6):
                wanted[row, t, k] += m * 0.7 * sum(up[k, j] * act[j] for j in range(3))
    found = made(h, None, torch.tensor(strengths)[:, None, None])
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-5)
    assert torch.equal(found[0], h[0]) and torch.equal(made(h, None, 0.0), h)
    assert made(h.bfloat16(), None, 1.0).dtype == torch.bfloat16 and made.down.dtype == torch.float32
    assert math.isclose(made.norm(), 0.7 * np.linalg.norm(up @ down), rel_tol=1e-6)


def test_the_linear_one_is_a_matrix_and_a_name_that_is_none_is_refused() -> None:
    made = filled(Steering([(Site(0), PostBlock(8, rank=2, nonlinearity="linear"))])).entries[0][1]
    h = torch.randn(3, 5, 8)
    matrix = torch.eye(8) + made.up @ made.down  # type: ignore[operator]
    torch.testing.assert_close(made(h, None, 1.0), h @ matrix.T)
    with pytest.raises(UserError, match="unknown nonlinearity 'swish'.*gelu, linear, relu, silu, tanh"):
        PostBlock(8, nonlinearity="swish")


def test_the_start_is_nothing_and_only_u_moves_first() -> None:
    """D uniform in +-1e-3/sqrt(H), U zero; 2 L H r parameters, L H of vectors; the base model gets no gradient."""
    model = families.model("llama")
    steering = post_block.build(model)
    size = sum(p.numel() for p in steering.parameters())
    assert size == 2 * families.LAYERS * families.HIDDEN * 8 and steering.layers == tuple(range(families.LAYERS))
    for _, made in steering:
        bound = 1e-3 / math.sqrt(families.HIDDEN)
        assert isinstance(made, PostBlock) and 0.9 * bound < made.down.abs().max() <= bound and not made.up.any()
    assert torch.equal(run(model), run(model, steering))
    ids, _ = families.token_rows([6])
    with hooks.attach(model, steering.at(1.0)):
        model(input_ids=ids).logits.log_softmax(-1)[..., 7].sum().backward()
    for _, made in steering:
        assert not made.get_parameter("down").grad.any() and made.get_parameter("up").grad.abs().max() > 0  # type: ignore[union-attr]
    assert all(p.grad is None for p in model.parameters())
    same, other = post_block.build(model), post_block.build(model, seed=1)
    assert same == steering and other != steering
    vectors = post_block.build(model, kind="vector")
    assert (
        sum(p.numel() for p in vectors.parameters()) == families.LAYERS * families.HIDDEN and vectors.forms == ("vector",) * families.LAYERS
    )
    assert torch.equal(run(model), run(model, vectors))


# ---------------------------------------------------------------- where it acts


@pytest.mark.parametrize("family", count(families.EVERY, families.EVERY[::4]))
def test_every_site_of_every_family_and_the_model_as_it_was(family: str) -> None:
    """Each place is another one; the logits without it are bit for bit those of before; parameters and hooks too."""
    model = families.model(family)
    before, found = run(model), []
    for site in SITES:
        steering = filled(post_block.build(model, [1, 3], [site], rank=3))
        found.append(run(model, steering))
        assert torch.equal(run(model), before)
    for i, a in enumerate(found):
        assert (a - before).abs().max() > 1e-3 and all((a - b).abs().max() > 1e-3 for b in found[:i])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sites_are_what_their_names_say() -> None:
    """A vector at `mlp` is a bias of the down projection, at `attn` one of the output projection, at `mlp_input` one of the norm before."""
    model = families.build("llama")
    v = torch.randn(families.HIDDEN, generator=torch.Generator().manual_seed(2))
    block = model.model.layers[2]
    for site, at in (("mlp", block.mlp.down_proj), ("attn", block.self_attn.o_proj), ("mlp_input", block.post_attention_layernorm)):
        ours = run(model, Steering([(Site(2, None, site), Vector.from_state(v, write_point=site))]))
        handle = at.register_forward_hook(lambda module, args, output: output + v)
        torch.testing.assert_close(ours, run(model))
        handle.remove()
    block_output = Steering([(Site(2), Vector.from_state(v))])
    torch.testing.assert_close(
        run(model, block_output), run(model, Steering([(Site(2, None, "mlp"), Vector.from_state(v, write_point="mlp"))]))
    )


def test_the_attention_of_gemma_is_before_its_norm_and_fc2_is_the_end_of_an_mlp_without_a_module() -> None:
    model = families.model("gemma2")
    assert anatomy.write_point(model, 1, "attn") is model.model.layers[1].self_attn
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "word_embed_proj_dim": 16,
    }
    opt = OPTForCausalLM(OPTConfig(max_position_embeddings=32, **sizes)).eval().requires_grad_(False)
    layer = opt.model.decoder.layers[0]
    assert anatomy.write_point(opt, 0, "mlp") is layer.fc2 and anatomy.write_point(opt, 0, "mlp_input") is layer.fc1
    assert anatomy.write_point(opt, 0, "attn") is layer.self_attn and anatomy.write_width(opt, 0, "mlp_input") == 16


def test_what_is_read_too_late_is_refused() -> None:
    for site, may in PASSED.items():
        for point in POINTS:
            if point in may:
                Steering([(Site(1, point, site), LoRA(32, 32, read_point=point, write_point=site))])
            else:
                with pytest.raises(UserError, match=f"read at '{point}' comes after what is written at '{site}'"):
                    Steering([(Site(1, point, site), LoRA(32, 32, read_point=point, write_point=site))])
    with pytest.raises(UserError, match="comes after"):
        FitSettings(method="sft", intervention_method="lora", layers=(1,), site="attn")
    assert set(PASSED) < set(WRITE_POINTS)


@pytest.mark.parametrize("words", [{"layers": []}, {"sites": ()}, {"sites": ("block", "block")}, {"layers": [1, 1]}, {"rank": 0}])
def test_what_cannot_be_built(words: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="wanted"):
        post_block.build(families.model("llama"), **words)


@pytest.mark.parametrize(("name", "word"), [("kind", "lora"), ("scope", "first"), ("sites", ("norm",)), ("nonlinearity", "celu")])
def test_words_that_are_none(name: str, word: Any) -> None:
    with pytest.raises(UserError, match="unknown .*have: "):
        post_block.build(families.model("llama"), **{name: word})


# ---------------------------------------------------------------- files


def test_a_file_says_everything_and_nothing_is_taken_for_granted(tmp_path: Path) -> None:
    model = families.model("qwen2")
    steering = filled(post_block.build(model, sites=("mlp", "attn"), rank=3, nonlinearity="linear", alpha=0.5, scope="last"))
    path = steering.save(tmp_path / "a.safetensors")
    again = Steering.load(path)
    assert again == steering and again.scope == "last" and again.layers == steering.layers
    made = again.entries[0][1]
    assert isinstance(made, PostBlock) and (made.nonlinearity, made.alpha, made.rank) == ("linear", 0.5, 3)
    assert len(load_file(path)) == 2 * len(steering)  # learned tensors alone
    for _, other in again:
        other.nonlinearity = "silu"  # type: ignore[assignment]
    assert again != steering  # an activation is part of what it is
    with safe_open(path, "pt") as file:
        words = json.loads(file.metadata()["steering"])
    for spoil, said in (
        (lambda row: row.pop("nonlinearity"), "nonlinearity"),
        (lambda row: row.update(nonlinearity="cube"), "unknown nonlinearity 'cube'"),
        (lambda row: row.update(alpha=math.inf), "alpha inf"),
        (lambda row: row.update(alpha="1"), "its metadata is not that"),
        (lambda row: row.update(write_point="No"), "no usable site"),
    ):
        entries = [dict(row) for row in words["entries"]]
        spoil(entries[1])
        save_file(load_file(path), tmp_path / "b.safetensors", {"steering": json.dumps({**words, "entries": entries})})
        with pytest.raises(UserError, match=said):
            Steering.load(tmp_path / "b.safetensors")
    save_file({**load_file(path), "1.v": torch.ones(4)}, tmp_path / "c.safetensors", {"steering": json.dumps(words)})
    with pytest.raises(UserError, match="wants the tensors down, up; found"):
        Steering.load(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="shape"):
        again.check(families.build("llama", hidden_size=48))


def test_layer_files_keep_the_activation_and_refuse_another_site(tmp_path: Path) -> None:
    made = filled(Steering([(Site(2), PostBlock(8, rank=2, nonlinearity="tanh", alpha=2.0))])).entries[0][1]
    path = tmp_path / "layer_2.pt"
    path.write_bytes(layer_file.dump(made, None))
    found = layer_file.load(path, "post_block", None, 8, {}, "mlp_mid", "block")
    h = torch.randn(1, 3, 8)
    assert torch.equal(found(h, None, 1.3), made(h, None, 1.3)) and Steering.load(path).entries[0][1].options() == made.options()
    with pytest.raises(UserError, match="layer_2.pt: a post-block adapter that was fitted at 'block' would act at 'mlp'; --set site=block"):
        layer_file.load(path, "post_block", None, 8, {}, "mlp_mid", "mlp")
    state = {name: value for name, value in torch.load(path, weights_only=True).items() if name != "nonlinearity"}
    torch.save(state, path)
    with pytest.raises(UserError, match="without its nonlinearity"):
        Steering.load(path)


# ---------------------------------------------------------------- fits


def test_settings_of_the_form_alone() -> None:
    made = FitSettings(method="sft", intervention_method="post_block", layers=(1, 2))
    assert (made.rank, made.alpha, made.nonlinearity, made.dropout, made.joint) == (8, 1.0, "silu", 0.0, True)
    assert not FitSettings(method="sft", intervention_method="post_block", layers=(1,)).joint
    for name, value in (("alpha", 2.0), ("nonlinearity", "relu")):
        with pytest.raises(UserError, match=f"{name} = {value} is of post_block"):
            FitSettings(method="sft", intervention_method="lora", layers=(1,), **{name: value})
    assert not {"alpha", "nonlinearity"} & FitSettings(method="sft", intervention_method="lora", layers=(1,)).as_dict().keys()


@pytest.mark.few(2)
@pytest.mark.parametrize("site", ("block", "mlp_input"))
@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_one_layer_is_fast_as_it_is_plain(family: str, site: str) -> None:
    """Fitted, measured, and in texts at several strengths side by side."""
    model, tokenizer = families.model(family), families.tokenizer()
    how: dict[str, Any] = {
        "layer": 2,
        "method": "spilt",
        "intervention": "post_block",
        "n_epochs": 2,
        "batch_size": 3,
        "lr": 0.05,
        "site": site,
    }
    fast, plain = (spilt.fit(model, tokenizer, PAIRS, **how, engine=engine) for engine in ("fast", "plain"))
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
    measured = [spilt.measure(model, tokenizer, fast, PAIRS, [-3.0, 3.0], engine=engine) for engine in ("fast", "plain")]
    assert abs(measured[0]["preference"] - measured[1]["preference"]).max() < 1e-4 and measured[0]["preference"].nunique() == 3
    texts = [spilt.generate(model, tokenizer, fast, ["abc"], [0, 1, 8], max_new_tokens=6, engine=e)["text"] for e in ("fast", "plain")]
    assert list(texts[0]) == list(texts[1])


def test_layers_are_fitted_together_and_lower_the_loss() -> None:
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    steering = spilt.fit(model, tokenizer, PAIRS, layer=[0, 2, 4], method="sft", intervention="post_block", n_epochs=12, lr=0.02)
    assert steering.forms == ("post_block",) * 3
    table = spilt.measure(model, tokenizer, steering, PAIRS, [1.0]).set_index("multiplier")
    assert table["loss_matching"][1.0] < table["loss_matching"][0.0] - 0.5
    several = [(steering.on(n)) for n in steering.layers]
    assert all(part.norm() > 1e-3 for part in several)
    with whole.steer(model, steering, 1.0):
        pass


def test_it_is_no_weight() -> None:
    for nonlinearity, said in (("silu", r"is not linear \(silu\)"), ("linear", "reads the stream that it changes")):
        with pytest.raises(UserError, match=f"{said}.*--format safetensors"):
            PostBlock(8, nonlinearity=nonlinearity).folded()
