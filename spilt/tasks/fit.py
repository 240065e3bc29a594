"""Fit: find the intervention of one cell and store it (`--mode generate`)."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spilt import verbs
from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.losses import NEUTRAL
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.data import readers
from spilt.data.chat import Encoded
from spilt.engine import choice, score, whole
from spilt.engine import train as training
from spilt.engine.closed_form import closed_form
from spilt.methods import METHODS
from spilt.model.checkpoint import family
from spilt.steering.layer_file import dump, dump_linears, metadata_line
from spilt.steering.steering import Steering
from spilt.tasks import screen
from spilt.tasks.context import check_context, lengths_of
from spilt.tasks.recordings import Run, tell_replaced
from spilt.verbs import Step
from spilt.weights import training as weights

log = logging.getLogger("spilt")
DIGEST = 32  # bytes of a sha256


def fit(step: Step, run: Run) -> str:
    """Find the intervention of one cell at each of its layers, or at all of them together (`joint`), and store it."""
    (cell,) = step.cells
    settings: Any = step.settings
    outputs = dict(zip(cell.layers, verbs.output_parts(step, run.request.limit, run.seen).items(), strict=True))
    together = settings.joint or settings.direction_layer is not None
    groups = [cell.layers] if together else [(layer,) for layer in cell.layers]
    return "done" if any([_fit(step, {layer: outputs[layer] for layer in group}, run) for group in groups]) else "already done"


def _fit(step: Step, outputs: dict[int, tuple[Path, dict[str, Any]]], run: Run) -> bool:
    """One fit, of one layer or of several together. outputs: layer -> file, what decides it. Returns whether anything was done."""
    (cell,) = step.cells
    standing = run.team.on_main(lambda: {path: manifest.standing(path, parts) for path, parts in outputs.values()})
    if not run.request.force and set(standing.values()) <= {"done", "foreign"}:
        for path in (path for path, state in standing.items() if state == "foreign"):
            log.warning("%s has no manifest (made elsewhere): kept as it is; --force fits it again", run.store.relative(path))
        return False
    tell_replaced(str(step), dict(outputs.values()), run)
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    adapters = METHODS[cell.method].adapters
    fmt = run.entry(step, "train")
    if METHODS[cell.method].estimate is not None:
        steering = _closed_form(step, tuple(outputs), run, fmt)
    elif adapters:
        steering, rows, more = _adapters(step, run, fmt, manifest.identity(next(iter(outputs.values()))[1]))
    else:
        steering, rows = _train(step, tuple(outputs), run, fmt, manifest.identity(next(iter(outputs.values()))[1]))
    for site, intervention in steering if not adapters else ():
        training.check_usable(intervention, f"{cell} layer {site.layer}")
    text = readers.concepts(fmt).get(cell.concept) if cell.concept is not None else None
    # adapters are at every layer: there is no one direction to ask for
    directions = {} if adapters else {site.layer: {"direction": screen.tell(step, site.layer, run, fmt)} for site, _ in steering}

    def write() -> None:
        for layer in steering.layers:
            path, parts = outputs[layer]
            several = [made for _, made in steering.on(layer)]
            run.seen.again(step.inputs)
            atomic_write(run.store.metadata(cell, layer), metadata_line(several, cell.concept, text))
            atomic_write(run.store.train_log(cell), _train_log(cell, layer, rows, run.store))
            last = rows[-1]["loss"] if rows else None
            notes = {"layer": layer, "steps": len(rows), "last_loss": last, **directions.get(layer, {}), **more}
            content = dump_linears(several, cell.concept) if adapters else dump(several[0], cell.concept)
            run.store_result(step, path, content, parts, notes)
        run.store.checkpoint(cell, min(outputs)).unlink(missing_ok=True)

    run.team.on_main(write)
    return True


def _train(
    step: Step, layers: tuple[int, ...], run: Run, fmt: readers.DatasetFormat, identity: str
) -> tuple[Steering, list[dict[str, float]]]:
    """The trained Steering and its log. What a killed fit left is gone on from."""
    (cell,), host = step.cells, run.host
    settings: Any = step.settings
    steering = Steering.of({layer: training.new_intervention(host.model, layer, settings) for layer in layers})
    prefix = host.chat(settings.use_chat_template, settings.system_prompt).prefix_length
    place = {"family": family(step.model), "joint": settings.joint, "positions": settings.fitted_positions}
    if choice.why_plain(steering.places, "fit", engine=run.request.engine, **place):
        sequences = run.recordings.sequences(step, fmt.path, host, fmt)
        job: training.Job = whole.Fit(host.model, steering, sequences, settings, METHODS[cell.method], prefix, host.pad_id)
    else:
        base, read = score.recorded_at(steering)
        key = next(key for key in run.recordings.keys(step) if key.layer == base)
        cache = run.recordings.get(key, host, fmt, read)
        job = training.Fit(host.model, steering, cache, settings, METHODS[cell.method], prefix)
    with _under_way(cell, min(layers), run, identity) as how:
        return steering, training.fit(job, **how)


def _adapters(step: Step, run: Run, fmt: readers.DatasetFormat, identity: str) -> tuple[Steering, list[dict[str, Any]], dict[str, Any]]:
    """What is made of two trained adapters, their log, and their geometry. What a killed fit left is gone on from."""
    (cell,), host = step.cells, run.host
    settings: Any = step.settings
    sequences = run.recordings.sequences(step, fmt.path, host, fmt)
    with _under_way(cell, min(cell.layers), run, identity) as how:
        trained = weights.train(host.model, sequences, settings, host.pad_id, **how)
    weights.check(trained.made, str(cell))
    return trained.made, trained.log, {"geometry": trained.geometry}


@contextmanager
def _under_way(cell: Cell, layer: int, run: Run, identity: str) -> Iterator[dict[str, Any]]:
    """For a loop: resume (what a killed fit left), checkpoint (stores the state now and then) and progress (a bar)."""
    unfinished = run.store.checkpoint(cell, layer)
    resume = None if run.request.force else run.team.on_main(lambda: unsealed(unfinished, identity))
    saved = time.monotonic()

    def checkpoint(state: Callable[[], dict[str, Any]]) -> None:
        nonlocal saved
        if run.team.writes and time.monotonic() - saved >= run.request.checkpoint_seconds:
            atomic_write(unfinished, sealed({"identity": identity, **state()}))
            saved = time.monotonic()

    with run.progress.bar(desc=f"fit {cell}", unit="step") as bar:

        def progress(step: int, steps: int, loss: float) -> None:
            bar.total, bar.n = steps, step
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(0)

        yield {"resume": resume, "checkpoint": checkpoint, "progress": progress}


def sealed(state: dict[str, Any]) -> bytes:
    """A state as torch.save writes it, and the sha256 of that (32 bytes) behind it: what is damaged is known before it is used."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getvalue()).digest())
    return buffer.getvalue()


