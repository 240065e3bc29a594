"""The story of a run: fit, generate and measure one step each, with the model and what was recorded shared by all."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from spilt import activations, anatomy, curves, generation, hooks, manifest, measure, odds, plan, training
from spilt.atomic import atomic_write
from spilt.cell import Cell
from spilt.data import readers
from spilt.data.batches import by_length, pad
from spilt.data.chat import Sequence
from spilt.errors import UserError
from spilt.host import Host
from spilt.interventions import INTERVENTIONS, Intervention, Vector
from spilt.methods import METHODS, caa
from spilt.plan import Request, Step
from spilt.store import PREFERENCE_TYPES, Store, dump, load, metadata_line

log = logging.getLogger("spilt")


class Key(NamedTuple):
    """What a recording depends on: equal keys share it."""

    data: Path
    concept: int | None
    layer: int
    use_chat_template: bool
    system_prompt: str
    output_length: int
    limit: int | None


class Recordings:
    """Activations of the pairs, recorded once per (data, layer) for all steps that read them, dropped after the last."""

    def __init__(self, steps: Iterable[Step], limit: int | None) -> None:
        self.limit = limit
        self.kept: dict[Key, activations.Activations] = {}
        self.uses: Counter[Key] = Counter()
        self.components: dict[Key, set[str]] = {}
        for step in steps:
            for key in self.keys(step):
                self.uses[key] += 1
                parts = self.components.setdefault(key, set())
                if step.cells[0].intervention != "vector":
                    parts.add(step.settings.intervention_components)

    def keys(self, step: Step) -> list[Key]:
        """What a step will ask for."""
        s: Any = step.settings
        if step.verb == "generate" or METHODS[step.cells[0].method].loss is None and step.verb == "fit":
            return []
        layers = s.layers if step.verb == "fit" else (min(s.layers),)
        return [
            Key(path, step.cells[0].concept, layer, s.use_chat_template, s.system_prompt, s.output_length, self.rows(s))
            for path in step.data.values()
            for layer in layers
        ]

    def rows(self, settings: Any) -> int | None:
        """How many rows are read: the smaller of --limit and max_num_of_examples."""
        given = [n for n in (self.limit, settings.max_num_of_examples) if n is not None]
        return min(given) if given else None

    def get(self, key: Key, host: Host, fmt: readers.DatasetFormat, component: str | None) -> activations.Activations:
        """Sequence 2 i is row i's matching answer, 2 i + 1 its not-matching one."""
        known = self.components.setdefault(key, set())
        if key not in self.kept or (component is not None and component not in self.kept[key].x):
            if component is not None:
                known.add(component)
            chat = host.chat(key.use_chat_template, key.system_prompt)
            pairs = readers.read_pairs(fmt, key.concept, key.limit)
            sequences = [
                chat.encode(pair.question, text, key.output_length, pair.row) for pair in pairs for text in (pair.matching, pair.not_matching)
            ]
            self.kept[key] = activations.record(host.model, key.layer, sequences, sorted(known), host.pad_id)
        return self.kept[key]

    def clear(self) -> None:
        """Another model is about to be loaded."""
        self.kept.clear()

    def release(self, step: Step) -> None:
        """The step is over: drop what no later step reads."""
        for key in self.keys(step):
            self.uses[key] -= 1
            if self.uses[key] <= 0:
                self.kept.pop(key, None)


class Run(NamedTuple):
    """What every step is handed."""

    request: Request
    host: Host
    store: Store
    recordings: Recordings
    quiet: bool


# ---------------------------------------------------------------- fit


def fit(step: Step, run: Run) -> str:
    """Find the intervention of one cell, at each of its layers, and store it. Returns 'done' or 'already done'."""
    (cell,) = step.cells
    settings: Any = step.settings
    done, story = 0, list[str]()
    for layer, (path, parts) in zip(cell.layers, plan.output_parts(step, run.request.limit).items(), strict=True):
        standing = manifest.standing(path, parts)
        if not run.request.force and standing in ("done", "foreign"):
            if standing == "foreign":
                log.warning("%s has no manifest (made elsewhere): kept as it is; --force fits it again", run.store.relative(path))
            done += 1
            continue
        fmt = readers.dataset_format(run.request.base_dir, cell.dataset, plan.DATA_OF["fit"]["train"])
        if METHODS[cell.method].loss is None:
            intervention, rows = _closed_form(cell, layer, settings, run, fmt), []
        else:
            intervention, rows = _train(cell, layer, settings, run, fmt)
        text = readers.concepts(fmt).get(cell.concept) if cell.concept is not None else None
        atomic_write(run.store.metadata(cell, layer), metadata_line(intervention, cell.concept, text))
        story.append(_train_log(cell, layer, rows))
        atomic_write(run.store.train_log(cell), "".join(story))
        manifest.write(path, dump(intervention, cell.concept), parts, {"layer": layer, "steps": len(rows), "last_loss": rows[-1]["loss"] if rows else None})
    return "already done" if done == len(cell.layers) else "done"


