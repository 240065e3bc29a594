"""The one exception that a user's mistake raises: the fact, the value, the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# what a terminal obeys or what reorders the words: C0, DEL, C1, bidirectional marks and overrides, line and paragraph
# separators; halves of surrogate pairs, which no stream can encode
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# half of a surrogate pair, as JSON's \ud83d alone gives: neither UTF-8 nor a tokenizer can take it
half_pair = re.compile("[\ud800-\udfff]").search


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")


class UserError(Exception):
    """The request or its input is wrong. The command line prints the message and exits 2, without a traceback."""


class NotFinite(FloatingPointError):
    """The model's numbers are NaN or infinite: the cell fails, nothing of it is stored, others go on. The message names the way out."""


class Mistakes:
    """Mistakes that are told together: of one file, not one per run."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def each(self) -> Iterator[None]:
        """A user's mistake inside is kept for later."""
        try:
            yield
        except UserError as error:
            self.said.append(str(error))

    def tell(self) -> None:
        """Raises UserError with all of them, a line each; nothing if there are none."""
        if self.said:
            raise UserError("\n".join(dict.fromkeys(self.said)))


def first_line(error: BaseException, most: int = 300) -> str:
    """What an exception says, in one line; its name when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def printable(text: str, lines: bool = False) -> str:
    """`text` as it may be shown: characters that steer a terminal become visible escapes such as \\x1b or \\u202e.

    lines: line breaks stay, for messages of several lines of our own; each line after the first is indented, so that a
    line break out of a file can't begin a line that looks like ours. What is printable stays as it is, so twice is once.
    """
    if lines:
        first, *more = text.split("\n")
        return "\n".join([printable(first), *(f"  {printable(line)}" if line[:1].strip() else printable(line) for line in more)])
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def nearest(value: str, have: Iterable[str]) -> str | None:
    """The known name closest to `value`, or None when nothing is close."""
    found = difflib.get_close_matches(value, list(have), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(kind: str, value: str, have: Iterable[str]) -> UserError:
    """unknown method 'sptl'; did you mean 'spilt'? have: caa, reps, sft, spilt"""
    names = sorted(have)
    guess = nearest(value, names)
    hint = f"; did you mean {guess!r}?" if guess else ";"
    return UserError(f"unknown {kind} {value!r}{hint} have: {', '.join(names) or 'none'}")


def checked_name(kind: str, name: str) -> str:
    """A name that is about to become part of a path: one folder name, no '/', no '..'."""
    if not _NAME.match(name) or ".." in name:
        raise UserError(f"{kind} {name!r} cannot be a folder name: letters, digits, '.', '_' and '-' only, and no '..'")
    return name
