"""An example as tokens: the prompt exactly as decoding feeds it, the completion, and the end of the turn, which is learned too.

| BOS, template ... | prompt | template | completion | end |
|<--------- not scored ----------------->|<-- scored ---->|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spilt.data.chat import Chat, Encoded
from spilt.downstream.rows import Example
from spilt.downstream.words import OVERLONG
from spilt.errors import UserError, unknown


class Prompted(NamedTuple):
    """The prompts of a split, cut to `max_length` where they were longer. dropped: rows left out, by number."""

    ids: list[tuple[int, ...]]
    rows: list[int]  # number of each in the split
    truncated: int
    dropped: list[int]


class Encoding(NamedTuple):
    """How a task's texts become tokens. overlong: the prompt loses its beginning (after the template's), or the row is left out."""

    chat: Chat
    ends: tuple[int, ...]  # tokens at which decoding stops
    max_length: int
    overlong: str = OVERLONG[0]

    @property
    def end(self) -> tuple[int, ...]:
        """What closes a completion: the template's end of turn up to the token at which decoding stops, or that token alone."""
        suffix = self.chat.suffix_ids if self.chat.use_template else ()
        at = next((i for i, token in enumerate(suffix) if token in self.ends), None)
        return suffix[: at + 1] if at is not None else self.ends[:1]

    def prompts(self, examples: Sequence[Example], room: int = 0) -> Prompted:
        """The tokens that decoding is fed; room: tokens of max_length that are kept for what follows."""
        check(self)
        ids, numbers, truncated, dropped = list[tuple[int, ...]](), list[int](), 0, list[int]()
        for number, example in enumerate(examples):
            whole = tuple(self.chat.prompt_ids(example.prompt))
            short = self._cut(whole, self.max_length - room)
            if short is None or (self.overlong == "drop" and short != whole):
                dropped.append(number)
                continue
            truncated += short != whole
            ids.append(short)
            numbers.append(number)
        return Prompted(ids, numbers, truncated, dropped)

    def _cut(self, ids: tuple[int, ...], most: int) -> tuple[int, ...] | None:
        """The template's beginning and the last tokens; None where these do not fit."""
        head = self.chat.prefix_length
        return ids if len(ids) <= most else None if most <= head else ids[:head] + ids[len(ids) - (most - head) :]

    def completion(self, prompt: str, ids: Sequence[int], completion: str) -> tuple[int, ...]:
        """The tokens after the prompt's own, in one text with it where they begin alike, else by themselves; and the end."""
        tokenizer: Any = self.chat.tokenizer
        before = self.chat.prompt_text(prompt)
        joined = list(tokenizer(before + completion, add_special_tokens=False)["input_ids"])
        own = list(tokenizer(before, add_special_tokens=False)["input_ids"])
        alone = joined[: len(own)] != own
        made = list(tokenizer(completion, add_special_tokens=False)["input_ids"]) if alone else joined[len(own) :]
        return (*made, *self.end)

    def training(self, examples: Sequence[Example]) -> tuple[list[Encoded], int, int]:
        """(sequences, prompts that were truncated, rows that were left out)."""
        check(self)
        out, truncated, dropped = list[Encoded](), 0, 0
        for example in examples:
            whole = tuple(self.chat.prompt_ids(example.prompt))
            said = self.completion(example.prompt, whole, example.completion)
            short = self._cut(whole, self.max_length - len(said))
            if short is None or (self.overlong == "drop" and short != whole):
                dropped += 1
                continue
            truncated += short != whole
            out.append(Encoded(short + said, len(short), len(self.end)))
        if not out:
            raise UserError(f"no training row fits into {self.max_length} tokens; raise --max-length")
        return out, truncated, dropped


def check(one: Encoding) -> None:
    if one.overlong not in OVERLONG:
        raise unknown("way with what is too long", one.overlong, OVERLONG)
