"""What is read from the curves: regions, utility peak and drops, flat tails. Units: nats, m dimensionless.

`summary` is a table of spilt.analysis.odds.summarise: one row per split and multiplier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from spilt.analysis.curves.fitting import CurveFit, warned_of
from spilt.analysis.recommend import BUDGET

Array = npt.NDArray[np.float64]

LINEAR_TOLERANCE = 0.05  # of the curve's range: how far the linear region may lie from a straight line
CONVERGED_SLOPE = 0.1  # of the linear region's slope: below it, out to the end, the curve has converged
UNTRUSTED = ("low_r2", "low_held_out_r2", "spike", "misses_zero", "upside_down")  # such a fit is not read, the points are
TAIL, FLAT = 0.2, 0.05  # a tail is the outer 20% of a side; it is flat when it moves less than 5% of the curve's range


def regions(fit: CurveFit, multiplier: npt.ArrayLike, value: npt.ArrayLike) -> dict[str, Any] | None:
    """The three regions of the preference curve, as intervals of m; None without a fit. Of points, joined, where the fit is not trusted.

    linear: the widest interval around 0 whose curve stays within 5% of its range of one straight line;
    convergence: the outer parts where the slope stays under 10% of the linear region's; transitional: between the two.
    slope [nats per unit of m] and r2_linear: of a straight line through the measured points of the linear region (3 at least).
    """
    if fit.parameters is None:
        return None
    m, y = np.asarray(multiplier, dtype=float), np.asarray(value, dtype=float)
    order = np.argsort(m)
    m, y = m[order], y[order]
    grid, known = np.linspace(*fit.extent, 401), np.isfinite(y)
    curve = fit(grid) if _trusted(fit) else np.interp(grid, m[known], y[known])
    tolerance = LINEAR_TOLERANCE * float(np.ptp(curve))
    if tolerance == 0:
        return None
    left = right = int(np.abs(grid).argmin())
    grows = [True, True]
    while any(grows):
        for side in (0, 1):
            if not grows[side]:
                continue
            a, b = (left - 1, right) if side == 0 else (left, right + 1)
            grows[side] = a >= 0 and b < len(grid) and _off_line(grid[a : b + 1], curve[a : b + 1]) <= tolerance
            if grows[side]:
                left, right = a, b
    slope_of_curve = np.gradient(curve, grid)
    if right > left:
        steep = np.abs(slope_of_curve) >= CONVERGED_SLOPE * abs(np.polyfit(grid[left : right + 1], curve[left : right + 1], 1)[0])
    else:
        steep = np.ones(len(grid), dtype=bool)
    ends_right = max(right, int(np.flatnonzero(steep)[-1])) if steep.any() else right
    ends_left = min(left, int(np.flatnonzero(steep)[0])) if steep.any() else left

    def spans(*pairs: tuple[int, int]) -> list[list[float]]:
        return [[float(grid[a]), float(grid[b])] for a, b in pairs if b - a > 2]

    inside = np.isfinite(y) & (m >= grid[left] - 1e-12) & (m <= grid[right] + 1e-12)
    slope = r2 = None
    if inside.sum() >= 3 and np.ptp(y[inside]) > 0:
        slope, _ = (float(v) for v in np.polyfit(m[inside], y[inside], 1))
        r2 = float(np.corrcoef(m[inside], y[inside])[0, 1] ** 2)
    return {
        "linear": [float(grid[left]), float(grid[right])],
        "transitional": spans((ends_left, left), (right, ends_right)),
        "convergence": spans((0, ends_left), (ends_right, len(grid) - 1)),
        "slope": slope,
        "r2_linear": r2,
        "n_linear": int(inside.sum()),
        "source": "fit" if _trusted(fit) else "points",
    }


def _off_line(x: Array, y: Array) -> float:
    """Largest distance of y from its least-squares line."""
    x = x - x.mean()
    slope = (x @ y) / (x @ x)
    return float(np.abs(y - y.mean() - slope * x).max())


def utility_peak(fit: CurveFit, multiplier: npt.ArrayLike, utility: npt.ArrayLike) -> dict[str, Any] | None:
    """argmax of utility: on the fitted curve, or on the measured points where the fit is not good enough (`source` says which)."""
    m, y = np.asarray(multiplier, dtype=float), np.asarray(utility, dtype=float)
    m, y = m[np.isfinite(y)], y[np.isfinite(y)]
    if not len(m):
        return None
    if _trusted(fit):
        m, source = np.linspace(*fit.extent, 2001), "fit"
        y = fit(m)
    else:
        source = "points"
    at = int(y.argmax())
    return {"multiplier": float(m[at]), "utility": float(y[at]), "source": source}


def utility_drops(fit: CurveFit, multiplier: npt.ArrayLike, utility: npt.ArrayLike, drop: float = BUDGET) -> dict[str, Any]:
    """Where utility has first fallen `drop` nats below its value at m = 0, going outwards on each side; None where it does not."""
    m, y = np.asarray(multiplier, dtype=float), np.asarray(utility, dtype=float)
    m, y = m[np.isfinite(y)], y[np.isfinite(y)]
    order = np.argsort(m)
    m, y = m[order], y[order]
    source = "points"
    if _trusted(fit) and fit.extent[0] <= 0 <= fit.extent[1]:
        m, source = np.union1d(np.linspace(*fit.extent, 2001), [0.0]), "fit"
        y = fit(m)
    out: dict[str, Any] = {"drop": drop, "minus": None, "plus": None, "source": source}
    if not (m == 0).any():
        return out
    floor = y[m == 0][0] - drop
    for side, rows in (("plus", m >= 0), ("minus", m <= 0)):
        x, u = (m[rows], y[rows]) if side == "plus" else (m[rows][::-1], y[rows][::-1])
        below = np.flatnonzero(u < floor)
        if len(below):
            i = below[0]  # >= 1: at m = 0 nothing has dropped
            share = (u[i - 1] - floor) / (u[i - 1] - u[i])
            out[side] = float(x[i - 1] + share * (x[i] - x[i - 1]))
    return out


def _trusted(fit: CurveFit) -> bool:
    return fit.parameters is not None and not any(warned_of(fit, name) for name in UNTRUSTED)


def flattened(summary: pd.DataFrame) -> bool:
    """Have both tails of both curves flattened? Else the sweep is to be widened. Training items where they were measured.

    A tail is the outer 20% of one side (3 points at least); it is flat when it moves by less than 5% of the whole curve's range.
    A tail that ends in points that are not finite counts as flat: there is nothing more to measure. An empty side too.
    """
    have = set(summary["split"])
    rows = summary[summary["split"] == ("train" if "train" in have else next(iter(have), None))].sort_values("multiplier")
    m = rows["multiplier"].to_numpy(float)
    for name in ("preference", "utility"):
        y = rows[name].to_numpy(float)
        if not np.isfinite(y).any():
            continue
        span = float(np.nanmax(y) - np.nanmin(y))
        for sign in (1, -1):
            reach, curve = (m[m * sign >= 0] * sign)[::sign], y[m * sign >= 0][::sign]
            if len(reach) < 2 or not np.isfinite(curve[-1]):
                continue
            tail = curve[reach >= (1 - TAIL) * reach[-1] - 1e-9]
            tail = curve[-3:] if len(tail) < 3 else tail
            if np.nanmax(tail) - np.nanmin(tail) >= FLAT * span > 0:
                return False
    return True
