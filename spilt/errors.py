"""The one exception that a user's mistake raises: the fact, the value, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The request or its input is wrong. The command line prints the message and exits 2, without a traceback."""


def first_line(error: BaseException, most: int = 300) -> str:
    """What an exception says, in one line; its name when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


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
