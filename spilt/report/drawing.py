"""How pictures are drawn: colours, one style, SVG for a light and a dark page, PNG.

Every series differs by marker as well as colour, so that grey prints work. Each picture is drawn once, in light colours; `adaptive` gives
an SVG those for a dark page beside them. PNG files have a white ground and read on any page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, GROUND, RANDOM, BAND = "#1b1d21", "#5a6068", "#dfe2e6", "#fffffe", "#757b84", "#cfd3d9"
NARROW = 4.1  # inches: the width of a figure for small screens
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))
TINTS = {"linear": "#e6edf4", "transitional": "#f3f6f9"}
# method -> colours of (vector and local_weight, lora), markers of the same; Okabe-Ito hues, told apart by lightness too
SERIES = {
    "spilt": (("#0a4c86", "#3b82c0"), ("o", "s")),
    "reps": (("#c9571c", "#d97c3c"), ("^", "v")),
    "sft": (("#1c7f5d", "#3a9c78"), ("D", "X")),
    "caa": (("#84489e", "#a069ba"), ("P", "P")),
}
OTHER = (("#6b6200", "#a39a3c"), ("*", "p"))
DARK = {
    **{INK: "#eceae5", MUTED: "#a7acb4", GRID: "#363b42", GROUND: "#1a1d21", RANDOM: "#9aa1ab", BAND: "#3a4048"},
    **{TINTS["linear"]: "#222b35", TINTS["transitional"]: "#1e242b"},
    **{"#0a4c86": "#62aef5", "#3b82c0": "#a6d1fb", "#c9571c": "#f58a50", "#d97c3c": "#ffc09a", "#1c7f5d": "#45c197"},
    **{"#3a9c78": "#9ce0c6", "#84489e": "#cc95e6", "#a069ba": "#e3c3f2", "#6b6200": "#d6c945", "#a39a3c": "#ece49a"},
}
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), MUTED),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.7),
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9.0,
    "axes.titley": 1.0,  # nothing above that it would have to clear, which is measured anew at every draw
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}


def adaptive(svg: str) -> str:
    """With light and dark colours: the browser takes those that its reader prefers."""
    names = {light: f"--c{number}" for number, light in enumerate(DARK)}
    for light, name in names.items():
        svg = svg.replace(light, f"var({name})")
    lights, darks = (
        "".join(f"{name}:{value};" for name, value in zip(names.values(), some, strict=True)) for some in (DARK, DARK.values())
    )
    style = f"<style>svg{{{lights}}}@media(prefers-color-scheme:dark){{svg{{{darks}}}}}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda opened: opened[0] + style, svg, count=1)


@contextmanager
def drawing(name: str, narrow: bool, size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure of (width, height) inches, and the style while it is drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    font = 9.0 if narrow else 9.5
    sizes: dict[Any, float] = {"font.size": font, "axes.titlesize": font + 1, "axes.labelsize": font}
    sizes |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), font - 0.5)
    with matplotlib.rc_context({**STYLE, **sizes}):
        figure = Figure(figsize=size, layout="constrained")
        figure.set_label(name)
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.set(h_pad=0.1, w_pad=0.06)  # type: ignore[call-arg]
        yield figure


def _laid_out(figure: Figure) -> Figure:
    """With its places fixed: laid out once, however often it is drawn."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def svg_of(figure: Figure) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    # ids from the figure's own label: the same figure gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": str(figure.get_label()), "svg.fonttype": "path"}):
        FigureCanvasSVG(_laid_out(figure)).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"^\s+", "", text[text.index("<svg") :], flags=re.MULTILINE)
    # two decimals are a hundredth of a point; transforms keep theirs, glyphs are scaled by them
    return re.sub(r' (d|x|y)="[^"]*\.\d\d\d[^"]*"', lambda hit: re.sub(r"(\.\d\d)\d+", r"\1", hit[0]), text)


def png_of(figure: Figure, dpi: int = 160) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    _laid_out(figure).set(dpi=dpi, facecolor="white")
    # beyond level 3 time grows and files do not shrink
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    figure.set(facecolor="none")
    return out.getvalue()


def look(method: str, form: str) -> dict[str, Any]:
    """Colour, marker and line width of a method and form."""
    colours, markers = SERIES.get(method, OTHER)
    at = 1 if form == "lora" else 0
    return {"color": colours[at], "marker": markers[at], "linewidth": 1.3 if form == "lora" else 1.9}


def key(name: str, **style: Any) -> Any:
    """One entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=name, **style)


def zero_line(axes: Axes) -> None:
    """Where a log-odds is 0."""
    axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
