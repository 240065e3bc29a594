"""Measure: losses of both answers at every multiplier, the random control, and the report (`--mode loss`)."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from spilt import verbs
from spilt.analysis import odds
from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.journal import Journal
from spilt.artifacts.losses import APPLIED, COLUMNS, CONTROL, LOSS, PREFERENCE_TYPES
from spilt.cell import FORMS
from spilt.data import readers
from spilt.engine import activations, score, whole
from spilt.errors import NotFinite
from spilt.methods import METHODS
from spilt.steering import anatomy
from spilt.steering.interventions import Intervention, Vector
from spilt.steering.steering import Steering
from spilt.tasks.recordings import Run, stored, tell_replaced
from spilt.verbs import Step
from spilt.verbs import measure as measure_verb

CONTROL_DRAWS = 16  # random directions of the vector's norm: one alone can have a slope by chance, their mean should have none
CONTROL_PAIRS = 64  # questions that they are scored on, at most
CONTROL_EVERY = 3  # every third multiplier of the sweep


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
    if step.sweep:
        step = measure_verb.with_multipliers(step, run.store, _sweep(step, steering, run))
    new = _measure(step, steering, run, unfinished)
    if step.sweep:

        def still_moves() -> bool:
            from spilt.analysis import curves  # brings scipy

            frames = [odds.collect(run.store.loss_folder(cell), split) for split in step.data]
            return not curves.flattened(odds.summarise(pd.concat(frames)))

        if run.team.on_main(still_moves):
            wider = measure_verb.widened(step.multipliers)
            new = _measure(measure_verb.with_multipliers(step, run.store, wider), steering, run, unfinished) or new
            step = measure_verb.with_multipliers(step, run.store, wider)
        if FORMS[cell.intervention].direction:
            new = _control(step, steering, run, unfinished) or new
    return "done" if new else "already done"


def _sweep(step: Step, steering: Steering, run: Run) -> tuple[float, ...]:
    """The sweep's multipliers. caa is not trained at any strength: its range makes max |m v| that of the trained vectors."""
    (cell,) = step.cells
    if METHODS[cell.method].estimate is None:
        return step.multipliers
    layer, own = steering.layers[0], _norm(steering)
    if own == 0:
        return step.multipliers
    others = [replace(cell, method=name) for name, row in METHODS.items() if row.estimate is None and cell.intervention in row.forms]
    there = [other for other in others if run.store.vector(other, layer).is_file()]
    norms = [_norm(stored(replace(other, layers=(layer,)), step.settings, run)) for other in there]
    if norms:
        top = max(map(abs, step.multipliers)) * sum(norms) / len(norms)
    else:  # nothing trained is stored: the strength at which the vector is twice as long as the stream is
        recorded = _streams(step, steering, run)
        top = 2 * torch.cat([recorded.prefix_h, *recorded.h]).float().norm(dim=-1).mean().item()
    return measure_verb.sweep_multipliers((float(f"{top / own:.2g}"),))


def _streams(step: Step, steering: Steering, run: Run) -> activations.Activations:
    """The streams of the first split's pairs after the lowest steered block."""
    fmt = readers.dataset_format(run.request.base_dir, step.cells[0].dataset, verbs.VERBS["measure"].sections[next(iter(step.data))])
    if keys := run.recordings.keys(step):
        return run.recordings.get(keys[0], run.host, fmt, None)
    sequences = run.recordings.sequences(step, fmt.path, run.host, fmt)
    return activations.record(run.host.model, steering.layers[0], sequences, (), run.host.pad_id, together=2)


def _norm(steering: Steering) -> float:
    """Of the update at the lowest layer."""
    return steering.entries[0][1].norm()


def _scorer(step: Step, split: str, steering: Steering, run: Run, pairs: int | None = None) -> score.Scorer:
    """The losses of a split's pairs (the first `pairs` of them), by the engine that applies."""
    s: Any = step.settings
    fmt = readers.dataset_format(run.request.base_dir, step.cells[0].dataset, verbs.VERBS["measure"].sections[split])
    prefix, most = run.host.chat(s.use_chat_template, s.system_prompt).prefix_length, None if pairs is None else 2 * pairs
    if run.recordings.why_plain(step):
        sequences = run.recordings.sequences(step, step.data[split], run.host, fmt)[:most]
        return whole.Scorer(run.host.model, steering, sequences, run.host.pad_id, s.intervention_positions, prefix)
    key = next(key for key in run.recordings.keys(step) if key.data == step.data[split])
    cache = run.recordings.get(key, run.host, fmt, score.recorded_at(steering)[1])
    return score.Recorded(run.host.model, steering, cache if most is None else cache.first(most), s.intervention_positions, prefix)


def _measure(step: Step, steering: Steering, run: Run, unfinished: Unfinished) -> bool:
    """Write what is not there yet; multipliers that are done are not scored again. Returns whether anything was written."""
    (cell,) = step.cells
    outputs = verbs.output_parts(step, run.request.limit, run.seen)

    def decide() -> set[Path]:
        return {path for path, parts in outputs.items() if run.request.force or manifest.standing(path, parts) != "done"}

    todo = run.team.on_main(decide)
    tell_replaced(str(step), {path: outputs[path] for path in step.outputs if path in todo}, run)
    bad: set[float] = set()
    for split in step.data:
        wanted = [m for m in step.multipliers if any(run.store.losses(cell, m, kind, split) in todo for kind in PREFERENCE_TYPES)]
        if not wanted:
            continue
        scorer = _scorer(step, split, steering, run)
        signed = sorted({m for m in wanted} | {-m + 0.0 for m in wanted})
        with run.progress.bar(total=len(scorer.sequences) * len(signed), desc=f"loss {cell} {split}", unit="row") as bar:
            identities = measure_verb.loss_identities(step, signed, split, run.request.limit, run.seen)
            found = _shared_losses(run, scorer, signed, unfinished, identities, bar.update)
        place = {m: k for k, m in enumerate(signed)}
        bad |= {m for m, finite in zip(signed, _finite(found), strict=True) if not finite}
        sound = [m for m in wanted if bad.isdisjoint((m, -m + 0.0))]
        _store(run, unfinished, partial(_write, step, run, outputs, found, place, split, sound))
    if bad:
        raise _not_finite(sorted(bad))
    return bool(todo)


