"""A base folder and words of `spilt weights` that run in seconds on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families

from spilt import cli

BEHAVIOUR = "optimism"
SIZES = {
    "data": ["--n-topics", "3", "--n-personas", "2", "--n-samples", "2", "--n-audit", "3", "--n-audit-samples", "1"]
    + ["--max-new-tokens", "6"],
    "adapters": ["--adapter", "lora", "--layers", "1", "3", "--modules", "q_proj", "down_proj", "--rank", "2", "--lr", "0.03"]
    + ["--grad-accum", "1", "--epochs", "2", "--eval-steps", "2", "--checkpoint_seconds", "0"],
    "dw": ["--methods", "caa", "prompt"],
    "calibrate": ["--target-kl", "0.3", "--n-tokens", "4", "--n-calibration", "3", "--n-kl-audit", "3"],
    "evaluate": ["--vignettes", "none"],
    "table": ["--bootstrap-samples", "200"],
}


def make(root: Path) -> families.Base:
    return families.make_base(root, train=4)


def words(base: families.Base, stage: str, *more: str) -> list[str]:
    """Of a stage alone, or of all."""
    sizes = sum(SIZES.values(), []) if stage == "run" else list(SIZES[stage])
    sizes += ["--layers", "1", "3"] if stage == "dw" else []
    found = ["weights", stage, "--behavior", BEHAVIOUR, "--model", base.model, "--base_dir", str(base.path), "--device", "cpu", *sizes]
    return [*found, *more]


def run(base: families.Base, stage: str, *more: str) -> int:
    return cli.main(words(base, stage, *more))


def folder(base: families.Base) -> Path:
    return base.path / "weights" / base.model / BEHAVIOUR


def contents(base: families.Base) -> dict[str, Any]:
    """Every file, manifests without the time of day."""
    found: dict[str, Any] = {}
    for path in sorted(folder(base).rglob("*")):
        if path.is_file():
            data: Any = path.read_bytes()
            if path.name.endswith(".manifest.json"):
                data = {key: value for key, value in json.loads(data).items() if key not in ("created", "record_sha256")}
            found[str(path.relative_to(folder(base)))] = data
    return found
