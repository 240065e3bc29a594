"""hparams/Steer/dataset_format.yaml and the data files that it names, read as pairs and prompts.

Every mistake in a file is one UserError with the file, the line (or the row, in parquet) and the columns found.
Text is kept exactly: leading spaces of answers matter, 'NA' and 'None' are answers, not missing values.
No torch and no transformers here, and pyarrow only when a parquet file is opened: a dry run starts at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from spilt.data.chat import SYSTEM, Conversation, Question
from spilt.data.sources import Record, columns_of, ending_of, read, seen
from spilt.errors import Mistakes, UserError, half_pair, unknown
from spilt.settings.files import DATA, is_own

FORMATS_FILE = Path("hparams/Steer/dataset_format.yaml")
ENTRY_KEYS = ("file_path", "field_names", "multi_concept", "keywords")
UNUSED_ENTRY_KEYS = ("hf_path", "n_shots")  # of the released file; they say nothing about pairs and prompts
PAIR_FIELDS = ("question", "matching", "not_matching")
PROMPT_FIELDS = ("input", "reference_response")
SIDES = ("positive", "negative")
CONTRAST = tuple(f"{field}_{side}" for field in ("question", SYSTEM) for side in SIDES)  # in place of question, or of system
ASKED = (SYSTEM, *CONTRAST)  # columns that a row may have: its own system prompt, and prompts that are compared
CONCEPT_FIELDS = ("output_concept", "concept_id", "concept_genre", "category")
EVAL_FIELDS = ("input", "output_concept", "concept_id", "concept", "concept_genre", "category")  # of eval_data, in the released order
UNUSED_FIELDS = ("concept", "text", "label", "choices")  # of the released file; `concept` is a second name of output_concept there
FIELDS = (*PAIR_FIELDS, *PROMPT_FIELDS, *ASKED, *CONCEPT_FIELDS, *UNUSED_FIELDS)
# section of dataset_format.yaml -> standard fields that a row of it has
SECTIONS = {"train": PAIR_FIELDS, "valid": PAIR_FIELDS, "generation": PROMPT_FIELDS, "neutral": PROMPT_FIELDS}
# (dataset, section) -> the entry that goes before its own: the released scripts read `--dataset axbench` from these, and the
# released entries named `axbench` are of another experiment
FIRST_ENTRY = {("axbench", "train"): "axbench_train", ("axbench", "generation"): "axbench_test"}


class DatasetFormat(NamedTuple):
    """One entry of dataset_format.yaml: where the rows of a dataset lie and what their columns are called."""

    dataset: str
    section: str  # of SECTIONS
    path: Path  # file_path, below base_dir unless it is absolute
    field_names: Mapping[str, str]  # standard name -> the file's column; a name left out is its own column
    multi_concept: bool  # one intervention per concept_id (axbench)
    keywords: tuple[str, ...] = ()  # of `generation`: words by which a person sees the trait in an answer
    named: bool = False  # ASKED are read only where field_names has them: a file of dataset_format.yaml may call something else so

    def column(self, field: str) -> str:
        """The file's column for a standard name."""
        return self.field_names.get(field, field)


class Contrast(NamedTuple):
    """Two questions in place of one: what differs is how it is asked, or by whom (the system prompt)."""

    positive: Question
    negative: Question


class Pair(NamedTuple):
    """A question with its winning (`matching`) and losing (`not_matching`) answer, of one concept."""

    question: Question | Contrast
    matching: str  # "": the row has none, neither has any other
    not_matching: str
    concept_id: int | None
    concept: str | None
    row: int  # 0-based row in the file

    @property
    def questions(self) -> tuple[Question, Question]:
        """Of the matching and of the not-matching answer."""
        return (self.question.positive, self.question.negative) if isinstance(self.question, Contrast) else (self.question, self.question)

    @property
    def sides(self) -> tuple[tuple[Question, str], tuple[Question, str]]:
        """Sequences 2 i and 2 i + 1 of the engine: of one-sided rows the one answer twice, where a method reads one of them."""
        one, other = self.questions
        return (one, self.matching), (other, self.not_matching or self.matching)

    @property
    def kind(self) -> str:
        """What can be done with such rows (Verb.refuses)."""
        if isinstance(self.question, Contrast):
            return CONTRASTS if self.matching else BARE_CONTRASTS
        return (PAIRS if self.not_matching else ONE_SIDED) if self.matching else QUESTIONS


