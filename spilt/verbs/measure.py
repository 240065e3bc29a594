"""measure (`--mode loss`): pairs and a stored intervention -> train_losses.csv for each multiplier and preference type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spilt.artifacts import manifest
from spilt.artifacts.losses import NEUTRAL, PREFERENCE_TYPES, SPLITS, TABLES
from spilt.artifacts.store import Store
from spilt.data.readers import PAIRS
from spilt.methods import stand_ins
from spilt.model import identity
from spilt.settings import resolve_fit
from spilt.verbs.base import Request, Step, Verb, parts_of, without_files
from spilt.verbs.estimate import Cost, Shape, recording

SWEEP = "sweep"  # the word for --multipliers
SWEEP_MOST = 31  # strengths of a widened sweep


class Measure(Verb):
    name, mode = "measure", "loss"
    does = "measure preference and utility at every strength, and draw the curves"
    flags = ("multipliers", "split", "checkpoint_seconds", "released_files", "control_pairs", "no_report", "tensor_parallel")
    sections = {"train": "train", "test": "valid", NEUTRAL: "neutral"}
    work = "spilt.tasks.measure:measure"
    words = (SWEEP,)
    not_deciding = ("batch_size", "sweep_points")
    version = 2  # one multiplier per batch; tables that are not finite are not stored

    def multipliers(self, request: Request, settings: Any) -> tuple[float, ...]:
        if not request.words:  # what is recommended stands in a sweep
            return super().multipliers(request, settings)
        cell = (request.model, request.dataset, settings.method, settings.intervention_method)
        own, like = without_files(request, settings.method), stand_ins(*cell[2:])
        fitted = resolve_fit(request.base_dir, *cell, layers=settings.layers, own=own, like=like)
        return sweep_multipliers(fitted.settings.steering_factors, settings.sweep_points)

    def refuses(self, step: Step, kind: str) -> str:
        why = "preference and utility compare two answers to one question; give such rows (--test FILE --split test), or measure nothing"
        return "" if kind == PAIRS else why

    def outputs(self, store: Store, step: Step) -> list[Path]:
        """The tables of a sweep, the released files where they are wanted."""
        (cell,) = step.cells
        tables = [store.loss_table(cell, split) for split in _tables(step)]
        return tables + [store.losses(cell, m, kind, split) for split, m, kind in _files(step)]

    def decided_by(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        tables = [(split, of_table(step, split)) for split in _tables(step)]
        return tables + [(split, own(step, m, kind, split)) for split, m, kind in _files(step)]

    def complete(self, step: Step, path: Path) -> bool:
        """A table holds the multipliers asked for; of a sweep, all that it led to."""
        if path.name not in TABLES.values():
            return True
        notes = (manifest.read(path) or {}).get("notes", {})
        if step.sweep:
            return bool(notes.get("swept")) and len(notes["multipliers"]) >= step.settings.sweep_points
        return set(step.multipliers) <= set(notes.get("multipliers", ()))

    def unfinished(self, step: Step, limit: int | None, seen: identity.Seen) -> set[str]:
        signed = [sign * m + 0.0 for m in step.multipliers for sign in (1, -1)]
        places = {step.settings.fitted_positions, step.settings.applied_positions}
        return {one for split in step.data for where in places for one in loss_identities(step, signed, split, where, limit, seen)}

    def cost(self, step: Step, shape: Shape, rows: Sequence[Any], request: Request) -> Cost:
        """One pass below the layer, one above it for each multiplier and sign."""
        recorded, _, answers = recording(step, shape, rows, request.device.split(":")[0])
        strengths = len({abs(m) for m in step.multipliers}) * 2
        again = shape.run(recorded.tokens, shape.above(step.settings.layers), recorded.tokens / len(rows)) + answers * shape.head
        return recorded._replace(tokens=recorded.tokens * (1 + strengths), flops=recorded.flops + strengths * again)


def _tables(step: Step) -> list[str]:
    """The splits whose losses are kept in one table each."""
    return list(step.data) if step.sweep or not step.released else []


def _files(step: Step) -> list[tuple[str, float, str]]:
    splits = [split for split in step.data if split in SPLITS] if step.released else []
    return [(split, m, kind) for split in splits for m in step.multipliers for kind in PREFERENCE_TYPES]


def own(step: Step, multiplier: float, preference_type: str, split: str) -> dict[str, Any]:
    """What decides one released file besides what decides all of a step."""
    return {"multiplier": float(multiplier), "preference_type": preference_type, "split": split, "concept": step.cells[0].concept}


def of_table(step: Step, split: str) -> dict[str, Any]:
    """What decides the rows of a table besides what decides all of a step. Which multipliers there are stands in the manifest's notes."""
    return {"table": step.settings.applied_positions, "split": split, "concept": step.cells[0].concept}


def loss_identities(
    step: Step, multipliers: Iterable[float], split: str, positions: str, limit: int | None, seen: identity.Seen
) -> list[str]:
    """Whose the unfinished losses of each multiplier are: both answers are scored, whichever table asks."""
    return [
        manifest.identity(parts_of(step, split, {**own(step, m, "unfinished", split), "positions": positions}, limit, seen))
        for m in multipliers
    ]


def sweep_multipliers(factors: tuple[float, ...], points: int, widen: float = 1.0) -> tuple[float, ...]:
    """`points` values symmetric about 0 (0 among them) over the training factor range, times `widen`."""
    top = max(abs(f) for f in factors) * widen
    half = points // 2
    return tuple(round(top * k / half, 6) for k in range(-half, half + 1))


def widened(multipliers: tuple[float, ...]) -> tuple[float, ...]:
    """The same spacing over a range half as wide again, up to SWEEP_MOST values."""
    half = (len(multipliers) - 1) // 2
    spacing = max(multipliers) / half
    more = max(half, min(half + half // 2, (SWEEP_MOST - 1) // 2))
    return tuple(round(spacing * k, 6) for k in range(-more, more + 1))
