"""The strength that shows a behaviour most, within limits of incoherence and damage, and the range around it that works.

Tried: doses above 0, weakest first, until a limit is crossed, and below 0, unless one above shows half of what was missing; then between
the best one and its neighbours; then the edges of the range that works are halved in log m until they are known to a quarter. Everything
is measured, nothing extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from spilt.errors import UserError

CHOSEN = "chosen"
NO_EFFECT = "no effect"  # within the limits none shows it more than the unsteered model
TOO_MUCH = "over the limits"  # even the weakest that was tried
DOSES = (0.05, 0.1, 0.2, 0.4, 0.8)
CLOSED = 1.25  # an edge lies between two strengths with at most this ratio
INCOHERENT, DAMAGE = 0.1, 1.0  # limits: share of answers more than unsteered; nats per token


class Point(NamedTuple):
    """What was measured at one multiplier. success: share of answers that are as wanted and coherent; damage: nats per token."""

    multiplier: float
    success: float
    incoherent: float
    damage: float


class Limits(NamedTuple):
    """What a strength may cost. incoherent: more than unsteered."""

    incoherent: float = INCOHERENT
    damage: float = DAMAGE


LIMITS = Limits()


class Edge(NamedTuple):
    """An end of the range: the last strength that works, the first one beyond it that does not (None: none was tried), and why."""

    works: float
    fails: float | None
    why: str


class Chosen(NamedTuple):
    """The multiplier (0: none), how the search ended, both edges, from 0 outwards, and everything that was measured, by multiplier."""

    multiplier: float
    status: str
    edges: tuple[Edge, ...]
    points: tuple[Point, ...]

    @property
    def point(self) -> Point:
        return next(point for point in self.points if point.multiplier == self.multiplier)


class _Tried:
    """What was measured so far, and what it says within the limits."""

    def __init__(self, measure: Callable[[float], Point], limits: Limits) -> None:
        self.measure, self.limits, self.points = measure, limits, dict[float, Point]()
        self.base = self.at(0.0)

    def at(self, m: float) -> Point:
        if m not in self.points:
            self.points[m] = self.measure(m)
        return self.points[m]

    def crossed(self, point: Point) -> str:
        """Which limit; '' where it keeps both."""
        if not point.incoherent - self.base.incoherent <= self.limits.incoherent:
            return "incoherent"
        return "" if point.damage <= self.limits.damage else "damage"  # nan is not

    def best(self) -> Point:
        """Of equal ones the weakest."""
        allowed = [point for point in self.points.values() if not self.crossed(point)]
        return max(allowed, key=lambda point: (point.success, -abs(point.multiplier)))

    def side(self, m: float) -> list[float]:
        """The multipliers of this sign, weakest first."""
        return sorted((other for other in self.points if other * m > 0), key=abs)

    def fails(self, m: float, half: float) -> str:
        """Why a strength does not work; '' where it does: within the limits, and so large a share at least."""
        return self.crossed(self.at(m)) or ("" if self.at(m).success >= half else "shows it less")

    def edge(self, top: float, half: float, outwards: bool) -> Edge:
        """From `top` on: between the last strength that works and the first that does not, halved in log m until it is known."""
        side = self.side(top)[:: 1 if outwards else -1]
        works, beyond = top, None
        for m in side[side.index(top) + 1 :]:
            if self.fails(m, half):
                beyond = m
                break
            works = m
        while beyond is not None and max(works / beyond, beyond / works) > CLOSED:
            middle = _middle(works, beyond)
            works, beyond = (works, middle) if self.fails(middle, half) else (middle, beyond)
        return Edge(works, beyond, "" if beyond is None else self.fails(beyond, half))

    def ended(self, status: str, m: float = 0.0, edges: tuple[Edge, ...] = ()) -> Chosen:
        return Chosen(m, status, edges, tuple(self.points[m] for m in sorted(self.points)))


def choose(measure: Callable[[float], Point], unit: float, limits: Limits = LIMITS, doses: Sequence[float] = DOSES) -> Chosen:
    """unit: the dose of multiplier 1. Of equal ones the weakest is chosen. Raises UserError for a dose that cannot be scaled."""
    if not 0 < unit < math.inf:  # nan is not
        raise UserError(f"multiplier 1 has the dose {unit:g} (|added| / |stream|): no strength of this vector can be chosen; fit it again")
    tried = _Tried(measure, limits)
    base, kept = tried.base.success, False
    for sign in (1.0, -1.0):
        if kept and tried.best().success >= (1 + base) / 2:
            break
        for dose in doses:
            if tried.crossed(tried.at(sign * dose / unit)):
                break
            kept = True
    if not kept:
        return tried.ended(TOO_MUCH)
    if tried.best().success > base:  # between the best one and its neighbours
        here = tried.best().multiplier
        side = tried.side(here)
        for neighbour in side[max(0, side.index(here) - 1) : side.index(here) + 2]:
            if neighbour != here:
                tried.at(_middle(here, neighbour))
    while (top := tried.best()).success > base:
        half = base + (top.success - base) / 2  # at least half of the largest gain
        edges = tuple(tried.edge(top.multiplier, half, outwards) for outwards in (False, True))
        if tried.best() == top:  # the edges have shown no better one
            return tried.ended(CHOSEN, top.multiplier, edges)
    return tried.ended(NO_EFFECT)


def _middle(a: float, b: float) -> float:
    return math.copysign(math.sqrt(a * b), a)