PAIRS, ONE_SIDED, QUESTIONS = "pairs", "one-sided rows", "questions"  # two answers, a matching one, none
CONTRASTS, BARE_CONTRASTS = "contrasts", "contrasts without answers"  # of prompts


class Prompt(NamedTuple):
    """An input to generate from; `extra` has the row's other columns, as JSON values (with concepts, the released row first)."""

    input: Question
    reference_response: str | None
    concept_id: int | None
    concept: str | None
    row: int  # 0-based row in the file
    extra: dict[str, Any]


# ---- dataset_format.yaml ----


def load_formats(base_dir: Path) -> dict[str, dict[str, DatasetFormat]]:
    """All entries of `base_dir`/hparams/Steer/dataset_format.yaml: section -> dataset -> DatasetFormat.

    Raises UserError: no such file, not YAML, an unknown section or key, a dataset name that is no plain folder name.
    """
    raw = _sections(base_dir)
    return {
        section: {dataset: _format(base_dir, section, dataset, entry) for dataset, entry in raw[section].items()} for section in SECTIONS
    }


def dataset_format(base_dir: Path, dataset: str, section: str) -> DatasetFormat:
    """The entry of one dataset; other entries are not looked at, so a mistake in one dataset does not stop another.

    A missing `generation` entry is the `valid` one with input = question and reference_response = matching (of files of the user's
    own without held-out rows the `train` one).
    Raises UserError: unknown section or dataset (with those there are), or no entry in this section (with what to add).
    """
    if section not in SECTIONS:
        raise unknown("section", section, SECTIONS)
    raw = _sections(base_dir)
    entry = FIRST_ENTRY.get((dataset, section), dataset)
    if entry in raw[section]:
        return _format(base_dir, section, entry, raw[section][entry])._replace(dataset=dataset)
    if dataset in raw[section]:
        return _format(base_dir, section, dataset, raw[section][dataset])
    of_pairs = [name for name in ("valid", *(["train"] if is_own(base_dir, dataset) else [])) if dataset in raw[name]]
    if section == "generation" and of_pairs:
        return as_prompts(_format(base_dir, of_pairs[0], dataset, raw[of_pairs[0]][dataset]))
    file = formats_file(base_dir)
    there = sections_of(base_dir, dataset)
    if not there:
        said = f"{unknown('dataset', dataset, {name for entries in raw.values() for name in entries})} (in {file})"
        fields = ", ".join(SECTIONS["train"])
        plain = f"; or put {base_dir / DATA / dataset}/train.csv and test.csv there, with the columns {fields}"
        raise UserError(said + (plain if file != base_dir / FORMATS_FILE else ""))
    fields = ", ".join(f"{field}: <column>" for field in SECTIONS[section])
    raise UserError(
        f"dataset {dataset!r} has no {section!r} entry in {file} (it has: {', '.join(there)}); "
        f"add under '{section}:'\n  {dataset}: {{file_path: <file>, field_names: {{{fields}}}}}"
    )


def sections_of(base_dir: Path, dataset: str) -> tuple[str, ...]:
    """The sections of dataset_format.yaml that have an entry for a dataset, whatever is wrong with that entry or with others."""
    raw = _sections(base_dir)
    return tuple(name for name in SECTIONS if {dataset, FIRST_ENTRY.get((dataset, name), dataset)} & raw[name].keys())