def unsealed(path: Path, identity: str) -> dict[str, Any] | None:
    """The state that a killed fit of these very settings left, or None. One that is damaged is not used, with a warning."""
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise OSError("it is no plain file")
        data = memoryview(path.read_bytes())
        if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
            raise ValueError("it is damaged: its checksum is not that of its content")
        state = torch.load(io.BytesIO(data[:-DIGEST]), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, OSError, MemoryError) as error:
        why = error if type(error) in (OSError, ValueError) else type(error).__name__  # the words of torch.load are none for a user
        log.warning("%s: cannot be gone on from: %s; the fit begins again", path, why)
        return None
    return state if isinstance(state, dict) and state.get("identity") == identity else None


def _closed_form(step: Step, layers: Sequence[int], run: Run, fmt: readers.DatasetFormat) -> Steering:
    """The estimate of a method, from both answers in the released tokenisation without suffix."""
    (cell,) = step.cells
    settings: Any = step.settings
    chat = run.host.chat(settings.use_chat_template, settings.system_prompt)
    pairs = readers.read_pairs(fmt, cell.concept, run.recordings.rows(settings))
    sequences = [chat.encode_caa(question, text, p.row, not settings.multiple_choice) for p in pairs for question, text in p.sides]
    lengths = lengths_of(pairs, sequences)
    check_context(run.host.model, f"fit {cell}, answers with their questions", lengths, "shorten the question or its answer")
    neutral: Sequence[Encoded] = ()
    if NEUTRAL in step.data:
        neutral = run.recordings.sequences(step, step.data[NEUTRAL], run.host, run.entry(step, NEUTRAL))
    means = partial(run.recordings.means, step)  # all closed forms of a request have them from one pass
    how = (sequences, settings, METHODS[cell.method], run.host.pad_id, neutral, means)
    return closed_form(run.host.model, layers, *how)


def _train_log(cell: Cell, layer: int, rows: list[dict[str, Any]], store: Store) -> str:
    """The log with this layer's section new; those of the other layers whose vectors lie there stay as they are."""

    def answers(row: dict[str, Any]) -> str:
        return f"{row['answers']} " if "answers" in row else ""

    lines = [
        f"{answers(row)}epoch {row['epoch']} step {row['step']} loss {row['loss']:.6f} lr {row['lr']:.6g} grad_norm {row['grad_norm']:.6g}"
        for row in rows
    ]
    told = {at: text for at, text in _told(store.train_log(cell), cell).items() if store.vector(cell, at).exists()}
    told[layer] = "\n".join(lines or ["closed form: no steps"]) + "\n"
    return "".join(f"{cell} layer {at}\n{told[at]}" for at in sorted(told))


def _told(path: Path, cell: Cell) -> dict[int, str]:
    """layer -> what train.log says of it under its heading. What is not ours has no such heading."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    _, *parts = re.split(rf"^{re.escape(str(cell))} layer (\d{{1,9}})\n", text, flags=re.MULTILINE)
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))
