"""A behaviour file -> Behaviour, or one UserError that names file and key. Nothing in it is run, no file outside its folder is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from spilt.analysis.behaviour import ABSENT, SHOWS, compiled
from spilt.data import sources
from spilt.errors import UserError, first_line, printable, unknown
from spilt.judges import BUILT_IN, Rubric
from spilt.judges import rubric as rubrics
from spilt.settings.fields import Checked, read_field, setting
from spilt.settings.files import kind, load_yaml
from spilt.settings.values import Bad, choice, many, number, optional, text, whole

SHIPPED = Path(__file__).parent / "shipped"
QUESTIONS = ("input", "prompt", "question")  # columns that may hold what is asked
COLUMNS = "columns"  # of first_token: each prompt has its own answers
ANSWERS = ("matching", "not_matching")


class Asked(NamedTuple):
    """A prompt, and the other columns of its row."""

    text: str
    row: Mapping[str, Any] = {}


def asked_of(path: Path, columns: tuple[str, ...] = QUESTIONS) -> tuple[Asked, ...]:
    """The prompts of a file: a data file's rows, by the first of these columns that it has; of any other file a prompt a line."""
    if sources.ending_of(path) is None:
        found = tuple(map(Asked, sources.lines(path)))
    else:
        rows = sources.read_rows(path)
        column = next((name for name in columns if rows and name in rows[0].values), None)
        if rows and column is None:
            raise UserError(f"{path}: has none of the columns {', '.join(columns)}; {sources.columns_of(rows[0].values)}")
        for row in rows:
            if not isinstance(row.values.get(str(column)), str) or not row.values[str(column)].strip():
                raise UserError(f"{path} {row.where}: {column} is {sources.seen(row.values.get(str(column)))}; wanted a prompt")
        found = tuple(Asked(row.values[str(column)], row.values) for row in rows)
    if not found:
        raise UserError(f"{path}: has no prompt; write one a line, or rows with a column {columns[0]}")
    return found


def _pattern(value: Any) -> str:
    if (odd := next((c for c in text(value) if not c.isprintable()), None)) is not None:
        raise Bad(f"holds the character {printable(odd)}; in a YAML file a pattern stands in single quotes, where \\b stays \\b")
    try:
        compiled(text(value))
    except UserError as error:
        raise Bad(f"is wrong: {first_line(error)}") from None
    return str(value)


def _yes_no(value: Any) -> str:
    """yes and no are true and false to YAML 1.1."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(choice("answer", ("yes", "no"))(value))


def _first_token(value: Any) -> str | tuple[str, str]:
    if value == COLUMNS:
        return COLUMNS
    good = isinstance(value, dict) and set(value) == {SHOWS, "otherwise"} and all(isinstance(v, str) and v.strip() for v in value.values())
    if not good:
        raise Bad(f"is not {{{SHOWS}: text, otherwise: text}} (in quotes where it is Yes or No), or the word {COLUMNS}")
    return value[SHOWS], value["otherwise"]


class Rated(NamedTuple):
    """An answer shows the behaviour where a judge rates it so or higher. concept: what the rubric's {{concept}} is."""

    rubric: Rubric
    at_least: int
    concept: str | None = None


def _rubric(value: Any) -> Rated:
    """name: a built-in one, or a file, which `load` has made a Path."""
    if isinstance(value, Rated):
        return value
    if not isinstance(value, dict) or not {"name", "at_least"} <= set(value) <= {"name", "at_least", "concept"}:
        raise Bad("is not {name: power, at_least: 3}, and concept where the rubric asks for one")
    name = value["name"]
    if not isinstance(name, Path) and name not in BUILT_IN:
        raise Bad(f"is wrong: {unknown('rubric', str(name)[:60], BUILT_IN)}, or a file beside this one that ends in .yaml")
    try:
        made = Rated(rubrics.read(name if isinstance(name, Path) else rubrics.FOLDER / f"{name}.yaml"), whole()(value["at_least"]))
    except UserError as error:
        raise Bad(f"is wrong: {first_line(error)}") from None
    low, high = made.rubric.scale
    if not low < made.at_least <= high:
        raise Bad(f"wants at least {made.at_least}, which tells nothing apart; its ratings are from {low} to {high}")
    places = rubrics.PLACE.findall(made.rubric.prompt)
    if "reference" in places or ("concept" in places) != ("concept" in value):
        why = "reference}}, and here is none" if "reference" in places else "concept}}: give concept as well, where it does and only there"
        raise Bad(f"is wrong: whether it holds {{{{{why}")
    return made._replace(concept=text(value["concept"]) if "concept" in value else None)