def _sections(base_dir: Path) -> dict[str, dict[str, Any]]:
    """section -> dataset -> entry as written; every section is there, empty when the file lacks it."""
    from spilt.settings import load_yaml  # here, since reading data files needs no YAML

    file, plain = formats_file(base_dir), _plain_files(base_dir)
    raw = load_yaml(file) if file.exists() or not plain else {}
    mistakes = Mistakes()
    for section, entries in raw.items():
        with mistakes.each():
            if section not in SECTIONS:
                raise UserError(f"{unknown('section', str(section), SECTIONS)} (in {file})")
            if not isinstance(entries, dict | None):
                raise UserError(f"{file}: section {section!r} is {entries!r}; wanted 'dataset: {{file_path: ...}}' entries")
    if mistakes.said:  # whose entries stand there, nobody knows: told with what else is wrong in the file
        for section in SECTIONS:
            for name, entry in (raw[section] if isinstance(raw.get(section), dict) else {}).items():
                with mistakes.each():
                    _format(base_dir, section, str(name), entry)
    mistakes.tell()
    found = {section: {str(name): entry for name, entry in (raw.get(section) or {}).items()} for section in SECTIONS}
    for (section, name), paths in plain.items():  # which of several is meant, nobody has said: refused when asked for
        if file != base_dir / FORMATS_FILE or is_own(base_dir, name):
            found[section].setdefault(name, {"file_path": paths[0]} if len(paths) == 1 else f"one of {', '.join(paths)}")
    return found


def formats_file(base_dir: Path) -> Path:
    """The dataset_format.yaml that is read: where there is no hparams/Steer, the one that comes with the package."""
    from spilt.settings.files import tree_of

    return tree_of(base_dir, FORMATS_FILE.parent) / FORMATS_FILE


