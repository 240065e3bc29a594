"""From the folder of YAML files to the settings of one cell and verb.

A later layer goes before an earlier one: released defaults < global file(s) < the cell's file < overrides of the command line.
A key with no value (`lr:`) counts as not given, unless nothing is one of its meanings (`max_num_of_examples:` = all).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spilt.cell import FORMS
from spilt.errors import Mistakes, UserError, unknown
from spilt.settings.fields import OWN_DEFAULTS, Common, GenerateSettings, GenerationParams, intervention_name, method_name, read_field
from spilt.settings.files import is_own, kind, load_yaml, parse_yaml, tree_of, trees
from spilt.settings.keys import FIELDS, IGNORED_KEYS, IGNORED_PARAMS, KEY_ALIASES, KNOWN, PARAM_ALIASES, PARAMS, SECTIONS, SETTINGS
from spilt.settings.values import Bad, text

ROOT = Path("hparams/Steer/experiment_hparams/spilt_experiment")
COMMAND_LINE = "command line"
# what a file says that stands in for one that is not there: where it acts and on what; not how another method is trained, nor strengths
STANDS_IN = {key.name for kind in (Common, GenerateSettings) for key in fields(kind)} - {"method", "intervention_method", "multipliers"} | {
    "output_length",
    "max_num_of_examples",
    "multiple_choice",
}


class Unused(NamedTuple):
    """A key without effect: where it stands, and why it has none."""

    where: str
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key} has no effect: {self.why}"


class Resolved(NamedTuple):
    """`settings`: those of the verb; `files`: read, in order; `unused`: the keys without effect.

    `origin`: where they come from instead, for a base folder without settings files; else ''.
    """

    settings: Any
    files: tuple[Path, ...]
    unused: tuple[Unused, ...]
    origin: str = ""


def expected_hparam_files(base_dir: Path | str, dataset: str, model: str, method: str, intervention: str, verb: str) -> list[Path]:
    """The names under which a cell's file for fit, generate or measure is looked for, best first."""
    if verb not in SETTINGS:
        raise ValueError(f"no verb {verb!r}; have {', '.join(SETTINGS)}")  # a programming error
    method, intervention = method_name(method), intervention_name(intervention)
    if verb == "measure":
        folder, names = "sft", ["generate_sft_loss.yaml"]
    elif verb == "generate":
        folder, names = method, [f"apply_{method}.yaml", "apply.yaml"]
    else:
        folder, names = method, [f"generate_{method}_{intervention}.yaml"]
        if intervention == "local_weight":
            names.append(f"generate_{method}_weight.yaml")
        if (method, intervention) == ("caa", "vector"):
            names.append("generate_caa.yaml")
    return [Path(base_dir) / ROOT / dataset / model / folder / name for name in names]


def hparam_file(base_dir: Path | str, dataset: str, model: str, method: str, intervention: str, verb: str) -> Path | None:
    """The first of the expected files that exists."""
    return next((path for path in expected_hparam_files(base_dir, dataset, model, method, intervention, verb) if _is_file(path)), None)


def known(base_dir: Path) -> dict[tuple[str, str], Path]:
    """(dataset, model) -> the folder of its settings, of base_dir and of what comes with the package; base_dir goes before."""
    folders = [folder for base in reversed(trees(base_dir)) for folder in sorted((base / ROOT).glob("*/*")) if folder.is_dir()]
    return {(folder.parent.name, folder.name): folder for folder in folders if next(folder.rglob("*.yaml"), None)}


def resolve(
    verb: str,
    base_dir: Path | str,
    model: str,
    dataset: str,
    method: str,
    intervention: str,
    overrides: Mapping[str, Any] | None = None,
    layers: Sequence[int] = (),
    own: bool = False,
    device: str = "",
    like: Sequence[tuple[str, str]] = (),
) -> Resolved:
    """The settings of a cell and verb: global file < the cell's file < overrides.

    fit: config.yaml < generate_{method}_{intervention}.yaml. measure: config.yaml < sft/generate_sft_loss.yaml < layers of the fit.
    generate: apply_config.yaml < apply_{method}.yaml; layers left out there are those of the fit.
    layers: those of a cell for which there are no files at all, nor a word of the command line. own: the data are files of the user's own,
    which need no settings files. device: a CPU's dtype is float32 where nobody says another: few have the released bfloat16's arithmetic.
    like: (method, form) whose files say where this one acts where it has none (methods.stand_ins).
    """
    stack = _Stack(verb, base_dir, model, dataset, method, intervention, own)
    stack.layers, stack.device, stack.like = tuple(layers), device, like
    stack.add_globals("apply_config.yaml" if verb == "generate" else "config.yaml")
    stack.add_cell()
    if verb == "measure":
        stack.add_fitted_layers()
    stack.add_overrides(overrides)
    if verb == "generate" and "layers" not in stack.values:
        stack.add_fitted_layers()
    return stack.resolve()


