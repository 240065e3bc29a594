"""ListOps: nested operations on digits (arXiv 1804.06028), made from a seed. [MAX 2 9 [MIN 4 7 ] 0 ] is 9.

MIN, MAX; MED, the whole part of the median; SM, the sum modulo 10; FIRST, LAST.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from spilt.errors import UserError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
    "FIRST": lambda values: values[0],
    "LAST": lambda values: values[-1],
}
PUBLISHED = ("MIN", "MAX", "MED", "SM")
NESTED = 0.25  # chance that an argument is a list itself, where the depth allows it


class Shape(NamedTuple):
    """What expressions are made: operators, most lists within each other, fewest and most arguments of each."""

    operators: tuple[str, ...] = PUBLISHED
    depth: int = 3
    fewest: int = 2
    most: int = 5


def expression(shape: Shape, draw: random.Random, depth: int | None = None) -> str:
    """One expression, words apart by spaces: '[MAX 2 9 ]'."""
    room = shape.depth if depth is None else depth
    count = draw.randint(shape.fewest, shape.most)
    parts = [expression(shape, draw, room - 1) if room > 1 and draw.random() < NESTED else str(draw.randrange(10)) for _ in range(count)]
    return " ".join([f"[{draw.choice(shape.operators)}", *parts, "]"])


def value(text: str) -> int:
    """What an expression evaluates to, 0 to 9. Raises UserError for what is none."""
    stack: list[tuple[str, list[int]]] = [("", [])]
    for word in text.replace("]", " ] ").split():
        if word == "]" and len(stack) > 1 and stack[-1][1]:
            name, values = stack.pop()
            stack[-1][1].append(OPERATORS[name](values))
        elif word[:1] == "[" and word[1:] in OPERATORS:
            stack.append((word[1:], []))
        elif len(word) == 1 and word in "0123456789":
            stack[-1][1].append(int(word))
        else:
            raise UserError(f"no ListOps expression: {text[:80]!r} at {word!r}; operators: {', '.join(OPERATORS)}")
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise UserError(f"no ListOps expression: {text[:80]!r} is not one closed list")
    return stack[0][1][0]


def expressions(count: int, shape: Shape, seed: int, without: frozenset[str] = frozenset()) -> list[str]:
    """`count` different expressions, none of `without`. Raises UserError where so many are not found."""
    draw, found = random.Random(f"listops/{seed}"), dict[str, None]()
    for _ in range(100 * count + 1000):
        if len(found) == count:
            return list(found)
        made = expression(shape, draw)
        if made not in without:
            found[made] = None
    if len(found) == count:
        return list(found)
    raise UserError(
        f"only {len(found)} different expressions of depth {shape.depth} with {shape.fewest} to {shape.most} arguments were found, "
        f"{count} wanted; give a larger depth or more arguments"
    )