def _plain_files(base_dir: Path) -> dict[tuple[str, str], list[str]]:
    """(section, dataset) -> data/{dataset}/train.* or test.*: known without an entry where no dataset_format.yaml is, or own.py made it."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((base_dir / DATA).glob("*/*")):
        ending = ending_of(path) or path.suffix
        section = {"train": "train", "test": "valid"}.get(path.name.removesuffix(ending))
        if section is not None and ending_of(path):
            found.setdefault((section, path.parent.name), []).append(str(path.relative_to(base_dir)))
    return found


def _format(base_dir: Path, section: str, dataset: str, entry: Any) -> DatasetFormat:
    """Check one entry of dataset_format.yaml."""
    here = f"{formats_file(base_dir)}: {section}: {dataset}"
    # the name becomes a folder of vectors/ and generation/: it must stay in there
    if not re.fullmatch(r"[^\x00-\x1f/\\:]+", dataset) or dataset in (".", ".."):
        raise UserError(
            f"{here}: {dataset!r} can't be a dataset's name: it names folders, so no '/', '\\', ':', control character, '.' or '..'"
        )
    if not isinstance(entry, dict):
        raise UserError(f"{here}: {entry!r} is no entry; wanted the keys {', '.join(ENTRY_KEYS)}")
    wrong = [str(unknown("key", str(key), ENTRY_KEYS)) for key in entry if key not in (*ENTRY_KEYS, *UNUSED_ENTRY_KEYS)]
    file_path, names, multi = entry.get("file_path"), entry.get("field_names") or {}, entry.get("multi_concept") or False
    if not isinstance(file_path, str) or not file_path.strip() or "\0" in file_path:
        wrong.append(f"file_path is {file_path!r}; wanted the data file's path, absolute or from base_dir")
    if not isinstance(multi, bool):
        wrong.append(f"multi_concept is {multi!r}; wanted true or false")
    words = [] if (given := entry.get("keywords")) is None else given
    if not isinstance(words, list) or not all(isinstance(word, str) and re.fullmatch(r"\w+", word) for word in words):
        wrong.append(f"keywords is {seen(words)}; wanted a list of single words, such as [sea, boat]; quote a word such as 'yes'")
    elif words and section != "generation":
        wrong.append("keywords are looked for in generated texts; write them in the 'generation' section")
    if not isinstance(names, dict):
        wrong.append(f"field_names is {names!r}; wanted 'standard name: column' entries")
        names = {}
    for field, column in names.items():
        if not isinstance(field, str) or not isinstance(column, str | None):
            wrong.append(f"field_names has {field!r}: {column!r}; wanted a standard name and the file's column, both text")
        elif field not in FIELDS:
            wrong.append(str(unknown("field name", field, FIELDS)))
    if wrong:
        raise UserError("\n".join(f"{here}: {what}" for what in wrong))
    columns = {field: column for field, column in names.items() if column}  # null: the file has no such column
    return DatasetFormat(dataset, section, base_dir / str(file_path), columns, multi, tuple(words), not is_own(base_dir, dataset))


def as_prompts(valid: DatasetFormat) -> DatasetFormat:
    """An entry of pairs read as a `generation` entry: ask the question, keep the winning answer as the reference."""
    renamed = {"input": valid.column("question"), "reference_response": valid.column("matching")}
    kept = {field: column for field, column in valid.field_names.items() if field not in (*PAIR_FIELDS, *PROMPT_FIELDS)}
    return valid._replace(section="generation", field_names={**renamed, **kept})


# ---- pairs, prompts, concepts ----


class Row:
    """One row of a data file, read as its entry of dataset_format.yaml says; `values` by the file's columns, `row` its number."""

    def __init__(self, fmt: DatasetFormat, record: Record) -> None:
        self.fmt, self.row, self.where, self.values = fmt, record.row, record.where, record.values

    def wrong(self, fact: str) -> UserError:
        fmt = self.fmt
        return UserError(f"{fmt.path} {self.where}: {fact} (dataset {fmt.dataset!r}, {fmt.section}; {columns_of(self.values)})")

    def value(self, field: str) -> Any:
        """What the file has for a standard name. Raises UserError without such a column."""
        column = self.fmt.column(field)
        if column not in self.values:
            raise self.wrong(f"no column {column!r} for {field!r}; map '{field}: <column>' in field_names of {FORMATS_FILE}")
        return self.values[column]

    def text(self, field: str) -> str:
        """The same as text that can be tokenised."""
        return self._checked(self.value(field), field)

    def _checked(self, value: Any, field: str) -> str:
        at = f"in column {self.fmt.column(field)!r}"
        if not isinstance(value, str):
            raise self.wrong(f"{field} is {seen(value)} ({type(value).__name__}) {at}; wanted text")
        if "\0" in value:
            raise self.wrong(f"{field} has a NUL character {at}: {seen(value)}; is the file damaged?")
        if half_pair(value):
            raise self.wrong(f"{field} has half of a surrogate pair {at}: {ascii(value)[:80]}; write the whole character")
        return value

    def has(self, field: str) -> bool:
        if self.fmt.named and field in ASKED and field not in self.fmt.field_names:
            return False
        return self.values.get(self.fmt.column(field)) is not None

    def answer(self, field: str) -> str:
        """The same as text that is not empty; also of a list of one turn, the assistant's. "" where the file has null."""
        value = self.value(field)
        if value is None:
            return ""
        if isinstance(value, list):
            turns = self._turns(value, field)
            if [role for role, _ in turns] != ["assistant"]:
                raise self.wrong(f"{field} has turns of {_roles(turns)}; wanted text, or one turn of the assistant")
        text = turns[0][1] if isinstance(value, list) else self.text(field)
        if not text.strip():
            column = self.fmt.column(field)
            raise self.wrong(f"empty answer {seen(text)} in column {column!r} ({field}); write an answer or remove the row")
        return text

    def asked(self, field: str, system: str = SYSTEM) -> Question:
        """A question: text, or a list of turns; with the row's own system prompt, where it has one."""
        value = self.value(field)
        question: Question = self._conversation(value, field) if isinstance(value, list) else self.text(field)
        if not self.has(system) or not (prompt := self.text(system)).strip():
            return question
        if not isinstance(question, str) and question[0][0] == SYSTEM:
            raise self.wrong(f"a system turn in {field}, and another in column {self.fmt.column(system)!r}; keep one of them")
        return ((SYSTEM, prompt), *((("user", question),) if isinstance(question, str) else question))

    def question(self) -> Question | Contrast:
        """What is asked, or two of it where the row has columns of CONTRAST."""
        sides = []
        for side in SIDES:
            field, system = (f"{name}_{side}" if any(self.has(f"{name}_{one}") for one in SIDES) else name for name in ("question", SYSTEM))
            for name in (field, system):
                if name in CONTRAST and not self.has(name):
                    raise self.wrong(f"no {name} where the other side has one; give both of {', '.join(CONTRAST)} that belong together")
            sides.append(self.asked(field, system))
        return Contrast(*sides) if any(map(self.has, CONTRAST)) else sides[0]

    def _conversation(self, value: list[Any], field: str) -> Conversation:
        """Turns in the order that every chat template takes."""
        turns = self._turns(value, field)
        spoken = turns[1:] if turns and turns[0][0] == SYSTEM else turns
        if not spoken or [role for role, _ in spoken] != ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken) | 1)]:
            raise self.wrong(
                f"{field} has turns of {_roles(turns)}; wanted user and assistant by turns, the user's last; a system turn may be first"
            )
        return spoken if spoken is not turns and not turns[0][1].strip() else turns

    def _turns(self, value: list[Any], field: str) -> Conversation:
        if not all(isinstance(turn, dict) for turn in value):
            at = f"in column {self.fmt.column(field)!r}"
            raise self.wrong(f"{field} is {seen(value)} (list) {at}; wanted text, or turns of {{'role': ..., 'content': ...}}")
        for number, turn in enumerate(value):
            if not {"role", "content"} <= turn.keys():
                raise self.wrong(f"{field}: turn {number} (0-based) is {seen(turn)}; wanted {{'role': ..., 'content': ...}}")
        return tuple((self._checked(turn["role"], f"{field}: role"), self._checked(turn["content"], f"{field}: content")) for turn in value)

    @cached_property
    def concept_id(self) -> int | None:
        """None where the file has none; multi_concept needs it."""
        if not self.fmt.multi_concept and self.fmt.column("concept_id") not in self.values:
            return None
        value = self.value("concept_id")
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value):  # CSV knows only text
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # pandas stores whole numbers with gaps as floats
            return int(value)
        if self.fmt.multi_concept:
            raise self.wrong(f"concept_id is {seen(value)} in column {self.fmt.column('concept_id')!r}; wanted a whole number")
        return None

    @property
    def concept(self) -> str | None:
        """The concept's text, None where the file has none."""
        return None if self.values.get(self.fmt.column("output_concept")) is None else self.text("output_concept")


