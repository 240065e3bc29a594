"""Exported GGUF files in llama.cpp: its logits and texts are ours. Skipped where its library is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint, intervention, token_rows
from llama_cpp import Engine, libraries, write
from test_export import assert_same
from test_real_model import FOLDER, WHY
from transformers import AutoModelForCausalLM, AutoTokenizer

import spilt
from spilt import cli
from spilt.engine import whole
from spilt.steering.steering import Site, Steering

M = -1.3


@pytest.fixture(scope="module", autouse=True)
def there() -> None:
    libraries()


def one(form: str, layer: int, hidden: int = 32, width: int | None = None, scale: float = 0.3) -> Steering:
    made = intervention(form, None, hidden, width, seed=layer, scale=scale)
    return Steering([(Site(layer, made.read_point, "block"), made)])


def export(base: Path, model: str, value: Steering, m: float = M) -> int:
    path = value.save(base / "any.safetensors")
    words = ["--base_dir", str(base), "--model_name", model, "--steering", str(path), "--device", "cpu", "--multiplier", str(m)]
    return cli.main(["export", "--format", "gguf", *words, "--output", str(base / "out")])


def engine(model: Path, out: Path) -> Engine:
    """With the files that are there."""
    vector, lora = out / "control_vector.gguf", out / "lora.gguf"
    return Engine(model, vector if vector.exists() else None, lora if lora.exists() else None)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0])


VALUES = {
    "vector": lambda: one("vector", 2),
    "lora": lambda: one("lora", 0),
    "local_weight": lambda: one("local_weight", 3),
    "several": lambda: one("vector", 1) + one("lora", 1) + one("vector", 4) + 0.5 * one("lora", 3),
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.few(2)
def test_the_logits_are_ours(tmp_path: Path, family: str, kind: str) -> None:
    """Control vector, LoRA and both, unsteered too."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / family).symlink_to(checkpoint(family))
    value = VALUES[kind]()
    assert export(tmp_path, family, value) == 0
    model = loaded(checkpoint(family))
    file = write(model, tmp_path / "model.gguf")
    ids = token_rows([20])[0][0].tolist()
    plain, steered = Engine(file), engine(file, tmp_path / "out")
    assert_same(plain.logits(ids), logits(model, ids))
    with whole.steer(model, value, M):
        ours = logits(model, ids)
    assert_same(steered.logits(ids), ours)
    assert (ours - logits(model, ids)).abs().max() > 0.02 * ours.abs().max()
    plain.close()
    steered.close()


def test_block_0_takes_no_vector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "qwen2").symlink_to(checkpoint("qwen2"))
    assert export(tmp_path, "qwen2", one("vector", 0)) == 2
    assert "llama.cpp does not steer block 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Path]]:
    """(base folder, the model, its GGUF)."""
    base = tmp_path_factory.mktemp("llama")
    (base / "models").mkdir()
    (base / "models" / "real").symlink_to(FOLDER.resolve())
    model = loaded(FOLDER)
    yield base, model, write(model, base / "model.gguf")


@pytest.mark.real_model
@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=WHY)
@pytest.mark.parametrize("form", ["vector", "lora"])
@pytest.mark.long
def test_a_real_model_says_the_same(real: tuple[Path, Any, Path], tmp_path: Path, form: str) -> None:
    """A fitted vector changes the text in llama.cpp as it does here: the same tokens, greedily, and other ones than unsteered."""
    base, model, file = real
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    pairs = [(f"What do you like about place {i}?", " The sea and its waves.", " The city and its streets.") for i in range(8)]
    how: dict[str, Any] = {"method": "caa"} if form == "vector" else {"method": "sft", "intervention": form, "n_epochs": 1}
    value, m = spilt.fit(model, tokenizer, pairs, layer=15, **how), 2.0
    path = tmp_path / "any.safetensors"
    value.save(path)
    words = ["--base_dir", str(base), "--model_name", "real", "--steering", str(path), "--device", "cpu", "--multiplier", str(m)]
    assert cli.main(["export", "--format", "gguf", *words, "--output", str(tmp_path / "out")]) == 0
    said = [{"role": "user", "content": "Describe a house that you would love to live in."}]
    ids = tokenizer(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))["input_ids"]
    plain, steered = Engine(file), engine(file, tmp_path / "out")
    assert_same(plain.logits(ids), logits(model, ids))
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.0}
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    unsteered = model.generate(**batch, **how)[0, len(ids) :].tolist()
    with whole.steer(model, value, m):
        assert_same(steered.logits(ids), logits(model, ids))
        ours = model.generate(**batch, **how)[0, len(ids) :].tolist()
    assert steered.text(ids, 12) == ours and plain.text(ids, 12) == unsteered and ours != unsteered
    plain.close()
    steered.close()
