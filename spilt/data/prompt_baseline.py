"""What a prompt baseline is: a system prompt or a few examples, behind which the unsteered model is asked what the methods are asked.

`--prompt_baseline NAME=FILE` of `spilt table`, `spilt generate` and `spilt evaluate` is read here, and nowhere else. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spilt.data import sources
from spilt.data.chat import SYSTEM, Conversation, Question
from spilt.errors import UserError, checked_name

FEW_SHOT = ("question", "answer")
HELP = "a text file is a system prompt; rows of question and answer (.jsonl, .json, .csv) are examples"


class Prompt(NamedTuple):
    """turns: a system turn, or user and assistant by turns. word: as it was given, NAME=FILE."""

    name: str
    turns: Conversation
    word: str = ""

    @property
    def decides(self) -> list[list[str]]:
        """What of it decides a result, for manifests: what it says, wherever its file lies."""
        return [[*turn] for turn in self.turns]


def read(words: Sequence[str]) -> list[Prompt]:
    """NAME=FILE each: a text is a system prompt; rows of `question` and `answer` (.jsonl, .json, .csv ...) are turns. Raises UserError."""
    found = list[Prompt]()
    for word in words:
        name, _, file = word.partition("=")
        if not name or not file:
            raise UserError(f"--prompt_baseline {word!r}: wanted NAME=FILE")
        if name in (one.name for one in found):
            raise UserError(f"--prompt_baseline {name}: named twice; give each prompt a name of its own")
        found.append(Prompt(checked_name("prompt baseline", name), _turns(Path(file)), word))
    return found


def _turns(path: Path) -> Conversation:
    if sources.ending_of(path) is None:
        text = sources.text(path).strip()
        if not text:
            raise UserError(f"prompt {path}: is empty; write a system prompt into it")
        return ((SYSTEM, text),)
    turns = []
    for row in sources.read_rows(path):
        for role, column in zip(("user", "assistant"), FEW_SHOT, strict=True):
            value = row.values.get(column)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"prompt {path}, {row.where}: wanted texts {' and '.join(FEW_SHOT)}; {column} is {repr(value)[:60]}")
            turns.append((role, value))
    if not turns:
        raise UserError(f"prompt {path}: has no rows; write one with {' and '.join(FEW_SHOT)} for each example")
    return tuple(turns)


def behind(turns: Conversation, question: Question, system_prompt: str = "") -> Question:
    """The question behind a prompt. Its own system prompt, or that of the settings, comes first."""
    asked = (("user", question),) if isinstance(question, str) else question
    own = asked[0][1] if asked[0][0] == SYSTEM else system_prompt
    system = "\n\n".join(filter(None, [own, *(text for role, text in turns if role == SYSTEM)]))
    rest = tuple(turn for turn in (*turns, *asked) if turn[0] != SYSTEM)
    return ((SYSTEM, system), *rest) if system else rest
