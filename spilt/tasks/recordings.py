"""What the steps of a run share: the model, and the activations recorded once for all of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from spilt import plan, verbs
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.cell import FORMS, Cell
from spilt.data import entries, readers
from spilt.data.chat import Encoded, Question
from spilt.doubts import doubts_of
from spilt.engine import activations
from spilt.errors import UserError
from spilt.methods import METHODS
from spilt.model import identity
from spilt.model.host import Host
from spilt.progress import Progress
from spilt.steering import anatomy, layer_file
from spilt.steering.interventions import Intervention
from spilt.steering.steering import Site, Steering
from spilt.tasks.context import check_context, lengths_of
from spilt.team import Team
from spilt.verbs import Request, Step

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
    stage: str = ""  # concepts are many: what is recorded of one is not kept until the next stage


def encoded(key: Key, host: Host, fmt: readers.DatasetFormat) -> list[Encoded]:
    """Sequence 2 i is row i's matching answer, 2 i + 1 its not-matching one; of neutral text, sequence i is row i's."""
    chat = host.chat(key.use_chat_template, key.system_prompt)
    rows = readers.read_entry(fmt, key.concept, key.limit)
    sequences = [chat.encode(question, text, key.output_length, row.row) for row in rows for question, text in _scored(row, fmt)]
    what = "texts with their prompts" if entries.has_prompts(fmt.section) else "answers with their questions"
    check_context(host.model, f"{fmt.path}, {what}", lengths_of(rows, sequences), "lower output_length")
    return sequences


def _scored(row: readers.Pair | readers.Prompt, fmt: readers.DatasetFormat) -> Sequence[tuple[Question, str]]:
    """What is asked and scored of a row: both answers, or neutral text. Raises UserError where there is none."""
    if isinstance(row, readers.Pair):
        return row.sides
    if not (row.reference_response or "").strip():
        raise UserError(f"{fmt.path}: row {row.row} (0-based) has no {fmt.column('reference_response')!r}: neutral text to score")
    return [(row.input, str(row.reference_response))]


class Recordings:
    """Activations of the pairs, recorded once per (data, layer) for all steps that read them, dropped after the last."""

    def __init__(self, steps: Iterable[Step], limit: int | None, engine: str = "fast") -> None:
        self.limit, self.engine = limit, engine
        self.kept: dict[Key, activations.Activations] = {}
        self.uses: Counter[Key] = Counter()
        self.read_points: dict[Key, set[str]] = {}
        self.along_random: dict[str, Any] = {}  # measured random interventions, for all cells of a form, place and data
        self.judge: Any = None  # of texts, asked by all steps
        self.known: dict[tuple[Hashable, ...], dict[int, Tensor]] = {}  # answers' means of closed forms, by layer
        self.wanted: dict[Hashable, Counter[int]] = {}  # layer -> steps that want them
        for step in steps:
            self.wanted.setdefault(self._answers(step), Counter()).update(_directions(step))
            for key in self.keys(step):
                self.uses[key] += 1
                parts = self.read_points.setdefault(key, set())
                if FORMS[step.cells[0].intervention].reads and step.settings.site == "block":
                    parts.add(step.settings.intervention_components)

    def keys(self, step: Step) -> list[Key]:
        """What a step will ask for."""
        s: Any = step.settings
        if step.verb not in ("fit", "measure") or self.why_plain(step):
            return []
        if step.verb == "fit" and METHODS[step.cells[0].method].estimate is not None:
            return []
        below = 0 if s.site == "block" else 1  # the block itself is run again when its inside is steered
        layers = [layer - below for layer in (s.layers if step.verb == "fit" else (min(s.layers),))]
        concept = step.cells[0].concept
        stage = "" if concept is None else step.verb
        return [
            Key(path, concept, layer, s.use_chat_template, s.system_prompt, s.output_length, self.rows(s), stage)
            for path in step.data.values()
            for layer in layers
        ]

    def why_plain(self, step: Step) -> str:
        """Why the plain engine does this step; '' where the fast one does."""
        return plan.why_plain(step, self.engine)

    def rows(self, settings: Any) -> int | None:
        """How many rows are read: the smaller of --limit and max_num_of_examples."""
        return readers.fewest(self.limit, settings.max_num_of_examples)

    def sequences(self, step: Step, path: Path, host: Host, fmt: readers.DatasetFormat) -> list[Encoded]:
        """Both answers of a step's pairs, for the plain engine."""
        s: Any = step.settings
        key = Key(path, step.cells[0].concept, -1, s.use_chat_template, s.system_prompt, s.output_length, self.rows(s))
        return encoded(key, host, fmt)

    def get(self, key: Key, host: Host, fmt: readers.DatasetFormat, read_point: str | None) -> activations.Activations:
        """Sequence 2 i is row i's matching answer, 2 i + 1 its not-matching one."""
        known = self.read_points.setdefault(key, set())
        if key not in self.kept or (read_point is not None and read_point not in self.kept[key].x):
            if read_point is not None:
                known.add(read_point)
            sequences = encoded(key, host, fmt)
            together = 1 if entries.has_prompts(fmt.section) else 2
            there = [name for name in sorted(known) if name in anatomy.read_widths(host.model, key.layer)]  # what a step's settings name
            self.kept[key] = activations.record(host.model, key.layer, sequences, there, host.pad_id, together)
        return self.kept[key]

    def means(self, step: Step, model: nn.Module, layers: Collection[int], sequences: list[Encoded], *how: Any) -> dict[int, Tensor]:
        """`answer_means` at these layers: one pass for all layers that closed forms want of the same answers."""
        if not _directions(step):
            return activations.answer_means(model, layers, sequences, *how)
        same = self._answers(step)
        key = (same, how, tuple(sequences))
        if not set(layers) <= self.known.get(key, {}).keys():
            self.known[key] = activations.answer_means(model, {*layers, *self.wanted.get(same, ())}, sequences, *how)
        return self.known[key]

    def _answers(self, step: Step) -> Hashable:
        """What the answers of a closed form are made of."""
        s, cell = step.settings, step.cells[0]
        if not _directions(step):
            return None
        return cell.dataset, cell.concept, cell.model, s.use_chat_template, s.system_prompt, s.multiple_choice, self.rows(s)

    def clear(self) -> None:
        """Another model is about to be loaded."""
        self.kept.clear()
        self.known.clear()

    def release(self, step: Step) -> None:
        """The step is over: drop what no later step reads."""
        for key in self.keys(step):
            self.uses[key] -= 1
            if self.uses[key] <= 0:
                self.kept.pop(key, None)
        same = self._answers(step)
        if same is not None:
            self.wanted[same].subtract(_directions(step))
            self.wanted[same] += Counter()
            if not self.wanted[same]:
                self.known = {key: kept for key, kept in self.known.items() if key[0] != same}


