"""The answers of a run to a split, evaluated: stored with their summary, and not made again. A killed one goes on to the same bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.journal import Journal
from spilt.downstream import evaluation, load, variants
from spilt.downstream.answers import extractor
from spilt.downstream.places import Place, summaries
from spilt.downstream.words import KINDS, PARTS, Variant, acting
from spilt.downstream.work import Request, artifact, counted, cut, put, restored
from spilt.engine import sampling
from spilt.errors import UserError, first_line
from spilt.model.host import Host
from spilt.model.identity import model_hash
from spilt.steering import joint
from spilt.steering.steering import Steering

log = logging.getLogger("spilt")


class Trained(NamedTuple):
    """What a run has learned, ready to act on its model: a Steering, or all weights."""

    steering: Steering | None
    weights: Mapping[str, Tensor] | None = None


def trained(request: Request, host: Host) -> Trained:
    """What the run has learned. Raises UserError where nothing is stored, or what is stored is of another variant."""
    path, v = artifact(request), request.variant.plain()
    if v.kind == "base":
        return Trained(None)
    if not path.is_file():
        others = sorted(other.parent.name for other in path.parents[1].glob(f"*/{path.name}"))
        there = f"; of {v.name} there is: {', '.join(others)}" if others else ""
        raise UserError(f"{path}: nothing was learned there yet; spilt tasks train with the same words makes it{there}")
    record = manifest.read(path)
    if record is None or not manifest.matches(path, record):
        raise UserError(f"{path}: is not what its manifest speaks of; spilt tasks train makes it again")
    if record["parts"]["model"] != model_hash(host.path):
        raise UserError(f"{path}: was learned on another model than {host.path}; train it on this one")
    if v.kind == "full":
        try:
            return Trained(None, load_file(path))
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be read as safetensors: {first_line(error)}") from None
    steering = Steering.load(path)
    refuse_other(v, steering, str(path))
    return Trained(steering.to(host.model))


def refuse_other(v: Variant, steering: Steering, path: str) -> None:
    """Raises UserError where a stored Steering is not the variant that is asked for: it is never read as another one."""
    said = dict(steering.about.get("variant") or {})
    wanted = json.loads(json.dumps(v.as_dict()))
    if other := manifest.differences(said, wanted):
        raise UserError(f"{path}: was trained with {other}; evaluate it as what it is")
    options = {made.options().get("nonlinearity") for _, made in steering if made.form == "post_block"}
    if "nonlinearity" in KINDS[v.kind].words and options != {v.nonlinearity}:
        raise UserError(f"{path}: holds adapters that are {', '.join(map(str, options))}, not {v.nonlinearity}: the file was changed")


def evaluate(request: Request, host: Host, split: str, *, multiplier: float = 1.0) -> dict[str, Any]:
    """The summary of a split, which is stored beside its rows; nothing is done again that is there.

    Training rows are needed only to tell what of the split was among them: seen_in_train is None where they are not at hand.
    """
    here, task = request.place, request.source.task
    data, train_data = cut(request.source.split(split), request.limit_eval), request.source.train()
    seen = None if train_data is None else load.seen_in(cut(train_data, request.limit), data)
    known = None if request.variant.kind == "base" else manifest.read(artifact(request))
    if request.part != PARTS[0] and request.variant.kind != "joint":
        raise UserError(f"--part {request.part} is of --variant joint, which has two")
    name = split + acting(multiplier, request.part)
    path = here.results(name)
    parts: dict[str, Any] = {
        "verb": "tasks evaluate",
        "task": task.name,
        "data": data.hash,
        "model": model_hash(host.path),
        "dtype": request.dtype,
    }
    parts |= {"learned": known and known["identity"], "reading": request.reading(), "max_new_tokens": task.max_new_tokens}
    parts |= {"multiplier": multiplier, "extract": task.extract, "part": request.part}
    standing = manifest.standing(path, parts)
    if standing == "done" and not request.force:
        return _stored(here, name, parts, seen)
    if standing == "stale" and (other := _asked_otherwise(path, parts)):
        log.warning("%s: was made with %s, and is made again", path, other)
    learned = trained(request, host)
    if known is not None:
        now = request.train_parts(host, known["parts"]["data"] if train_data is None else cut(train_data, request.limit).hash)
        if other := manifest.differences(known["parts"], json.loads(json.dumps(now))):
            log.warning("%s: was learned with %s; spilt tasks train learns it again", artifact(request), other)
    if len(wrong := load.misread(task, data)) == len(data.examples):
        said = load.says_misread(task, data.examples[wrong[0]])
        log.warning("%s: no completion of %s would be counted as right: %s", task.name, split, said)
    encoding = request.encoding(host)
    prompted = encoding.prompts(data.examples)
    base = sampling.decoding({"do_sample": False}, host.model, host.tokenizer)
    how = evaluation.greedy(task.max_new_tokens, base.eos, base.pad, base.processors)
    if learned.weights is not None and multiplier != 1.0:
        raise UserError("--multiplier is a Steering's strength, and full fine-tuning has none")
    steering = joint.part(learned.steering, request.part) if learned.steering and request.part != PARTS[0] else learned.steering
    steering = steering or variants.nothing(host.model)
    strength = multiplier if learned.steering else 0.0
    asked = evaluation.Asked(host.model, steering, strength, how, request.variant.scope, request.engine, request.batch_size)
    journal = Journal(here.outputs(name))
    if request.force:
        journal.remove()
    with restored(host.model) if learned.weights is not None else nullcontext():
        if learned.weights is not None:
            put(host.model, learned.weights)
        made = evaluation.answers(asked, prompted.ids, journal, manifest.identity(parts))
    scored = evaluation.score(data.examples, prompted, made, how, extractor(task.extract), host.tokenizer)
    summary = {**scored.summary, "seen_in_train": seen, "rows_without_answer": data.without_answer}
    summary |= {name: known["notes"][name] if known else 0 for name in ("parameters", "share")}
    if request.part != PARTS[0]:
        summary |= counted(steering, host.model)
    summary |= {"task": task.name, "split": split, "model": request.model, "variant": request.variant.plain().name, "run": here.folder.name}
    summary |= {"multiplier": multiplier, "part": request.part, "max_new_tokens": task.max_new_tokens}
    summary |= {"decoder": "fast" if not asked.why_plain else f"plain: {asked.why_plain}", "part_of_file": request.source.part(split)}
    manifest.write(path, scored.lines(), parts, summary)
    _keep(here, name, summary)
    journal.close()
    journal.remove()
    return json.loads(json.dumps(summary))  # type: ignore[no-any-return]


def _stored(here: Place, name: str, parts: dict[str, Any], seen: int | None) -> dict[str, Any]:
    """The summary of results that are there; what of them the training rows have is counted again, since these may have changed."""
    path = here.results(name)
    stored = dict((manifest.read(path) or {})["notes"])
    if seen is not None and stored.get("seen_in_train") != seen:
        stored["seen_in_train"] = seen
        manifest.write(path, path.read_bytes(), parts, stored)
    _keep(here, name, stored)
    here.outputs(name).unlink(missing_ok=True)  # of one that was killed after its last write
    return stored


def _asked_otherwise(path: Path, parts: dict[str, Any]) -> str:
    """What another evaluation under this name was asked; '' where only what was learned is another."""
    then = dict((manifest.read(path) or {}).get("parts") or {})
    return manifest.differences({**then, "learned": None}, json.loads(json.dumps({**parts, "learned": None})))


def _keep(here: Place, name: str, summary: Mapping[str, Any]) -> None:
    """In the run's summary.json, beside those of other splits."""
    known = summaries(here)
    if known.get(name) != summary:
        atomic_write(here.summary, json.dumps({**known, name: summary}, indent=1, sort_keys=True) + "\n")
