"""Data files -> rows: .jsonl, .json, .csv, .tsv, .parquet, the text ones also as .gz, read as they are.

Every mistake in a file is one UserError with the file, the line (or the row, in parquet) and the columns found.
Text is kept exactly: leading spaces of answers matter, 'NA' and 'None' are answers, not missing values.
pyarrow is loaded only when a parquet file is opened: a dry run starts at once.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import reprlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts import manifest
from spilt.artifacts.atomic import half_replaced
from spilt.errors import UserError, printable

LARGEST = 2**30  # bytes of a data file, unpacked: all of its rows are held in memory, several times over
GZIP = ".gz"
# delimiters of CSV; the one that cuts the header into most columns is taken
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
VALUE = 64  # bytes that Python needs for a value besides its text


class Record(NamedTuple):
    """One row of a data file as it was found."""

    row: int  # 0-based
    where: str  # 'line 17', 1-based, where the row begins; in parquet 'row 16 (0-based)'
    values: dict[str, Any]


def columns_of(names: Iterable[str], most: int = 40) -> str:
    """The columns for a message: a header is a file's text, and a file of another kind can look like thousands of columns."""
    found = [printable(str(name))[:80] for name in names]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"columns found: {', '.join(found[:most]) or 'none'}{more}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def seen(value: Any) -> str:
    """A value for a message: as Python writes it, cut where it is long."""
    return _short.repr(value)


def read_rows(path: Path) -> list[Record]:
    """All rows of a data file, unchecked. Raises UserError as the module says."""
    return list(read(path))


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes, hex."""
    try:
        return manifest.file_hash(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def ending_of(path: Path) -> str | None:
    """The ending of a file that can be read, such as '.csv' or '.csv.gz'; None of any other."""
    endings = (*READERS, *(f"{ending}{GZIP}" for ending in READERS if READERS[ending] is not _parquet))
    return next((ending for ending in endings if path.name.lower().endswith(ending)), None)


def read(path: Path) -> Iterator[Record]:
    _check_file(path)
    if (ending := ending_of(path)) is None:
        raise UserError(f"data file {path}: unknown ending {path.suffix!r}; have: {', '.join(READERS)}, and those of text with {GZIP}")
    for row, (where, values) in enumerate(READERS[ending.removesuffix(GZIP)](path)):
        yield Record(row, where, values)


def text(path: Path) -> str:
    """A text file, with the checks of a data file."""
    _check_file(path)
    return _utf8(path, _bytes(path)).replace("\r\n", "\n")


def lines(path: Path) -> list[str]:
    """Its lines that hold something, stripped."""
    return [line for one in text(path).split("\n") if (line := one.strip())]


def _check_file(path: Path) -> None:
    """A plain file of a size that can be held, and not one of several that are half replaced. Opens nothing: a pipe would wait."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        what = next((name for test, name in KINDS if test(found.st_mode)), "no plain file")
        raise UserError(f"data file {path} can't be read: it is {what}; wanted a plain file ({', '.join(READERS)})")
    if found.st_size > LARGEST:
        raise _too_large(path, f"has {found.st_size:,} bytes")
    if others := half_replaced(path):
        raise UserError(
            f"data file {path} is not to be used: spilt.prepare was cut off while it replaced {', '.join(others)}, "
            "which may now be of different splits; run the same prepare command again"
        )


KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _too_large(path: Path, fact: str) -> UserError:
    way_out = "keep fewer rows, or only the columns that are used"
    return UserError(f"data file {path} {fact}; at most {LARGEST:,} are read, since all rows are held in memory; {way_out}")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"data file {path} can't be read: {error.strerror or error}")


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) != size:  # someone writes it, or it is made up on reading as those of /proc
        raise UserError(f"data file {path} can't be read: it has {size:,} bytes by its size and others on reading; give a file that rests")
    if not path.name.lower().endswith(GZIP):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            data = packed.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} is not readable as gzip: {error}; pack it again, or give it unpacked") from error
    if len(data) > LARGEST:
        raise _too_large(path, "unpacks to more bytes")
    return data