resolve_fit, resolve_generate, resolve_measure = partial(resolve, "fit"), partial(resolve, "generate"), partial(resolve, "measure")


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`--set key=value` -> {key: value}; the value is YAML, lists also as `1,2`; `generation_params.top_p=.9` sets one entry."""
    out: dict[str, Any] = {}
    mistakes = Mistakes()
    for item in items:
        with mistakes.each():
            _override(item, out)
    mistakes.tell()
    return out


def _override(item: str, out: dict[str, Any]) -> None:
    """One `key=value` into `out`."""
    key, equals, value = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {item}: wanted key=value, such as --set lr=0.01")
    key, _, entry = key.partition(".")
    key = _known(key, f"--set {item}", "")
    if key in ("method", "intervention_method"):
        raise UserError(f"--set {item}: is chosen with --{key}")
    if entry and key != "generation_params":
        raise UserError(f"--set {item}: {key} has no entries")
    if not entry:
        out[key] = _from_text(key, value)
        return
    merged = out.get(key)
    out[key] = {**(merged if isinstance(merged, dict) else {}), entry: parse_yaml(value, f"--set {item}")}
    wrong = Mistakes()
    _params(out[key], COMMAND_LINE, [], wrong)
    wrong.tell()


class _Stack:
    """The layers of one resolution, laid one over the other: `values` holds what has been read and checked so far."""

    def __init__(self, verb: str, base_dir: Path | str, model: str, dataset: str, method: str, intervention: str, own: bool) -> None:
        self.verb, self.asked, self.model, self.dataset = verb, Path(base_dir), model, dataset
        self.base_dir = tree_of(self.asked, ROOT)
        self.own = own or is_own(self.asked, dataset)
        self.without_files = self.own or self.base_dir != self.asked
        self.method, self.intervention = method_name(method), intervention_name(intervention)
        self.values: dict[str, Any] = {}
        self.files: list[Path] = []
        self.unused: list[Unused] = []
        self.mistakes = Mistakes()  # of all files, told together
        self.cell_file: Path | None = None
        self.like: Sequence[tuple[str, str]] = ()
        self.stands_in: Path | None = None
        self.given: Collection[str] = ()  # keys of the command line
        self.layers: tuple[int, ...] = ()  # where nobody says them
        self.device = self.cpu = ""  # the second: what a CPU changes in the defaults, in words
        self.overridden = ""  # for messages about values that come together from several places

    def add_globals(self, name: str) -> None:
        """The global file, then axbench's own; both may be absent."""
        names = [name, "axbench/axbench_config.yaml"] if self.dataset == "axbench" else [name]
        for path in (self.base_dir / ROOT / name for name in names):
            if path.exists():
                given = self._read(path)
                for key in ("method", "intervention_method"):
                    given.pop(key, None)  # of one cell; means nothing for all
                self._lay(given, str(path))

    def add_cell(self) -> None:
        """The cell's own file. A fit file that names another method or form is refused; elsewhere the path decides, and it is said."""
        self.cell_file = path = hparam_file(self.base_dir, self.dataset, self.model, self.method, self.intervention, self.verb)
        if path is None and (other := self._stand_in(self.verb)):
            self.stands_in = other
            return self._lay({key: value for key, value in self._read(other).items() if key in STANDS_IN}, str(other))
        if path is None and self.without_files:  # the defaults of fields.py, which are those of the released code
            if self.device == "cpu" and (self.base_dir != self.asked or "dtype" not in self.values):
                self.values["dtype"], self.cpu = "float32", " in float32"
            return
        if path is None:
            raise self._missing()
        given = self._read(path)
        for key, asked in (("method", self.method), ("intervention_method", self.intervention)):
            found = given.pop(key, None)
            if found is None:
                continue
            found = read_field(KNOWN[key], found, str(path))
            if found == asked or self.verb == "measure":  # one loss file serves every method
                continue
            if self.verb == "fit":
                raise UserError(f"{path}: is for {key} {found!r}, but its place is that of {asked!r}; move the file, or correct the key")
            if key == "method":  # one apply file serves every form, so its form says nothing
                self.unused.append(Unused(str(path), f"alg_name = {found}", f"the file lies where {asked} is looked for"))
        self._lay(given, str(path))

    def _stand_in(self, verb: str) -> Path | None:
        cells = ((self.base_dir, self.dataset, self.model, method, form) for method, form in self.like)
        return next((path for cell in cells if (path := hparam_file(*cell, verb))), None)

    def add_fitted_layers(self) -> None:
        """The layers that the cell was, or would be, fitted at."""
        path = hparam_file(self.base_dir, self.dataset, self.model, self.method, self.intervention, "fit") or self._stand_in("fit")
        if path is not None:
            self._lay({"layers": self._read(path, "fit").get("layers")}, str(path))

    def add_overrides(self, overrides: Mapping[str, Any] | None) -> None:
        given = _canonical(overrides or {}, COMMAND_LINE, self.unused, self.mistakes)
        for key in ("method", "intervention_method"):
            given.pop(key, None)
        self.given = given
        self.cpu = "" if "dtype" in given else self.cpu
        if given:
            self.overridden = " with the settings of the command line"
        self._lay({key: _from_text(key, value) if isinstance(value, str) else value for key, value in given.items()}, COMMAND_LINE)

    def resolve(self) -> Resolved:
        self.mistakes.tell()
        if self.layers and self.without_files:
            self.values.setdefault("layers", self.layers)
        where = f"{self.files[-1]}{self.overridden}" if self.files else COMMAND_LINE
        if "layers" not in self.values:
            raise UserError(f"{where}: layers is missing; add the 0-based decoder blocks, such as `layers: [20]`")
        values = {**self.values, "method": self.method, "intervention_method": self.intervention}
        try:
            if "generation_params" in values:
                values["generation_params"] = GenerationParams(**values["generation_params"])
            settings: Any = SETTINGS[self.verb](**values)
        except UserError as error:  # two values that do not go together
            raise UserError(f"{where}: {error}") from None
        return Resolved(settings, tuple(self.files), tuple(dict.fromkeys(self.unused)), self._origin(settings.layers))

    def _origin(self, layers: Sequence[int]) -> str:
        if self.stands_in:
            return f"{self.method} {self.intervention} has no settings of its own: {self.stands_in} says where it acts; else defaults"
        if self.own and self.cell_file is None:
            at = "" if "layers" in self.given else f" (layer {', '.join(map(str, layers))})"
            if self.method in OWN_DEFAULTS:
                return f"{self.dataset} has no settings file of {self.method}, so its defaults{self.cpu}{at}; --set KEY=VALUE changes them"
            return f"{self.dataset} has no settings files, so the released defaults{self.cpu}{at}; --set KEY=VALUE changes them"
        if self.base_dir == self.asked:
            return ""
        there = (self.base_dir / ROOT / self.dataset / self.model).is_dir()
        what = "the settings that come with spilt" if there else f"the released defaults{self.cpu}; --set KEY=VALUE changes them"
        return f"{self.asked / ROOT} does not exist, so {what} (layer {', '.join(map(str, layers))})"

    def _read(self, path: Path, verb: str = "") -> dict[str, Any]:
        """The file's keys for a verb: the shared ones, with those of the verb's section over them."""
        content = load_yaml(path)
        self.files.append(path)
        sections = {name: content.pop(name) for name in SECTIONS if name in content}
        given = _canonical(content, str(path), self.unused, self.mistakes)
        for name, section in sections.items():
            if section is None:
                continue
            if not isinstance(section, dict):
                raise UserError(f"{path}: the section {name} holds a {kind(section)}; wanted `key: value` lines under it")
            inner = _canonical(section, f"{path}, section {name}", self.unused, self.mistakes)  # a misspelt key is an error in any section
            if SECTIONS[name] == (verb or self.verb):
                given |= inner
        return given

    def _lay(self, given: Mapping[str, Any], where: str) -> None:
        for name, value in given.items():
            with self.mistakes.each():
                self._lay_one(name, value, where)

    def _lay_one(self, name: str, value: Any, where: str) -> None:
        key = FIELDS[self.verb].get(name)
        if key is None and where != COMMAND_LINE:  # of another verb
            return
        if value is None and not _may_be_none(KNOWN[name]):
            return
        if name == "multipliers" and isinstance(value, dict):  # ours: a vector and a weight update live on different scales
            value = self._of_form(value, where)
            if value is None:
                return
        if name == "generation_params":
            value = {**self.values.get(name, {}), **_params(value, where, self.unused, self.mistakes)}
        else:
            value = read_field(KNOWN[name], value, where)
        if key is not None:  # what has no effect here is read too: no reason to take what it cannot mean
            self.values[name] = value

    def _of_form(self, by_form: dict[str, Any], where: str) -> Any:
        """This form's entry of `multipliers: {vector: [...], lora: [...]}`; None when it has none."""
        for form in by_form:
            if form not in FORMS:
                raise UserError(f"{where}: multipliers: {unknown('intervention_method', str(form), FORMS)}")
        return by_form.get(self.intervention)

    def _missing(self) -> UserError:
        wanted = expected_hparam_files(self.base_dir, self.dataset, self.model, self.method, self.intervention, self.verb)
        names = " or ".join([str(wanted[0]), *(path.name for path in wanted[1:])])
        folder = wanted[0].parent
        while folder != self.base_dir and not folder.is_dir():
            folder = folder.parent
        level = {
            self.base_dir / ROOT: "settings exist for the datasets",
            self.base_dir / ROOT / self.dataset: f"{self.dataset} has settings for the models",
            self.base_dir / ROOT / self.dataset / self.model: f"{self.dataset} {self.model} has settings for",
            wanted[0].parent: "the folder has",
        }.get(folder)
        if level is None:
            return UserError(f"no hparam file {names}: {self.base_dir / ROOT} does not exist; is --base_dir right?")
        like = sorted(path.name for path in folder.glob(f"{wanted[0].stem}*.yaml")) if folder == wanted[0].parent else []
        if like:
            return UserError(f"no hparam file {names}; the folder has {', '.join(like)}: rename it to {wanted[0].name} if it is meant")
        yaml_only = folder == wanted[0].parent
        there = sorted(entry.name for entry in folder.iterdir() if (entry.suffix == ".yaml" if yaml_only else entry.is_dir()))
        said = f"no hparam file {names}; {level}: {', '.join(there) or 'none'}"
        inside = [path.relative_to(self.base_dir / ROOT / self.dataset / self.model) for path in wanted]
        usable = [pair for pair, where in known(self.asked).items() if any((where / name).is_file() for name in inside)]
        if not usable:
            return UserError(f"{said}; copy one and adapt it")
        best = max(usable, key=lambda pair: (pair[0] == self.dataset, pair[1] == self.model))
        at = " ".join(map(str, self.layers or (14,)))
        command = f"spilt settings --like {'/'.join(best)} --for {self.dataset}/{self.model} --layers {at}"
        return UserError(f"{said}; `{command} --base_dir {shlex.quote(str(self.asked))}` makes one")


