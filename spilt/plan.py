"""Request -> steps: what will run, in order, with what it reads and writes, and why some combinations are left out.

No torch here: a dry run prints this and stops. Names come from the tables (METHODS, FORMS, dataset_format.yaml).
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts.store import Store
from spilt.cell import FORMS, PROMPT, Cell
from spilt.data import entries, readers
from spilt.data.prompt_baseline import Prompt
from spilt.engine import choice
from spilt.errors import Mistakes, UserError, nearest, printable, unknown
from spilt.methods import METHODS
from spilt.model import checkpoint
from spilt.reading import check_data, columns, concept_ids, entry, first_pair, read_by, refuse_rows, splits_of
from spilt.settings.fields import intervention_name, method_name
from spilt.settings.files import is_own
from spilt.steering import anatomy
from spilt.team import place
from spilt.verbs import MODES, VERBS, Request, Step, Verb
from spilt.verbs.base import RECOMMENDED, with_own
from spilt.verbs.measure import SWEEP

log = logging.getLogger("spilt")
ALL = "all"
AGAIN = "to be made again"  # of a stored result: asked for with --force, or what it is made from is made again


class Wanted(NamedTuple):
    """A cell without its concept."""

    method: str
    form: str
    seed: int | None  # of the fit; None: the settings'
    layers: tuple[int, ...] | None  # None: the settings'
    apart: bool  # they are others than the settings'

    @property
    def names(self) -> tuple[str, str]:
        """Method and form as the report names a cell."""
        return self.method, Cell("", "", self.method, self.form, self.layers or (), None, self.seed, self.apart).variant


class LeftOut(NamedTuple):
    """A combination of several that does not exist, or has no recommended multiplier."""

    name: str
    why: str


class Plan(NamedTuple):
    steps: list[Step]
    left_out: list[LeftOut]


def pairs_of(method: str | Sequence[str], intervention: str | Sequence[str]) -> tuple[list[tuple[str, str]], list[LeftOut]]:
    """(method, form) combinations of a request, and those of several that do not exist. Impossible by name: UserError.

    Of several words, one that names both (`spilt_lora`, as the folders do) is that combination alone.
    """
    words = [intervention] if isinstance(intervention, str) else intervention
    forms = [form for word in words for form in _named("intervention_method", intervention_name(word), FORMS)]
    asked: list[tuple[str, str]] = []
    for word in [method] if isinstance(method, str) else method:
        if not isinstance(method, str) and (cell := _cell_named(word)):
            asked.append(cell)
        else:
            asked += [(name, form) for name in _named("method", method_name(word), METHODS) for form in forms]
    asked = list(dict.fromkeys(asked))
    valid = [(name, form) for name, form in asked if form in METHODS[name].forms]
    left_out = [LeftOut(f"{name} {form}", METHODS[name].why) for name, form in asked if (name, form) not in valid]
    if len(asked) == 1 and left_out:
        ((name, form),) = asked
        raise UserError(f"{name} + {form} does not exist: {METHODS[name].why}; {name} goes with: {', '.join(METHODS[name].forms)}")
    if not valid:
        raise UserError(f"nothing to do: {'; '.join(f'{x.name}: {x.why}' for x in left_out)}")
    return valid, left_out


def _cell_named(word: str) -> tuple[str, str] | None:
    """(method, form) of a word such as spilt_lora; both names may have underscores."""
    cuts = [at for at, letter in enumerate(word) if letter == "_"]
    found = [(method_name(word[:at]), intervention_name(word[at + 1 :])) for at in cuts]
    return next(((name, form) for name, form in found if name in METHODS and form in FORMS), None)


def _named(kind: str, word: str, table: Mapping[str, Any]) -> list[str]:
    """The rows of a table that a word means."""
    if word not in (*table, ALL):
        raise unknown(kind, word, table)
    return [name for name, row in table.items() if row.in_all] if word == ALL else [word]


def make(request: Request, *, dry: bool = False) -> Plan:
    """The steps of a request, in the order in which they run.

    Raises UserError for a wrong request: unknown names, impossible pairs, missing or wrong settings; unless `dry` also
    for a missing model or data file, and for data that cannot be read, so that nothing is written before all is known to be well.
    """
    store = Store(request.base_dir)
    if not request.base_dir.is_dir():
        raise UserError(f"--base_dir {request.base_dir}: no such folder")
    needless = request.own is not None or is_own(request.base_dir, request.dataset) or request.model_folder.is_dir()
    if not (tree := request.base_dir / "hparams" / "Steer").is_dir() and not needless:
        raise UserError(
            f"{tree}: no such folder, so nothing is known of any dataset; is --base_dir {request.base_dir} right? "
            f"With a checkpoint folder {request.model_folder} it does without one"
        )
    combinations, left_out = pairs_of(request.method, request.intervention)
    if request.mode not in MODES:
        raise unknown("mode", request.mode, MODES)
    # a closed form has nothing that a seed decides
    groups = _layers(request, store)
    if request.tensor_parallel:
        choice.refuse_in_parts(request, MODES[request.mode], checkpoint.config(request.model_folder), place()[1], dry)
    if request.engine == choice.VLLM:
        choice.refuse_vllm(MODES[request.mode], request.device, dry)
    wanted_cells = [
        Wanted(m, f, seed, layers, apart(request, m, f, layers))
        for m, f in combinations
        for layers in groups
        for seed in (request.seeds if METHODS[m].estimate is None else (None,))
    ]
    if RECOMMENDED in request.words and "measure" not in MODES[request.mode]:
        wanted_cells, none = _with_a_recommendation(request, wanted_cells)
        left_out += none
    if request.prompts:
        refuse_prompts(request)
    model = request.model_folder
    if not dry and request.folder is None:
        check_model(store, request.model)
    asked = {method for method, _ in combinations}
    sections = {verb: read_by(VERBS[verb], request, asked) for verb in MODES[request.mode]}
    if "measure" in sections:
        sections["measure"] = {split: sections["measure"][split] for split in splits_of(request)}
    wanted = {section for names in sections.values() for section in names.values()}
    formats, mistakes = dict[str, readers.DatasetFormat](), Mistakes()
    for section in entries.SECTIONS:
        if section in wanted:
            with mistakes.each():
                formats[section] = entry(request, section)
    mistakes.tell()
    concepts = concept_ids(request, formats, dry)
    if request.prompts and concepts != [None]:
        raise UserError(f"{request.dataset} has concepts, each with a vector of its own; prompts are baselines of data sets without")
    if not dry:
        for sentence in check_data(request.base_dir, formats, concepts, request.limit):
            log.warning("%s", sentence)

    steps: list[Step] = []
    for name, names in sections.items():
        made: list[Step] = []
        how = {purpose: columns(formats[section]) for purpose, section in names.items()}
        data = {purpose: formats[section].path for purpose, section in names.items()}
        for wanted_cell in wanted_cells:
            own_data = {purpose: path for purpose, path in data.items() if purpose in VERBS[name].purposes(wanted_cell.method)}
            found = _steps(request, store, VERBS[name], wanted_cell, concepts, own_data, model)
            made += [step._replace(columns=how) for step in found]
        # cells of one concept and layer side by side: they share what is recorded
        made.sort(key=lambda step: (-1 if (first := step.cells[0]).concept is None or len(step.cells) > 1 else first.concept, first.layers))
        if request.prompts and VERBS[name].prompts:
            made += [
                _behind(request, store, VERBS[name], wanted_cells[0], data, model, prompt)._replace(columns=how)
                for prompt in request.prompts
            ]
        steps += made
    for said in {step.settings.anatomy for step in steps}:
        anatomy.parse(said)
    for step in steps if request.tensor_parallel else ():
        _refuse_in_parts(step)
    texts = {str(step): step.engine or why_plain(step, request.engine) for step in steps if step.verb == "generate"}
    choice.refuse_step(request.decode_step, texts, request.device)
    if request.own is None or not dry:  # before they are brought, own.py knows them
        refuse_rows(steps, {section: row.kind for section, fmt in formats.items() if (row := first_pair(fmt)) is not None})
    checkpoint.check(model, *({layer for step in steps if wants(step) for layer in _layers_of(step)} for wants in (bool, _wants_down)))
    return Plan(steps, left_out)


def _refuse_in_parts(step: Step) -> None:
    """Raises UserError for a step that needs what no process has whole."""
    if step.prompt is not None:
        return
    cell = step.cells[0]
    if METHODS[cell.method].adapters:
        raise UserError(f"--tensor_parallel: {cell.method} changes the weights, and each process holds a part of them; --device auto")
    if FORMS[cell.intervention].reads:
        choice.refuse_split(step.settings.intervention_components)


def _layers_of(step: Step) -> set[int]:
    """The blocks that a step names."""
    return {*step.settings.layers, getattr(step.settings, "direction_layer", None)} - {None}


def _wants_down(step: Step) -> bool:
    """Whether a fit needs a down projection that is found by itself; of other steps the stored vector says it."""
    s: Any = step.settings
    if step.prompt is not None or METHODS[step.cells[0].method].adapters:
        return False
    reads = FORMS[step.cells[0].intervention].reads and s.intervention_components == "mlp_mid"
    return step.verb == "fit" and "mlp_mid" not in s.anatomy and (reads or s.site == "down_proj")


def _with_a_recommendation(request: Request, cells: list[Wanted]) -> tuple[list[Wanted], list[LeftOut]]:
    """The cells that there is something to do for, and why others have none. Raises UserError where no cell has."""
    none = {cell: why for cell in cells if isinstance(why := recommended(request, cell.names), str)}
    left_out = [LeftOut(" ".join(cell.names), why) for cell, why in none.items()]
    if request.multipliers is not None:  # texts at other strengths are asked for too
        return cells, left_out
    if len(none) == len(cells):
        raise UserError("; ".join(f"{item.name}: {item.why}" for item in left_out))
    return [cell for cell in cells if cell not in none], left_out


def recommended(request: Request, names: tuple[str, str]) -> float | str:
    """What the stored losses recommend for a cell, or why it has none. names: as the report has them."""
    found = request.recommended.get(names, "not measured; --mode loss --multipliers sweep measures it")
    return f"no recommended multiplier: {found}" if isinstance(found, str) else found


def settled(step: Step, request: Request) -> tuple[Step, str]:
    """A step that waited, with what its losses recommend by now, and why that is nothing; without outputs if nothing else was asked for."""
    cell, verb = step.cells[0], VERBS[step.verb]
    found = recommended(request, (cell.method, cell.variant))
    if isinstance(found, str):
        alone = request.words == (RECOMMENDED,) and request.multipliers is None
        return step._replace(waits=False, outputs=() if alone else step.outputs), found
    step = step._replace(waits=False, multipliers=tuple(dict.fromkeys((*step.multipliers, found))))
    return step._replace(outputs=tuple(verb.outputs(Store(request.base_dir), step))), ""


def _layers(request: Request, store: Store) -> Sequence[tuple[int, ...] | None]:
    """The groups of layers that are cells of their own; [None]: the settings'."""
    if request.layers:
        return request.layers
    if request.layers is None:
        return [None]
    if request.folder is None:
        check_model(store, request.model)
    blocks = checkpoint.blocks(checkpoint.config(request.model_folder))
    if blocks is None:
        raise UserError(f"--layers {ALL}: the configuration of {request.model_folder} does not say how many blocks there are; name them")
    return [(layer,) for layer in range(blocks)]


