"""Where the stages of weight steering keep what they make: `{base_dir}/weights/{model}/{behavior}/`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from spilt.errors import checked_name

SIDES = ("pos", "neg")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of a PEFT folder
UNSTEERED = "unsteered"  # in place of an arm


class Folder(NamedTuple):
    """All paths of one model and behaviour. An arm is a method as it is compared: dW of an adapter, a vector, a prompt."""

    root: Path

    @classmethod
    def of(cls, base_dir: Path, model: str, behaviour: str) -> Folder:
        return cls(base_dir / "weights" / checked_name("model name", model) / checked_name("behavior", behaviour))

    @property
    def personas(self) -> Path:
        """What was asked, and as whom: both persona files resolved, the questions by split."""
        return self.root / "personas.json"

    @property
    def answers(self) -> Path:
        return self.root / "answers.jsonl"

    def adapter(self, kind: str, side: str) -> Path:
        """A PEFT folder's weights; its configuration and its log lie beside them."""
        return self.root / "adapters" / checked_name("adapter", kind) / side / WEIGHTS

    def unfinished(self, kind: str, side: str) -> Path:
        """State of an adapter under way; removed when it is finished."""
        return self.adapter(kind, side).with_name("unfinished.pt")

    def arm(self, name: str) -> Path:
        return self.root / "arms" / f"{checked_name('arm', name)}.safetensors"

    def prompt(self) -> Path:
        """The arm that is a prompt alone."""
        return self.root / "arms" / "prompt.json"

    def arms(self) -> list[str]:
        """Those that are stored, dW before vectors before the prompt."""
        found = sorted(path.stem for path in (self.root / "arms").glob("*.safetensors"))
        return [*found, *(["prompt"] if self.prompt().is_file() else [])]

    def diagnostics(self, name: str) -> Path:
        return self.root / "arms" / f"{checked_name('arm', name)}.diagnostics.json"

    def strengths(self, name: str) -> Path:
        return self.root / "kl" / f"{checked_name('arm', name)}.json"

    def kl(self, what: str) -> Path:
        """summary, audit or history: of all arms."""
        return self.root / "kl" / f"{what}.csv"

    def measured(self, name: str, what: str) -> Path:
        return self.root / "evaluation" / checked_name("arm", name) / f"{what}.csv"

    @property
    def scenes(self) -> Path:
        """The vignettes that were asked about."""
        return self.root / "evaluation" / "scenes.json"

    def table(self, name: str) -> Path:
        return self.root / "tables" / name

    def journal(self, stage: str, process: int = 0) -> Path:
        """Lines of work that is done and not yet in a result."""
        return self.root / f"unfinished_{stage}" / f"unfinished_{process}.jsonl"
