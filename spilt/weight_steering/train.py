"""Stage adapters: one PEFT adapter on the answers of either side, from the same start, on the same rows in the same order.

The loop is engine/train.py's and not the library's Trainer: a killed run goes on from its last step to the same bits, the model is given
back as it was, and one file holds the state. Each adapter is trained by one process on one device; several are dealt out over several.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.manifest import identity
from spilt.artifacts.weights import CONFIG, SIDES, WEIGHTS
from spilt.errors import UserError
from spilt.settings import FitSettings
from spilt.settings.fields import WEIGHT_ARITHMETIC
from spilt.verbs.base import adapted_layers
from spilt.weight_steering import data, personas
from spilt.weight_steering.stage import Context

log = logging.getLogger("spilt")
STAGE = "adapters"


def make(run: Context) -> None:
    """Both adapters of each kind that is asked for."""
    if run.words["pos"] is not None:
        run.team.on_main(lambda: log.warning("--pos and --neg are given: no adapter is trained"))
        return
    run.dealt([(kind, side) for kind in run.words["adapter"] for side in SIDES], lambda which: _side(run, *which))


def settings_of(run: Context, kind: str) -> FitSettings:
    """What the flags say, as a fit takes it."""
    from spilt.steering import anatomy

    w = run.words
    layers = w["layers"] or adapted_layers(len(anatomy.blocks(run.host.model)))
    of_all = {
        name: w[name]
        for name in ("dtype", "seed", "lr", "dropout", "rank", "lora_alpha", "weight_decay", "modules", "warmup", "block_size")
    }
    loop = {"n_epochs": w["epochs"], "batch_size": w["train_batch_size"], "gradient_accumulation_steps": w["grad_accum"]}
    form = "lora" if kind == "lora" else "local_weight"
    one_side = {"preference_pairs": ("orig_add",), "substraction_type": "normal", "output_length": w["max_length"]}
    if w["max_steps"] is not None:
        loop["n_epochs"] = max(w["epochs"], w["max_steps"])  # each has a step or more
    return FitSettings(method=WEIGHT_ARITHMETIC, intervention_method=form, layers=layers, adapter=kind, **of_all, **loop, **one_side)


def _side(run: Context, kind: str, side: str) -> None:
    path = run.folder.adapter(kind, side)
    parts = run.parts(STAGE, [run.folder.answers], run.settings(STAGE) | {"adapter": kind, "side": side})
    run.use(run.folder.answers)
    if not run.wanted(path, parts):
        run.folder.unfinished(kind, side).unlink(missing_ok=True)
        return
    from spilt.tasks import fit

    s = settings_of(run, kind)
    rows = data.read(run, personas.TRAIN)
    longest = run.words["max_length"]
    texts = data.sequences(run, rows, side, longest)
    cut = sum(len(one) < len(whole) for one, whole in zip(_lengths(texts), _lengths(data.sequences(run, rows, side)), strict=True))
    if cut:
        log.warning("%s: %d of %d answers are cut at --max-length %d", side, cut, len(rows), longest)
    held_out = _held_out(len(rows), run.words["validation"], s.seed)
    shown = [texts[i] for i in range(len(rows)) if i not in held_out]
    unfinished = run.folder.unfinished(kind, side)
    own = identity(parts)
    resume = None if run.words["force"] else fit.unsealed(unfinished, own)
    saved = time.monotonic()

    def checkpoint(state: Callable[[], dict[str, Any]]) -> None:
        nonlocal saved
        if time.monotonic() - saved >= run.words["checkpoint_seconds"]:
            atomic_write(unfinished, fit.sealed({"identity": own, **state()}))
            saved = time.monotonic()

    weights, config, table = _train(run, s, kind, shown, [texts[i] for i in sorted(held_out)], resume, checkpoint)
    least = min((row["validation"] for row in table if "validation" in row), default=None)
    notes = {"steps": len(table), "last_loss": table[-1]["loss"], "validation": least, "validation_rows": len(held_out), "cut": cut}
    atomic_write(path.with_name(CONFIG), config)
    atomic_write(path.with_name("log.jsonl"), "".join(json.dumps(row) + "\n" for row in table))
    run.store(path, weights, parts, {**notes, "config": hashlib.sha256(config.encode()).hexdigest()})
    unfinished.unlink(missing_ok=True)


def _lengths(texts: Sequence[Any]) -> list[tuple[int, ...]]:
    return [text.input_ids for text in texts]


def _held_out(count: int, share: float, seed: int) -> set[int]:
    """Rows that the loss is watched on: at least one of ten where a share is asked for; none of fewer than four."""
    n = max(1, round(share * count)) if share and count >= 4 else 0
    return set(random.Random(seed).sample(range(count), n))


def _train(
    run: Context,
    s: FitSettings,
    kind: str,
    shown: Sequence[Any],
    held_out: Sequence[Any],
    resume: dict[str, Any] | None,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None],
) -> tuple[bytes, str, list[dict[str, Any]]]:
    """(the adapter's weights, its configuration, a row of the log for each step)."""
    import peft

    from spilt import api
    from spilt.engine import train as training
    from spilt.weights import adapters
    from spilt.weights import training as weights
    from spilt.weights.validation import Validation

    model, pad = run.host.model, run.host.pad_id
    places = adapters.maps(model, s.layers, s.modules or (), kind)
    sizes = adapters.Sizes(s.rank, s.lora_alpha, s.dropout, s.block_size or adapters.Sizes().block_size)
    twice = [text for text in shown for _ in SIDES]  # the loop takes those at the even places
    with (
        api.frozen(model),
        weights.adapter_in(model, lambda: peft.get_peft_model(model, adapters.config(model, kind, places, sizes)), s.seed) as held,
    ):
        job = weights.Fit(model, held, twice, s, pad)
        every, patience = run.words["eval_steps"], run.words["patience"]
        watch = Validation(model, job.intervention, held_out, pad, every, patience) if held_out else None
        table = training.fit(job, resume=resume, checkpoint=checkpoint, most=run.words["max_steps"], watch=watch)
        if watch is not None:
            watch.best()
            if watch.ended:
                log.warning("training ended after step %d: the validation loss is least at step %d", len(table), watch.at)
        return *_peft_files(held.model, run.name), table


def _peft_files(model: Any, base: str) -> tuple[bytes, str]:
    """As PEFT writes them; of the configuration sets are sorted, and the base has its name in place of a path of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        content = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        weights = (Path(folder) / WEIGHTS).read_bytes()
    lists = ("target_modules", "feedforward_modules", "exclude_modules")
    content |= {name: sorted(content[name]) for name in lists if isinstance(content.get(name), list)}
    content["base_model_name_or_path"] = base
    return weights, json.dumps(content, indent=2, sort_keys=True) + "\n"


def folder_of(run: Context, kind: str, side: str) -> Path:
    """A trained PEFT folder, looked at. Raises UserError where it is not as it was stored."""
    path = run.use(run.folder.adapter(kind, side))
    config = path.with_name(CONFIG)
    if not config.is_file() or hashlib.sha256(config.read_bytes()).hexdigest() != run.notes(path).get("config"):
        raise UserError(
            f"{config}: is not as it was stored beside {path.name}; spilt weights adapters --adapter {kind} --force makes both anew"
        )
    return path.parent