def apart(request: Request, method: str, form: str, layers: tuple[int, ...] | None) -> bool:
    """Whether layers are not those of the settings: of the fit, where it has some, since all verbs must agree."""
    if layers is None:
        return False
    for name in dict.fromkeys(("fit", *MODES[request.mode])):
        try:
            settings: Any = VERBS[name].settings(request, method, form).settings
        except UserError:  # told when they are asked for
            continue
        together = len(layers) == 1 or METHODS[method].estimate is not None or getattr(settings, "joint", True)
        return not (together and tuple(settings.layers) == layers)
    return True


def why_plain(step: Step, engine: str) -> str:
    """Why the plain engine does a step; '' where the fast one does, or where nothing is to be chosen (closed forms, vLLM)."""
    s: Any = step.settings
    if step.engine:
        return ""
    family = checkpoint.family(step.model)
    if step.prompt is not None:
        return choice.why_plain([], step.verb, family=family, engine=engine)
    if step.verb == "fit" and METHODS[step.cells[0].method].estimate is not None:
        return choice.why_plain([], "fit", family=family)
    if METHODS[step.cells[0].method].adapters:
        return choice.ASKED if engine == choice.PLAIN else "linear maps inside the blocks are changed"
    joint = getattr(s, "joint", False)
    layers = [(layer,) for layer in s.layers] if step.verb == "fit" and not joint else [s.layers]
    how = {"engine": engine, "family": family, "joint": joint, "positions": s.applied_positions}
    said = [choice.why_plain([(n, s.site) for n in group], step.verb, **how) for group in layers]
    return next(filter(None, said), "")


