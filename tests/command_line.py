"""The command line in a process of its own, and where it stores what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Base, intervention, make_base, write_yaml

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base that nothing may be written to."""
    return make_base(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base")


def process(argv: list[str], *options: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """run_spilt.py as a user starts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, *options, str(REPO / "run_spilt.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=env)


def vector_path(base: Base, method: str, form: str, dataset: str = "", layer: int = 2) -> Path:
    leaf = "caa_vector" if method == "caa" else f"{method}_{form}"
    return base.path / "vectors" / base.model / method / (dataset or base.one) / leaf / f"layer_{layer}.pt"


def results_path(base: Base, method: str, form: str, m: str) -> Path:
    return base.path / "generation" / base.model / method / base.one / f"{method}_{form}" / m / f"{base.one}_results.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def released_state(form: str, seed: int = 0, **more: Any) -> Any:
    """A stored intervention as the released code writes it."""
    state = intervention(form, seed=seed, **more).state()
    if isinstance(state, dict):
        state["concept_id"] = 0
    return state


def put(path: Path, state: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def change(base: Base, **values: Any) -> None:
    path = base.hparams(base.one, "sft", "generate_sft_vector.yaml")
    import yaml

    write_yaml(path, {**yaml.safe_load(path.read_text()), **values})