def _roles(turns: Conversation) -> str:
    return ", ".join(role for role, _ in turns) or "none"


def read_pairs(fmt: DatasetFormat, concept: int | None = None, limit: int | None = None) -> list[Pair]:
    """The pairs of a `train` or `valid` entry in file order, at most `limit`, of one concept or of all with id >= 0.

    A question may be empty (two of the released power-seeking rows are), an answer may not.
    Raises UserError: see the module; also when no row is left.
    """
    return pairs_of(_wanted(fmt, concept, limit))


def pairs_of(rows: Iterable[Row]) -> list[Pair]:
    """Rows as pairs, all of one kind. Raises UserError."""
    pairs: list[Pair] = []
    for row in rows:
        question, (matching, not_matching) = row.question(), (row.answer(field) for field in PAIR_FIELDS[1:])
        if not_matching and not matching:
            raise row.wrong("a not_matching answer without a matching one; name the answers' columns the other way round, or write both")
        if isinstance(question, Contrast):
            not_matching = not_matching or matching
        pair = Pair(question, matching, not_matching, row.concept_id, row.concept, row.row)
        if pairs and pair.kind != pairs[0].kind:
            field = next((name for name in PAIR_FIELDS[1:] if bool(getattr(pair, name)) != bool(getattr(pairs[0], name))), "question")
            value = seen(row.values.get(row.fmt.column(field)))
            raise row.wrong(f"{field} is {value}: {pair.kind} here, {pairs[0].kind} above; wanted text in all rows, or in none")
        pairs.append(pair)
    return pairs


def read_entry(fmt: DatasetFormat, concept: int | None = None, limit: int | None = None) -> list[Pair] | list[Prompt]:
    """The rows of an entry: pairs, or prompts where its section has those."""
    return read_prompts(fmt, concept, limit) if has_prompts(fmt.section) else read_pairs(fmt, concept, limit)


def has_prompts(section: str) -> bool:
    return SECTIONS[section] is PROMPT_FIELDS


