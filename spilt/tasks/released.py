"""The released files of losses: one train_losses.csv for each multiplier and preference type, measured in the released positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spilt import verbs
from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.losses import APPLIED, COLUMNS, LOSS, PREFERENCE_TYPES, SPLITS, TABLES
from spilt.engine import score
from spilt.steering.steering import Steering
from spilt.tasks.recordings import Run, tell_replaced
from spilt.tasks.scoring import Unfinished, complete, csv_of, finite, not_finite, scorer_of, shared_losses
from spilt.verbs import Step
from spilt.verbs import measure as measure_verb


def write(step: Step, steering: Steering, run: Run, unfinished: Unfinished) -> bool:
    """Write the released files that are not there yet; multipliers that are done are not scored again. Returns whether anything was."""
    (cell,) = step.cells
    where = step.settings.fitted_positions
    every = verbs.output_parts(step, run.request.limit, run.seen)
    outputs = {path: parts for path, parts in every.items() if path.name not in TABLES.values()}

    def decide() -> set[Path]:
        return {path for path, parts in outputs.items() if run.request.force or manifest.standing(path, parts) != "done"}

    todo = run.team.on_main(decide)
    tell_replaced(str(step), {path: parts for path, parts in outputs.items() if path in todo}, run)
    bad: set[float] = set()
    for split in (split for split in step.data if split in SPLITS):
        wanted = [m for m in step.multipliers if any(run.store.losses(cell, m, kind, split) in todo for kind in PREFERENCE_TYPES)]
        if not wanted:
            continue
        scorer = scorer_of(step, split, steering, run, where)
        signed = sorted({m for m in wanted} | {-m + 0.0 for m in wanted})
        with run.progress.bar(total=len(scorer.sequences) * len(signed), desc=f"loss {cell} {split}", unit="row") as bar:
            identities = measure_verb.loss_identities(step, signed, split, where, run.request.limit, run.seen)
            found = shared_losses(run, scorer, signed, unfinished, identities, bar.update)
        place = {m: k for k, m in enumerate(signed)}
        bad |= {m for m, good in zip(signed, finite(found), strict=True) if not good}
        sound = [m for m in wanted if bad.isdisjoint((m, -m + 0.0))]
        complete(run, unfinished, partial(_stored, step, run, outputs, found, place, split, sound))
    if bad:
        raise not_finite(sorted(bad))
    return bool(todo)


def _stored(
    step: Step,
    run: Run,
    outputs: dict[Path, dict[str, Any]],
    found: score.Losses,
    place: dict[float, int],
    split: str,
    multipliers: Sequence[float],
) -> None:
    """The files of these multipliers. place: of each signed multiplier in `found`."""
    (cell,) = step.cells
    s: Any = step.settings
    for m in multipliers:
        for kind in PREFERENCE_TYPES:
            path = run.store.losses(cell, m, kind, split)
            table = loss_table(found, place, m, kind, s.preference_pairs)
            mean = table[LOSS].mean()
            run.seen.again(step.inputs)
            atomic_write(path.with_name("train.log"), f"{cell} m={m} {kind}: {len(table)} rows, mean {mean:.6f}\n")
            run.store_result(step, path, csv_of(table), outputs[path])


def loss_table(found: score.Losses, place: dict[float, int], m: float, kind: str, pairs: tuple[str, ...]) -> pd.DataFrame:
    """Rows of train_losses.csv: (example, pair) in dataset order.

    winning_only scores matching at +m (orig_add) and not_matching at -m (orig_sub); losing_only the other two.
    """
    examples = found.total.shape[1] // 2
    columns = []
    for pair in pairs:
        applied = (m if pair == "orig_add" else -m) + 0.0
        matching = (pair == "orig_add") == (kind == "winning_only")
        sequence, k = 2 * np.arange(examples) + (0 if matching else 1), place[applied]
        columns.append(
            {
                LOSS: found.total[k, sequence] / found.tokens[sequence],
                APPLIED: np.full(examples, applied),
                "neg_steering_factors": np.full(examples, applied),
                "example": np.arange(examples),
                "pair": np.full(examples, pair),
                "target": np.full(examples, "matching" if matching else "not_matching"),
                "n_tokens": found.tokens[sequence],
                "loss_sum": found.total[k, sequence],
                "answer_tokens": found.answer_tokens[sequence],
                "answer_loss_sum": found.answer[k, sequence],
            }
        )
    # one row of each pair after the other, example by example
    rows = {name: np.stack([part[name] for part in columns], 1).reshape(-1) for name in columns[0]}
    return pd.DataFrame({"epoch": 0, "step": np.repeat(np.arange(examples), len(pairs)), **rows})[[*COLUMNS]]
