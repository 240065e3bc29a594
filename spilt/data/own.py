"""Files of your own -> data/{name}/train.jsonl and test.jsonl, read as any other dataset: `--train FILE --test FILE|0.2 --columns a=b,...`.

Beside them lies source.json, which says what they were made of; where it lies, the dataset needs neither an entry of dataset_format.yaml
nor settings files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts.atomic import atomic_write_together, half_replaced
from spilt.data import hub, sense
from spilt.data.chat import SYSTEM, Question
from spilt.data.entries import ASKED, CONTRAST, PAIR_FIELDS, DatasetFormat, as_prompts, formats_file, sections_of
from spilt.data.readers import Pair, Prompt, Row, pairs_of, prompts_of
from spilt.data.sources import Record, columns_of, ending_of, file_hash, read
from spilt.errors import Mistakes, UserError, checked_name, unknown
from spilt.settings.files import DATA, SOURCE
from spilt.team import place

FIELDS = (*PAIR_FIELDS, *ASKED)
PARTS = ("train", "test", "valid", "data", "train_data", "test_data")  # file names that don't say what the data is: their folder may
SECTION = {"train": "train", "test": "valid"}
LOSING = PAIR_FIELDS[2]
TO_BE = "(an answer of the unsteered model)"
Write = Callable[[list[Question]], list[str]]


class Own(NamedTuple):
    """What the command line says of the user's files."""

    train: tuple[Path, ...]
    test: tuple[Path, ...] | float = ()  # files; a share of the questions if below 1, else so many of them
    columns: Mapping[str, str] = {}  # field of a pair -> the file's column; a field left out is its own column
    seed: int = 42  # of the split
    download: bool = False  # what is named by hf: and not in the local cache
    writer: Mapping[str, Any] = {}  # of not_matching answers that are missing: the model and its settings; empty: none is written


def columns_from(text: str) -> dict[str, str]:
    """`question=ask,matching=good,not_matching=bad`."""
    found: dict[str, str] = {}
    for item in text.split(","):
        field, equals, column = item.partition("=")
        if not equals or not column:
            raise UserError(f"--columns {text}: {item!r} is no field=column; wanted such as question=ask,matching=good,not_matching=bad")
        if field.strip() not in FIELDS:
            raise UserError(f"--columns {text}: {unknown('field', field.strip(), FIELDS)}")
        found[field.strip()] = column
    return found


def test_from(words: list[str] | None) -> tuple[Path, ...] | float:
    """Of --test: files, or one number."""
    if not words:
        return ()
    try:
        share = float(words[0])
    except ValueError:
        return tuple(map(Path, words))
    if len(words) > 1 or not (0 < share < 1 or share >= 1 and share.is_integer() and share < 1e9):
        raise UserError(f"--test {' '.join(words)}: wanted a share of the questions such as 0.2, a whole number of them, or files")
    return share


def name_of(train: tuple[Path, ...]) -> str:
    """The dataset's name, from the first file, or from its folder where the file is called train or the like."""
    first = train[0]
    if str(first).startswith(hub.SCHEME):
        return checked_name("dataset", hub.spec_of(str(first)).name.rpartition("/")[2])
    stem = first.name.removesuffix(ending_of(first) or first.suffix)
    stem = first.absolute().parent.name if stem.lower() in PARTS else stem
    try:
        return checked_name("dataset", stem)
    except UserError as error:
        raise UserError(f"{error}; give --dataset NAME") from None


def formats(base_dir: Path, name: str, own: Own) -> dict[str, DatasetFormat]:
    """The entries of dataset_format.yaml that the files will stand for."""
    parts = ("train", "test") if own.test else ("train",)
    return {SECTION[part]: DatasetFormat(name, SECTION[part], base_dir / DATA / name / f"{part}.jsonl", {}, False) for part in parts}


