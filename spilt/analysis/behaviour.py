"""What a generated answer shows, by rules that a person can check: keywords, a pattern, its first word; and whether it still is an answer.

No model. An incoherent answer never counts as one that shows, or rightly does not show, anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import regex

from spilt.errors import UserError

SHOWS, ABSENT, INCOHERENT = VERDICTS = ("shows", "absent", "incoherent")
SECONDS = 2.0  # that a pattern may take on one answer


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def compiled(pattern: str) -> Any:
    """Without regard to case. Raises UserError for what is no regular expression."""
    try:
        return regex.compile(pattern, regex.IGNORECASE)
    except regex.error as error:
        raise UserError(f"{pattern[:80]!r} is no regular expression: {error}") from None


def found(pattern: str, text: str) -> bool:
    """Whether the pattern is anywhere in the text. Raises UserError for one that does not come to an end."""
    try:
        return compiled(pattern).search(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"), timeout=SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"the pattern {pattern[:80]!r} takes more than {SECONDS:g} s on one answer; write it without repetitions in repetitions"
        ) from None


def shows(text: str, reference: str | None, keywords: Sequence[str] = ()) -> bool | None:
    """It holds one of the keywords (of the dataset's `generation` entry); without keywords, it begins with the reference, if that is one
    word. None: no rule can tell."""
    said = words(text)
    if keywords:
        return not {word.lower() for word in keywords}.isdisjoint(said)
    if not reference or len(reference.split()) != 1:
        return None
    return said[:1] == words(reference)[:1]


def share(answers: Iterable[tuple[str, str | None]], keywords: Sequence[str] = ()) -> float | None:
    """Share of (text, reference) that show it; None where no rule can tell of all of them."""
    told = [shows(text, reference, keywords) for text, reference in answers]
    return sum(map(bool, told)) / len(told) if told and None not in told else None
