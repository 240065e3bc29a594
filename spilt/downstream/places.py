"""Where a run's files lie: {base_dir}/tasks/{task}/{model}/{variant}/{run}/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from spilt.errors import UserError, checked_name, first_line

ROOT = "tasks"
SUMMARY = "summary.json"


class Place(NamedTuple):
    """The folder of one run. A run is a task, a model, a variant, and how it was trained."""

    folder: Path

    @property
    def steering(self) -> Path:
        """What was learned, with everything that is needed to use it."""
        return self.folder / "steering.safetensors"

    @property
    def weights(self) -> Path:
        """All weights, of full fine-tuning."""
        return self.folder / "model.safetensors"

    @property
    def log(self) -> Path:
        """A JSON object for each optimizer step."""
        return self.folder / "train_log.jsonl"

    @property
    def unfinished(self) -> Path:
        """The state of a training under way."""
        return self.folder / "unfinished.pt"

    @property
    def summary(self) -> Path:
        return self.folder / SUMMARY

    def results(self, split: str) -> Path:
        """JSON lines {prompt, output, label, eval}, under the public code's name."""
        return self.folder / f"{split}.json"

    def outputs(self, split: str) -> Path:
        """Texts of an evaluation under way."""
        return self.folder / f"unfinished_{split}.jsonl"


def place(base_dir: Path, task: str, model: str, variant: str, run: str) -> Place:
    parts = [checked_name(kind, name) for kind, name in (("task", task), ("model name", model))]
    return Place(base_dir.joinpath(ROOT, *parts, variant, run))


def runs(base_dir: Path) -> list[Place]:
    """Every run that has been evaluated."""
    return [Place(path.parent) for path in sorted((base_dir / ROOT).glob(f"*/*/*/*/{SUMMARY}"))]


def summaries(here: Place) -> dict[str, Any]:
    """name -> summary of what was evaluated in a run's folder. Raises UserError for a file that is none."""
    try:
        found = json.loads(here.summary.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{here.summary}: cannot be read: {first_line(error)}; spilt tasks evaluate --force writes it anew") from None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{here.summary}: is no summary; spilt tasks evaluate --force writes it anew")
    return found