def new_intervention(cell: Cell, layer: int, settings: Any, host: Host) -> Intervention:
    """A fresh intervention on the block's device; the same seed gives the same start."""
    component = None if cell.intervention == "vector" else settings.intervention_components
    width = anatomy.read_width(host.model, layer, component) if component else 0
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        made = INTERVENTIONS[cell.intervention](
            anatomy.hidden_size(host.model),
            width,
            component=component,
            site=settings.site,
            dropout=settings.dropout,
            rank=settings.rank,
            alpha=settings.lora_alpha,
        )
    return made.to(host.device(layer))


def _train(cell: Cell, layer: int, settings: Any, run: Run, fmt: readers.DatasetFormat) -> tuple[Intervention, list[dict[str, float]]]:
    intervention = new_intervention(cell, layer, settings, run.host)
    key = next(key for key in run.recordings.keys(_as_step(cell, settings, fmt)) if key.layer == layer)
    cache = run.recordings.get(key, run.host, fmt, intervention.component)
    prefix = run.host.chat(settings.use_chat_template, settings.system_prompt).prefix_length
    job = training.Fit(run.host.model, layer, intervention, cache, settings, METHODS[cell.method], prefix)
    with tqdm(desc=f"fit {cell}", unit="step", leave=False, disable=run.quiet) as bar:

        def progress(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        return intervention, training.fit(job, progress=progress)


def _as_step(cell: Cell, settings: Any, fmt: readers.DatasetFormat) -> Step:
    return Step("fit", (cell,), settings, (), Path(), {"train": fmt.path}, (), (), "")


def _closed_form(cell: Cell, layer: int, settings: Any, run: Run, fmt: readers.DatasetFormat) -> Intervention:
    """caa: mean stream over the answer's tokens, blocks up to `layer` only, the released tokenisation without suffix."""
    chat = run.host.chat(settings.use_chat_template, settings.system_prompt)
    pairs = readers.read_pairs(fmt, cell.concept, run.recordings.rows(settings))
    sequences = [chat.encode_caa(p.question, text, p.row) for p in pairs for text in (p.matching, p.not_matching)]
    means = answer_means(run.host, layer, sequences, settings.multiple_choice)
    return Vector.from_state(caa(means[0::2], means[1::2]), site=settings.site).eval()


def answer_means(host: Host, layer: int, sequences: list[Sequence], multiple_choice: bool) -> torch.Tensor:
    """The stream at block `layer` averaged over each sequence's answer tokens (or its second-to-last token), float32 [S, D]."""
    from spilt import suffix

    device = host.model.get_input_embeddings().weight.device  # type: ignore[operator]
    lengths = [len(s.input_ids) for s in sequences]
    means: dict[int, torch.Tensor] = {}
    for indices in by_length(lengths, activations.max_tokens(device)):
        batch = pad([sequences[i] for i in indices], host.pad_id)
        h = suffix.record(host.model, layer, batch.input_ids.to(device)).h.float()
        for row, i in enumerate(indices):
            answer = h[row, sequences[i].prompt_length : lengths[i]]
            means[i] = h[row, lengths[i] - 2] if multiple_choice else answer.mean(0)
    return torch.stack([means[i] for i in range(len(sequences))])


def _train_log(cell: Cell, layer: int, rows: list[dict[str, float]]) -> str:
    lines = [f"{cell} layer {layer}"]
    lines += [
        f"epoch {row['epoch']} step {row['step']} loss {row['loss']:.6f} lr {row['lr']:.6g} grad_norm {row['grad_norm']:.6g}" for row in rows
    ]
    return "\n".join(lines if rows else [*lines, "closed form: no steps"]) + "\n"


# ---------------------------------------------------------------- generate


def stored(cell: Cell, settings: Any, run: Run) -> dict[int, Intervention]:
    """layer -> the stored intervention of a cell, checked against the model."""
    found = {}
    for layer in cell.layers:
        widths = {name: anatomy.read_width(run.host.model, layer, name) for name in anatomy.COMPONENTS}
        made = load(
            run.store.vector(cell, layer),
            cell.intervention,
            cell.concept if cell.concept is not None else settings.concept_id,
            anatomy.hidden_size(run.host.model),
            widths,
            settings.intervention_components,
            settings.site,
        )
        found[layer] = made.to(run.host.device(layer))
    return found


def generate(step: Step, run: Run) -> str:
    """Text for every prompt, multiplier and response of a step, in one stream; one file per multiplier."""
    outputs = plan.output_parts(step, run.request.limit)
    wanted = {
        m: (path, parts)
        for m, (path, parts) in zip(step.multipliers, outputs.items(), strict=True)
        if run.request.force or manifest.standing(path, parts) != "done"
    }
    if not wanted:
        return "already done"
    made: dict[float, list[dict[str, Any]]] = {m: [] for m in wanted}
    for cell in step.cells:
        for m, results in _texts(cell, step, list(wanted), run).items():
            made[m].append(results)
    for m, (path, parts) in wanted.items():
        content: Any = made[m] if step.cells[0].concept is not None else made[m][0]["generated_results"]
        atomic_write(run.store.generation_log(step.cells[0], m), _generation_log(step, m, made[m]))
        manifest.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", parts)
    return "done"


def _texts(cell: Cell, step: Step, multipliers: list[float], run: Run) -> dict[float, dict[str, Any]]:
    """multiplier -> {concept_id, concept_name, generated_results, eval_data, multiplier} of one cell."""
    s: Any = step.settings
    fmt = readers.dataset_format(run.request.base_dir, cell.dataset, plan.DATA_OF["generate"]["prompts"])
    given = [n for n in (run.request.limit, s.generation_data_size) if n is not None]
    prompts = readers.read_prompts(fmt, cell.concept, min(given) if given else None)
    interventions = stored(cell, s, run)
    chat = run.host.chat(s.use_chat_template, s.system_prompt)
    ids = [tuple(chat.prompt_ids(prompt.input)) for prompt in prompts]

    def sites(multiplier: torch.Tensor) -> list[hooks.Site]:
        return [hooks.Site(layer, intervention, multiplier) for layer, intervention in interventions.items()]

    strengths = [*([None] if s.generate_orig_output else []), *multipliers]  # None: the unsteered answer, made once
    rows, where = [], []
    for strength in strengths:
        for i, prompt in enumerate(ids):
            for response in range(s.num_responses):
                rows.append(generation.Row(prompt, strength or 0.0, f"{s.seed}/{i}/{response}"))
                where.append((strength, i, response))
    how = generation.decoding(s.generation_params.as_kwargs(), run.host.model, run.host.tokenizer)
    texts: dict[tuple[float | None, int, int], list[int]] = {}
    size = run.request.batch_size or s.batch_size
    with tqdm(total=len(rows), desc=f"apply {cell}", unit="text", leave=False, disable=run.quiet) as bar:
        for number, new in generation.generate(run.host.model, sites, rows, how, size):
            texts[where[number]] = new
            bar.update()

    def decode(tokens: Any, skip: bool) -> str:
        return run.host.tokenizer.decode(list(tokens), skip_special_tokens=skip)

    def answers(strength: float | None, i: int) -> list[list[int]]:
        return [texts[strength, i, response] for response in range(s.num_responses)]

    out = {}
    for m in multipliers:
        results = [
            {
                "input": prompt.input,
                "orig_pred": [decode(new, True) for new in answers(None, i)] if s.generate_orig_output else [],
                "pred": [decode(new, True) for new in answers(m, i)],
                "reference_response": prompt.reference_response,
                "complete_output": [decode([*ids[i], *new], False) for new in answers(m, i)],
            }
            for i, prompt in enumerate(prompts)
        ]
        name = next((prompt.concept for prompt in prompts if prompt.concept), None)
        extra = [prompt.extra for prompt in prompts]
        out[m] = {"concept_id": cell.concept, "concept_name": name, "generated_results": results, "eval_data": extra, "multiplier": m}
    return out


def _generation_log(step: Step, multiplier: float, made: list[dict[str, Any]]) -> str:
    rows = sum(len(part["generated_results"]) for part in made)
    return f"{step}\nmultiplier {multiplier}\nprompts {rows}\nsettings {json.dumps(step.settings.as_dict(), default=str)}\n"


# ---------------------------------------------------------------- measure

CONTROL_DRAWS = 16  # random directions of the vector's norm: one alone can have a slope by chance, their mean should have none
CONTROL_PAIRS = 64  # questions that they are scored on, at most
CONTROL_EVERY = 3  # every third multiplier of the sweep


def measure_cell(step: Step, run: Run) -> str:
    """Losses of both answers at every multiplier, as train_losses.csv files; a sweep is widened once when a tail still moves."""
    (cell,) = step.cells
    interventions = stored(cell, step.settings, run)
    if step.sweep:
        step = plan.with_multipliers(step, run.store, _sweep(step, interventions, run))
    new = _measure(step, interventions, run)
    if step.sweep:
        if not curves.flattened(odds.summarise(pd.concat([odds.collect(run.store.loss_folder(cell), split) for split in step.data]))):
            wider = plan.widened(step.multipliers)
            new = _measure(plan.with_multipliers(step, run.store, wider), interventions, run) or new
            step = plan.with_multipliers(step, run.store, wider)
        if cell.intervention == "vector":
            new = _control(step, interventions, run) or new
    return "done" if new else "already done"


def _sweep(step: Step, interventions: dict[int, Intervention], run: Run) -> tuple[float, ...]:
    """The sweep's multipliers. caa is not trained at any strength: its range makes max |m v| that of the trained vectors."""
    (cell,) = step.cells
    if METHODS[cell.method].loss is not None:
        return step.multipliers
    layer = min(interventions)
    own = _norm(interventions[layer])
    if own == 0:
        return step.multipliers
    others = [replace(cell, method=name) for name, row in METHODS.items() if row.loss is not None and cell.intervention in row.forms]
    there = [other for other in others if run.store.vector(other, layer).is_file()]
    norms = [_norm(stored(replace(other, layers=(layer,)), step.settings, run)[layer]) for other in there]
    if norms:
        top = max(map(abs, step.multipliers)) * sum(norms) / len(norms)
    else:  # nothing trained is stored: the strength at which the vector is twice as long as the stream is
        key = run.recordings.keys(step)[0]
        fmt = readers.dataset_format(run.request.base_dir, cell.dataset, plan.DATA_OF["measure"][next(iter(step.data))])
        top = 2 * torch.cat(run.recordings.get(key, run.host, fmt, None).h).float().norm(dim=-1).mean().item()
    return plan.sweep_multipliers((float(f"{top / own:.2g}"),))


def _norm(intervention: Intervention) -> float:
    assert isinstance(intervention, Vector)
    return intervention.v.norm().item()


def _cache(step: Step, split: str, component: str | None, run: Run) -> activations.Activations:
    fmt = readers.dataset_format(run.request.base_dir, step.cells[0].dataset, plan.DATA_OF["measure"][split])
    key = next(key for key in run.recordings.keys(step) if key.data == step.data[split])
    return run.recordings.get(key, run.host, fmt, component)


def _measure(step: Step, interventions: dict[int, Intervention], run: Run) -> bool:
    """Write what is not there yet; multipliers that are done are not scored again. Returns whether anything was written."""
    (cell,) = step.cells
    s: Any = step.settings
    outputs = plan.output_parts(step, run.request.limit)
    todo = {path for path, parts in outputs.items() if run.request.force or manifest.standing(path, parts) != "done"}
    prefix = run.host.chat(s.use_chat_template, s.system_prompt).prefix_length
    first = min(interventions)
    for split in step.data:
        wanted = [m for m in step.multipliers if any(run.store.losses(cell, m, kind, split) in todo for kind in PREFERENCE_TYPES)]
        if not wanted:
            continue
        cache = _cache(step, split, interventions[first].component, run)
        signed = sorted({m for m in wanted} | {-m + 0.0 for m in wanted})
        with tqdm(total=len(cache.sequences), desc=f"loss {cell} {split}", unit="seq", leave=False, disable=run.quiet) as bar:
            found = measure.losses(
                run.host.model, interventions, cache, signed, s.intervention_positions, prefix, run.host.device(first), progress=bar.update
            )
        place = {m: k for k, m in enumerate(signed)}
        for m in wanted:
            for kind in PREFERENCE_TYPES:
                path = run.store.losses(cell, m, kind, split)
                table = loss_table(found, place, m, kind, s.preference_pairs)
                atomic_write(path.with_name("train.log"), f"{cell} m={m} {kind}: {len(table)} rows, mean {table['pos_steer_loss'].mean():.6f}\n")
                manifest.write(path, _csv(table), outputs[path])
    return bool(todo)


def _csv(table: pd.DataFrame) -> str:
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue()


def loss_table(found: measure.Losses, place: dict[float, int], m: float, kind: str, pairs: tuple[str, ...]) -> pd.DataFrame:
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
                "pos_steer_loss": found.total[k, sequence] / found.tokens[sequence],
                "pos_steering_factors": np.full(examples, applied),
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
    return pd.DataFrame({"epoch": 0, "step": np.arange(examples * len(pairs)), **rows})


def _control(step: Step, interventions: dict[int, Intervention], run: Run) -> bool:
    """control.csv: preference and utility along random directions of the stored vector's norm, per draw and multiplier."""
    (cell,) = step.cells
    s: Any = step.settings
    split = list(step.data)[-1]  # test items where they are measured
    multipliers = [0.0, *(sign * m for m in [m for m in step.multipliers if m > 0][:: -CONTROL_EVERY] for sign in (1, -1))]
    path = run.store.control(cell)
    drawn = {"multipliers": multipliers, "draws": CONTROL_DRAWS, "pairs": CONTROL_PAIRS}
    parts = {"control": drawn, **plan.measure_parts(step, 0.0, "control", split, run.request.limit)}
    if not run.request.force and manifest.standing(path, parts) == "done":
        return False
    first = min(interventions)
    whole = _cache(step, split, None, run)
    few = slice(0, 2 * CONTROL_PAIRS)
    cache = activations.Activations(whole.sequences[few], whole.h[few], {}, whole.pad_id)
    prefix = run.host.chat(s.use_chat_template, s.system_prompt).prefix_length
    generator = torch.Generator().manual_seed(s.seed)
    tables = []
    for draw in tqdm(range(CONTROL_DRAWS), desc=f"control {cell}", unit="draw", leave=False, disable=run.quiet):
        random_ones: dict[int, Intervention] = {}
        for layer, intervention in interventions.items():
            direction = torch.randn(anatomy.hidden_size(run.host.model), generator=generator)
            made = Vector.from_state(direction / direction.norm() * _norm(intervention), site=s.site)
            random_ones[layer] = made.eval().to(run.host.device(layer))
        found = measure.losses(
            run.host.model, random_ones, cache, multipliers, s.intervention_positions, prefix, run.host.device(first)
        )
        mean = found.answer / found.answer_tokens
        utility = odds.utility_log_odds(mean[:, 0::2], mean[:, 1::2])
        defined = np.isfinite(utility).sum(1)
        table = pd.DataFrame({"split": split, "draw": draw, "multiplier": multipliers})
        table["preference"] = odds.preference_log_odds(mean[:, 0::2], mean[:, 1::2]).mean(1)
        table["utility"] = np.where(defined > 0, np.nansum(utility, 1) / np.maximum(defined, 1), np.nan)
        table["n"], table["n_undefined"] = utility.shape[1], utility.shape[1] - defined
        tables.append(table)
    manifest.write(path, _csv(pd.concat(tables)), parts)
    return True


STAGES = {"fit": fit, "generate": generate, "measure": measure_cell}


def run_step(step: Step, run: Run) -> str:
    """Run one step; whatever happens, what no later step needs is released."""
    try:
        return STAGES[step.verb](step, run)
    finally:
        run.recordings.release(step)


def report(steps: Iterable[Step], request: Request, quiet: bool) -> str:
    """Curves, pictures and report.html of everything stored by now; returns the page, relative to base_dir."""
    from spilt.report import update

    cell = next(iter(steps)).cells[0]
    with tqdm(desc="report", unit="cell", leave=False, disable=quiet) as bar:
        page = update(request.base_dir, cell.model, cell.dataset, progress=lambda _: bar.update() and None)
    return Store(request.base_dir).relative(page)


def not_there(step: Step) -> list[Path]:
    """Stored vectors that the step would read and that do not exist."""
    return [path for path in step.vectors if not path.exists()]


__all__ = ["Recordings", "Run", "UserError", "not_there", "run_step"]