def _utf8(path: Path, data: bytes, first_line: int = 1) -> str:
    """Bytes -> text, a byte order mark left out."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        byte = error.object[error.start]
        raise UserError(f"{path} line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from error


def _object(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} {where}: {type(value).__name__} {seen(str(value))} where an object with named columns was wanted")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a key given twice would drop a value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"a key is given twice: {seen(next(key for key in names if names.count(key) > 1))}")
    return made


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One JSON object a line; blank lines are skipped."""
    columns = ""
    # split at \n only: str.splitlines would also cut at U+2028 inside a text
    for number, line in enumerate(io.BytesIO(_bytes(path)), 1):
        text = _utf8(path, line.removesuffix(b"\n"), number)
        if text.strip():
            where = f"line {number}"
            try:
                values = _object(path, where, json.loads(text, object_pairs_hook=_once))
            except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and numbers of thousands of digits
                raise UserError(f"{path} {where}: not JSON: {error}; correct or remove the line{columns}") from error
            columns = f" ({columns_of(values)} in the line before)"
            yield where, values


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A list of objects, read entry by entry, so that a mistake has its line; or one object (_of_object)."""
    text = _utf8(path, _bytes(path))
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    blank = re.compile(r"[ \t\r\n]*")
    at = counted = 0
    line = 1

    def skip() -> str:
        """Go to the next character that is not blank and return it, '' at the end."""
        nonlocal at, counted, line
        match = blank.match(text, at)
        at = match.end() if match else at
        line += text.count("\n", counted, at)
        counted = at
        return text[at : at + 1]

    def entry() -> Any:
        nonlocal at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {error.lineno}: not JSON: {error.msg} (column {error.colno}); correct the file") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {line}: not JSON: {error}; correct the file") from error
        return value

    if not skip():
        return
    if skip() != "[":
        where = f"line {line}"
        yield from _of_object(path, where, _object(path, where, entry()))
    else:
        at += 1
        following = skip()
        while following != "]":
            where = f"line {line}"
            yield where, _object(path, where, entry())
            following = skip()
            if following == ",":
                at += 1
                following = skip()
                if following == "]":
                    raise UserError(f"{path} line {line}: not JSON: a comma before ']'; correct the file")
            elif following != "]":
                raise UserError(f"{path} line {line}: not JSON: wanted ',' or ']', found {following or 'the end'!r}; correct the file")
        at += 1
    if skip():
        raise UserError(f"{path} line {line}: text after the end of the JSON value; one list of rows a file, or name it .jsonl")


def _of_object(path: Path, where: str, value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of one JSON object: rows under one of its keys, columns ({name: [...]}, or pandas' {name: {row: value}}), or itself as one row."""
    rows = [key for key, item in value.items() if isinstance(item, list) and item and all(_is_row(one) for one in item)]
    columns = [list(item.values()) if isinstance(item, dict) else item for item in value.values()]
    if len(rows) > 1:
        raise UserError(f"{path} {where}: rows under {', '.join(map(seen, rows))}; give a file for each")
    if rows:
        yield from ((f"{seen(rows[0])}, row {number} (0-based)", row) for number, row in enumerate(value[rows[0]]))
    elif len(columns) > 1 and all(isinstance(item, list) and not any(isinstance(one, dict) for one in item) for item in columns):
        if len({len(item) for item in columns}) > 1:
            lengths = ", ".join(f"{seen(key)} {len(item)}" for key, item in zip(value, columns, strict=True))
            raise UserError(f"{path} {where}: columns of different lengths ({lengths}); a row needs a value in each")
        yield from ((f"row {i} (0-based)", dict(zip(value, row, strict=True))) for i, row in enumerate(zip(*columns, strict=True)))
    else:
        yield where, value