def _directions(step: Step) -> tuple[int, ...]:
    """Where a closed form looks for its direction; of another step, nowhere."""
    if step.verb != "fit" or METHODS[step.cells[0].method].estimate is None:
        return ()
    s: Any = step.settings
    return tuple(s.layers) if s.direction_layer is None else (s.direction_layer,)


class Run(NamedTuple):
    """What every step is handed."""

    request: Request
    host: Host
    store: Store
    recordings: Recordings
    progress: Progress
    team: Team
    seen: identity.Seen

    @classmethod
    def alone(cls, request: Request, host: Host, device: str, seen: identity.Seen, tell: Callable[[str], None]) -> Run:
        """For work that is no step of a plan: nothing is recorded for others, no bars are drawn."""
        progress = Progress({}, 0, tell, quiet=True)
        return cls(request, host, Store(request.base_dir), Recordings([], None), progress, Team(device), seen)

    def entry(self, step: Step, purpose: str) -> readers.DatasetFormat:
        """Of dataset_format.yaml, what a step reads for a purpose."""
        return verbs.entry_of(step.verb, purpose, self.request.base_dir, step.cells[0].dataset)

    def store_result(self, step: Step, path: Path, data: bytes | str, parts: dict[str, Any], notes: dict[str, Any] | None = None) -> None:
        """Store a result of a step, unless an input was exchanged since it was read (Changed)."""
        self.seen.again(step.inputs)
        if self.request.tensor_parallel:  # sums are split: other last digits, of the same result
            notes = {**(notes or {}), "tensor_parallel": self.team.size}
        manifest.write(path, data, parts, notes)
        self.seen.forget([path])  # a vector that later steps read


