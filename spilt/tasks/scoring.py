"""Losses of a step's pairs: which engine scores them, dealt out over processes, kept while a run is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spilt.artifacts.journal import Journal
from spilt.engine import score, whole
from spilt.errors import NotFinite
from spilt.steering.steering import Steering
from spilt.tasks.recordings import Run
from spilt.verbs import Step


class Unfinished(Journal):
    """Losses that are scored but not yet in a table: a line for each batch, written after every so many seconds.

    A line counts only with the identity of what was asked: [identity, sequences, their losses, the answers' part of them].
    """

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(path)
        self.seconds, self.saved = seconds, time.monotonic()
        self.waiting: list[Any] = []

    def read(self, identities: Sequence[str], sequences: int) -> np.ndarray:
        """[2, K, S], for each identity the losses of all sequences; NaN where there is none."""
        found = np.full((2, len(identities), sequences), np.nan)
        place = {identity: k for k, identity in enumerate(identities)}
        for line in self.whole():
            try:
                identity, numbers, total, answer = line
                found[:, place[identity], numbers] = total, answer
            except (ValueError, TypeError, LookupError):  # not ours
                continue
        return found

    def add(self, identity: str, numbers: Sequence[int], scored: np.ndarray) -> None:
        """scored: [2, S] of this identity and these sequences."""
        self.waiting.append([identity, numbers, *scored.tolist()])
        if time.monotonic() - self.saved >= self.seconds:
            self.append(self.waiting)
            self.waiting, self.saved = [], time.monotonic()

    def close(self) -> None:
        """What waits to be written is no longer needed."""
        self.waiting = []
        super().close()


def scorer_of(step: Step, split: str, steering: Steering, run: Run, positions: str, pairs: int | None = None) -> score.Scorer:
    """The losses of a split's pairs (the first `pairs` of them) where these positions are steered, by the engine that applies."""
    s: Any = step.settings
    fmt = run.entry(step, split)
    prefix, most = run.host.chat(s.use_chat_template, s.system_prompt).prefix_length, None if pairs is None else 2 * pairs
    if run.recordings.why_plain(step):
        sequences = run.recordings.sequences(step, step.data[split], run.host, fmt)[:most]
        return whole.Scorer(run.host.model, steering, sequences, run.host.pad_id, positions, prefix)
    key = next(key for key in run.recordings.keys(step) if key.data == step.data[split])
    cache = run.recordings.get(key, run.host, fmt, score.recorded_at(steering)[1])
    return score.Recorded(run.host.model, steering, cache if most is None else cache.first(most), positions, prefix)


def shared_losses(
    run: Run,
    scorer: score.Scorer,
    multipliers: Sequence[float],
    unfinished: Unfinished,
    identities: Sequence[str],
    progress: Callable[[int], Any] | None = None,
) -> score.Losses:
    """The losses, the batches dealt out over the processes: each batch is the same as with one process, so the bytes are too.

    identities: whose the losses of each multiplier are. Those that a killed run left are not scored again.
    """
    share = slice(run.team.rank % run.team.parts, None, run.team.parts)
    known = run.team.on_main(lambda: unfinished.read(identities, len(scorer.sequences)))

    def keep(k: int, numbers: Sequence[int], scored: np.ndarray) -> None:
        if run.team.writes:
            unfinished.add(identities[k], numbers, scored)

    def work() -> score.Losses:
        return score.losses(scorer, multipliers, progress=progress, share=share, known=known, keep=keep)

    found = run.team.gather(work)
    return found[0]._replace(total=np.sum([part.total for part in found], 0), answer=np.sum([part.answer for part in found], 0))


def complete(run: Run, unfinished: Unfinished, write: Callable[[], Any]) -> None:
    """Results that are complete are written, and what was kept for them goes."""
    unfinished.close()

    def write_and_remove() -> None:
        write()
        unfinished.remove()

    run.team.on_main(write_and_remove)


def finite(found: score.Losses) -> list[bool]:
    """Per multiplier: is every loss a finite number?"""
    return [bool(np.isfinite(total).all() and np.isfinite(answer).all()) for total, answer in zip(found.total, found.answer, strict=True)]


def not_finite(multipliers: Sequence[float]) -> NotFinite:
    """The error for losses that are not."""
    at = ", ".join(f"{m:g}" for m in multipliers)
    smaller = "another --dtype (bfloat16, float32)" if 0 in multipliers else "smaller multipliers or another --dtype (bfloat16, float32)"
    return NotFinite(f"losses are NaN or infinite at m = {at}, so these were not stored; use {smaller}")


def csv_of(table: pd.DataFrame) -> str:
    """As it is stored."""
    return str(table.to_csv(index=False, lineterminator="\n"))
