"""Rows that every reader takes and no fit can use: told before anything is run."""

from __future__ import annotations

from collections.abc import Sequence

from spilt.data.chat import Question, bare, readable
from spilt.data.readers import CONTRAST, PAIRS, Contrast, DatasetFormat, Pair, Prompt
from spilt.errors import UserError

SHOWN = 5  # rows that a remark names


def refuse_useless(fmt: DatasetFormat, pairs: Sequence[Pair], concept: int | None = None) -> None:
    """Raises UserError for pairs of one concept that prefer nothing: each has the same answer twice; or, to fit on, all are one row."""
    of = "" if concept is None else f", concept {concept}"
    here = f"{fmt.path} (dataset {fmt.dataset!r}, {fmt.section}{of})"
    if isinstance(pairs[0].question, Contrast) and all(pair.sides[0] == pair.sides[1] for pair in pairs):
        raise UserError(f"{here}: both prompts are the same in all {len(pairs)} rows ({', '.join(CONTRAST)}), so nothing is compared")
    if pairs[0].kind == PAIRS and all(pair.matching == pair.not_matching for pair in pairs):
        columns = f"{fmt.column('matching')!r} and {fmt.column('not_matching')!r}"
        raise UserError(
            f"{here}: columns {columns} hold the same answer in every one of {len(pairs)} pairs, so neither is preferred; "
            "are both names of field_names mapped to the columns that are meant?"
        )
    if fmt.section == "train" and len(pairs) > 1 and len({(pair.question, pair.matching, pair.not_matching) for pair in pairs}) == 1:
        raise UserError(f"{here}: all {len(pairs)} rows are equal, which is one pair; give different rows, or --limit 1 to fit on that one")


def remarks(fmt: DatasetFormat, pairs: Sequence[Pair]) -> list[str]:
    """What of the pairs is odd, a sentence each: answers that are equal to the question's other one, spaces around them aside."""
    same = [pair.row for pair in pairs if pair.kind == PAIRS and pair.matching.strip() == pair.not_matching.strip()]
    if not same:
        return []
    rows = ", ".join(map(str, same[:SHOWN])) + (" ..." if len(same) > SHOWN else "")
    return [
        f"{fmt.path}: {len(same)} of {len(pairs)} pairs have the same answer twice, which prefers nothing "
        f"(dataset {fmt.dataset!r}, {fmt.section}; 0-based rows {rows}); correct or remove them"
    ]


def overlap(train: DatasetFormat, fitted: Sequence[Pair], held_out: DatasetFormat, asked: Sequence[Pair | Prompt]) -> list[str]:
    """A sentence where questions of the held-out rows are among the fitted ones, of the same concept if there are concepts."""
    seen = {(pair.concept_id if train.multi_concept else None, question) for pair in fitted for question in _questions(pair)}
    both = [row for row in asked if any((_concept(row, held_out), question) in seen for question in _questions(row))]
    same = train.path.samefile(held_out.path)
    if not both and not same:
        return []
    file = "is the training file too" if same else f"overlaps with the training file {train.path}"
    return [
        f"{held_out.path} {file}: {len(both)} of {len(asked)} questions are in both (dataset {train.dataset!r}, {held_out.section}); "
        "what they measure was seen in the fit: hold other rows out"
    ]


def _concept(row: Pair | Prompt, fmt: DatasetFormat) -> int | None:
    return row.concept_id if fmt.multi_concept else None


def _questions(row: Pair | Prompt) -> set[Question]:
    """What is asked, whatever the system prompt; an empty question is none."""
    return {bare(one) for one in (row.questions if isinstance(row, Pair) else (row.input,)) if readable(one).strip()}
