"""Measure: losses of both answers at every multiplier, the random control, and the report (`--mode loss`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spilt import verbs
from spilt.analysis import odds, recommend
from spilt.artifacts import manifest
from spilt.artifacts.losses import NEUTRAL, NEUTRAL_TARGET, SPLITS, TABLE, TABLES, TARGETS
from spilt.cell import FORMS
from spilt.engine import activations, dose, score
from spilt.methods import METHODS
from spilt.steering.steering import Steering
from spilt.tasks import control, released
from spilt.tasks.recordings import Run, stored, tell_replaced
from spilt.tasks.scoring import Unfinished, complete, csv_of, finite, not_finite, scorer_of, shared_losses
from spilt.verbs import Step
from spilt.verbs import measure as measure_verb

SOLVED, REACH = 8, 4.0  # times that a multiplier for the budget is looked for and measured; how far beyond the sweep's end, times it


def measure(step: Step, run: Run) -> str:
    """Losses of both answers at every multiplier, as train_losses.csv files; a sweep is widened once when a tail still moves."""
    (cell,) = step.cells
    path = run.store.unfinished_losses(cell, run.team.rank)
    with closing(Unfinished(path, run.request.checkpoint_seconds)) as unfinished:
        if run.request.force:
            run.team.on_main(unfinished.remove)
        return _measure_step(step, run, unfinished)


def _measure_step(step: Step, run: Run, unfinished: Unfinished) -> str:
    (cell,) = step.cells
    steering = run.team.each(lambda: stored(cell, step.settings, run))
    new = released.write(step, steering, run, unfinished) if step.released else False
    if step.sweep or not step.released:
        new = _tables(step, steering, run, unfinished) or new
    return "done" if new else "already done"


def _tables(step: Step, steering: Steering, run: Run, unfinished: Unfinished) -> bool:
    """One table of losses per split, measured as text is made; a sweep is widened once when a tail still moves, the multiplier that
    meets the utility budget is measured too, and random interventions beside it. Returns whether anything was written."""
    (cell,) = step.cells
    outputs = {path: parts for path, parts in verbs.output_parts(step, run.request.limit, run.seen).items() if path.name in TABLES.values()}

    def decide() -> bool:
        if not run.request.force and all(verbs.state(step, path, parts) == "done" for path, parts in outputs.items()):
            return False
        tell_replaced(str(step), outputs, run)
        return True

    todo = run.team.on_main(decide)
    if todo:
        tables = Tables(step, steering, run, unfinished, outputs)
        if not step.sweep:
            tables.measure(step.multipliers)
            return True
        multipliers = run.team.gather(lambda: _sweep(step, steering, run))[0]
        tables.measure(multipliers)
        if run.team.on_main(lambda: _still_moves(tables, multipliers)):
            tables.measure(measure_verb.widened(multipliers))
        reach = REACH * max(multipliers)
        for _ in range(SOLVED):
            found = run.team.on_main(lambda: recommend.next_multiplier(tables.frame(next(iter(step.data))), reach=reach))
            if found is None:
                break
            tables.measure([found])
        tables.finish()
    return step.sweep and run.request.control_pairs > 0 and _control(step, steering, run, unfinished) or todo


def _still_moves(tables: Tables, multipliers: Sequence[float]) -> bool:
    """Of the sweep's own multipliers, whatever else has been measured: a run that goes on after a kill decides the same."""
    from spilt.analysis import curves  # brings scipy

    frame = pd.concat([tables.frame(split) for split in tables.step.data if split in SPLITS])
    return not curves.flattened(odds.summarise(frame[frame["multiplier"].isin(multipliers)]))