def _canonical(content: Mapping[str, Any], where: str, unused: list[Unused], mistakes: Mistakes) -> dict[str, Any]:
    """Keys under their own names; those without effect are told and left out; unknown ones are an error."""
    out: dict[str, Any] = {}
    source: dict[str, str] = {}
    for key, value in content.items():
        if key in IGNORED_KEYS:
            unused.append(Unused(where, key, IGNORED_KEYS[key]))
            continue
        with mistakes.each():
            name = _known(key, where, "hparam ")
            if name in out and out[name] is not None and value is not None and out[name] != value:
                raise UserError(f"{where}: {source[name]} = {out[name]} and {key} = {value} are the same setting; keep one of them")
            if out.get(name) is None:
                out[name], source[name] = value, key
    return out


def _known(key: str, where: str, what: str) -> str:
    name = KEY_ALIASES.get(key, key)
    if name in KNOWN:
        return name
    if key in IGNORED_KEYS:
        raise UserError(f"{where}: {key} has no effect: {IGNORED_KEYS[key]}")
    raise UserError(f"{where}: {unknown(f'{what}key', str(key), [*KNOWN, *KEY_ALIASES, *SECTIONS] if what else KNOWN)}")


def _params(value: Any, where: str, unused: list[Unused], mistakes: Mistakes) -> dict[str, Any]:
    """The entries of generation_params, checked one by one."""
    if isinstance(value, GenerationParams):
        return dict(vars(value))
    if not isinstance(value, dict):
        raise UserError(f"{where}: generation_params holds a {kind(value)}; wanted `key: value` lines such as `max_new_tokens: 128`")
    out: dict[str, Any] = {}
    for key, item in value.items():
        if key in IGNORED_PARAMS:
            unused.append(Unused(where, f"generation_params.{key}", IGNORED_PARAMS[key]))
            continue
        with mistakes.each():
            field = PARAMS.get(PARAM_ALIASES.get(str(key), str(key)))
            if field is None:
                raise UserError(f"{where}: {unknown('hparam key in generation_params', str(key), PARAMS)}")
            if item is not None or _may_be_none(field):
                out[field.name] = read_field(field, item, f"{where}: generation_params")
    return out


def _may_be_none(key: Any) -> bool:
    try:
        key.metadata["read"](None)
    except Bad:
        return False
    return True


def _from_text(key: str, value: str) -> Any:
    """What a value typed on the command line means to a key: text as it is, a list with or without brackets, else YAML."""
    key = KEY_ALIASES.get(key, key)
    if KNOWN[key].metadata["read"] is text or value == "":
        return value
    if "tuple" in str(KNOWN[key].type) and not value.lstrip().startswith("["):
        value = f"[{value}]"
    return parse_yaml(value, f"{COMMAND_LINE}: {key}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False
