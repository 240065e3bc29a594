"""A run on a task: training what is learned, and its answers. A killed one goes on to the same bytes."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from tqdm import tqdm

from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write, atomic_write_all
from spilt.artifacts.journal import Journal
from spilt.data.chat import Encoded
from spilt.downstream import evaluation, load, training, variants
from spilt.downstream.answers import extractor
from spilt.downstream.encode import Encoding
from spilt.downstream.places import Place, place
from spilt.downstream.rows import SPLITS
from spilt.downstream.words import KINDS, OVERLONG, PARTS, TrainSettings, Variant, acting
from spilt.engine import choice, sampling
from spilt.engine.train import check_usable
from spilt.errors import UserError, first_line
from spilt.model.host import Host
from spilt.model.identity import model_hash
from spilt.steering import joint
from spilt.steering.steering import SCOPE, Steering, base_model
from spilt.tasks.context import check_context
from spilt.tasks.fit import sealed, unsealed

log = logging.getLogger("spilt")


class Request(NamedTuple):
    """What a run is. limit: of the training rows; limit_eval: of each split that is evaluated. None: all."""

    source: load.Source
    model: str
    variant: Variant
    settings: TrainSettings
    base_dir: Path = Path(".")
    dtype: str = "float32"
    use_chat_template: bool = True
    system_prompt: str = ""
    overlong: str = OVERLONG[0]
    limit: int | None = None
    limit_eval: int | None = None
    engine: str = choice.FAST
    batch_size: int | None = None
    checkpoint_seconds: float = 60.0
    force: bool = False
    part: str = PARTS[0]  # of joint: what of it acts when it is evaluated

    @property
    def place(self) -> Place:
        """Two runs that differ in what their manifests tell apart are one folder only where the name says what differs."""
        s = self.settings
        words = [f"lr{s.lr:g}", f"bs{s.bs}x{s.grad_accum}", f"ep{s.epochs}", f"warmup{s.warmup_ratio:g}", f"wd{s.weight_decay:g}"]
        words += [s.scheduler] if s.scheduler != TrainSettings.scheduler else []
        words += [f"seed{s.seed}", *([] if self.limit is None else [f"rows{self.limit}"])]
        untrained = self.variant.kind == "base"
        run = "_".join(([] if untrained else words) + ([] if self.dtype == "float32" else [self.dtype])) or "untrained"
        return place(self.base_dir, self.source.task.name, self.model, self.variant.plain().name, run)

    def reading(self) -> dict[str, Any]:
        """How texts become tokens, as far as it decides a result."""
        how = {"use_chat_template": self.use_chat_template, "system_prompt": self.system_prompt, "overlong": self.overlong}
        return {**how, "max_length": self.source.task.max_length}

    def encoding(self, host: Host) -> Encoding:
        """Raises UserError where the model has no token that ends a text."""
        ends = sampling.decoding({"do_sample": False}, host.model, host.tokenizer).eos
        if not ends:
            log.warning("%s has no end token: nothing teaches it to stop, so every answer is as long as --max-new-tokens", self.model)
        return Encoding(host.chat(self.use_chat_template, self.system_prompt), ends, self.source.task.max_length, self.overlong)

    def train_parts(self, host: Host, data: load.Data) -> dict[str, Any]:
        """What decides what is learned."""
        parts: dict[str, Any] = {
            "model": model_hash(host.path),
            "data": data.hash,
            "variant": self.variant.as_dict(),
            "reading": self.reading(),
        }
        parts |= {"task": self.source.task.name, "limit": self.limit, "dtype": self.dtype}
        return parts | {"settings": self.settings.as_dict(), "verb": "tasks train"}


class Trained(NamedTuple):
    """What a run has learned, ready to act on its model: a Steering, or all weights."""

    steering: Steering | None
    weights: Mapping[str, Tensor] | None = None


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """After the `with` every weight is as before."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        put(model, before)


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError for weights of another model."""
    own = dict(model.named_parameters())
    other = {name for name in own.keys() ^ weights.keys()} | {n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape}
    if other:
        raise UserError(f"these are the weights of another model: {', '.join(sorted(other)[:4])} differ")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def cut(data: load.Data, limit: int | None) -> load.Data:
    return data if limit is None else data._replace(examples=data.examples[:limit])


def train(request: Request, host: Host, say: Callable[[str], None], *, quiet: bool = False) -> str:
    """'done' or 'already done': what was learned lies in the run's folder."""
    here, task = request.place, request.source.task
    if request.variant.kind == "base":
        raise UserError("--variant base learns nothing; spilt tasks evaluate measures it")
    data = cut(request.source.split("train"), request.limit)
    parts, path = request.train_parts(host, data), artifact(request)
    standing = manifest.standing(path, parts)
    if standing == "done" and not request.force:
        return "already done"
    if standing not in ("missing", "done"):
        log.warning("%s: is %s, and made again", path, standing)
    encoding = request.encoding(host)
    sequences, truncated, dropped = encoding.training(data.examples)
    lengths = [(i, len(sequence.input_ids)) for i, sequence in enumerate(sequences)]
    check_context(host.model, f"tasks train {task.name}", lengths, "lower --max-length")
    said = f"{task.name}: {len(data.examples)} training rows, {training.supervised(sequences)} supervised tokens"
    say(said + "".join(f", {count} {what}" for count, what in counts(data, truncated, dropped) if count))
    with restored(host.model) if request.variant.kind == "full" else nullcontext():
        learner = learner_of(request, host)
        with _under_way(request, here, manifest.identity(parts), quiet) as how:
            rows = training.train(learner, sequences, request.settings, **how)
        about = {"method": "tasks", "task": task.name, SCOPE: request.variant.scope, "variant": request.variant.as_dict()}
        about |= {"base_model": {"checkpoint": parts["model"], **base_model(host.model)}, "settings": request.settings.as_dict()}
        _store(request, host, learner, rows, parts, about, sequences, truncated, dropped)
    here.unfinished.unlink(missing_ok=True)
    return "done"


