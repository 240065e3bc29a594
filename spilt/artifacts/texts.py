"""Stored texts as they are read again, ours or another tool's: a file that is not what it should be is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from spilt.errors import UserError, first_line, half_pair, printable

ROW_KEYS = ("input", "orig_pred", "pred", "reference_response", "complete_output")  # of a prompt
CONCEPT_KEYS = ("concept_id", "concept_name", "generated_results", "eval_data", "multiplier")  # of a concept, with its rows in it


class Row(NamedTuple):
    """One prompt of a results file: which it is, what was answered (first response first), and the unsteered answers."""

    concept: int
    number: int
    prompt: str
    texts: list[str]
    plain: list[str]
    reference: str | None

    @property
    def key(self) -> tuple[int, int, str]:
        """The same prompt has the same key in the files of all multipliers."""
        return self.concept, self.number, self.prompt


def read(path: Path) -> list[Row]:
    """The rows of {dataset}_results.json or all_generation_results_m{m}.json, concepts one after the other.

    Raises UserError naming the file, what was found and where.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: is no plain file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)}); --mode apply makes it again") from None
    rows = []
    for at, entry in enumerate(_list(content, path, "the file")):
        if isinstance(entry, dict) and "generated_results" in entry:
            concept = entry.get("concept_id")
            if not isinstance(concept, int):
                raise _wrong(path, f"entry {at}", "concept_id", concept, "a whole number")
            inner = _list(entry["generated_results"], path, f"entry {at}: generated_results")
            rows += [_row(row, path, f"entry {at}, row {k}", concept, k) for k, row in enumerate(inner)]
        else:
            rows.append(_row(entry, path, f"row {at}", 0, at))
    return rows


def _row(row: Any, path: Path, where: str, concept: int, number: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}: {where} is a {type(row).__name__}; wanted an object with input and pred")
    prompt, reference = row.get("input", ""), row.get("reference_response")
    for name, value in (("input", prompt), ("reference_response", reference or "")):
        if not isinstance(value, str):
            raise _wrong(path, where, name, value, "a text")
        _refuse_halves(path, where, name, value or "")
    texts, plain = (_texts(row.get(name), path, where, name) for name in ("pred", "orig_pred"))
    return Row(concept, number, prompt, texts, plain, reference or None)


def _texts(value: Any, path: Path, where: str, name: str) -> list[str]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise _wrong(path, where, name, value, "a list of texts")
    for text in found:
        _refuse_halves(path, where, name, text)
    return found


def _refuse_halves(path: Path, where: str, name: str, text: str) -> None:
    """No tokenizer and no file takes half of a surrogate pair."""
    if half := half_pair(text):
        raise UserError(f"{path}: {where}: {name} holds half of a surrogate pair ({printable(half[0])}); --mode apply makes it again")


def _list(value: Any, path: Path, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{path}: {what} holds a {type(value).__name__}; wanted a list of rows; --mode apply makes it again")
    return value


def _wrong(path: Path, where: str, name: str, value: Any, wanted: str) -> UserError:
    return UserError(f"{path}: {where}: {name} is a {type(value).__name__}; wanted {wanted}; --mode apply makes it again")
