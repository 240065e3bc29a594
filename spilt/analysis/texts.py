"""What can be said of a text by itself, without a model. Words are runs of letters and digits, whatever their case."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from spilt.analysis.behaviour import words

RUN = 4  # words of a run, for repetition
BEGINNING = 160  # characters in which a refusal shows
TOO_SHORT = "too few words"
REFUSAL = re.compile(
    r"\b(i can(no|')t|i can not|i('m| am) (not able|unable|not willing)|i won't|i will not|i('m| am) (very |so )?sorry"
    r"|i must decline|i (have to|must) refuse|i apologi[sz]e|as an ai|i do not feel comfortable|i don't feel comfortable|not appropriate)\b"
)


def runs(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams in order."""
    return list(zip(*(said[i:] for i in range(n)), strict=False))


def distinct(text: str, n: int) -> float | None:
    """|different n-grams| / |n-grams| (distinct-n, arXiv 1510.03055); None where there is none."""
    found = runs(words(text), n)
    return len(set(found)) / len(found) if found else None


def repetition(text: str) -> float | None:
    """1 - distinct-4: n-grams that stood there before (seq-rep-4, arXiv 1908.04319); None for a text of fewer words."""
    found = distinct(text, RUN)
    return None if found is None else 1 - found


def refuses(text: str) -> float:
    """1 where its beginning has a phrase of refusals (English), else 0."""
    return float(REFUSAL.search(text[:BEGINNING].lower().replace("\u2019", "'")) is not None)


# measure -> its value; None: the text is too short for it
OFFLINE: dict[str, Callable[[str], float | None]] = {
    "distinct_1": lambda text: distinct(text, 1),
    "distinct_2": lambda text: distinct(text, 2),
    "distinct_3": lambda text: distinct(text, 3),
    "repetition": repetition,
    "length": lambda text: float(len(words(text))),
    "refusal": refuses,
    "empty": lambda text: float(not words(text)),
}


def begins_with(text: str, matching: str, not_matching: str) -> float | None:
    """1: the text begins with the matching answer's word, 0: with the other's, None: with neither."""
    first = words(text)[:1]
    return 1.0 if first == words(matching) else 0.0 if first == words(not_matching) else None
