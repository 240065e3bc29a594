"""Cell: one grid point of a request, that is what is fitted, applied or measured."""

from __future__ import annotations

from dataclasses import dataclass

# The forms of an intervention, in the order in which `all` runs them; interventions.py gives each its class.
FORMS: tuple[str, ...] = ("vector", "lora", "local_weight")


@dataclass(frozen=True)
class Cell:
    """One grid point. A value: equal cells are the same work.

    `concept` is the concept id of a dataset with one intervention per concept (axbench), else None.
    `layers` are 0-based decoder block indices; each has its own parameters, all act together when applied.
    """

    model: str
    dataset: str
    method: str
    intervention: str
    layers: tuple[int, ...]
    concept: int | None = None

    def __str__(self) -> str:
        concept = "" if self.concept is None else f" concept {self.concept}"
        return f"{self.dataset}{concept} {self.method} {self.intervention}"
