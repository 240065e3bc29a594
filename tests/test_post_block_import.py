"""Checkpoints of the public post-block code: read where all is said, refused where their meaning would be guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import spilt
from spilt.engine import whole
from spilt.errors import UserError

D, LAYERS = families.HIDDEN, families.LAYERS


def checkpoint(
    path: Path, *sites: str, rank: int = 3, vectors: bool = False, base: bool = True, prefix: str = "adapters."
) -> dict[str, Tensor]:
    """As that code lays it out, with the frozen base beside it."""
    generator = torch.Generator().manual_seed(1)
    held: dict[str, Tensor] = {"base_model.model.embed_tokens.weight": torch.zeros(3, D)} if base else {}
    for layer in range(LAYERS):
        for site in sites:
            if vectors:
                held[f"deltas.layer{layer}_{site}"] = torch.randn(D, generator=generator) * 0.2
            else:
                held[f"{prefix}layer{layer}_{site}.down.weight"] = torch.randn(rank, D, generator=generator) * 0.2
                held[f"{prefix}layer{layer}_{site}.up.weight"] = torch.randn(D, rank, generator=generator) * 0.2
    torch.save(held, path)
    return held


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=families.token_rows([8])[0]).logits


def by_hand(model: nn.Module, held: dict[str, Tensor], site: str, act: Any) -> Tensor:
    """That code's own hooks: on the layer, on its MLP, on its post_attention_layernorm."""
    handles = []
    for i, layer in enumerate(model.model.layers):
        at = {"block": layer, "mlp": layer.mlp, "attn": layer.post_attention_layernorm}[site]
        down, up = (held[f"adapters.layer{i}_{site}.{name}.weight"] for name in ("down", "up"))

        def edit(module: nn.Module, args: Any, output: Any, down: Tensor = down, up: Tensor = up) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = h + act(h @ down.T) @ up.T
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(at.register_forward_hook(edit))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("site", "ours"), [("block", "block"), ("mlp", "mlp"), ("attn", "mlp_input")])
def test_it_does_what_that_code_does(site: str, ours: str, tmp_path: Path) -> None:
    model = families.model("llama")
    held = checkpoint(tmp_path / "pytorch_model.bin", site)
    for name, act in (("silu", nn.functional.silu), ("linear", lambda x: x), ("tanh", torch.tanh)):
        steering = spilt.read_post_block(model, tmp_path / "pytorch_model.bin", nonlinearity=name, scope="all")
        assert {where.write_point for where, _ in steering} == {ours} and steering.layers == tuple(range(LAYERS))
        with whole.steer(model, steering, 1.0):
            found = logits(model)
        torch.testing.assert_close(found, by_hand(model, held, site, act), atol=1e-4, rtol=1e-3)


def test_vectors_several_sites_and_the_joint_file(tmp_path: Path) -> None:
    model = families.model("qwen2")
    held = checkpoint(tmp_path / "v.bin", "block", vectors=True)
    steering = spilt.read_post_block(model, tmp_path / "v.bin", scope="last")
    assert steering.scope == "last" and torch.equal(steering.entries[2][1].v, held["deltas.layer2_block"])  # type: ignore[arg-type]
    checkpoint(tmp_path / "adapter_steerer.pt", "mlp", "attn", base=False, prefix="")
    steering = spilt.read_post_block(model, tmp_path / "adapter_steerer.pt", nonlinearity="gelu", scope="all", alpha=0.5)
    assert len(steering) == 2 * LAYERS and all(made.options() == {"alpha": 0.5, "nonlinearity": "gelu"} for _, made in steering)
    assert spilt.Steering.load(steering.save(tmp_path / "ours.safetensors")) == steering


def test_a_linear_checkpoint_is_never_read_as_silu_unasked(tmp_path: Path) -> None:
    """The public evaluation does so, and gives other answers: here it is a question."""
    model = families.model("llama")
    checkpoint(tmp_path / "a.bin", "block")
    for words, said in (
        ({"scope": "all"}, "does not say their activation.*--linear: linear"),
        ({"nonlinearity": "silu"}, "does not say which tokens.*'last'"),
        ({"nonlinearity": "swish", "scope": "all"}, "unknown nonlinearity 'swish'"),
        ({"nonlinearity": "silu", "scope": "first"}, "unknown scope 'first'"),
    ):
        with pytest.raises(UserError, match=said):
            spilt.read_post_block(model, tmp_path / "a.bin", **words)
    with pytest.raises(UserError, match="spilt.read_post_block takes both"):
        spilt.Steering.load(tmp_path / "a.bin")
    two = [spilt.read_post_block(model, tmp_path / "a.bin", nonlinearity=name, scope="all") for name in ("silu", "linear")]
    found = []
    for steering in two:
        with whole.steer(model, steering, 1.0):
            found.append(logits(model))
    assert (found[0] - found[1]).abs().max() > 0.1


def test_what_is_not_such_a_file(tmp_path: Path) -> None:
    model, path = families.model("llama"), tmp_path / "a.bin"
    held = checkpoint(path, "block")
    spoilt: list[tuple[Any, str]] = [
        ([1, 2], "holds a list"),
        ({"x.weight": torch.ones(2)}, "these are no adapters.*x.weight"),
        ({name: value for name, value in held.items() if name.startswith("base_model")}, "these are no adapters"),
        ({name: value for name, value in held.items() if name != "adapters.layer1_block.up.weight"}, "layer 1, block is not whole"),
        ({**held, "deltas.layer0_mlp": torch.ones(D)}, "adapters and fixed vectors"),
        ({**held, "adapters.layer0_block.down.weight": torch.full((3, D), float("nan"))}, "no finite number"),
        ({**held, "adapters.layer0_block.down.weight": torch.ones(2, D)}, "is not whole"),
        ({**held, "adapters.layer9_block.down.weight": torch.ones(3, D), "adapters.layer9_block.up.weight": torch.ones(D, 3)}, "layer 9"),
    ]
    for what, said in spoilt:
        torch.save(what, path)
        with pytest.raises(UserError, match=said):
            spilt.read_post_block(model, path, nonlinearity="silu", scope="all")
    checkpoint(path, "block")
    with pytest.raises(UserError, match="wants"):
        spilt.read_post_block(families.build("llama", hidden_size=48), path, nonlinearity="silu", scope="all")
    checkpoint(path, "block", vectors=True)
    with pytest.raises(UserError, match="no activation: leave"):
        spilt.read_post_block(model, path, nonlinearity="silu", scope="all")
    checkpoint(path, "attn")
    for family in ("gemma2", "gpt2"):
        with pytest.raises(UserError, match=f"post_attention_layernorm; in {family} that is not the MLP's input"):
            spilt.read_post_block(families.model(family), path, nonlinearity="silu", scope="all")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"adapters.layer0_block.down.weight": Evil()}, tmp_path / "e.bin")
    with pytest.raises(UserError, match="refused"):
        spilt.read_post_block(families.model("llama"), tmp_path / "e.bin", nonlinearity="silu", scope="all")
    assert not (tmp_path / "ran").exists()
