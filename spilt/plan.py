"""Request -> steps: what will run, in order, with what it reads and writes, and why some combinations are left out.

No torch here: a dry run prints this and stops. Names come from the tables (METHODS, FORMS, dataset_format.yaml).
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts import manifest
from spilt.artifacts.store import PREFERENCE_TYPES, Store
from spilt.cell import FORMS, Cell
from spilt.data import readers, sense
from spilt.errors import Mistakes, UserError, nearest, printable, unknown
from spilt.methods import METHODS
from spilt.model import checkpoint, identity, template
from spilt.settings import FitSettings, GenerateSettings, MeasureSettings, resolve_fit, resolve_generate, resolve_measure
from spilt.settings.fields import intervention_name, method_name
from spilt.settings.resolve import Unused

log = logging.getLogger("spilt")
ALL = "all"
# the command line's words for the verbs; translated here and nowhere else
MODES: dict[str, tuple[str, ...]] = {"generate": ("fit",), "apply": ("generate",), "both": ("fit", "generate"), "loss": ("measure",)}
MODE_OF = {"fit": "generate", "generate": "apply", "measure": "loss"}
# what each verb reads: purpose -> section of dataset_format.yaml
DATA_OF = {"fit": {"train": "train"}, "generate": {"prompts": "generation"}, "measure": {"train": "train", "test": "valid"}}
SWEEP = "sweep"  # the word for --multipliers
SWEEP_POINTS, SWEEP_MOST = 21, 31
FIRST_CONCEPTS = 10
AGAIN = "to be made again"  # of a stored result: asked for with --force, or what it is made from is made again
# of the code of each verb: raised when equal settings would give other results
VERSIONS = {"fit": 1, "generate": 1, "measure": 2}


@dataclass(frozen=True)
class Request:
    """What the user asked for, in checked words."""

    dataset: str
    method: str
    model: str
    intervention: str
    mode: str = "both"
    device: str = "cuda:0"
    multipliers: tuple[float, ...] | str | None = None  # 'sweep' (loss mode); None: the YAML's, else 1.0
    base_dir: Path = Path(".")
    overrides: Mapping[str, Any] = field(default_factory=dict)  # --set, --seed, --dtype
    concepts: tuple[int, ...] | None = None
    limit: int | None = None
    split: str | None = None  # of loss mode: train, test, both; None: both where dataset_format.yaml has a `valid` entry
    batch_size: int | None = None
    force: bool = False
    checkpoint_seconds: float = 60.0  # a fit or measurement under way is saved after this long
    deterministic: bool = False
    flags: tuple[str, ...] = ()  # our own flags as they were typed, for the copy-paste command lines


class LeftOut(NamedTuple):
    """A combination of `all` that does not exist."""

    name: str
    why: str


class Step(NamedTuple):
    """One piece of work: cells has several only for `generate` on a dataset with concepts (one file for all of them)."""

    verb: str
    cells: tuple[Cell, ...]
    settings: FitSettings | GenerateSettings | MeasureSettings
    files: tuple[Path, ...]  # hparam files read
    model: Path
    data: dict[str, Path]  # by what it is for: train, test (loss mode), prompts
    vectors: tuple[Path, ...]  # stored interventions that are read
    outputs: tuple[Path, ...]
    command: str
    multipliers: tuple[float, ...] = ()
    sweep: bool = False
    notes: tuple[Unused, ...] = ()  # keys of the settings without effect
    columns: Mapping[str, Mapping[str, Any]] = {}  # by what it is for, as `data`: how dataset_format.yaml reads the file

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (self.model, *self.data.values(), *self.vectors)

    def __str__(self) -> str:
        first = self.cells[0]
        concepts = f" concepts {','.join(str(c.concept) for c in self.cells)}" if len(self.cells) > 1 else ""
        return (
            f"{MODE_OF[self.verb]} {first}"
            if not concepts
            else f"{MODE_OF[self.verb]} {first.dataset}{concepts} {first.method} {first.intervention}"
        )


class Plan(NamedTuple):
    steps: list[Step]
    left_out: list[LeftOut]


def pairs_of(method: str, intervention: str) -> tuple[list[tuple[str, str]], list[LeftOut]]:
    """(method, form) combinations of a request, and those of `all` that do not exist. Impossible by name: UserError."""
    method, intervention = method_name(method), intervention_name(intervention)
    if method not in (*METHODS, ALL):
        raise unknown("method", method, METHODS)
    if intervention not in (*FORMS, ALL):
        raise unknown("intervention_method", intervention, FORMS)
    methods = list(METHODS) if method == ALL else [method]
    forms = list(FORMS) if intervention == ALL else [intervention]
    valid, left_out = [], []
    for name in methods:
        for form in forms:
            if form in METHODS[name].forms:
                valid.append((name, form))
            elif ALL in (method, intervention) and (method != name or intervention == ALL):
                left_out.append(LeftOut(f"{name} {form}", METHODS[name].why))
            else:
                raise UserError(f"{name} + {form} does not exist: {METHODS[name].why}; {name} goes with: {', '.join(METHODS[name].forms)}")
    if not valid:
        raise UserError(f"nothing to do: {'; '.join(f'{x.name}: {x.why}' for x in left_out)}")
    return valid, left_out


def make(request: Request, *, dry: bool = False) -> Plan:
    """The steps of a request, in the order in which they run.

    Raises UserError for a wrong request: unknown names, impossible pairs, missing or wrong settings; unless `dry` also
    for a missing model or data file, and for data that cannot be read, so that nothing is written before all is known to be well.
    """
    store = Store(request.base_dir)
    if not request.base_dir.is_dir():
        raise UserError(f"--base_dir {request.base_dir}: no such folder")
    if not (tree := request.base_dir / "hparams" / "Steer").is_dir():
        raise UserError(f"{tree}: no such folder, so nothing is known of any dataset; is --base_dir {request.base_dir} right?")
    combinations, left_out = pairs_of(request.method, request.intervention)
    if request.mode not in MODES:
        raise unknown("mode", request.mode, MODES)
    model = store.model(request.model)
    if not dry:
        check_model(store, request.model)
    sections = {verb: DATA_OF[verb] for verb in MODES[request.mode]}
    if "measure" in sections:
        sections["measure"] = {split: DATA_OF["measure"][split] for split in splits_of(request)}
    wanted = {section for names in sections.values() for section in names.values()}
    formats, mistakes = dict[str, readers.DatasetFormat](), Mistakes()
    for section in readers.SECTIONS:
        if section in wanted:
            with mistakes.each():
                formats[section] = readers.dataset_format(request.base_dir, request.dataset, section)
    mistakes.tell()
    concepts = concept_ids(request, formats, dry)
    if not dry:
        for sentence in check_data(request.base_dir, formats, concepts, request.limit):
            log.warning("%s", sentence)

    steps: list[Step] = []
    for verb, names in sections.items():
        groups: list[Step] = []
        data = {purpose: formats[section].path for purpose, section in names.items()}
        for method, form in combinations:
            made = _steps(request, store, verb, method, form, concepts, data, model)
            groups += [step._replace(columns={purpose: columns(formats[section]) for purpose, section in names.items()}) for step in made]
        # cells of one concept side by side: they share what is recorded
        groups.sort(
            key=lambda step: (step.cells[0].concept is not None, step.cells[0].concept or 0) if len(step.cells) == 1 else (False, 0)
        )
        steps += groups
    checkpoint.check(model, {layer for step in steps for layer in step.settings.layers})
    return Plan(steps, left_out)


def columns(fmt: readers.DatasetFormat) -> dict[str, Any]:
    """What of a dataset_format.yaml entry decides the rows: the columns of the same file can be read as other data."""
    fields = (*readers.SECTIONS[fmt.section], *(("concept_id", "output_concept") if fmt.multi_concept else ()))
    return {"columns": {field: fmt.column(field) for field in fields}, "multi_concept": fmt.multi_concept}


def check_model(store: Store, name: str) -> None:
    folder = store.model(name)
    if (folder / "config.json").is_file():
        return
    have = store.models()
    guess = nearest(name, have)
    hint = f"did you mean {guess!r}? " if guess else ""
    raise UserError(
        f"unknown model {name!r}: no {folder / 'config.json'}; {hint}have: {', '.join(have) or 'none'}; put a checkpoint folder there"
    )


def concept_ids(request: Request, formats: Mapping[str, readers.DatasetFormat], dry: bool) -> list[int | None]:
    """The concepts of the request: [None] for a dataset without; the first ten ids unless --concepts says which."""
    every = [*formats.values(), *_trained_on(request)]
    first = next((fmt for fmt in every if fmt.multi_concept), every[0])
    if not first.multi_concept:
        if request.concepts is not None:
            raise UserError(f"--concepts: dataset {request.dataset!r} has no concepts (multi_concept in dataset_format.yaml)")
        return [None]
    if (dry or first not in formats.values()) and not first.path.exists():
        return list(request.concepts or range(FIRST_CONCEPTS))
    have = list(readers.concepts(first))
    if request.concepts is None:
        return list(have[:FIRST_CONCEPTS])
    for concept in request.concepts:
        if concept not in have:
            raise unknown("concept", str(concept), map(str, have))
    return list(request.concepts)


def _trained_on(request: Request) -> list[readers.DatasetFormat]:
    """The entry of the training pairs: it says whether a dataset has concepts, also when only prompts are read."""
    if "train" not in readers.sections_of(request.base_dir, request.dataset):
        return []
    return [readers.dataset_format(request.base_dir, request.dataset, "train")]


def check_data(base_dir: Path, formats: Mapping[str, readers.DatasetFormat], concepts: list[int | None], limit: int | None) -> list[str]:
    """Read everything once: a broken line, or pairs that nothing can be learnt from, are found before anything is written.

    Returns what is odd, a sentence each.
    """
    said = []
    found = {section: {concept: _rows(fmt, concept, limit) for concept in concepts} for section, fmt in formats.items()}
    flat = {section: [row for rows in by_concept.values() for row in rows] for section, by_concept in found.items()}
    for section, fmt in formats.items():
        if section != "generation":
            for concept, rows in found[section].items():
                sense.refuse_useless(fmt, rows, concept)
            said += sense.remarks(fmt, flat[section])
        if section != "train" and "train" in formats:
            said += sense.overlap(formats["train"], flat["train"], fmt, flat[section])
    if set(formats) == {"train"}:
        said += _of_held_out(base_dir, formats["train"], flat["train"], concepts)
    return said


def _of_held_out(base_dir: Path, train: readers.DatasetFormat, fitted: list[Any], concepts: list[int | None]) -> list[str]:
    """For a fit alone: what it has in common with the rows that later commands measure on. What is wrong with those, they say."""
    for section in ("valid", "generation"):
        try:
            fmt = readers.dataset_format(base_dir, train.dataset, section)
            rows = [row for concept in concepts for row in _rows(fmt, concept, None)]
        except UserError:
            continue
        return sense.overlap(train, fitted, fmt, rows)
    return []


def _rows(fmt: readers.DatasetFormat, concept: int | None, limit: int | None) -> list[Any]:
    return (readers.read_prompts if fmt.section == "generation" else readers.read_pairs)(fmt, concept, limit)


def sweep_multipliers(factors: tuple[float, ...], points: int = SWEEP_POINTS, widen: float = 1.0) -> tuple[float, ...]:
    """`points` values symmetric about 0 (0 among them) over the training factor range, times `widen`."""
    top = max(abs(f) for f in factors) * widen
    half = points // 2
    return tuple(round(top * k / half, 6) for k in range(-half, half + 1))


def widened(multipliers: tuple[float, ...]) -> tuple[float, ...]:
    """The same spacing over a range half as wide again, up to SWEEP_MOST values."""
    half = (len(multipliers) - 1) // 2
    spacing = max(multipliers) / half
    more = min(half + half // 2, (SWEEP_MOST - 1) // 2)
    return tuple(round(spacing * k, 6) for k in range(-more, more + 1))


def with_multipliers(step: Step, store: Store, multipliers: tuple[float, ...]) -> Step:
    """The same measuring step at other strengths."""
    outputs = _loss_files(store, step.cells[0], step.data, multipliers)
    return step._replace(multipliers=multipliers, outputs=tuple(outputs))


def _loss_files(store: Store, cell: Cell, data: Mapping[str, Path], multipliers: tuple[float, ...]) -> list[Path]:
    return [store.losses(cell, m, kind, split) for split in data for m in multipliers for kind in PREFERENCE_TYPES]


def _steps(
    request: Request, store: Store, verb: str, method: str, form: str, concepts: list[int | None], data: dict[str, Path], model: Path
) -> list[Step]:
    """The steps of one (method, form) and verb: one per concept, or one for all concepts together (generate)."""
    resolve = {"fit": resolve_fit, "generate": resolve_generate, "measure": resolve_measure}[verb]
    found = resolve(request.base_dir, request.model, request.dataset, method, form, request.overrides)
    settings: Any = found.settings
    if verb == "fit" and METHODS[method].estimate is not None and settings.site != "block":
        why = "the mean is taken at the block's output, which is another space where a norm follows the MLP"
        raise UserError(f"{found.files[-1]}: {method} with site: {settings.site} does not exist: {why}; leave site out")
    cells = [Cell(request.model, request.dataset, method, form, tuple(settings.layers), concept) for concept in concepts]
    sweep = request.multipliers == SWEEP
    if sweep:
        multipliers = sweep_multipliers(
            resolve_fit(request.base_dir, request.model, request.dataset, method, form).settings.steering_factors
        )
    elif verb == "fit":
        multipliers = ()
    else:
        given = request.multipliers if isinstance(request.multipliers, tuple) else getattr(settings, "multipliers", None)
        multipliers = tuple(dict.fromkeys(float(m) for m in (given or (1.0,))))
    groups = [tuple(cells)] if verb == "generate" else [(cell,) for cell in cells]
    steps = []
    for group in groups:
        vectors = [store.vector(cell, layer) for cell in group for layer in cell.layers]
        if verb == "fit":
            outputs = vectors
        elif verb == "generate":
            outputs = [store.results(group[0], m) for m in multipliers]
        else:
            outputs = _loss_files(store, group[0], data, multipliers)
        read = tuple(vectors) if verb != "fit" else ()
        command = _command(request, verb, group, method, form, multipliers, sweep)
        steps.append(
            Step(verb, group, settings, found.files, model, data, read, tuple(outputs), command, multipliers, sweep, tuple(found.unused))
        )
    return steps


def _command(
    request: Request, verb: str, group: tuple[Cell, ...], method: str, form: str, multipliers: tuple[float, ...], sweep: bool
) -> str:
    words = ["python", "run_spilt.py", "--dataset", request.dataset, "--method", method, "--model_name", request.model]
    words += ["--intervention_method", form, "--mode", MODE_OF[verb], "--device", request.device, "--base_dir", str(request.base_dir)]
    if verb != "fit":
        words += ["--multipliers", *(["sweep"] if sweep else [str(m) for m in multipliers])]
    if group[0].concept is not None:
        words += ["--concepts", *(str(cell.concept) for cell in group)]
    return " ".join(map(_quoted, [*words, *request.flags]))


def _quoted(word: str) -> str:
    """For the shell, on one line: a line break in a system prompt is written as $'\\n', since raw it would not be shown."""
    if printable(word) == word:
        return shlex.quote(word)
    return "$'" + printable(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


# ---------------------------------------------------------------- identity: the same from a plan and from a stored artifact


def fit_parts(step: Step, cell: Cell, layer: int, limit: int | None, seen: identity.Seen) -> dict[str, Any]:
    """Everything that decides a fitted vector."""
    settings = {**step.settings.as_dict(), "layers": [layer]}
    return {"settings": settings, "concept": cell.concept, **_common(step, "train", limit, seen)}


def generate_parts(step: Step, multiplier: float, limit: int | None, seen: identity.Seen) -> dict[str, Any]:
    """Everything that decides the texts of one multiplier."""
    settings = {k: v for k, v in step.settings.as_dict().items() if k not in ("multipliers", "batch_size")}
    own = {"multiplier": float(multiplier), "concepts": [cell.concept for cell in step.cells]}
    return {"settings": settings, **own, **_common(step, "prompts", limit, seen)}


def measure_parts(
    step: Step, multiplier: float, preference_type: str, split: str, limit: int | None, seen: identity.Seen
) -> dict[str, Any]:
    """Everything that decides one train_losses.csv."""
    settings = {k: v for k, v in step.settings.as_dict().items() if k != "batch_size"}
    own = {"multiplier": float(multiplier), "preference_type": preference_type, "split": split, "concept": step.cells[0].concept}
    return {"settings": settings, **own, **_common(step, split, limit, seen)}


def _common(step: Step, purpose: str, limit: int | None, seen: identity.Seen) -> dict[str, Any]:
    sources = {
        "columns": step.columns[purpose],
        "model": seen.of(step.model),
        "data": seen.of(step.data[purpose]),
        "vectors": [seen.of(path) for path in step.vectors],
    }
    dated = template.identity(step.model) if step.settings.use_chat_template else None
    if dated is not None:  # left out for all others: nothing of it depends on the day
        sources["template"] = dated
    return {"verb": step.verb, "version": VERSIONS[step.verb], "limit": limit, **sources}


def missing_inputs(step: Step) -> list[Path]:
    """Inputs that are not there (a model folder counts by its config.json)."""
    model = [] if (step.model / "config.json").is_file() else [step.model]
    return model + [p for p in (*step.data.values(), *step.vectors) if not p.is_file()]


def splits_of(request: Request) -> tuple[str, ...]:
    """The item sets that loss mode measures."""
    every = DATA_OF["measure"]
    if request.split == "both":
        return tuple(every)
    if request.split is not None:
        return (request.split,)
    there = readers.sections_of(request.base_dir, request.dataset)
    return tuple(split for split, section in every.items() if section in there) or ("train",)


def summary(standing: Mapping[Path, str]) -> str:
    """One word for a step: what its outputs are."""
    states = set(standing.values())
    if states <= {"done"}:
        return "already done"
    if states <= {"done", "foreign"}:
        return "there, without manifest"
    words = [
        f"{sum(v == state for v in standing.values())} {state}"
        for state in ("done", AGAIN, "stale", "damaged", "foreign", "missing")
        if state in states
    ]
    return "to do" if states == {"missing"} else f"to do: {', '.join(words)}"


def output_parts(step: Step, limit: int | None, seen: identity.Seen) -> dict[Path, dict[str, Any]]:
    """output -> what decides it; only when all inputs are there."""
    if step.verb == "fit":
        parts = [fit_parts(step, cell, layer, limit, seen) for cell in step.cells for layer in cell.layers]
    elif step.verb == "generate":
        parts = [generate_parts(step, m, limit, seen) for m in step.multipliers]
    else:
        parts = [measure_parts(step, m, k, s, limit, seen) for s in step.data for m in step.multipliers for k in PREFERENCE_TYPES]
    return dict(zip(step.outputs, parts, strict=True))


def standing(step: Step, limit: int | None, seen: identity.Seen) -> dict[Path, str]:
    """output -> 'done' | 'missing' | 'stale' | 'damaged' | 'foreign' (manifest.standing); 'missing' when an input is."""
    if missing_inputs(step):
        return {path: "foreign" if path.exists() and not manifest.manifest_path(path).exists() else "missing" for path in step.outputs}
    return {path: manifest.standing(path, parts) for path, parts in output_parts(step, limit, seen).items()}


def text_identities(outputs: Mapping[float, Mapping[str, Any]]) -> dict[float | None, str]:
    """multiplier -> whose the unfinished texts are. outputs: multiplier -> parts; None: the unsteered texts, the same for all."""
    found: dict[float | None, str] = {m: manifest.identity(dict(parts)) for m, parts in outputs.items()}
    return {**found, None: manifest.identity({**next(iter(outputs.values())), "multiplier": None})}


def loss_identities(step: Step, multipliers: Iterable[float], split: str, limit: int | None, seen: identity.Seen) -> list[str]:
    """Whose the unfinished losses of each multiplier are: both answers are scored, whichever table asks."""
    return [manifest.identity(measure_parts(step, m, "unfinished", split, limit, seen)) for m in multipliers]


def unfinished_identities(step: Step, limit: int | None, seen: identity.Seen) -> set[str]:
    """Of everything that a step keeps while it is under way."""
    outputs = output_parts(step, limit, seen)
    if step.verb == "fit":
        return {manifest.identity(parts) for parts in outputs.values()}
    if step.verb == "generate":
        return set(text_identities(dict(zip(step.multipliers, outputs.values(), strict=True))).values())
    signed = [sign * m + 0.0 for m in step.multipliers for sign in (1, -1)]
    return {identity for split in step.data for identity in loss_identities(step, signed, split, limit, seen)}


def without_effect(steps: Iterable[Step]) -> dict[str, tuple[list[str], int]]:
    """Why -> (the keys of the settings that have no effect, in how many files they stand)."""
    found: dict[str, list[Unused]] = {}
    for note in dict.fromkeys(note for step in steps for note in step.notes):
        found.setdefault(note.why, []).append(note)
    return {why: (sorted({note.key for note in notes}), len({note.where for note in notes})) for why, notes in found.items()}


def replaced(outputs: Mapping[Path, Mapping[str, Any]]) -> dict[str, list[Path]]:
    """Why -> the stored files that are not what is asked for and will be written over."""
    found: dict[str, list[Path]] = {}
    for path, parts in outputs.items():
        state = manifest.standing(path, dict(parts))
        if state in ("foreign", "damaged"):
            why = {"foreign": "made elsewhere: no manifest", "damaged": "damaged, or changed by hand"}[state]
        elif state == "stale":
            then = (manifest.read(path) or {}).get("parts")
            why = f"made with {manifest.differences(then if isinstance(then, dict) else {}, parts)}"
        else:
            continue
        found.setdefault(why, []).append(path)
    return found


# ---------------------------------------------------------------- a stored vector is used as what it is


def doubts(cell: Cell, layer: int, settings: Any, request: Request, seen: identity.Seen) -> list[str]:
    """What the manifest of a stored vector says against its use by `cell` at `layer`, a sentence each. Without manifest: nothing is known.

    Raises UserError where the use can't be meant: a vector of another method, form, layer, concept or write point.
    """
    store = Store(request.base_dir)
    path = store.vector(cell, layer)
    parts = (manifest.read(path) or {}).get("parts")
    then = parts.get("settings") if isinstance(parts, dict) else None
    if not isinstance(parts, dict) or not isinstance(then, dict):
        return []
    ours = {"method": cell.method, "intervention_method": cell.intervention, "layers": [layer], "site": settings.site}
    found = {name: then.get(name) for name in ours} | {"concept": parts.get("concept")}
    if other := manifest.differences(found, ours | {"concept": cell.concept}):
        raise UserError(
            f"{path}: is another vector by its manifest: {other.replace('(now', '(wanted')}; put it where it belongs, fit this one with "
            f"--mode generate, or remove {manifest.manifest_path(path).name} to use it as it is"
        )
    said = []
    if parts.get("model") != seen.of(store.model(cell.model)):
        said.append(f"was fitted on another model than {store.relative(store.model(cell.model))} holds now")
    try:
        found_now = resolve_fit(request.base_dir, cell.model, cell.dataset, cell.method, cell.intervention, request.overrides)
        data = readers.dataset_format(request.base_dir, cell.dataset, DATA_OF["fit"]["train"]).path
    except UserError:  # a vector needs no settings of its fit to be used
        return said
    fitted = found_now.settings.as_dict()
    # the model's dtype may differ on purpose: fitted in one, used in another
    both = {name: value for name, value in then.items() if name in fitted and name not in ("dtype", "layers")}
    if edited := manifest.differences(both, {name: fitted[name] for name in both}):
        said.append(f"was fitted with other settings: {edited}")
    if data.is_file() and parts.get("data") != seen.of(data):
        said.append(f"was fitted on other data than {store.relative(data)} holds now")
    return said