def counts(data: load.Data, truncated: int, dropped: int) -> list[tuple[int, str]]:
    return [
        (data.without_answer, "rows without an answer left out"),
        (truncated, "prompts cut on the left"),
        (dropped, "too long and left out"),
    ]


def artifact(request: Request) -> Path:
    return learned_at(request.place, request.variant.kind)


def learned_at(here: Place, kind: str) -> Path:
    """Where a kind of Variant keeps what it has learned."""
    return here.weights if kind == "full" else here.steering


def learner_of(request: Request, host: Host) -> training.Learner:
    if request.variant.kind == "full":
        return training.Full(host.model, host.pad_id)
    steering = variants.make(host.model, request.variant, request.settings.seed)
    if request.variant.kind == "joint":
        return training.Joint(host.model, steering, host.pad_id, request.variant.projection)
    return training.Steered(host.model, steering, host.pad_id)


def _store(
    request: Request, host: Host, learner: training.Learner, rows: list[dict[str, float]], parts: dict[str, Any], about: dict[str, Any],
    sequences: list[Encoded], truncated: int, dropped: int,
) -> None:  # fmt: skip
    here = request.place
    notes = {"rows": len(sequences), "truncated": truncated, "left_out": dropped, "steps": len(rows), "last_loss": rows[-1]["loss"]}
    if isinstance(learner, training.Steered):
        steering = variants.stored(learner.steering, about)
        if not any(made.norm() > 0 for _, made in steering):
            check_usable(steering.entries[0][1], f"{request.source.task.name} {request.variant.name}")
        with tempfile.TemporaryDirectory() as folder:
            content = steering.save(Path(folder) / here.steering.name).read_bytes()
    else:
        content = save_tensors({name: p.detach().cpu().contiguous() for name, p in host.model.named_parameters()})
    notes |= counted(learner.module, host.model)
    _forget_others(here, manifest.identity(parts))
    atomic_write_all([(here.log, "".join(json.dumps(row) + "\n" for row in rows))])
    manifest.write(artifact(request), content, parts, notes)


def _forget_others(here: Place, learned: str) -> None:
    """The summary keeps what was evaluated of this, and nothing of what was learned there before."""
    known = summaries(here) if here.summary.exists() else {}
    kept = {name: summary for name, summary in known.items() if learned_in(here, name) == learned}
    if gone := sorted(known.keys() - kept.keys()):
        log.warning("%s: %s left out: of what was learned before; spilt tasks evaluate measures again", here.summary, ", ".join(gone))
        atomic_write(here.summary, json.dumps(kept, indent=1, sort_keys=True) + "\n")


