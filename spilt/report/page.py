"""HTML pages: templates/ filled in. One file that needs nothing else; every text is escaped, other scripts and requests are shut off."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spilt.artifacts.scores import MEASURES
from spilt.errors import printable
from spilt.report import drawing
from spilt.report.places import absent, anchor, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Image(NamedTuple):
    """An SVG as an address that holds it, and its size in points, so that the page does not jump while images decode."""

    data: str
    width: int
    height: int


class Picture(NamedTuple):
    """One figure, and the narrow one for small screens; drawn: the SVG of the first, in light colours."""

    wide: Image
    narrow: Image
    drawn: str


class Column(NamedTuple):
    """One column of a table: the value's name in the row, a heading, a unit below it, and the format of its numbers ("": text).

    low, high: names of an interval's ends, shown below a number; kind: CSS class of a text's cell; words: what is shown instead of a value.
    """

    name: str
    heading: str
    unit: str = ""
    spec: str = ""
    low: str = ""
    high: str = ""
    kind: str = ""
    words: Mapping[object, str] = {}


def image(svg: str) -> Image:
    """Of an SVG in light colours."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    data = base64.b64encode(drawing.adaptive(svg).encode()).decode()
    return Image(f"data:image/svg+xml;base64,{data}", round(float(width)), round(float(height)))


def picture(wide: Figure, narrow: Figure) -> Picture:
    drawn = drawing.svg_of(wide)
    return Picture(image(drawn), image(drawing.svg_of(narrow)), drawn)


def columns(names: Iterable[str], unit: str, spec: str) -> list[Column]:
    """Numbers whose names are their headings."""
    return [Column(name, name, unit, spec) for name in names]


def score_sheet(table: pd.DataFrame) -> tuple[list[dict[str, Any]], list[Column]]:
    """One cell's, for the page: a row per measure, a column per multiplier."""
    columns, rows = [Column("measure", "measure"), Column("what", "what it is", kind="text")], dict[str, dict[str, Any]]()
    for k, m in enumerate(dict.fromkeys(table["multiplier"])):
        columns.append(Column(f"m{k}", f"m = {m:g}", "", ".3g", f"low{k}", f"high{k}"))
        for row in table[table["multiplier"] == m].to_dict("records"):
            own = rows.setdefault(row["measure"], {"measure": row["measure"], "what": MEASURES.get(row["measure"], "rating by a judge")})
            own |= {f"m{k}": row["mean"], f"low{k}": row["low"], f"high{k}": row["high"]}
            own["missing"] = own.get("missing", 0) + row["missing"]
    empty = {name: None for column in columns[2:] for name in (column.name, column.low, column.high)}
    return [{**empty, **row} for row in rows.values()], [*columns, Column("missing", "missing", "of all m", ".0f")]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("spilt.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, auto_reload=False, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"shown": shown, "sha256": _sha256, "anchor": anchor}
    made.tests |= {"absent": absent}
    files = {"style": "style.css", "script": "sort.js"}  # no templates: taken as they are
    made.globals |= {name: Markup(loader.get_source(made, file)[0]) for name, file in files.items()}
    made.globals |= {"column": Column, "columns": columns}
    return made


def render(template: str, **values: Any) -> str:
    """A page of templates/; what steers a terminal or is forbidden in HTML becomes a visible escape."""
    return "\n".join(map(printable, _environment().get_template(template).render(values).split("\n")))