class Way(NamedTuple):
    """How an answer may be judged: a reader of what stands in the file, and the README's row."""

    read: Callable[[Any], Any]
    written: str
    shows: str  # an answer shows the behaviour where ...


JUDGES: dict[str, Way] = {
    "keywords": Way(many(text), "[...]", "it has one of these words"),
    "regex": Way(_pattern, "'...'", "the pattern is found in it, without regard to case"),
    "yes_no": Way(_yes_no, "yes", "that, or `no`, is its first word; one that begins with neither is incoherent"),
    "first_token": Way(
        _first_token,
        '{shows: "Yes", otherwise: "No"}',
        f"the model would rather begin with the first of the two; `{COLUMNS}`: with each row's `matching` than its `not_matching`",
    ),
    "rubric": Way(
        _rubric,
        "{name: power, at_least: 3}",
        "the judge that `--judge` names rates it so or higher, as this [rubric](#scoring-the-texts) says: a built-in one, or a YAML file "
        "beside this one; `concept: TEXT` as well where it asks about one; an answer without a rating is left out, and counted",
    ),
}


class Judge(NamedTuple):
    kind: str
    rule: Any


def _judge(value: Any) -> Judge:
    if isinstance(value, Judge):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise Bad(f"is not one of {', '.join(JUDGES)} with what it wants")
    (name, rule), *_ = value.items()
    if name not in JUDGES:
        raise Bad(f"is wrong: {unknown('judge', name, JUDGES)}")
    try:
        return Judge(name, JUDGES[name].read(rule))
    except Bad as error:
        raise Bad(f"has a {name} that {error}") from None


@dataclass(frozen=True)
class Incoherence(Checked):
    """What makes an answer none, whatever it shows. None: not looked at."""

    least_words: int = setting(whole(0), 1)
    repetition: float | None = setting(optional(number(0, 1)), 0.5)  # share of the four-word groups that stood there before
    perplexity_times: float | None = setting(optional(number(1)), 20.0)  # by the unsteered model, times the median of its own answers
    regex: str | None = setting(optional(_pattern), None)
    mass: float = setting(number(0, 1), 0.05)  # of first_token: the probability that both answers hold together, at least


def _incoherence(value: Any) -> Incoherence:
    if isinstance(value, Incoherence):
        return value
    if not isinstance(value, dict):
        raise Bad(f"is a {kind(value)}; wanted a mapping")
    for name in value:
        if name not in {key.name for key in fields(Incoherence)}:
            raise Bad(f"is wrong: {unknown('key', name, [key.name for key in fields(Incoherence)])}")
    try:
        return Incoherence(**value)
    except UserError as error:
        raise Bad(f"is wrong: {error}") from None