class Tables:
    """The tables of losses of one step, one per split, that grow by multipliers. m = 0 is always among them."""

    def __init__(self, step: Step, steering: Steering, run: Run, unfinished: Unfinished, outputs: dict[Path, dict[str, Any]]) -> None:
        self.step, self.steering, self.run, self.unfinished, self.outputs = step, steering, run, unfinished, outputs
        self.rows: dict[str, pd.DataFrame] = {}
        for split in step.data:
            path = run.store.loss_table(step.cells[0], split)
            self.rows[split] = run.team.on_main(partial(self._stored, path))
        self.unit = dose.of(steering, _seen(step, steering, run))  # at multiplier 1

    def _stored(self, path: Path) -> pd.DataFrame:
        """The rows that a run before this one left, of the same request."""
        usable = not self.run.request.force and manifest.standing(path, self.outputs[path]) == "done"
        return odds.losses_table(path) if usable else pd.DataFrame(columns=[*TABLE])

    def frame(self, split: str) -> pd.DataFrame:
        """What is known of a split, per question."""
        return odds.per_question(odds.answers(self.rows[split], "mean"), split)

    def measure(self, multipliers: Sequence[float]) -> None:
        """Add these strengths to every split. Raises NotFinite, when all that is sound has been stored."""
        bad: set[float] = set()
        for split in self.step.data:
            wanted = sorted({0.0, *(m + 0.0 for m in multipliers)} - set(self.rows[split]["multiplier"]))
            if wanted:
                bad |= self._measure(split, wanted)
        if bad:
            raise not_finite(sorted(bad))

    def _measure(self, split: str, wanted: Sequence[float]) -> set[float]:
        step, run, where = self.step, self.run, self.step.settings.applied_positions
        scorer = scorer_of(step, split, self.steering, run, where)
        with run.progress.bar(total=len(scorer.sequences) * len(wanted), desc=f"loss {step.cells[0]} {split}", unit="row") as bar:
            identities = measure_verb.loss_identities(step, wanted, split, where, run.request.limit, run.seen)
            found = shared_losses(run, scorer, wanted, self.unfinished, identities, bar.update)
        sound = finite(found)
        new = [table_rows(found, k, m, abs(m) * self.unit, where, split) for k, m in enumerate(wanted) if sound[k]]
        grown = pd.concat([part for part in (self.rows[split], *new) if len(part)]) if new else self.rows[split]
        self.rows[split] = grown.sort_values(["multiplier", "example", "target"], ignore_index=True)
        self._store(split, swept=False)
        return {m for m, good in zip(wanted, sound, strict=True) if not good}

    def _store(self, split: str, swept: bool) -> None:
        if not len(table := self.rows[split]):
            return
        path = self.run.store.loss_table(self.step.cells[0], split)
        notes = {"multipliers": sorted(set(table["multiplier"])), "swept": swept}
        complete(self.run, self.unfinished, lambda: self.run.store_result(self.step, path, csv_of(table), self.outputs[path], notes))

    def finish(self) -> None:
        """The sweep is whole: nothing that it led to is missing."""
        for split in self.step.data:
            self._store(split, swept=True)


def table_rows(found: score.Losses, k: int, multiplier: float, amount: float, positions: str, split: str) -> pd.DataFrame:
    """The rows of TABLE of one multiplier."""
    count, targets = found.total.shape[1], (NEUTRAL_TARGET,) if split == NEUTRAL else TARGETS
    columns = {
        "multiplier": multiplier,
        "dose": amount,
        "positions": positions,
        "example": np.arange(count) // len(targets),
        "target": np.resize(targets, count),
        "n_tokens": found.tokens,
        "loss_sum": found.total[k],
        "answer_tokens": found.answer_tokens,
        "answer_loss_sum": found.answer[k],
    }
    return pd.DataFrame(columns)[[*TABLE]]


def _seen(step: Step, steering: Steering, run: Run) -> list[dose.Seen]:
    """The streams that doses are measured on: of the first pairs of the step's first split."""
    split, path = next(iter(step.data.items()))
    sequences = run.recordings.sequences(step, path, run.host, run.entry(step, split))
    return dose.streams(run.host.model, steering, sequences, run.host.pad_id)


