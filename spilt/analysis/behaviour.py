"""Whether a generated answer shows the behaviour, by rules that a person can check: keywords, or a reference of one word. No model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


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
