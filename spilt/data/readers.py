"""The data files that dataset_format.yaml names, read as pairs and prompts.

Every mistake in a file is one UserError with the file, the line (or the row, in parquet) and the columns found.
Text is kept exactly: leading spaces of answers matter, 'NA' and 'None' are answers, not missing values.
No torch and no transformers here, and pyarrow only when a parquet file is opened: a dry run starts at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from spilt.data.chat import SYSTEM, Conversation, Question
from spilt.data.entries import ASKED, CONTRAST, FORMATS_FILE, PAIR_FIELDS, PROMPT_FIELDS, SIDES, DatasetFormat, has_prompts
from spilt.data.sources import Record, columns_of, read, seen
from spilt.errors import UserError, half_pair

EVAL_FIELDS = ("input", "output_concept", "concept_id", "concept", "concept_genre", "category")  # of eval_data, in the released order


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