def _sweep(step: Step, steering: Steering, run: Run) -> tuple[float, ...]:
    """The sweep's multipliers. A closed form's vector is trained at none: its range makes max |m v| that of the trained ones."""
    (cell,) = step.cells
    if METHODS[cell.method].estimate is None or not FORMS[cell.intervention].direction:
        return step.multipliers
    own = _norm(steering)
    if own == 0:
        return step.multipliers
    others = [
        replace(cell, method=name)
        for name, row in METHODS.items()
        if row.in_all and row.estimate is None and not row.adapters and cell.intervention in row.forms
    ]
    there = [other for other in others if all(run.store.vector(other, n).is_file() for n in cell.layers)]
    norms = [_norm(stored(other, step.settings, run)) for other in there]
    if norms:
        top = max(map(abs, step.multipliers)) * sum(norms) / len(norms)
    else:  # nothing trained is stored: the strength at which the vector is twice as long as the stream is
        recorded = _streams(step, steering, run)
        top = 2 * recorded.h[:-1].float().norm(dim=-1).mean().item()
    return measure_verb.sweep_multipliers((float(f"{top / own:.2g}"),), len(step.multipliers))


def _streams(step: Step, steering: Steering, run: Run) -> activations.Activations:
    """The streams of the first split's pairs after the lowest steered block."""
    fmt = run.entry(step, next(iter(step.data)))
    if keys := run.recordings.keys(step):
        return run.recordings.get(keys[0], run.host, fmt, None)
    sequences = run.recordings.sequences(step, fmt.path, run.host, fmt)
    return activations.record(run.host.model, steering.layers[0], sequences, (), run.host.pad_id, together=2)


def _norm(steering: Steering) -> float:
    """Of the update at the lowest layer."""
    return steering.entries[0][1].norm()


def _control(step: Step, steering: Steering, run: Run, unfinished: Unfinished) -> bool:
    """control.csv: preference and utility along random interventions of the stored one's form, per draw and dose."""
    (cell,) = step.cells
    s: Any = step.settings
    splits = [split for split in step.data if split in SPLITS]
    split, where = splits[-1], s.applied_positions  # test items where they are measured
    path = run.store.control(cell)
    asked = {"draws": control.DRAWS, "doses": list(control.DOSES), "pairs": run.request.control_pairs, "answers": control.FIRST_WORD}
    parts = {"control": asked, **verbs.parts_of(step, split, measure_verb.of_table(step, split), run.request.limit, run.seen)}
    if run.team.on_main(lambda: not run.request.force and manifest.standing(path, parts) == "done"):
        return False
    bar = run.progress.bar(total=control.DRAWS, desc=f"control {cell}", unit="draw")

    def scored(draw: int, drawn: Steering, multipliers: Sequence[float]) -> score.Losses:
        scorer = scorer_of(step, split, drawn, run, where, run.request.control_pairs)
        identities = [manifest.identity({**parts, "draw": draw, "multiplier": m}) for m in multipliers]
        found = shared_losses(run, scorer, multipliers, unfinished, identities)
        if not all(finite(found)):
            raise not_finite([m for m, good in zip(multipliers, finite(found), strict=True) if not good])
        bar.update(draw + 1 - bar.n)
        return found

    seen = _seen(step, steering, run)
    shapes = [tuple(p.shape) for p in steering.parameters()]
    # the same draws serve every cell of this form, place and data
    same = {name: value for name, value in s.as_dict().items() if name not in ("method", "batch_size")}
    key = manifest.identity({**parts, "settings": same, "vectors": None, "places": steering.places, "shapes": shapes})
    with bar:
        if key not in run.recordings.along_random:
            run.recordings.along_random[key] = control.along_random(steering, seen, s.seed, scored, split)
    table = control.of_cell(run.recordings.along_random[key], dose.of(steering, seen))
    # the texts first: when control.csv stands there, both do
    star = run.team.on_main(lambda: _recommended(step, run))
    texts = control.texts(step, steering, seen, star, run) if star else None
    if texts is not None:
        run.team.on_main(lambda: run.store_result(step, run.store.control_texts(cell), csv_of(texts), {**parts, "texts": star}))
    complete(run, unfinished, lambda: run.store_result(step, path, csv_of(table), parts))
    return True


def _recommended(step: Step, run: Run) -> float | None:
    """The multiplier that meets the utility budget, of the step's first split."""
    split = next(iter(step.data))
    table = odds.losses_table(run.store.loss_table(step.cells[0], split))
    return recommend.solve(odds.per_question(odds.answers(table, "mean"), split))