def learned_in(here: Place, name: str) -> str | None:
    """Identity of what a stored evaluation was of; None: of nothing, or nobody can say."""
    found = ((manifest.read(here.results(name)) or {}).get("parts") or {}).get("learned")
    return None if found is None else str(found)


def counted(learned: nn.Module | Steering, model: nn.Module) -> dict[str, float]:
    """How many numbers are learned, and as a share of the model's."""
    count, own = (sum(parameter.numel() for parameter in module.parameters()) for module in (learned, model))
    return {"parameters": count, "share": count / own}


@contextmanager
def _under_way(request: Request, here: Place, identity: str, quiet: bool) -> Iterator[dict[str, Any]]:
    """For the loop: resume (what a killed run left), checkpoint (state and log now and then), progress (a bar)."""
    saved = time.monotonic()

    def checkpoint(state: Callable[[], dict[str, Any]]) -> None:
        nonlocal saved
        if time.monotonic() - saved >= request.checkpoint_seconds:
            now = state()
            atomic_write(here.unfinished, sealed({"identity": identity, **now}))
            atomic_write(here.log, "".join(json.dumps(row) + "\n" for row in now["log"]))
            saved = time.monotonic()

    with tqdm(desc=f"{request.source.task.name} {request.variant.name}", unit="step", disable=quiet or None, leave=False) as bar:

        def progress(step: int, steps: int, loss: float) -> None:
            bar.total, bar.n = steps, step
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(0)

        resume = None if request.force else unsealed(here.unfinished, identity)
        yield {"resume": resume, "checkpoint": checkpoint, "progress": progress}


def trained(request: Request, host: Host) -> Trained:
    """What the run has learned. Raises UserError where nothing is stored, or what is stored is of another variant."""
    path, v = artifact(request), request.variant.plain()
    if v.kind == "base":
        return Trained(None)
    if not path.is_file():
        raise UserError(f"{path}: nothing was learned there yet; spilt tasks train with the same words makes it")
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


def evaluate(request: Request, host: Host, split: str, say: Callable[[str], None], *, multiplier: float = 1.0) -> dict[str, Any]:
    """The summary of a split, which is stored beside its rows; nothing is done again that is there."""
    here, task = request.place, request.source.task
    data = request.source.split(split)
    train_data = request.source.split(SPLITS[0])
    seen = load.seen_in(train_data, data)
    data = cut(data, request.limit_eval)
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
    if manifest.standing(path, parts) == "done" and not request.force:
        stored = dict((manifest.read(path) or {})["notes"])
        _keep(here, name, stored)
        return stored
    learned = trained(request, host)
    if known is not None:
        now = json.loads(json.dumps(request.train_parts(host, cut(train_data, request.limit))))
        if other := manifest.differences(known["parts"], now):
            log.warning("%s: was learned with %s; spilt tasks train learns it again", artifact(request), other)
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
    summary |= {"decoder": "fast" if not asked.why_plain else f"plain: {asked.why_plain}"}
    manifest.write(path, scored.lines(), parts, summary)
    _keep(here, name, summary)
    journal.close()
    journal.remove()
    if seen:
        say(f"{task.name}: {seen} prompts of {split} are also training prompts")
    return json.loads(json.dumps(summary))  # type: ignore[no-any-return]


def _keep(here: Place, name: str, summary: Mapping[str, Any]) -> None:
    """In the run's summary.json, beside those of other splits."""
    known = summaries(here)
    if known.get(name) != summary:
        atomic_write(here.summary, json.dumps({**known, name: summary}, indent=1, sort_keys=True) + "\n")


def summaries(here: Place) -> dict[str, Any]:
    """name -> summary of what was evaluated in a run's folder. Raises UserError for a file that is none."""
    try:
        found = json.loads(here.summary.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{here.summary}: cannot be read: {first_line(error)}; spilt tasks evaluate --force writes it anew") from None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{here.summary}: is no summary; spilt tasks evaluate --force writes it anew")
    return found
