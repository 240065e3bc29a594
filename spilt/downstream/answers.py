"""What a text answers, and whether that is right: pure functions. A text without an answer is counted apart from a wrong one.

One rule for all: what follows the last 'Answer:' counts; without one, the last thing that can only be meant as an answer. A number is read
whole (70000, 1,200), and a letter is a word of its own ('Answer by elimination' has none).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from spilt.data.sources import seen
from spilt.errors import unknown

# 'Answer:', 'the answer is', 'answer choice -'; then what follows it on its line
ANSWER = re.compile(
    r"\banswer\b[ \t]*(?:choice|option)?[ \t]*(?:is\b[ \t]*:?|[=-]|:)(?:(?<=:)\s*|[ \t]*)(?P<said>[^\n]*)",
    re.I,
)
# groups of three, or all digits: never a part of either; a minus that joins two numbers is none of the second
NUMBER = re.compile(
    r"(?<![\w.])[-\u2212]?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}\b)?"
)
TAG = re.compile(r"<answer>(.*?)</answer>", re.I | re.S)
LETTERS = "ABCDE"
# 'C', '(c)', 'option C because'; not the article of 'a dog' or 'A dog', nor "E's"
LETTER = re.compile(r"(?:(?i:option|choice)[ \t]+)?\(?(?:([A-E])\b(?!['\u2019-]|(?<=A)[ \t]+[a-z])|([a-e])(?:\)|\.?$))")


def _answers(text: str) -> list[str]:
    """What follows each 'Answer:', the last first."""
    return [found["said"].strip().strip("*`\"'") for found in ANSWER.finditer(text)][::-1]


def _words(*words: str) -> Callable[[str], str | None]:
    """One of some words: the first after the last 'Answer:' that has one, else the last in the text; in lower case."""
    pattern = re.compile(rf"\b({'|'.join(words)})\b", re.I)

    def find(text: str) -> str | None:
        for said in _answers(text):
            if hit := pattern.search(said):
                return hit[1].lower()
        every = pattern.findall(text)
        return every[-1].lower() if every else None

    return find


def option(text: str) -> int | None:
    """1 or 2: 'Answer: Option2', 'answer: 2', else the last 'option 2'."""
    for said in _answers(text):
        if hit := re.search(r"\b(?:option[ \t]*)?([12])\b", said, re.I):
            return int(hit[1])
    every = re.findall(r"\boption[ \t]*([12])\b", text, re.I)
    return int(every[-1]) if every else None


def tagged(text: str) -> int | None:
    """The whole number in the last <answer>...</answer>."""
    every = TAG.findall(text)
    return int(every[-1]) if every and re.fullmatch(r"\s*-?\d{1,18}\s*", every[-1], re.ASCII) else None


def numbers(text: str) -> list[float]:
    """Every number of a text, whole: 70000 is 70000.0 and 1,200 is 1200.0."""
    found = (hit[0].replace(",", "").replace("$", "").replace("\u2212", "-") for hit in NUMBER.finditer(text))
    return [value for word in found if math.isfinite(value := float(word))]


def number(text: str) -> float | None:
    """The first number after the last 'Answer:' that has one (of an equation there, that after its last '='), else the last of all."""
    for said in _answers(text):
        if found := numbers(said.rpartition("=")[2]) or numbers(said):
            return found[0]
    every = numbers(text)
    return every[-1] if every else None


def letter(text: str) -> str | None:
    """A to E after the last 'Answer:' that has one; else the last '(D)', or a text that is 'D' or begins 'D)'."""
    for said in _answers(text):
        if hit := LETTER.match(said):
            return (hit[1] or hit[2]).upper()
    every = re.findall(r"\(([A-E])\)", text) or re.findall(r"\A\s*([A-E])(?:[).:]|\s*\Z)", text)
    return every[-1] if every else None


def text(said: str) -> str | None:
    """What stands behind the last 'Answer:', else the whole text; letter case, spaces and a last full stop do not count."""
    found = (_answers(said) or [said])[0]
    return _plain(found) or None


def _plain(said: str) -> str:
    return " ".join(said.split()).rstrip(".").strip().casefold()


class Extractor(NamedTuple):
    """How the answer of a kind is found in a text, and what a label of that kind is as such an answer."""

    find: Callable[[str], Any]
    label: Callable[[Any], Any]
    says: str

    def score(self, output: str, label: Any) -> bool | None:
        """Whether the text's answer is the label; None where it has no answer. Raises ValueError for a label of another kind."""
        found, wanted = self.find(output), self.label(label)
        if found is None:
            return None
        return abs(found - wanted) < 1e-4 if isinstance(wanted, float) else bool(found == wanted)


def _number_of(label: Any) -> float:
    found = [] if isinstance(label, bool) else [float(label)] if isinstance(label, (int, float)) else numbers(str(label))
    if len(found) != 1 or not math.isfinite(found[0]):
        raise ValueError(f"{seen(label)} is not one number")
    return found[0]


def _whole_of(label: Any) -> int:
    if not isinstance(label, bool) and re.fullmatch(r"-?[0-9]{1,18}", said := str(label).strip()):
        return int(said)
    if (value := _number_of(label)) != int(value):
        raise ValueError(f"{seen(label)} is no whole number")
    return int(value)


def _one_of(*words: str) -> Callable[[Any], str]:
    def check(label: Any) -> str:
        if (said := str(label).strip().lower()) not in words:
            raise ValueError(f"{seen(label)} is none of {', '.join(words)}")
        return said

    return check


def _letter_of(label: Any) -> str:
    said = str(label).strip().strip("().").upper()
    if len(said) != 1 or said not in LETTERS:
        raise ValueError(f"{seen(label)} is no letter from A to E")
    return said


def _option_of(label: Any) -> int:
    if str(label).strip() not in ("1", "2"):
        raise ValueError(f"{seen(label)} is neither 1 nor 2")
    return int(label)


def _text_of(label: Any) -> str:
    """As `text` finds it: what stands behind 'Answer:' in the label, too."""
    if (found := text(str(label))) is None:
        raise ValueError(f"{seen(label)} is no text")
    return found


NLI = ("entailment", "neutral", "contradiction")
EXTRACTORS: dict[str, Extractor] = {
    "boolean": Extractor(_words("true", "false"), _one_of("true", "false"), "true or false"),
    "option": Extractor(option, _option_of, "Option1 or Option2"),
    "tag": Extractor(tagged, _whole_of, "the whole number in <answer></answer>"),
    "number": Extractor(number, _number_of, "a number"),
    "letter": Extractor(letter, _letter_of, "a letter from A to E"),
    "nli": Extractor(_words(*NLI), _one_of(*NLI), ", ".join(NLI)),
    "text": Extractor(text, _text_of, "what follows 'Answer:', or the whole text"),
}


def extractor(name: str) -> Extractor:
    if name not in EXTRACTORS:
        raise unknown("extractor", name, EXTRACTORS)
    return EXTRACTORS[name]
