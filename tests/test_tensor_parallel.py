"""A model loaded with tp_plan (two processes on the CPU, gloo): the same fits, losses and texts, or a refusal with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import forked
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.tasks.context import texts_at_once

ROOT = Path(__file__).resolve().parents[1]
PLACES: dict[str, dict[str, str]] = {
    "vector": {}, "vector ": {"site": "down_proj"}, "lora": {"intervention_components": "mlp"},
    "local_weight": {"intervention_components": "attn"},
}  # fmt: skip
PROGRAM = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import spilt
from spilt.errors import UserError

folder, out, places = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
split = {"tp_plan": "auto"} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **split).eval().requires_grad_(False)
tokenizer = AutoTokenizer.from_pretrained(folder)
pairs = [(f"is {i} odd?", " yes" + "!" * (i % 3), f" not {i}") for i in range(6)]
found = {"split": type(model.model.layers[1].mlp.down_proj.weight).__name__}
for form, where in places.items():
    for engine in ("fast", "plain"):
        how = {"method": "spilt", "intervention": form.strip(), "layer": 1, "n_epochs": 1, "batch_size": 3, "lr": 0.01, **where}
        fitted = spilt.fit(model, tokenizer, pairs, engine=engine, **how)
        texts = spilt.generate(model, tokenizer, fitted, ["is 3 odd?"], [-5, 0, 5], max_new_tokens=4, do_sample=False, engine=engine)
        losses = spilt.measure(model, tokenizer, fitted, pairs[:3], [-2, 2], engine=engine)[["preference", "utility"]].values.tolist()
        found[f"{form} {engine}"] = {"norm": fitted.norm(), "losses": losses, "texts": texts["text"].tolist()}
try:
    spilt.fit(model, tokenizer, pairs, layer=1, method="sft", intervention="lora", n_epochs=1)
    found["mlp_mid"] = "done"
except UserError as error:
    found["mlp_mid"] = str(error)
with open(f"{out}/{os.environ.get('RANK', 'alone')}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.long
@pytest.mark.slow
def test_split_over_two_processes_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [str(tmp_path / "program.py"), str(families.checkpoint()), str(tmp_path), json.dumps(PLACES)]
    for processes in (1, 2):
        done = forked.run(words, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", 0, 1))
    assert first == second and first["split"] == "DTensor" and alone["split"] == "Parameter"
    assert alone["mlp_mid"] == "done" and "each process holds a part of it" in first["mlp_mid"]
    cells: list[str] = [name for name in alone if " " in name]
    assert len(cells) == 2 * len(PLACES)
    for name in cells:
        assert first[name]["norm"] == pytest.approx(alone[name]["norm"], rel=1e-5)
        torch.testing.assert_close(torch.tensor(first[name]["losses"]), torch.tensor(alone[name]["losses"]), atol=1e-5, rtol=0)
        assert first[name]["texts"] == alone[name]["texts"] and len(set(first[name]["texts"])) > 1


def test_what_is_split_is_refused() -> None:
    model = families.build("qwen2")
    down, up = anatomy.down_proj(model, 1), model.get_submodule("model.layers.1.mlp.up_proj")
    assert anatomy.read_width(model, 1, "mlp_mid") == 48
    for module, axis in ((down, 1), (up, 0)):
        weight: Any = module.weight
        weight.placements = (Shard(axis),)
    assert anatomy.read_width(model, 1, "mlp") == anatomy.write_width(model, 1, "down_proj") == 32
    with pytest.raises(UserError, match="mlp_mid of block 1 is read, .* intervention_components mlp, attn or block"):
        anatomy.read_width(model, 1, "mlp_mid")
    with pytest.raises(UserError, match="mlp.up_proj of block 1 is written"):
        anatomy.write_width(model, 1, "mlp.up_proj")
    down.weight.placements = (Replicate(),)
    assert anatomy.read_width(model, 1, "mlp_mid") == 48


def test_all_processes_make_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one with the least memory."""
    model: Any = families.build("qwen2")
    monkeypatch.setattr(model, "_tp_size", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value, op: value.fill_(3.5e6))
    assert texts_at_once(model, None, [[1] * 9], 5).texts < 64
