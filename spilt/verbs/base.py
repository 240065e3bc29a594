"""A verb: what a step of it reads and writes, what decides its results, what it costs, and who does it. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from spilt.artifacts import manifest
from spilt.artifacts.losses import NEUTRAL
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.data import entries, readers
from spilt.data.own import Own
from spilt.data.prompt_baseline import Prompt
from spilt.errors import UserError
from spilt.methods import METHODS, stand_ins
from spilt.model import checkpoint, identity, template
from spilt.settings.fields import OF_ADAPTERS, method_name
from spilt.settings.resolve import Resolved, Unused, resolve
from spilt.verbs.estimate import Cost, Shape, shape_of

RECOMMENDED = "recommended"  # a word for --multipliers
# settings that say what steers, and where: no matter to the unsteered model, and what methods may differ in that are compared
OF_STEERING = ("method", "intervention_method", "layers", "intervention_components", "site", "concept_id", "steer_positions")


@dataclass(frozen=True)
class Request:
    """What the user asked for, in checked words."""

    dataset: str
    method: str | tuple[str, ...]
    model: str
    intervention: str | tuple[str, ...]
    mode: str = "both"
    device: str = "cuda:0"
    multipliers: tuple[float, ...] | None = None  # None: the YAML's, else 1.0
    words: tuple[str, ...] = ()  # beside them: 'sweep', 'recommended'
    recommended: Mapping[tuple[str, str], float | str] = field(default_factory=dict)  # (method, form) -> it, or why there is none
    base_dir: Path = Path(".")
    overrides: Mapping[str, Any] = field(default_factory=dict)  # --set, --seed, --dtype
    concepts: tuple[int, ...] | None = None
    seeds: tuple[int | None, ...] = (None,)  # of several fits of each cell; None: the settings'
    layers: tuple[tuple[int, ...], ...] | None = (
        None  # cells of their own, several of one act together; (): each block; None: the settings'
    )
    own: Own | None = None  # the user's files that the dataset is made of
    limit: int | None = None
    split: str | None = None  # of loss mode: train, test, both; None: both where dataset_format.yaml has a `valid` entry
    batch_size: int | None = None
    force: bool = False
    checkpoint_seconds: float = 60.0  # a fit or measurement under way is saved after this long
    deterministic: bool = False
    tensor_parallel: bool = False  # the processes of a launcher hold parts of one model (in_step.py)
    released_files: bool | None = None  # of loss mode; None: where multipliers are given one by one
    control_pairs: int = 32  # questions on which random interventions are measured after a sweep; 0: none are
    report: bool = True  # loss mode: draw the page
    engine: str = "fast"  # 'plain': hooks and the library's own forward everywhere
    decode_step: str = "plain"  # of texts: how the next token's scores are computed (engine.choice.STEPS)
    judge: str | None = None  # of evaluate: judges.ENDPOINT, or a checkpoint; None: no judge
    rubrics: tuple[str, ...] = ()  # names or files; (): those of the dataset
    judge_limit: int | None = None  # prompts of each results file whose texts are judged, from the first
    prompts: tuple[Prompt, ...] = ()  # baselines beside the cells, of verbs that know them
    flags: tuple[str, ...] = ()  # our own flags as they were typed, for the copy-paste command lines
    program: str = "python run_spilt.py"  # what was called, for the same
    model_said: str = ""  # a path or a hub id: `model` is its last part, and its files lie in `folder`
    folder: Path | None = None

    @property
    def model_folder(self) -> Path:
        return self.folder or Store(self.base_dir).model(self.model)


def with_own(overrides: Mapping[str, Any], method: str, seed: int | None = None, layers: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The command line's settings with the seed of one of several fits, and the layers of --layers: several are fitted by one loss."""
    found = dict(overrides) if seed is None else {**overrides, "seed": str(seed)}
    return found if layers is None else {**found, "layers": list(layers), "joint": len(layers) > 1 and METHODS[method].estimate is None}


def without_files(request: Request, method: str) -> bool:
    """Whether settings files are not asked for: the data are the user's own, or none were released for the method."""
    return request.own is not None or METHODS[method].adapters


def _asks_for_adapters(request: Request) -> bool:
    words = [request.method] if isinstance(request.method, str) else request.method
    return any(method_name(word).startswith(name) for word in words for name, row in METHODS.items() if row.adapters)