def _is_row(value: Any) -> bool:
    """An object with columns; one with a role is a turn of a conversation."""
    return isinstance(value, dict) and "role" not in value


def _columns_by(data: bytes, delimiter: str) -> int:
    try:
        lines = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), strict=True, delimiter=delimiter)
        return len(next(filter(None, lines), []))
    except csv.Error:
        return 0


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A header and rows of as many fields; every value is text. A row's line is the one it begins on."""
    data = _bytes(path)
    _utf8(path, data)  # names the line of a wrong byte; the text itself is taken piece by piece
    tabs = path.name.lower().removesuffix(GZIP).endswith(".tsv")
    delimiter = "\t" if tabs else max(DELIMITERS, key=lambda mark: _columns_by(data, mark))
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        where = f"line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "a quote is not closed, or an inner one not doubled"
            raise UserError(f"{path} {where}: not CSV: {error} ({hint}; {columns_of(header)})") from error
        if not fields:  # a blank line
            continue
        if not header:
            header = fields
            if len(set(header)) < len(header):
                raise UserError(f"{path} {where}: the header names a column twice; {columns_of(header)}")
            continue
        if len(fields) != len(header):
            hint = f"quote fields that hold {DELIMITERS[delimiter]} or a line break"
            raise UserError(f"{path} {where}: {len(fields)} fields where the header has {len(header)} ({hint}; {columns_of(header)})")
        yield where, dict(zip(header, fields, strict=True))


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a parquet file; pandas' stored index is no column.

    A few thousand bytes can stand for any number of rows and texts: what they unpack to is counted, from the file's own
    account first, then batch by batch before values are made of it.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            # of a row group only: pyarrow ends the process at a damaged account of a column
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            count = file.metadata.num_rows * max(1, file.metadata.num_columns)
            if max(sum(groups), count * VALUE) > LARGEST:
                raise _too_large(path, f"unpacks to {file.metadata.num_rows:,} rows, {count:,} values and {sum(groups):,} bytes")
            columns = [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]
            if len(set(columns)) < len(columns):
                raise UserError(f"{path}: the file names a column twice; {columns_of(columns)}")
            # texts in lists stay references to the texts that differ, as a row can hold any number of them
            nested = [column.path for column in map(file.schema.column, range(len(file.schema))) if column.max_repetition_level]
        with parquet.ParquetFile(path, read_dictionary=nested) as file:
            row = unpacked = 0
            for number, size in enumerate(groups):
                # a value is no longer than its row group: so few rows at a time can't be far above LARGEST
                together = min(max(8, LARGEST // 4 // max(1, size)), 1024)
                for batch in file.iter_batches(together, row_groups=[number], columns=columns):
                    unpacked += sum(map(_unpacked, batch.columns))
                    if unpacked > LARGEST:
                        raise _too_large(path, f"unpacks to more bytes from row {row} (0-based) on")
                    for values in batch.to_pylist():
                        yield f"row {row} (0-based)", values
                        row += 1
    except OSError as error:
        raise _unreadable(path, error) from error
    # text that is not UTF-8, lengths beyond reason, an unknown time zone
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError, MemoryError) as error:
        raise UserError(f"data file {path} is not readable as parquet: {error}") from error


def _unpacked(array: Any) -> int:
    """Bytes that the values of a pyarrow array take, each by itself: a dictionary holds a value once that its rows repeat."""
    import pyarrow
    from pyarrow import compute

    if pyarrow.types.is_dictionary(array.type):
        return int(compute.sum(compute.take(compute.binary_length(array.dictionary), array.indices)).as_py() or 0)
    if pyarrow.types.is_struct(array.type):
        return sum(map(_unpacked, array.flatten()))
    if pyarrow.types.is_nested(array.type) and hasattr(array, "flatten"):
        return VALUE * len(array.flatten()) + _unpacked(array.flatten())
    return int(array.nbytes)


READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
