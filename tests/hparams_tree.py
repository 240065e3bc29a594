"""A settings tree of one cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from spilt.settings import ROOT, FitSettings, resolve_fit

REPOSITORY = Path(__file__).resolve().parent.parent
QWEN = "qwen2.5-7b-it"


class Tree:
    """A base_dir with the files of one cell: model `m`, dataset `d`, method spilt, form lora."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / ROOT
        self.cell = "d/m/spilt/generate_spilt_lora.yaml"

    def put(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def fit(self, text: str | None = None, **overrides: object) -> FitSettings:
        if text is not None:
            self.put(self.cell, text)
        return resolve_fit(self.base, "m", "d", "spilt", "lora", overrides).settings


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)
