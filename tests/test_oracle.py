"""spilt oracle: a fine-tuned checkpoint as steering of its base, told by block, drawn, and refused where there is nothing to tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from spilt import cli
from spilt.report.figures import oracle_figure


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose second block has another down projection, by a change of rank 2."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(families.checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(families.HIDDEN, 2, generator=generator), torch.randn(2, families.MIDDLE, generator=generator)
    tensors[name] = tensors[name] + 0.1 * a @ b
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.long
def test_by_block(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is added but behind block 1, by as much rank as the change has; from there on all is put right."""
    (tmp_path / "texts.txt").write_text("so is it odd?\nabc\n")
    words = ["oracle", str(families.checkpoint("llama")), str(tuned), "--texts", str(tmp_path / "texts.txt")]
    assert cli.main([*words, "--json", "--picture", str(tmp_path / "a.png")]) == 0
    rows = json.loads(capsys.readouterr().out)["blocks"]
    assert [row["block"] for row in rows] == [*range(families.LAYERS)]
    assert rows[1]["ranks"][1] <= 2 and sum(rows[1]["shares"][:2]) == pytest.approx(1, abs=1e-6)
    assert rows[0]["kl"] > 1e-4 and all(abs(row["kl"]) < 1e-5 for row in rows[1:])
    assert rows[0]["mlp"] is None and rows[0]["ranks"] is None and rows[1]["mlp"] == pytest.approx(1) and 0 < rows[2]["mlp"] < 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + families.LAYERS
    panels = oracle_figure(rows).axes
    assert list(panels[1].lines[0].get_ydata()) == [row["kl"] for row in rows] and len(panels) == 3


def test_what_is_refused(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("abc\n")
    base, texts = str(families.checkpoint("llama")), ["--texts", str(tmp_path / "texts.txt")]
    for words, said in (
        ([base, base, *texts], "nothing to add"),
        ([base, str(families.checkpoint("qwen2")), "--texts", str(tmp_path / "no.txt")], "no.txt"),
        ([base, str(tuned), *texts, "--picture", "a.svg"], "ends in .png"),
    ):
        assert cli.main(["oracle", *words]) == 2
        assert said in capsys.readouterr().err