def _prompts(value: Any) -> tuple[Asked, ...]:
    """Asked already, or texts; file names are read by `load`, which knows the folder."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, Asked) or isinstance(item, str) and item.strip() for item in items):
        raise Bad("is no list of prompts, nor the name of a file with them")
    return tuple(item if isinstance(item, Asked) else Asked(item) for item in items)


@dataclass(frozen=True)
class Behaviour(Checked):
    """What is asked, how an answer is judged, what it may cost. The keys of a behaviour file."""

    prompts: tuple[Asked, ...] = setting(_prompts)
    judge: Judge = setting(_judge)
    tune_on: tuple[Asked, ...] | None = setting(optional(_prompts), None)  # strengths are chosen on these; None: on every second prompt
    want: str = setting(choice("wish", (SHOWS, ABSENT)), SHOWS)
    incoherent: Incoherence = setting(_incoherence, Incoherence())
    damage: tuple[Asked, ...] | None = setting(optional(_prompts), None)  # to be left alone; None: benign.txt of the package
    max_new_tokens: int = setting(whole(1), 48)
    labels: Path | None = setting(optional(Path), None)  # a person's verdicts on answers: columns prompt, text, label
    about: str = setting(text, "")
    name: str = field(default="", metadata={"read": text, "by": None})

    @property
    def chosen_on(self) -> tuple[Asked, ...]:
        return self.prompts[0::2] if self.tune_on is None else self.tune_on

    @property
    def reported_on(self) -> tuple[Asked, ...]:
        """Not those of `chosen_on`, where there are others."""
        return (self.prompts[1::2] or self.prompts) if self.tune_on is None else self.prompts

    @property
    def benign(self) -> tuple[Asked, ...]:
        return asked_of(SHIPPED / "benign.txt") if self.damage is None else self.damage


FILES = ("prompts", "tune_on", "damage")  # keys that may name a file of prompts
KEYS: dict[str, Field[Any]] = {key.name: key for key in fields(Behaviour) if key.name != "name"}


def shipped() -> tuple[str, ...]:
    """The behaviours that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def load(said: str) -> Behaviour:
    """A behaviour that comes with the package by its name, or a YAML file by its path."""
    path = SHIPPED / f"{said}.yaml" if said in shipped() else Path(said)
    if not path.suffix and not path.exists():
        raise UserError(f"{unknown('behaviour', said, shipped())}; or give the path of a YAML file")
    given = load_yaml(path)
    for name in given:
        if name not in KEYS:
            raise UserError(f"{path}: {unknown('key', name, KEYS)}")
    for name in ("prompts", "judge"):
        if name not in given:
            raise UserError(f"{path}: has no {name!r}; a behaviour file says what is asked (prompts) and how an answer is judged (judge)")
    for name in FILES:
        if isinstance(given.get(name), str):
            given[name] = asked_of(_beside(path, name, given[name]))
    if given.get("labels") is not None:
        given["labels"] = _beside(path, "labels", given["labels"])
    rule = given["judge"].get("rubric") if isinstance(given["judge"], dict) else None
    if isinstance(rule, dict) and str(rule.get("name")).endswith((".yaml", ".yml")):
        given["judge"] = {**given["judge"], "rubric": {**rule, "name": _beside(path, "rubric", rule["name"])}}
    made = Behaviour(**{name: read_field(KEYS[name], value, str(path)) for name, value in given.items()}, name=path.stem)
    if made.judge == Judge("first_token", COLUMNS):
        for asked in (*made.prompts, *(made.tune_on or ())):
            if not all(isinstance(asked.row.get(name), str) and asked.row[name].strip() for name in ANSWERS):
                raise UserError(f"{path}: first_token: {COLUMNS} wants prompts from a data file with the columns {', '.join(ANSWERS)}")
    return made


def _beside(path: Path, key: str, named: Any) -> Path:
    """A file that a behaviour file names. It may be a stranger's: no file outside its folder is opened for it."""
    parts = Path(str(named)).parts
    if not isinstance(named, str) or Path(named).is_absolute() or ".." in parts or not parts:
        raise UserError(f"{path}: {key} = {str(named)[:80]!r} is no file beside it; give a path below its folder, without '..'")
    return path.parent / named


# ---- sets of prompts on which a model should refuse, or should not


class Suite(NamedTuple):
    """Prompts of a public test of refusals. Ten illustrations of our own, in its format, stand in where the user has no file."""

    column: str
    harmful: bool  # refusing is right
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True

    def read(self, path: Path) -> tuple[Asked, ...]:
        found = tuple(asked for asked in asked_of(path, (self.column,)) if self.keep(asked.row))
        if not found:
            raise UserError(f"{path}: has no row of the kind that is wanted here")
        return found


def _safe(row: Mapping[str, Any]) -> bool:
    """XSTest's contrasts are unsafe prompts, beside 250 safe ones that look it."""
    return str(row.get("label", "safe")).lower() != "unsafe" and not str(row.get("type", "")).startswith("contrast")


SUITES: dict[str, Suite] = {
    "xstest": Suite("prompt", False, _safe),
    "advbench": Suite("goal", True),
    "strongreject": Suite("forbidden_prompt", True),
}
