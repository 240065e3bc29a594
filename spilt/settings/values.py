"""Readers: a value as YAML gave it -> the value a setting holds, or `Bad` saying what was wanted. Pure and small."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from spilt.errors import unknown

Reader = Callable[[Any], Any]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[-+]?\d{1,15}", re.ASCII)


class Bad(ValueError):
    """What is wrong with one value, worded to follow `file: key = value`."""


def plain(value: Any) -> Any:
    """What Python users have of numpy, pandas or torch, as YAML would have it."""
    if isinstance(value, (list, tuple)) and any(hasattr(one, "tolist") for one in value):
        return [plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def number(low: float = -math.inf, high: float = math.inf, *, above: float | None = None, below: float | None = None) -> Reader:
    """A finite float in [low, high], and strictly beyond `above` / `below` if given. `1e-2`, a string for YAML 1.1, is a number."""

    def read(value: Any) -> float:
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Bad("is not a number")
        if isinstance(value, float) and not math.isfinite(value) or abs(value) > 1e30:
            raise Bad("is not a finite number")
        value = float(value)
        if value < low or (above is not None and value <= above):
            raise Bad(f"is too small; wanted {f'at least {low:g}' if above is None else f'more than {above:g}'}")
        if value > high or (below is not None and value >= below):
            raise Bad(f"is too large; wanted {f'at most {high:g}' if below is None else f'less than {below:g}'}")
        return value

    return read


def whole(low: int = 0) -> Reader:
    """A whole number from `low` up to 1e15."""

    def read(value: Any) -> int:
        if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Bad("is not a whole number")
        if value < low:
            raise Bad(f"is too small; wanted at least {low}")
        if value > 10**15:
            raise Bad("is too large; wanted at most 1e15")
        return value

    return read


def whole_or_all(low: int = 1) -> Reader:
    """A count, or None = all. The released files also write -1 for all."""
    read = whole(low)
    return lambda value: None if value is None or (value == -1 and not isinstance(value, bool)) else read(value)


def optional(read: Reader) -> Reader:
    """None, or what `read` makes of it."""
    return lambda value: None if value is None else read(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Bad("is neither true nor false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Bad("is not text; put it in quotes if it is meant as text")
    return value


def choice(kind: str, names: Iterable[str], aliases: Mapping[str, str] | None = None) -> Reader:
    """One of `names`; `aliases` are other spellings that released files use."""
    names, aliases = tuple(names), dict(aliases or {})

    def read(value: Any) -> str:
        word = aliases.get(value, value) if isinstance(value, str) else str(value)
        if word not in names:
            raise Bad(f"is wrong: {unknown(kind, word[:60], names)}")
        return word

    return read


def many(read: Reader, *, distinct: bool = False) -> Reader:
    """A list with at least one entry, as a tuple; a single value is a list of one."""

    def read_all(value: Any) -> tuple[Any, ...]:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise Bad("is empty; wanted at least one entry")
        out = tuple(read(item) for item in items)
        if distinct and len(set(out)) < len(out):
            raise Bad("names an entry twice")
        return out

    return read_all


POSITIONS = ("all", "all_prompt", "all_generation")  # released words; `all` begins after the template prefix
# which tokens of a sequence are steered. last: the one whose logits are made, and that alone, so that no key or value of a text is
# steered; last_cached: its approximation in one pass, from the last prompt token on, with steered keys and values
SCOPES = ("all", "last", "last_cached", "prompt", "generated")
STEERED = ("all", "skip_prefix", *POSITIONS[1:], *SCOPES[1:])  # of `steer_positions`; `all` is every token
_ENDS = re.compile(r"f([1-9]\d{0,5})(?:\+l([1-9]\d{0,5}))?|l([1-9]\d{0,5})", re.ASCII)


def positions(value: Any) -> str:
    """`all`, `all_prompt`, `all_generation`, or the first and last n prompt tokens after the template prefix: `f5+l5`, `f5`, `l5`."""
    ends(value)
    return str(value)


def steered(value: Any) -> str:
    """`steer_positions`: `all` (every token), `skip_prefix` (from the template prefix's end on), SCOPES, and the words of `positions`."""
    ends(value, STEERED)
    return str(value)


def ends(value: Any, words: Sequence[str] = POSITIONS) -> tuple[int, int] | None:
    """How many of the first and of the last prompt tokens; None for one of `words`. The one place that reads these words."""
    if isinstance(value, str) and value in words:
        return None
    found = _ENDS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Bad(f"is unknown; wanted {', '.join(words)}, f{{n}}, l{{n}}, f{{n}}+l{{n}} with n >= 1 (first / last n prompt tokens)")
    return int(found[1] or 0), int(found[2] or found[3] or 0)
