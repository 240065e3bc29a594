"""The strength that shows a behaviour most, within limits of incoherence and damage, and the range around it that works.

Tried: doses above 0, weakest first, until a limit is crossed, and below 0, unless one above shows half of what was missing; then between
the best one and its neighbours; then the edges of the range that works are halved in log m until they are known to a quarter. Everything
is measured, nothing extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


def choose(measure: Callable[[float], Point], unit: float, limits: Limits = LIMITS, doses: Sequence[float] = DOSES) -> Chosen:
    """unit: the dose of multiplier 1. Of equal ones the weakest is chosen."""
    points: dict[float, Point] = {}

    def at(m: float) -> Point:
        if m not in points:
            points[m] = measure(m)
        return points[m]

    base = at(0.0)

    def crossed(point: Point) -> str:
        """Which limit; '' where it keeps both."""
        if not point.incoherent - base.incoherent <= limits.incoherent:
            return "incoherent"
        return "" if point.damage <= limits.damage else "damage"  # nan is not

    def best() -> Point:
        allowed = [point for point in points.values() if not crossed(point)]
        return max(allowed, key=lambda point: (point.success, -abs(point.multiplier)))

    kept = list[float]()
    for sign in (1.0, -1.0):
        if kept and best().success >= (1 + base.success) / 2:
            break
        for dose in doses:
            if crossed(at(sign * dose / unit)):
                break
            kept.append(sign * dose / unit)

    def ended(status: str, m: float = 0.0, edges: tuple[Edge, ...] = ()) -> Chosen:
        return Chosen(m, status, edges, tuple(points[m] for m in sorted(points)))

    if not kept:
        return ended(TOO_MUCH)
    if best().success > base.success:
        here = best().multiplier
        side = sorted((m for m in points if m * here > 0), key=abs)
        for neighbour in side[max(0, side.index(here) - 1) : side.index(here) + 2]:
            if neighbour != here:
                at(_middle(here, neighbour))
    while (top := best()).success > base.success:
        half = base.success + (top.success - base.success) / 2

        def fails(m: float, half: float = half) -> str:
            """Why a strength does not work; '' where it does: within the limits, and at least half of the largest gain."""
            return crossed(at(m)) or ("" if at(m).success >= half else "shows it less")

        edges = []
        for outwards in (False, True):
            side = sorted((m for m in points if m * top.multiplier > 0), key=abs, reverse=not outwards)
            works, beyond = top.multiplier, None
            for m in side[side.index(top.multiplier) + 1 :]:
                if fails(m):
                    beyond = m
                    break
                works = m
            while beyond is not None and max(works / beyond, beyond / works) > CLOSED:
                middle = _middle(works, beyond)
                works, beyond = (works, middle) if fails(middle) else (middle, beyond)
            edges.append(Edge(works, beyond, "" if beyond is None else fails(beyond)))
        if best() == top:  # the edges have shown no better one
            return ended(CHOSEN, top.multiplier, tuple(edges))
    return ended(NO_EFFECT)


def _middle(a: float, b: float) -> float:
    return math.copysign(math.sqrt(a * b), a)
