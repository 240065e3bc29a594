"""measure (`--mode loss`): pairs and a stored intervention -> train_losses.csv for each multiplier and preference type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spilt.artifacts import manifest
from spilt.artifacts.losses import PREFERENCE_TYPES
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.model import identity
from spilt.settings import resolve_fit
from spilt.verbs.base import Request, Step, Verb, parts_of
from spilt.verbs.estimate import Cost, Shape, recording

SWEEP = "sweep"  # the word for --multipliers
SWEEP_POINTS, SWEEP_MOST = 21, 31


class Measure(Verb):
    name, mode = "measure", "loss"
    does = "measure preference and utility at every strength, and draw the curves"
    flags = ("multipliers", "split", "checkpoint_seconds", "no_report")
    sections = {"train": "train", "test": "valid"}
    work = "spilt.tasks.measure:measure"
    version = 2  # one multiplier per batch; tables that are not finite are not stored

    def multipliers(self, request: Request, settings: Any) -> tuple[float, ...]:
        if request.multipliers != SWEEP:
            return super().multipliers(request, settings)
        cell = (request.model, request.dataset, settings.method, settings.intervention_method)
        fitted = resolve_fit(request.base_dir, *cell, layers=settings.layers)
        return sweep_multipliers(fitted.settings.steering_factors)

    def outputs(self, store: Store, cells: tuple[Cell, ...], data: Mapping[str, Path], multipliers: tuple[float, ...]) -> list[Path]:
        return [store.losses(cells[0], m, kind, split) for split, m, kind in _tables(data, multipliers)]

    def decided_by(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        return [(split, own(step, m, kind, split)) for split, m, kind in _tables(step.data, step.multipliers)]

    def unfinished(self, step: Step, limit: int | None, seen: identity.Seen) -> set[str]:
        signed = [sign * m + 0.0 for m in step.multipliers for sign in (1, -1)]
        return {one for split in step.data for one in loss_identities(step, signed, split, limit, seen)}

    def cost(self, step: Step, shape: Shape, rows: Sequence[Any], request: Request) -> Cost:
        """One pass below the layer, one above it for each multiplier and sign."""
        recorded, _, answers = recording(step, shape, rows, request.device.split(":")[0])
        strengths = len({abs(m) for m in step.multipliers}) * 2
        again = shape.run(recorded.tokens, shape.above(step.settings), recorded.tokens / len(rows)) + answers * shape.head
        return recorded._replace(tokens=recorded.tokens * (1 + strengths), flops=recorded.flops + strengths * again)


def _tables(data: Mapping[str, Path], multipliers: Iterable[float]) -> list[tuple[str, float, str]]:
    return [(split, m, kind) for split in data for m in multipliers for kind in PREFERENCE_TYPES]


def own(step: Step, multiplier: float, preference_type: str, split: str) -> dict[str, Any]:
    """What decides one table besides what decides all of a step."""
    return {"multiplier": float(multiplier), "preference_type": preference_type, "split": split, "concept": step.cells[0].concept}


def loss_identities(step: Step, multipliers: Iterable[float], split: str, limit: int | None, seen: identity.Seen) -> list[str]:
    """Whose the unfinished losses of each multiplier are: both answers are scored, whichever table asks."""
    return [manifest.identity(parts_of(step, split, own(step, m, "unfinished", split), limit, seen)) for m in multipliers]


def with_multipliers(step: Step, store: Store, multipliers: tuple[float, ...]) -> Step:
    """The same step at other strengths."""
    return step._replace(multipliers=multipliers, outputs=tuple(Measure().outputs(store, step.cells, step.data, multipliers)))


def sweep_multipliers(factors: tuple[float, ...], points: int = SWEEP_POINTS, widen: float = 1.0) -> tuple[float, ...]:
    """`points` values symmetric about 0 (0 among them) over the training factor range, times `widen`."""
    top = max(abs(f) for f in factors) * widen
    half = points // 2
    return tuple(round(top * k / half, 6) for k in range(-half, half + 1))


def widened(multipliers: tuple[float, ...]) -> tuple[float, ...]:
    """The same spacing over a range half as wide again, up to SWEEP_MOST values."""
    half = (len(multipliers) - 1) // 2
    spacing = max(multipliers) / half
    more = min(half + half // 2, (SWEEP_MOST - 1) // 2)
    return tuple(round(spacing * k, 6) for k in range(-more, more + 1))