def tell_replaced(what: str, outputs: Mapping[Path, Mapping[str, Any]], run: Run) -> None:
    """Nothing that was made is replaced without a word: one warning for each reason."""
    for why, paths in verbs.replaced(outputs).items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        log.warning("%s: replaces %s%s, %s", what, run.store.relative(paths[0]), more, why)


def to_make(step: Step, run: Run, outputs: Mapping[float, tuple[Path, dict[str, Any]]]) -> list[float]:
    """The multipliers whose results are not there yet, by process 0. outputs: multiplier -> its file, and what decides it."""

    def decide() -> list[float]:
        return [m for m, (path, parts) in outputs.items() if run.request.force or verbs.state(step, path, parts) != "done"]

    wanted = run.team.on_main(decide)
    tell_replaced(str(step), dict(outputs[m] for m in wanted), run)
    return wanted


def refuse_changed(path: Path) -> None:
    """Raises UserError for a stored vector that is not as its manifest says."""
    if not manifest.is_as_recorded(path):
        raise UserError(
            f"{path}: is not the file that its manifest speaks of (damaged, or changed by hand); make it again with --mode generate, "
            f"or remove {manifest.manifest_path(path).name} to use it as it is"
        )


def refuse_parts_of_two_fits(cell: Cell, run: Run) -> None:
    """Raises UserError where a layer was fitted jointly with another one that acts here and has been fitted anew since."""
    records = {layer: manifest.read(run.store.vector(cell, layer)) or {} for layer in cell.layers}
    for layer, record in records.items():
        settings = record.get("parts", {}).get("settings", {})
        others = set(settings.get("layers", ())) & records.keys() if settings.get("joint") else ()
        if another := [other for other in others if records[other].get("identity") != record.get("identity")]:
            raise UserError(
                f"{run.store.relative(run.store.vector(cell, layer))}: was fitted jointly with layer {', '.join(map(str, another))}, "
                "whose file is of another fit now; fit them together again with --mode generate"
            )


def stored(cell: Cell, settings: Any, run: Run) -> Steering:
    """The stored Steering of a cell, checked against the model. What its manifests say against its use is a warning."""
    refuse_parts_of_two_fits(cell, run)
    entries: list[tuple[Site, Intervention]] = []
    doubts: dict[str, list[str]] = {}
    for layer in cell.layers:
        widths = anatomy.read_widths(run.host.model, layer)
        path = run.store.vector(cell, layer)
        refuse_changed(path)
        for doubt in doubts_of(cell, layer, settings, run.request, run.seen):
            doubts.setdefault(doubt, []).append(run.store.relative(path))
        run.seen.of(path)
        concept = cell.concept if cell.concept is not None else settings.concept_id
        hidden, read = anatomy.hidden_size(run.host.model), settings.intervention_components
        if METHODS[cell.method].adapters:
            several = layer_file.linears(layer_file.read(path), path, cell.intervention)
        else:
            several = [layer_file.load(path, cell.intervention, concept, hidden, widths, read, settings.site)]
        run.seen.again([path])
        for made in several:  # of a model in parts, none may read or write what no process has whole
            anatomy.write_width(run.host.model, layer, made.write_point)
            if made.read_point:
                anatomy.read_width(run.host.model, layer, made.read_point)
        entries += [(Site(layer, made.read_point, made.write_point), made.to(run.host.device(layer))) for made in several]
    for doubt, names in doubts.items():
        log.warning("%s%s: %s; --mode generate fits it again", names[0], f" and {len(names) - 1} more" if len(names) > 1 else "", doubt)
    steering = Steering(entries, {"method": cell.method})
    if METHODS[cell.method].adapters:  # of a file at linear maps the shapes alone do not say that they are the model's
        steering.check(run.host.model)
    return steering