def _finite(found: score.Losses) -> list[bool]:
    """Per multiplier: is every loss a finite number?"""
    return [bool(np.isfinite(total).all() and np.isfinite(answer).all()) for total, answer in zip(found.total, found.answer, strict=True)]


def _not_finite(multipliers: Sequence[float]) -> NotFinite:
    at = ", ".join(f"{m:g}" for m in multipliers)
    smaller = "another --dtype (bfloat16, float32)" if 0 in multipliers else "smaller multipliers or another --dtype (bfloat16, float32)"
    return NotFinite(f"losses are NaN or infinite at m = {at}, so these were not stored; use {smaller}")


def _write(
    step: Step,
    run: Run,
    outputs: dict[Path, dict[str, Any]],
    found: score.Losses,
    place: dict[float, int],
    split: str,
    multipliers: Sequence[float],
) -> None:
    (cell,) = step.cells
    s: Any = step.settings
    for m in multipliers:
        for kind in PREFERENCE_TYPES:
            path = run.store.losses(cell, m, kind, split)
            table = loss_table(found, place, m, kind, s.preference_pairs)
            mean = table[LOSS].mean()
            run.seen.again(step.inputs)
            atomic_write(path.with_name("train.log"), f"{cell} m={m} {kind}: {len(table)} rows, mean {mean:.6f}\n")
            run.store_result(step, path, _csv(table), outputs[path])


def _shared_losses(
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
    share = slice(run.team.rank, None, run.team.size)

    def keep(k: int, numbers: Sequence[int], scored: np.ndarray) -> None:
        unfinished.add(identities[k], numbers, scored)

    def work() -> score.Losses:
        known = unfinished.read(identities, len(scorer.sequences))
        return score.losses(scorer, multipliers, progress=progress, share=share, known=known, keep=keep)

    found = run.team.gather(work)
    return found[0]._replace(total=np.sum([part.total for part in found], 0), answer=np.sum([part.answer for part in found], 0))


def _store(run: Run, unfinished: Unfinished, write: Callable[[], Any]) -> None:
    """Results that are complete are written, and what was kept for them goes."""
    unfinished.close()

    def write_and_remove() -> None:
        write()
        unfinished.remove()

    run.team.on_main(write_and_remove)


def _csv(table: pd.DataFrame) -> str:
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue()


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


def _control(step: Step, steering: Steering, run: Run, unfinished: Unfinished) -> bool:
    """control.csv: preference and utility along random directions of the stored vector's norm, per draw and multiplier."""
    (cell,) = step.cells
    s: Any = step.settings
    split = list(step.data)[-1]  # test items where they are measured
    multipliers = [0.0, *(sign * m for m in [m for m in step.multipliers if m > 0][::-CONTROL_EVERY] for sign in (1, -1))]
    path = run.store.control(cell)
    drawn = {"multipliers": multipliers, "draws": CONTROL_DRAWS, "pairs": CONTROL_PAIRS}
    parts = {"control": drawn, **verbs.parts_of(step, split, measure_verb.own(step, 0.0, "control", split), run.request.limit, run.seen)}
    if run.team.on_main(lambda: not run.request.force and manifest.standing(path, parts) == "done"):
        return False
    generator = torch.Generator().manual_seed(s.seed)
    tables = []
    for draw in run.progress.bar(range(CONTROL_DRAWS), desc=f"control {cell}", unit="draw"):
        random_ones: dict[int, Intervention] = {}
        for site, intervention in steering:
            direction = torch.randn(anatomy.hidden_size(run.host.model), generator=generator)
            made = Vector.from_state(direction / direction.norm() * intervention.norm(), write_point=s.site)
            random_ones[site.layer] = made.eval().to(run.host.device(site.layer))
        each = [manifest.identity({**parts, "draw": draw, "multiplier": m}) for m in multipliers]
        scorer = _scorer(step, split, Steering.of(random_ones), run, CONTROL_PAIRS)
        found = _shared_losses(run, scorer, multipliers, unfinished, each)
        if not all(_finite(found)):
            raise _not_finite([m for m, finite in zip(multipliers, _finite(found), strict=True) if not finite])
        mean = found.answer / found.answer_tokens
        utility = odds.utility_log_odds(mean[:, 0::2], mean[:, 1::2])
        defined = np.isfinite(utility).sum(1)
        table = pd.DataFrame({"split": split, "draw": draw, "multiplier": multipliers})
        table["preference"] = odds.preference_log_odds(mean[:, 0::2], mean[:, 1::2]).mean(1)
        table["utility"] = np.where(defined > 0, np.nansum(utility, 1) / np.maximum(defined, 1), np.nan)
        table["n"], table["n_undefined"] = utility.shape[1], utility.shape[1] - defined
        tables.append(table[[*CONTROL]])
    _store(run, unfinished, lambda: run.store_result(step, path, _csv(pd.concat(tables)), parts))
    return True
