"""The picture: how far the headline foundation moved against side effects on the others, one point per method, at equal KL."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spilt.report import drawing as figures
from spilt.report.drawing import GROUND, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^vDPX*<>hp8d"


def movement(points: pd.DataFrame, headline: str, budget: float | None = None, narrow: bool = False) -> Figure:
    """points: a row for each method (tables.points). Further up is more of what is meant, further left fewer side effects; below the
    dashed line side effects are larger than the movement. Open markers: not at the budget. Methods without a number are named below."""
    known = points[np.isfinite(points["movement"]) & np.isfinite(points["side"])] if len(points) else points
    with figures.drawing("movement", narrow, (figures.NARROW, 5.2) if narrow else (7.6, 4.4)) as figure:
        axes = figure.subplots()
        colours = [colours[tint] for tint in (0, 1) for colours, _ in (*figures.SERIES.values(), figures.OTHER)]
        keys: list[Any] = []
        for i, (_, row) in enumerate(known.iterrows()):
            colour, marker = colours[i % len(colours)], MARKERS[i % len(MARKERS)]
            face = colour if row["at_budget"] else GROUND
            bars = [[[_reach(row, name, end)] for end in ("low", "high")] for name in ("side", "movement")]
            axes.errorbar(row["side"], row["movement"], xerr=bars[0], yerr=bars[1], color=colour, linewidth=0.8, zorder=2)
            style: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": "none", "markersize": 6.5}
            axes.plot([row["side"]], [row["movement"]], zorder=3, **style)
            keys.append(figures.key(str(row["method"]), **style))
        axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
        right = max([0.1, *axes.get_xlim()])
        axes.plot([0, right], [0, right], color=MUTED, linestyle=figures.DASHED, linewidth=0.8, zorder=1)
        axes.set_xlim(0, right)
        axes.set_xlabel("side effects: mean |change| of the other foundations (nats of logit w)")
        axes.set_ylabel(f"movement of {headline} as meant (nats)")
        axes.set_title("Movement against side effects" + ("" if budget is None else f" at KL p95 = {budget:g} nat"))
        if budget is not None and not all(known["at_budget"]):
            keys.append(figures.key("not at this KL", color=INK, marker="o", markerfacecolor=GROUND, linestyle="none"))
        if lacking := [str(name) for name in points["method"] if name not in set(known["method"])] if len(points) else []:
            keys.append(figures.key(f"no valid verdicts: {', '.join(lacking)}", linestyle="none"))
        where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2} if narrow else {}
        where = where or {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        if keys:
            axes.legend(handles=keys, title="method; bars: 95% over vignettes", alignment="left", **where)
        return figure


def _reach(row: pd.Series, name: str, end: str) -> float:
    """How far a bar goes from its point; 0 where it is not known. A percentile interval can leave its point out."""
    reach = row[f"{name}_{end}"] - row[name]
    return max(0.0, -reach if end == "low" else reach) if math.isfinite(reach) else 0.0


def svg(figure: Figure) -> str:
    """With colours for light and dark pages."""
    return figures.adaptive(figures.svg_of(figure))


def png(figure: Figure) -> bytes:
    return figures.png_of(figure)
