"""The picture of a table: the accuracy of each run with its interval, one below the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spilt.report import drawing
from spilt.report.drawing import DASHED, INK, MUTED, RANDOM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 30  # runs that are drawn


def accuracy(values: pd.DataFrame, narrow: bool = False) -> Figure:
    """values: a row for each run (table.collect). Percent, Wilson's 95%; dashed: the reference's accuracy; grey: nothing was learned."""
    drawn = values.head(MOST)
    width, height = drawing.NARROW if narrow else 7.6, 0.85 + 0.42 * len(drawn)
    with drawing.drawing("accuracy", narrow, (width, height)) as figure:
        axes = figure.subplots()
        at = np.arange(len(drawn))
        for i, (_, row) in zip(at, drawn.iterrows(), strict=True):
            colour = drawing.SERIES["spilt"][0][0] if row["parameters"] else RANDOM
            low, high = (abs(row[end] - row["accuracy"]) * 100 for end in ("low", "high"))
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5.5, "linewidth": 1.4, "zorder": 3}
            axes.errorbar(100 * row["accuracy"], i, xerr=[[low], [high]], **style)
            name = _short(str(row["variant"]), 34 if narrow else 64)
            axes.text(1, i - 0.34, name, color=INK, va="center", ha="left", parse_math=False).set_in_layout(False)
            axes.text(100, i - 0.34, f"{row['share']:.2%}" if row["parameters"] else "", color=MUTED, va="center", ha="right")
        for share in values["accuracy"][(values["variant"] == values["reference"]) & (len(values) > 1)]:
            axes.axvline(100 * share, color=MUTED, linestyle=DASHED, linewidth=0.8, zorder=1)
        axes.set_xlim(-1, 101)
        axes.set_ylim(len(drawn) - 0.5, -0.75)
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("accuracy in percent")
        return figure


def _short(name: str, most: int) -> str:
    """Its beginning and its end, where it is longer: runs of one variant differ at the end."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"
