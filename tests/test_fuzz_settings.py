"""Mutated settings files: settings or one message."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import COUNT, Findings, mutated

from spilt.data import entries, readers
from spilt.settings import resolve_fit, resolve_generate, resolve_measure

FIT = """alg_name: spilt
layers: [2]
intervention_method: lora
batch_size: 4
gradient_accumulation_steps: 2
n_epochs: 3
lr: 1e-2
low_rank_dimension: 4
steering_factors: [0.2, 0.4, 1.0]
preference_pairs: [orig_add, orig_sub]
substraction_type: normal
intervention_positions: all
intervention_components: mlp_mid
dropout: 0.1
margin_threshold: 0.5
concept_id: 0
seed: 42
"""
APPLY = """alg_name: spilt
layers: [2]
multipliers: [1.0, -1.0]
generation_data_size: 100
num_responses: 1
generate_orig_output: true
generation_params:
  max_new_tokens: 20
  do_sample: false
  temperature: 0.9
"""
FORMATS = """train:
  mine: {file_path: data/mine/train.jsonl, field_names: {question: question, matching: matching, not_matching: not_matching}}
valid:
  mine: {file_path: data/mine/valid.jsonl, field_names: {question: question, matching: matching, not_matching: not_matching}}
generation:
  mine:
    file_path: data/mine/valid.jsonl
    field_names: {input: question, reference_response: matching}
    multi_concept: false
    keywords: [yes_please, gladly]
neutral:
  mine: {file_path: data/mine/neutral.jsonl}
"""
# lines that make a sound settings file surely wrong
WRONG_LINES = [
    "lerning_rate: 1", "layers: []", "layers: [-1]", "layers: [1.5]", "layers: [2, 2]", "layers: {a: 1}", "lr: .nan", "lr: .inf",
    "lr: -1", "lr: fast",
    "lr: [1, 2]", "n_epochs: 0", "n_epochs: 1e999", "batch_size: 0", "batch_size: 99999999999999999999", "dropout: 1.5", "dropout: yes",
    "steering_factors: []", "steering_factors: [a]", "steering_factors: [.inf]", "intervention_positions: g5",
    "intervention_components: mlp_end",
    "preference_pairs: [orig_mul]", "substraction_type: odd", "low_rank_dimension: 0", "seed: 1.5", "seed: [1]", "x: &a [*a]",
    "? [1]\n: 2", "lr: !!python/name:os.system",
    "1: 2", "\tlr: 1", "lr: 'open", "lr: [1", "lr: {a: ", "lr: !!float x", "use_chat_template: 3", "torch_dtype: float7",
    "site: everywhere", "steer_positions: everywhere", "steer_positions: 3",
]  # fmt: skip


def bomb(rng: random.Random) -> str:
    """Aliases that double what was read before."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * rng.randint(2, 9))}]" for i in range(1, rng.randint(10, 25))]
    return "\n".join(lines)


def test_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "hparams/Steer/experiment_hparams/spilt_experiment/mine/tiny/spilt"
    folder.mkdir(parents=True)
    fit, apply, formats = folder / "generate_spilt_lora.yaml", folder / "apply_spilt.yaml", tmp_path / readers.FORMATS_FILE
    loss = folder.parent / "sft/generate_sft_loss.yaml"
    loss.parent.mkdir()
    texts = {fit: FIT, apply: APPLY, formats: FORMATS, loss: "alg_name: sft\nlayers: [2]\nbatch_size: 1\noutput_length: 512\n"}
    for path, text in texts.items():
        path.write_text(text)
    place = (tmp_path, "tiny", "mine", "spilt", "lora")
    jobs: dict[Path, Callable[[], Any]] = {
        fit: lambda: [resolve_fit(*place).settings.as_dict(), resolve_measure(*place)],
        apply: lambda: resolve_generate(*place).settings.as_dict(),
        formats: lambda: [entries.load_formats(tmp_path), *(entries.dataset_format(tmp_path, "mine", s) for s in entries.SECTIONS)],
        loss: lambda: resolve_measure(*place).settings.as_dict(),
    }
    for work in jobs.values():
        work()
    findings = Findings()
    for seed in range(COUNT):
        rng = random.Random(seed)
        path = rng.choices([fit, apply, formats, loss], [5, 2, 2, 1])[0]
        hurt = rng.random() < 0.3
        if not hurt:
            name, data = "bytes", mutated(texts[path].encode(), rng, 2)
        elif rng.random() < 0.1:
            name, data = "bomb", f"{texts[path]}{bomb(rng)}\n".encode()
        elif path == fit:
            lines, wrong = FIT.splitlines(), rng.choice(WRONG_LINES)
            kept = [line for line in lines if line.split(":")[0] != wrong.split(":")[0].strip()]
            kept.insert(rng.randrange(len(kept) + 1), wrong)
            name, data = f"line {wrong!r}", "\n".join(kept).encode()
        else:
            lines = texts[path].splitlines(keepends=True)
            at, junk = (
                rng.randrange(len(lines)),
                rng.choice(["]\n", "key_of_nobody: 1\n", "%\n", "\0\n", "{{\n", "'\n", "!!python/none x\n"]),
            )
            name, data = f"junk {junk!r}", "".join([*lines[:at], junk, *lines[at:]]).encode()
        path.write_bytes(data)
        findings.run(f"{name} seed={seed} {path.name}", hurt, jobs[path])
        path.write_text(texts[path])
    findings.check("settings")
