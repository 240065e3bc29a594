"""A run on a task: training what is learned. A killed one goes on to the same bytes."""

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
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from tqdm import tqdm

from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write, atomic_write_all
from spilt.data.chat import Encoded
from spilt.downstream import load, training, variants
from spilt.downstream.encode import Encoding
from spilt.downstream.places import Place, place, summaries
from spilt.downstream.rows import OWN
from spilt.downstream.words import OVERLONG, PARTS, TrainSettings, Variant
from spilt.engine import choice, sampling
from spilt.engine.train import check_usable
from spilt.errors import UserError
from spilt.model.host import Host
from spilt.model.identity import model_hash
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

    def train_parts(self, host: Host, data: str) -> dict[str, Any]:
        """What decides what is learned. data: hash of the training rows."""
        parts: dict[str, Any] = {
            "model": model_hash(host.path),
            "data": data,
            "variant": self.variant.as_dict(),
            "reading": self.reading(),
        }
        parts |= {"task": self.source.task.name, "limit": self.limit, "dtype": self.dtype}
        return parts | {"settings": self.settings.as_dict(), "verb": "tasks train"}


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
    _check_read(request, data)
    parts, path = request.train_parts(host, data.hash), artifact(request)
    standing = manifest.standing(path, parts)
    if standing == "done" and not request.force:
        here.unfinished.unlink(missing_ok=True)  # of one that was killed after its last write
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


def _check_read(request: Request, data: load.Data) -> None:
    """Raises UserError where no training row's own completion would be counted as right; of some of them it warns."""
    task = request.source.task
    if not (wrong := load.misread(task, data)):
        return
    first = f"row {wrong[0]} (0-based): {load.says_misread(task, data.examples[wrong[0]])}"
    if len(wrong) == len(data.examples):
        way_out = "another --extractor reads it otherwise" if task.source == OWN else "mend the rows"
        raise UserError(f"{task.name}: what is taught would be counted as wrong in every training row; {first}; {way_out}")
    count = f"{len(wrong)} of {len(data.examples)}"
    log.warning("%s: in %s training rows what is taught would be counted as wrong; %s", task.name, count, first)


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