def check_model(store: Store, name: str) -> None:
    folder = store.model(name)
    if checkpoint.there(folder):
        return
    have = store.models()
    guess = nearest(name, have)
    hint = f"did you mean {guess!r}? " if guess else ""
    raise UserError(
        f"unknown model {name!r}: no {folder / 'config.json'}; {hint}have: {', '.join(have) or 'none'}; put a checkpoint folder there"
    )


def _steps(
    request: Request,
    store: Store,
    verb: Verb,
    wanted: Wanted,
    concepts: list[int | None],
    data: dict[str, Path],
    model: Path,
) -> list[Step]:
    """The steps of one cell and verb: one per concept, or one for all concepts together."""
    method, form, seed, layers, own_place = wanted
    given = with_own(request.overrides, method, seed if verb.fits else None, layers)
    found = verb.settings(replace(request, overrides=given), method, form)
    settings: Any = found.settings
    cells = tuple(
        Cell(request.model, request.dataset, method, form, tuple(settings.layers), concept, seed, own_place) for concept in concepts
    )
    sweep = SWEEP in verb.words and bool(request.words)  # what is recommended stands in one
    multipliers = verb.multipliers(request, settings)
    applied = RECOMMENDED in request.words and RECOMMENDED in verb.words
    waits = applied and "measure" in MODES[request.mode]
    if applied and not waits and not isinstance(found_one := recommended(request, wanted.names), str):
        multipliers = tuple(dict.fromkeys((*multipliers, found_one)))
    released = not sweep if request.released_files is None else request.released_files
    steps = []
    for group in [cells] if verb.together else [(cell,) for cell in cells]:
        read: tuple[Path, ...] = () if verb.fits else tuple(store.vector(cell, layer) for cell in group for layer in cell.layers)
        notes = tuple(found.unused)
        step = Step(verb.name, group, settings, found.files, model, data, read, (), "", multipliers, sweep, waits, released, notes)
        step = verb.filled(step, request, store)
        command = _command(request, verb, group, wanted, step.multipliers, SWEEP if sweep else RECOMMENDED if waits else "")
        step = step._replace(command=command)
        if request.engine == choice.VLLM:
            choice.refuse_in_vllm(settings.dtype, settings.applied_positions)
            step = step._replace(engine=request.engine)
        steps.append(step._replace(origin=found.origin, outputs=tuple(verb.outputs(store, step))))
    return steps