def adapted_layers(blocks: int) -> tuple[int, ...]:
    """From 30% to 80% of the depth, where behaviours lie, as the rebuilds of arXiv 2511.05408 take them."""
    return tuple(range(round(0.3 * blocks), max(round(0.8 * blocks), round(0.3 * blocks) + 1)))


LONGEST = 200  # characters of --layers in a folder's name, which has at most 255 of them, with method, form and seed


def layer_groups(words: Sequence[str] | None) -> tuple[tuple[int, ...], ...] | None:
    """The words of --layers: `10 14+18` -> ((10,), (14, 18)); () of `all`."""
    if words is None or list(words) == ["all"]:
        return None if words is None else ()
    found = []
    for word in words:
        if not re.fullmatch(r"[0-9]{1,5}(\+[0-9]{1,5})*", word, re.ASCII):
            raise UserError(f"--layers {word}: wanted block numbers from 0 such as 10 14, 10+14 for layers that act together, or all")
        layers = tuple(map(int, word.split("+")))
        if len(set(layers)) < len(layers):
            raise UserError(f"--layers {word}: names a block twice")
        if len(word) > LONGEST:
            why = f"{len(layers)} blocks that act together give a folder a name that is too long"
            way = f"--set layers=[{layers[0]},{layers[1]},...], with --set joint=true where they are trained"
            raise UserError(f"--layers {word[:40]}...: {why}; name them in the settings: {way}")
        found.append(tuple(sorted(layers)))
    return tuple(dict.fromkeys(found))


class Step(NamedTuple):
    """One piece of work: cells has several only for `generate` on a dataset with concepts (one file for all of them)."""

    verb: str
    cells: tuple[Cell, ...]
    settings: Any
    files: tuple[Path, ...]  # hparam files read
    model: Path
    data: dict[str, Path]  # by what it is for: train, test (loss mode), prompts
    vectors: tuple[Path, ...]  # stored interventions that are read
    outputs: tuple[Path, ...]
    command: str
    multipliers: tuple[float, ...] = ()
    sweep: bool = False
    waits: bool = False  # for the multiplier that its losses will recommend
    released: bool = True  # measure: the released files are written; else the tables of losses
    notes: tuple[Unused, ...] = ()  # keys of the settings without effect
    columns: Mapping[str, Mapping[str, Any]] = {}  # by what it is for, as `data`: how dataset_format.yaml reads the file
    origin: str = ""  # of the settings, for a base folder without settings files
    engine: str = ""  # another program's, whose results are its own: vllm
    texts: tuple[Path, ...] = ()  # stored results files that are read
    scoring: Mapping[str, Any] = {}  # of evaluate: what decides the judge's ratings
    lacks: str = ""  # what is left out, and how it is to be had
    prompt: Prompt | None = None  # in the place of a vector: the unsteered model behind it

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (self.model, *self.data.values(), *self.vectors, *self.texts)

    def __str__(self) -> str:
        first, mode = self.cells[0], VERBS[self.verb].mode
        if len(self.cells) == 1:
            return f"{mode} {first}"
        return f"{mode} {first.dataset} concepts {','.join(str(c.concept) for c in self.cells)} {first.method} {first.intervention}"


