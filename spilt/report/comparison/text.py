"""Tables as text: Markdown, LaTeX, CSV, HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from spilt.report import page


class Table(NamedTuple):
    """name: as it is asked for; title and note: what stands above and below; shown: cells as text; values: as numbers."""

    name: str
    title: str
    note: str
    shown: pd.DataFrame
    values: pd.DataFrame


def markdown(made: Sequence[Table]) -> str:
    parts = []
    for table in made:
        cells = [list(table.shown.columns), *table.shown.astype(str).to_numpy().tolist()]
        lines = ["| " + " | ".join(str(text).replace("|", "\\|") for text in row) + " |" for row in cells]
        lines.insert(1, "|---" * len(table.shown.columns) + "|")
        parts.append("\n".join([f"## {table.title}", "", *(lines if len(table.shown) else ["nothing to compare"]), "", table.note, ""]))
    return "\n".join(parts)


def latex(made: Sequence[Table]) -> str:
    """booktabs; needs no package of fonts: the signs that plain LaTeX does not have are written with its commands."""
    parts = [
        table.shown.to_latex(index=False, escape=True, caption=table.title, label=f"tab:{n}-{table.name}") for n, table in enumerate(made)
    ]
    text = "\n".join(parts)
    for sign, command in {"−": "$-$", "–": "--", "²": "\\textsuperscript{2}", "°": "\\textdegree{}"}.items():
        text = text.replace(sign, command)
    return text


def csv(made: Sequence[Table], name: str) -> str:
    """All tables of one name in one file, as numbers."""
    values = [table.values for table in made if table.name == name]
    frame = pd.concat(values, ignore_index=True)
    first = [column for column in ("model", "dataset") if column in frame]
    ordered = frame[[*first, *(column for column in frame if column not in first)]]
    return str(ordered.to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def html(made: Sequence[Table], version: str) -> str:
    return page.render("comparison.html", tables=made, version=version)