def refuse_prompts(request: Request) -> None:
    """Raises UserError where no verb of the request takes prompts as baselines, or another program makes the texts."""
    if not any(VERBS[name].prompts for name in MODES[request.mode]):
        have = ", ".join(mode for mode, names in MODES.items() if any(VERBS[name].prompts for name in names))
        raise UserError(f"--prompt_baseline goes with --mode {have}; spilt table --prompt_baseline measures the losses behind prompts")
    if request.engine == choice.VLLM:
        raise UserError(f"--prompt_baseline: texts behind a prompt are not made by {choice.VLLM}; make them without --engine {choice.VLLM}")


def _behind(request: Request, store: Store, verb: Verb, like: Wanted, data: dict[str, Path], model: Path, prompt: Prompt) -> Step:
    """The step of the unsteered model behind a prompt, with the settings of a cell that it stands beside."""
    given = with_own(request.overrides, like.method, None, like.layers)
    found = verb.settings(replace(request, overrides=given), like.method, like.form)
    cell = Cell(request.model, request.dataset, PROMPT, prompt.name, ())
    notes = tuple(found.unused)
    step = Step(verb.name, (cell,), found.settings, found.files, model, data, (), (), "", (0.0,), notes=notes, prompt=prompt)
    step = verb.filled(step, request, store)
    command = f"{_command(request, verb, (cell,), like, (), '')} --prompt_baseline {_quoted(prompt.word)}"
    return step._replace(command=command, origin=found.origin, outputs=tuple(verb.outputs(store, step)))


def _command(request: Request, verb: Verb, group: tuple[Cell, ...], wanted: Wanted, multipliers: tuple[float, ...], word: str) -> str:
    """word: of --multipliers."""
    model = request.model_said or request.model
    words = [*_program(request), "--dataset", request.dataset, "--method", wanted.method, "--model_name", model]
    words += ["--intervention_method", wanted.form, "--mode", verb.mode, "--device", request.device, "--base_dir", str(request.base_dir)]
    if not verb.fits and (multipliers or word):
        words += ["--multipliers", *([] if word == SWEEP else map(str, multipliers)), *([word] if word else [])]
    if wanted.layers is not None:
        words += ["--layers", "+".join(map(str, wanted.layers))]
    if group[0].seed is not None:
        words += ["--seeds", str(group[0].seed)]
    if group[0].concept is not None:
        words += ["--concepts", *(str(cell.concept) for cell in group)]
    return " ".join(map(_quoted, [*words, *request.flags]))


def _program(request: Request) -> list[str]:
    """The words before the flags; of a model in parts with the launcher: as many processes as now, else one for each card."""
    words = request.program.split()
    if not request.tensor_parallel:
        return words
    count = str(place()[1]) if place()[1] > 1 else "2" if request.device == "cpu" else "gpu"
    return ["torchrun", "--nproc_per_node", count, *(words[1:] if words[0] == "python" else ["-m", *words])]


def _quoted(word: str) -> str:
    """For the shell, on one line: a line break in a system prompt is written as $'\\n', since raw it would not be shown."""
    if printable(word) == word:
        return shlex.quote(word)
    return "$'" + printable(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


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