class Verb:
    """One row of VERBS. A new verb is a class with these in a file of its own, and `register(it())`."""

    name: ClassVar[str]
    mode: ClassVar[str]  # the released command line's word for it
    does: ClassVar[str] = ""  # one line for `spilt --help`
    flags: ClassVar[tuple[str, ...]] = ()  # of the flags that not every verb takes, those that mean something to it
    sections: ClassVar[Mapping[str, str]]  # what it reads: purpose -> section of dataset_format.yaml
    optional: ClassVar[tuple[str, ...]] = ()  # purposes of them that a dataset may lack
    settings_of: ClassVar[str] = ""  # the verb whose settings it takes; its own
    work: ClassVar[str]  # 'module:function', (step, run) -> 'done' or 'already done'; imported when it is run
    version: ClassVar[int] = 1  # of its code: raised when equal settings would give other results
    fits: ClassVar[bool] = False  # its outputs are vectors; other verbs read them
    together: ClassVar[bool] = False  # one step for all concepts
    words: ClassVar[tuple[str, ...]] = ()  # of --multipliers, beside numbers
    prompts: ClassVar[bool] = False  # takes the unsteered model behind a prompt for a cell too
    not_deciding: ClassVar[tuple[str, ...]] = ("batch_size",)  # settings that change no result beyond rounding

    def settings(self, request: Request, method: str, form: str) -> Resolved:
        """The settings of a cell, from files and command line. Raises UserError for wrong ones."""
        blocks = checkpoint.blocks(checkpoint.config(request.model_folder))
        adapters, overrides = METHODS[method].adapters, request.overrides
        middle = () if blocks is None else adapted_layers(blocks) if adapters else (blocks // 2,)
        if not adapters and _asks_for_adapters(request):  # theirs, of a request for several methods
            overrides = {name: value for name, value in overrides.items() if name not in OF_ADAPTERS}
        if adapters and not self.fits and "layers" not in overrides:  # where it was fitted, whatever others' files say
            overrides = {**overrides, "layers": list(VERBS["fit"].settings(request, method, form).settings.layers)}
        cell = (request.base_dir, request.model, request.dataset, method, form)
        plain = without_files(request, method)
        return resolve(self.settings_of or self.name, *cell, overrides, middle, plain, request.device, stand_ins(method, form))

    def purposes(self, method: str) -> Collection[str]:
        """What of `sections` a method reads."""
        return self.sections

    def multipliers(self, request: Request, settings: Any) -> tuple[float, ...]:
        """Those of the command line, else of the settings, else 1.

        With `recommended` also 0; those of the settings then only where `sweep` is said too.
        """
        given = getattr(settings, "multipliers", None) if request.multipliers is None else request.multipliers
        found = tuple(dict.fromkeys(float(m) for m in (given or (1.0,))))
        if RECOMMENDED not in self.words or RECOMMENDED not in request.words:
            return found
        alone = request.words == (RECOMMENDED,) and request.multipliers is None
        return tuple(dict.fromkeys((*(() if alone else found), 0.0)))

    def filled(self, step: Step, request: Request, store: Store) -> Step:
        """The step with what this verb alone knows of it. Raises UserError."""
        return step

    def refuses(self, step: Step, kind: str) -> str:
        """Why a step makes no sense of its pairs of this kind (Pair.kind), and what would; '' where it does."""
        return ""

    def outputs(self, store: Store, step: Step) -> list[Path]:
        """The files that a step writes."""
        raise NotImplementedError(f"{self.name} does not say what it writes")

    def complete(self, step: Step, path: Path) -> bool:
        """Whether a stored output, made just so, holds all that the step asks for."""
        return True

    def decided_by(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        """For each output: which of its inputs (purpose), and what besides model, data, vectors and settings decides it."""
        raise NotImplementedError(f"{self.name} does not say what decides its results")

    def unfinished(self, step: Step, limit: int | None, seen: identity.Seen) -> set[str]:
        """Whose work under way may lie there, as identities."""
        return {manifest.identity(parts) for parts in output_parts(step, limit, seen).values()}

    def cost(self, step: Step, shape: Shape, rows: Sequence[Any], request: Request) -> Cost:
        """An estimate for one concept. rows: its prompts (where the section is `generation`) or pairs."""
        raise NotImplementedError(f"{self.name} does not say what it costs")


VERBS: dict[str, Verb] = {}
# the released command line's words -> verbs in order; `both` is the fit and the texts, `all` (ours) measures too
MODES: dict[str, tuple[str, ...]] = {}


def register(verb: Verb) -> None:
    """Make a verb known to plan, run, command line and verify."""
    VERBS[verb.name] = verb
    MODES[verb.mode] = (verb.name,)


def layers_of(step: Step, cell: Cell) -> list[list[int]]:
    """The layers of each stored vector's settings: its own, or those of the joint fit."""
    joint = getattr(step.settings, "joint", False)
    return [list(cell.layers) if joint else [layer] for layer in cell.layers]


def entry_of(verb: str, purpose: str, base_dir: Path, dataset: str) -> readers.DatasetFormat:
    """The entry of dataset_format.yaml that a verb reads for a purpose. Raises UserError."""
    return entries.dataset_format(base_dir, dataset, VERBS[verb].sections[purpose])


# ---------------------------------------------------------------- identity: the same from a plan and from a stored artifact


def parts_of(step: Step, purpose: str, own: Mapping[str, Any], limit: int | None, seen: identity.Seen) -> dict[str, Any]:
    """Everything that decides a result. own: what is not the same for all results of the step (settings in it replace the step's)."""
    verb = VERBS[step.verb]
    settings = {k: v for k, v in step.settings.as_dict().items() if k not in verb.not_deciding}
    sources: dict[str, Any] = {
        "columns": step.columns[purpose],
        "model": seen.of(step.model),
        "data": seen.of(step.data[purpose]),
        "vectors": [seen.of(path) for path in step.vectors],
    }
    if step.prompt is not None:
        settings = {k: v for k, v in settings.items() if k not in OF_STEERING}
        sources["prompt"] = step.prompt.decides
    dated = template.identity(step.model) if step.settings.use_chat_template else None
    if dated is not None:  # left out for all others: nothing of it depends on the day
        sources["template"] = dated
    if step.verb == "fit" and NEUTRAL in step.data:
        sources["neutral"] = seen.of(step.data[NEUTRAL])
    return {"settings": settings, **own, "verb": step.verb, "version": verb.version, "limit": limit, **sources}


def output_parts(step: Step, limit: int | None, seen: identity.Seen) -> dict[Path, dict[str, Any]]:
    """output -> what decides it; only when all inputs are there."""
    decided = VERBS[step.verb].decided_by(step)
    return {path: parts_of(step, purpose, own, limit, seen) for path, (purpose, own) in zip(step.outputs, decided, strict=True)}


def missing_inputs(step: Step) -> list[Path]:
    """Inputs that are not there (a model folder counts by its config.json)."""
    model = [] if checkpoint.there(step.model) else [step.model]
    return model + [p for p in step.inputs[1:] if not p.is_file()]


def standing(step: Step, limit: int | None, seen: identity.Seen) -> dict[Path, str]:
    """output -> 'done' | 'missing' | 'stale' | 'damaged' | 'foreign' (manifest.standing); 'missing' when an input is.

    What was made from a vector that is not as its manifest says is not done either: the work says so.
    """
    if missing_inputs(step):
        return {path: "foreign" if path.exists() and not manifest.manifest_path(path).exists() else "missing" for path in step.outputs}
    sound = all(map(manifest.is_as_recorded, step.vectors))
    states = {path: state(step, path, parts) for path, parts in output_parts(step, limit, seen).items()}
    return {path: "stale" if state == "done" and not sound else state for path, state in states.items()}


def state(step: Step, path: Path, parts: Mapping[str, Any]) -> str:
    """manifest.standing of one output; 'missing' where part of what is asked for is."""
    found = manifest.standing(path, dict(parts))
    return "missing" if found == "done" and not VERBS[step.verb].complete(step, path) else found


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


def without_effect(steps: Iterable[Step]) -> dict[str, tuple[list[str], int]]:
    """Why -> (the keys of the settings that have no effect, in how many files they stand)."""
    found: dict[str, list[Unused]] = {}
    for note in dict.fromkeys(note for step in steps for note in step.notes):
        found.setdefault(note.why, []).append(note)
    return {why: (sorted({note.key for note in notes}), len({note.where for note in notes})) for why, notes in found.items()}


def cost(step: Step, request: Request, read: dict[Any, Sequence[Any]] | None = None) -> Cost | None:
    """What a step will cost; None when the model or the data is not there to be counted. read: rows kept between the steps of a plan."""
    kept = {} if read is None else read
    shape, verb = shape_of(step.model), VERBS[step.verb]
    if shape is None or not all(path.is_file() for path in step.data.values()):
        return None
    s = step.settings
    limit = readers.fewest(request.limit, getattr(s, "generation_data_size", None), getattr(s, "max_num_of_examples", None))
    parts = []
    for cell in step.cells:
        for purpose in (purpose for purpose in step.data if purpose != NEUTRAL):  # a few texts
            fmt = entry_of(step.verb, purpose, request.base_dir, cell.dataset)
            key = (fmt.path, fmt.section, cell.concept, limit)
            if key not in kept:
                kept[key] = readers.read_entry(fmt, cell.concept, limit)
            parts.append(verb.cost(step, shape, kept[key], request))
    recorded = max(part.cache for part in parts)  # of one concept at a time
    peak = shape.weights * shape.size(s) + recorded + max(part.peak for part in parts)
    return Cost(sum(part.tokens for part in parts), sum(part.flops for part in parts), recorded, peak, parts[-1].batch)