def read_prompts(fmt: DatasetFormat, concept: int | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a `generation` entry in file order, at most `limit`, of one concept or of all with id >= 0.

    Without multi_concept all concepts have the same prompts.
    `reference_response` is None where the file has none. Raises UserError: see the module; also when no row is left.
    """
    return prompts_of(fmt, _wanted(fmt, concept if fmt.multi_concept else None, limit))


def prompts_of(fmt: DatasetFormat, rows: Iterable[Row]) -> list[Prompt]:
    """Rows as prompts. Raises UserError."""
    used = {fmt.column(field) for field in (*PROMPT_FIELDS, *ASKED, "concept_id", "output_concept")}
    prompts = []
    for row in rows:
        reference = None
        # asked for in field_names: the column must be there; otherwise it is taken if it is there
        if "reference_response" in fmt.field_names or "reference_response" in row.values:
            if row.value("reference_response") is not None:
                reference = row.text("reference_response")
        try:
            extra = {column: _json_value(value) for column, value in row.values.items() if column not in used}
            if fmt.multi_concept:
                extra = _released_row(row) | extra
        except RecursionError:
            raise row.wrong("a value is nested too deeply; flatten or remove it") from None
        if not row.has("input") and row.has(CONTRAST[0]):
            raise row.wrong("only questions that are compared, none to ask; give others (--test FILE), or fit alone (--mode generate)")
        prompts.append(Prompt(row.asked("input"), reference, row.concept_id, row.concept, row.row, extra))
    return prompts


def _released_row(row: Row) -> dict[str, Any]:
    """The keys of a row as the released results hold it (`eval_data`); `concept` is another name of `output_concept`."""
    found = {field: _json_value(row.values.get(row.fmt.column(field))) for field in EVAL_FIELDS}
    own = "concept" in row.fmt.field_names or "concept" in row.values
    return found | {"concept_id": row.concept_id, "concept": found["concept" if own else "output_concept"]}


def fewest(*rows: int | None) -> int | None:
    """How many rows are read where several limits may be given: the smallest of them; None without any."""
    return min((count for count in rows if count is not None), default=None)


def concepts(fmt: DatasetFormat) -> dict[int, str]:
    """concept_id -> concept text in id order; ids below 0 (negative examples) left out; {} without multi_concept.

    Raises UserError when one id has two texts, or no id is >= 0.
    """
    found: dict[int, str] = {}
    for row in _wanted(fmt) if fmt.multi_concept else ():
        here = row.concept_id
        assert here is not None  # multi_concept
        name = f"concept {here}" if row.concept is None else row.concept
        if found.setdefault(here, name) != name:
            raise row.wrong(f"concept_id {here} is {seen(name)} here and {seen(found[here])} above; one id, one concept")
    return dict(sorted(found.items()))


def _wanted(fmt: DatasetFormat, concept: int | None = None, limit: int | None = None) -> Iterator[Row]:
    """The rows asked for. Reads no further than `limit` needs."""
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: at least one row is needed; leave the limit out to read all of {fmt.path}")
    if concept is not None and not fmt.multi_concept:
        raise UserError(
            f"concept {concept} asked of dataset {fmt.dataset!r}, which has none; set multi_concept: true in {FORMATS_FILE} if it has"
        )
    if not fmt.path.exists():
        raise UserError(
            f"data file {fmt.path} of dataset {fmt.dataset!r} ({fmt.section}) does not exist; "
            f"put it there ('python -m spilt prepare --help' makes the paper's splits) or change file_path in {FORMATS_FILE}"
        )
    given = rows = 0
    ids, here = set[int](), f"(dataset {fmt.dataset!r}, {fmt.section})"
    for record in read(fmt.path):
        rows += 1
        row = Row(fmt, record)
        found, _ = row.concept_id, row.concept  # of rows that are left out too: a mistake there is told
        if fmt.multi_concept and found is not None:
            ids.add(found)
            other = found < 0 if concept is None else found != concept
            if other:
                continue
        yield row
        given += 1
        if given == limit:
            return
    if not rows:
        raise UserError(f"{fmt.path}: no rows {here}; put data in it or change file_path in {FORMATS_FILE}")
    if not given:
        what = f"no row of concept {concept}" if concept is not None else "only negative examples (concept_id < 0)"
        raise UserError(f"{fmt.path}: {what} {here}; concept ids found: {', '.join(map(str, sorted(ids)))}")


def _json_value(value: Any) -> Any:
    """`value` as JSON can hold it: NaN becomes null, dates and the like their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return str(value)
