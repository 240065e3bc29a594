"""A model that accelerate placed in parts (--device auto on a small machine): some blocks' weights are on disk until they are needed."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from spilt.engine import suffix
from spilt.methods import scoring
from spilt.model.host import Host
from spilt.steering import anatomy


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_placed_model_gives_the_same_suffix_and_keeps_its_forwards(tmp_path: Path, layer: int) -> None:
    """Logits of the suffix equal those of the whole model, and accelerate's own `forward` is on every block afterwards."""
    folder = families.checkpoint()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count = len(anatomy.blocks(whole))
    places: dict[str, int | str | torch.device] = {
        name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    }
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(count)}
    placed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path).eval()
    forwards = [block.__dict__["forward"] for block in anatomy.blocks(placed)]
    assert len(forwards) == count and next(anatomy.block(placed, count - 1).parameters()).device.type == "meta"
    assert all(Host(placed, None, folder).device(i) == torch.device("cpu") for i in range(count))

    ids, keep = torch.randint(5, 60, (2, 9)), torch.zeros(2, 9, dtype=torch.bool)
    keep[:, 4:] = True
    found = []
    for model in (whole, placed):
        with torch.no_grad():
            found.append(suffix.logits(model, layer, suffix.record(model, layer, ids).h, keep))
    assert torch.equal(found[0], found[1])
    with torch.no_grad():
        full = whole(ids).logits[keep]
    assert torch.allclose(found[1], full, atol=1e-6)
    assert scoring.scored_positions(keep).sum() == 10
    assert [block.__dict__["forward"] for block in anatomy.blocks(placed)] == forwards
