"""The multiplier at which a statistic of steering meets a budget: a bracket, then damped secant steps in logarithms.

The bracket, from where the search begins: x_next = x (budget / statistic)^(1/2), since KL is quadratic in a small change; at most 8 times,
and after LAW such steps at least twice. Within it:

x_next = log x_a + (log x_b - log x_a) g_a / (g_a - g_b),  g = log(statistic / budget): regula falsi where a power law is a straight line,
with the Illinois rule (an end that stays twice counts half), so that both ends close in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

CONVERGED = "converged"
BELOW = "below budget"  # at the strongest that may be tried
ABOVE = "above budget"  # at the weakest
NOT_MONOTONE = "not monotone"  # stronger was less somewhere: other strengths may meet the budget too
JUMPS = "jumps over the budget"  # from below to above within a step of half a percent
NOT_ZERO = "not the identity at 0"
STEPS = 16
CLOSED = 5e-3  # a step of half a percent, of which JUMPS speaks
LAW = 4  # tries by the quadratic law alone
TWICE, MOST = math.log(2), math.log(8)
HIGH = 1e3  # the strongest that is tried


class Probe(NamedTuple):
    """What was measured at one strength."""

    size: float  # |m|
    statistic: float


class Found(NamedTuple):
    """The strength nearest to the budget, what was measured there, how it ended, and everything that was tried, in order."""

    size: float
    statistic: float
    status: str
    probes: tuple[Probe, ...]


def solve(statistic: Callable[[float], float], budget: float, start: float = 1.0, **how: float) -> Found:
    """Where `statistic`(size) is within a tolerance of the budget. how: as for `search`."""
    (found,) = solve_together(lambda sizes: [statistic(size) for size in sizes.values()], [0], budget, start, **how).values()
    return found


def solve_together(
    statistics: Callable[[dict[Any, float]], Sequence[float]], keys: Sequence[Any], budget: float, start: float = 1.0, **how: float
) -> dict[Any, Found]:
    """A search for each key, side by side. statistics: key -> size, of those that go on, to a value for each."""
    searches = {key: search(budget, start, **how) for key in keys}
    sizes, found = {key: next(one) for key, one in searches.items()}, {}
    while sizes:
        for key, value in zip(list(sizes), statistics(sizes), strict=True):
            try:
                sizes[key] = searches[key].send(float(value))
            except StopIteration as end:
                found[key] = end.value
                del sizes[key]
    return {key: found[key] for key in keys}


def search(
    budget: float, start: float = 1.0, low: float = 1e-3, high: float = HIGH, tolerance: float = 0.05
) -> Generator[float, float, Found]:
    """Where a statistic of the size, in [low, high], is within tolerance x budget of the budget: yields sizes, is sent the statistic there.

    A statistic that is not finite is beyond every budget.
    """
    probes: list[Probe] = []

    def at(size: float) -> Generator[float, float, Probe]:
        value = yield size
        probes.append(Probe(size, value if math.isfinite(value) else math.inf))
        return probes[-1]

    def met(probe: Probe) -> bool:
        return abs(probe.statistic - budget) <= tolerance * budget

    def ended(status: str) -> Found:
        best = min(probes, key=lambda probe: abs(_height(probe, budget)))
        return Found(*best, NOT_MONOTONE if _falls(probes, tolerance * budget) else status, tuple(probes))

    last = probe = yield from at(min(max(start, low), high))
    weak = probe.statistic < budget
    while not met(probe) and (probe.statistic < budget) == weak:
        step = min(max(abs(_height(probe, budget)) / 2, TWICE if len(probes) >= LAW else 0.0), MOST)
        size = min(max(probe.size * math.exp(step if weak else -step), low), high)
        if size == probe.size:
            return ended(BELOW if weak else ABOVE)
        last, probe = probe, (yield from at(size))
    if met(probe):
        return ended(CONVERGED)
    below, above = (last, probe) if weak else (probe, last)
    heights = [_height(below, budget), _height(above, budget)]
    kept = [0, 0]  # steps in which an end stayed
    for _ in range(STEPS):
        probe = yield from at(_between(below.size, above.size, *heights))
        if met(probe):
            return ended(CONVERGED)
        side = 0 if probe.statistic < budget else 1
        below, above = (probe, above) if side == 0 else (below, probe)
        heights[side], kept[side] = _height(probe, budget), 0
        kept[1 - side] += 1
        if kept[1 - side] > 1:
            heights[1 - side] /= 2
        if abs(math.log(above.size / below.size)) < CLOSED:
            break
    return ended(JUMPS)


def _height(probe: Probe, budget: float) -> float:
    """log(statistic / budget); infinite where the statistic is 0 or beyond numbers."""
    return math.log(probe.statistic / budget) if 0 < probe.statistic < math.inf else math.copysign(math.inf, probe.statistic - budget)


def _between(a: float, b: float, height_a: float, height_b: float) -> float:
    """Where the line through both meets 0, in log size; the middle where there is no such line, or it meets an end."""
    share = height_a / (height_a - height_b) if math.isfinite(height_a) and math.isfinite(height_b) else 0.5
    share = share if 0.02 < share < 0.98 else 0.5
    return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))


def _falls(probes: Sequence[Probe], more: float) -> bool:
    """Whether a stronger one has less than a weaker one, by more than `more`."""
    highest = 0.0
    for _, value in sorted(probes):
        if value < highest - more:
            return True
        highest = max(highest, value)
    return False