def bring(base_dir: Path, name: str, own: Own, *, dry: bool = False, write: Write | None = None) -> list[str]:
    """Write data/{name}/, unless it is there just so; the lines to print. dry: only check, and say what would be written.

    write: questions -> answers of own.writer; what it wrote once is kept.

    Raises UserError: a file that can't be read as pairs, or a folder that holds other data.
    """
    folder = base_dir / DATA / checked_name("dataset", name)
    _refuse_others(base_dir, folder, own)
    rows = parts(own, name)
    there = {path.name: path.read_bytes() for path in _ours(folder)}
    source = (json.dumps(_source(own), indent=1, ensure_ascii=False) + "\n").encode()
    if own.writer and there.get(SOURCE) == source and len(there) == len(rows) + 1 and not half_replaced(folder / SOURCE):
        return []
    if missing := _missing(rows) if own.writer else []:
        answers = write([one.question for one in _pairs(missing)]) if write and not dry else [TO_BE] * len(missing)  # type: ignore[misc]
        if empty := [row for row, text in zip(missing, answers, strict=True) if not text.strip()]:
            raise UserError(
                f"the model writes nothing to {len(empty)} questions, such as {_asked(empty[0])[:80]!r}; write their not_matching"
            )
        for row, text in zip(missing, answers, strict=True):
            row[LOSING] = text
    texts = {f"{part}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found) for part, found in rows.items()}
    files = {name: text.encode() for name, text in texts.items()} | {SOURCE: source}
    if files == there and not half_replaced(folder / SOURCE):
        return []
    kind = kinds(rows)
    counts = ", ".join(f"{len(found)} {kind[SECTION[part]]} in {part}.jsonl" for part, found in rows.items())
    said = f"{counts} from {', '.join(map(_named, own.train))}"
    said += f"; {len(missing)} not_matching answers {'to be ' if dry else ''}written by {own.writer['model']}" if missing else ""
    if dry:
        return [f"{folder} will have {said}"]
    if place()[1] > 1:
        raise UserError(f"{folder} is to be written, by one process: run `spilt prepare --input FILE ... --name {name}` first")
    atomic_write_together([(folder / file, content) for file, content in files.items()])
    for file in there.keys() - files.keys():
        (folder / file).unlink()
    return [f"{folder} {'was replaced: ' if there else 'has '}{said}"]


def _missing(rows: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of one question that want a not_matching answer. Raises UserError for rows that compare two."""
    found = [row for some in rows.values() for row in some if row[LOSING] is None]
    if any(row[PAIR_FIELDS[1]] is None for row in found):
        raise UserError(f"--complete_losing: a row without a {PAIR_FIELDS[1]} answer, or one that compares two prompts, can't be completed")
    return found


def _pairs(rows: list[dict[str, Any]]) -> list[Pair]:
    return pairs_of(_as_read(DatasetFormat("", "train", Path("train"), {}, False), rows))


def parts(own: Own, name: str) -> dict[str, list[dict[str, Any]]]:
    """train and test -> their rows, by the names of a pair's fields."""
    rows = {"train": _rows(own.train, own, name, "train")}
    if isinstance(own.test, tuple):
        return rows | ({"test": _rows(own.test, own, name, "test")} if own.test else {})
    drawn = dict(zip(SECTION, _split(rows["train"], own), strict=True))
    for part, found in drawn.items():  # the file as a whole may prefer something where what is drawn of it does not
        fmt = DatasetFormat(name, SECTION[part], own.train[0], own.columns, False)
        if whole := [row for row in found if not own.writer or row[LOSING] is not None]:
            try:
                sense.refuse_useless(fmt, _pairs(whole))
            except UserError as error:
                raise UserError(f"--test {own.test:g}: of what is drawn for {part}.jsonl: {error}; another --seed draws others") from None
    return drawn


def section(own: Own, name: str, section: str) -> list[Pair] | list[Prompt]:
    """What a section of dataset_format.yaml would give of the files."""
    made = as_completed(own, parts(own, name))
    part = next((part for part in made if SECTION[part] == section), [*made][-1])
    fmt = formats(Path(), name, own)[SECTION[part]]
    if SECTION[part] == section:
        return pairs_of(_as_read(fmt, made[part]))
    return prompts_of(as_prompts(fmt), _as_read(as_prompts(fmt), made[part]))


def as_completed(own: Own, rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """With a stand-in for each answer that own.writer is going to write."""
    for row in _missing(rows) if own.writer else []:
        row[LOSING] = TO_BE
    return rows


def kinds(made: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """section -> what kind its pairs are of: that of the first. made: train and test -> rows."""
    return {SECTION[part]: _pairs(rows[:1])[0].kind for part, rows in made.items()}


def _as_read(fmt: DatasetFormat, rows: list[dict[str, Any]]) -> list[Row]:
    return [Row(fmt, Record(i, f"row {i} (0-based)", values)) for i, values in enumerate(rows)]


def _ours(folder: Path) -> list[Path]:
    return [path for file in ("train.jsonl", "test.jsonl", SOURCE) if (path := folder / file).is_file()]


def _refuse_others(base_dir: Path, folder: Path, own: Own) -> None:
    """Raises UserError where the name is taken: by an entry of dataset_format.yaml, by data put there by hand, by another file's rows."""
    mark = folder / SOURCE
    if not mark.is_file():
        if there := sorted(folder.glob("*.*")):
            raise UserError(f"{folder} holds other data ({there[0].name}); give another name with --dataset")
        if formats_file(base_dir).is_file() and sections_of(base_dir, folder.name):
            raise UserError(f"dataset {folder.name!r} has an entry in dataset_format.yaml already; give another name with --dataset")
        return
    try:
        before = [one["file"] for one in json.loads(mark.read_bytes())["train"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{mark} is damaged; remove the folder, or give another name with --dataset") from None
    if before != [*map(_named, own.train)]:
        raise UserError(f"{folder} holds the rows of {', '.join(map(str, before))}; give another name with --dataset, or remove the folder")


def _source(own: Own) -> dict[str, Any]:
    def named(paths: tuple[Path, ...]) -> list[dict[str, str]]:
        return [{"file": _named(path), "sha256": _hash(path, own)} for path in paths]

    test = {"test": named(own.test)} if isinstance(own.test, tuple) else {"test": own.test, "seed": own.seed}
    written = {"complete_losing": dict(own.writer)} if own.writer else {}
    return {"train": named(own.train), **test, "columns": dict(own.columns), **written}


def _named(path: Path) -> str:
    return str(path) if str(path).startswith(hub.SCHEME) else path.name


def _records(path: Path, own: Own) -> Iterable[Record]:
    return hub.rows(str(path), own.download) if str(path).startswith(hub.SCHEME) else read(path)


def _hash(path: Path, own: Own) -> str:
    if not str(path).startswith(hub.SCHEME):
        return file_hash(path)
    return hashlib.sha256(json.dumps([record.values for record in _records(path, own)]).encode()).hexdigest()


def _rows(paths: tuple[Path, ...], own: Own, name: str, part: str) -> list[dict[str, Any]]:
    """The pairs of some files, by the names of their fields. Every mistake of the first kind in a file is told with its line."""
    found, mistakes = list[dict[str, Any]](), Mistakes()
    for path in paths:
        with mistakes.each():
            records = [_with_question(path, record, own.columns) for record in _records(path, own)]
            if not records:
                raise UserError(f"{path}: no rows; wanted one pair of answers a row")
            fmt = DatasetFormat(name, "train", path, own.columns, False)
            for record in records:
                _check_columns(path, record, own.columns, part)
            rows = [Row(fmt, record._replace(values=dict.fromkeys(map(fmt.column, PAIR_FIELDS[1:])) | record.values)) for record in records]
            apart = [[row] for row in rows] if own.writer else [rows]  # to be completed: with and without both answers
            sense.refuse_useless(fmt, [pair for some in apart for pair in pairs_of(some)])
            found += [_stored(row) for row in rows]
    mistakes.tell()
    return found


def _stored(row: Row) -> dict[str, Any]:
    """A row as train.jsonl holds it: the fields of a pair, null where it has no such answer, and those of ASKED that it has."""

    def plain(value: Any) -> Any:
        return [{"role": turn["role"], "content": turn["content"]} for turn in value] if isinstance(value, list) else value

    asked = {field: plain(row.value(field)) for field in ("question", *ASKED) if row.has(field)}
    return {**asked, **{field: row.answer(field) or None for field in PAIR_FIELDS[1:]}}


def _with_question(path: Path, record: Record, columns: Mapping[str, str]) -> Record:
    """Of pairs of whole conversations (trl's, without a prompt): what both begin with is the question."""
    question, *answers = (columns.get(field, field) for field in PAIR_FIELDS)
    given = {name: value for name in answers if (value := record.values.get(name)) is not None}
    asked = (question, *(columns.get(field, field) for field in CONTRAST))
    if any(name in record.values for name in asked) or not any(isinstance(value, list) and len(value) > 1 for value in given.values()):
        return record
    first, *others = given.values()
    if not isinstance(first, list) or any(not isinstance(other, list) or other[:-1] != first[:-1] for other in others):
        names = " and ".join(map(repr, given))
        raise UserError(f"{path} {record.where}: {names} are conversations that begin differently; give the question its own column")
    return record._replace(values={**record.values, question: first[:-1], **{name: value[-1:] for name, value in given.items()}})


def _check_columns(path: Path, record: Record, columns: Mapping[str, str], part: str) -> None:
    """What must be there: what --columns names, a question or two that are compared, and, to fit on a question, a matching answer."""

    def there(field: str) -> bool:
        return columns.get(field, field) in record.values

    compared = any(map(there, CONTRAST))
    needed = {
        *columns,
        *([] if any(map(there, CONTRAST[:2])) else ["question"]),
        *(["matching"] if part == "train" and not compared else []),
    }
    if not all(map(there, needed)):
        missing = [field for field in FIELDS if field in needed | {*PAIR_FIELDS} and not there(field)]
        wanted = ", ".join(repr(columns.get(field, field)) for field in missing)
        example = ",".join(f"{field}={columns.get(field, '<column>')}" for field in PAIR_FIELDS)
        raise UserError(f"{path} {record.where}: no column {wanted} ({columns_of(record.values)}); say which is which: --columns {example}")


def _asked(row: dict[str, Any]) -> str:
    """What is asked, whatever the system prompt: rows of one question are held out together."""
    found: Any = row.get("question", row.get(CONTRAST[0]))
    return found if isinstance(found, str) else json.dumps([turn for turn in found if turn["role"] != SYSTEM])


def _split(rows: list[dict[str, Any]], own: Own) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, test): the questions in the order of their seeded hashes, the first are held out, so that new rows move few of the others."""
    asked = {_asked(row) for row in rows}
    assert isinstance(own.test, int | float)
    size = round(own.test * len(asked)) if own.test < 1 else int(own.test)
    if not 0 < size < len(asked):
        raise UserError(
            f"--test {own.test:g} of {len(asked)} different questions holds {size} out; both parts need one at least: give another share"
        )
    order = sorted(asked, key=lambda question: hashlib.sha256(f"{own.seed} {question}".encode()).digest())
    held_out = set(order[:size])
    return [row for row in rows if _asked(row) not in held_out], [row for row in rows if _asked(row) in held_out]
