"""spilt audit: a fine-tune is taken apart into the Steerings that it is made of, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_in_place import everywhere

from spilt import cli
from spilt.steering import anatomy
from spilt.steering.inplace import by_place, change
from spilt.steering.steering import Steering


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint with 0.5 of one Steering and -2 of another in its weights, and both of them."""
    source, changed = families.checkpoint("gpt2"), tmp_path / "changed"
    shutil.copytree(source, changed)
    model = families.build("gpt2")
    a, b = everywhere(model), Steering.of({2: families.intervention("lora"), 0: families.intervention("lora", seed=3)})
    tensors = load_file(changed / "model.safetensors")
    blocks = anatomy.of(model).blocks
    prefix = "" if any(name.startswith(f"{blocks}.") for name in tensors) else "transformer."
    for one, m in ((a, 0.5), (b, -2.0)):
        for (layer, path), several in by_place(model, one).items():
            module = anatomy.block(model, layer).get_submodule(path)
            for kind, update in zip(("weight", "bias"), change(module, several), strict=True):
                name = f"{blocks}.{layer}.{path}.{kind}".removeprefix(prefix)
                if update is not None:
                    tensors[name] = (tensors[name] + m * update).contiguous()
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    return changed, a.save(tmp_path / "a.safetensors"), b.save(tmp_path / "b.safetensors")


def audit(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    code = cli.main(["audit", str(families.checkpoint("gpt2")), *map(str, words)])
    said = capsys.readouterr()
    return code, json.loads(said.out) if "--json" in words else said.out, said.err


def test_what_it_is_made_of(made: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Both strengths, nothing left, biases and Conv1D too; with one of the two something is left, and what is elsewhere is told."""
    changed, a, b = made
    code, found, _ = audit(capsys, changed, "--steering", a, b, "--json")
    assert code == 0 and [row["multiplier"] for row in found["steerings"]] == pytest.approx([0.5, -2], abs=1e-4)
    assert found["left"] < 1e-3 and found["outside"] == {"tensors": 0, "norm": 0}
    tensors = load_file(changed / "model.safetensors")
    norm = next(name for name in tensors if name.endswith("ln_f.weight"))
    save_file({**tensors, norm: tensors[norm] + 1}, changed / "model.safetensors", {"format": "pt"})
    code, out, _ = audit(capsys, changed, "--steering", a)
    assert code == 0 and "is left unexplained" in out and f"1 tensors have changed too (norm {families.HIDDEN**0.5:.4g})" in out


def test_what_cannot_be_compared_is_told(made: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    changed, a, _ = made
    assert audit(capsys, families.checkpoint("gpt2"), "--steering", a)[0] == 2
    vector = Steering.of({1: families.intervention("lora", "attn")}).save(tmp_path / "v.safetensors")
    code, _, said = audit(capsys, changed, "--steering", vector)
    assert code == 2 and "no weight of the model goes from there" in said
    tensors = load_file(changed / "model.safetensors")
    name = next(name for name in tensors if name.endswith("c_fc.weight"))
    save_file({**tensors, name: torch.zeros(2, 2)}, changed / "model.safetensors", {"format": "pt"})
    code, _, said = audit(capsys, changed, "--steering", a)
    assert code == 2 and f"{name} has shape" in said
    del tensors[name]
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    code, _, said = audit(capsys, changed, "--steering", a)
    assert code == 2 and "has other tensors than" in said
