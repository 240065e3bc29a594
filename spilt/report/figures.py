"""Pictures from stored results: the paper's figure, the trade-off, the random-direction control, one per cell (analysis.md "Pictures").

Every series differs by marker as well as colour, so that grey prints work. Each picture is drawn once, in light colours; `dark` turns
an SVG's colours into those for a dark page. PNG files have a white ground and read on any page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spilt.report.cells import FORMS, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, GROUND, RANDOM, BAND = "#1b1d21", "#5a6068", "#dfe2e6", "#fffffe", "#757b84", "#cfd3d9"
NARROW = 4.1  # inches: the width of a figure for small screens
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
NAMES = {"vector": "vector", "lora": "LoRA", "local_weight": "local weight"}


def form_name(form: str) -> str:
    return NAMES.get(form, form)


def dark(svg: str) -> str:
    for light, other in DARK.items():
        svg = svg.replace(light, other)
    return svg


@contextmanager
def _drawing(narrow: bool) -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    size = 9.0 if narrow else 9.5
    with matplotlib.rc_context(
        {
            **{"font.size": size, "axes.titlesize": size + 1, "axes.labelsize": size, "legend.fontsize": size - 0.5},
            **{"xtick.labelsize": size - 0.5, "ytick.labelsize": size - 0.5, "axes.titlelocation": "left", "axes.titleweight": "bold"},
            **{"text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": MUTED, "ytick.color": MUTED},
            **{"axes.edgecolor": MUTED, "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False},
            **{"axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.facecolor": "none"},
            **{"figure.facecolor": "none", "legend.frameon": False},
            **{"axes.unicode_minus": True, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "axes.titlepad": 9.0},
        }
    ):
        yield


def svg_of(figure: Figure) -> str:
    import matplotlib

    out = io.StringIO()
    # ids from the figure's own label: the same figure gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": str(figure.get_label()), "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"^\s+", "", text[text.index("<svg") :], flags=re.MULTILINE)
    # two decimals are a hundredth of a point; transforms keep theirs, glyphs are scaled by them
    return re.sub(r' (d|x|y)="[^"]*"', lambda hit: re.sub(r"(\.\d\d)\d+", r"\1", hit[0]), text)


def png_of(figure: Figure, dpi: int = 160) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def look(method: str, form: str) -> dict[str, Any]:
    """Colour, marker and line width of a method and form."""
    colours, markers = SERIES.get(method, OTHER)
    at = 1 if form == "lora" else 0
    return {"color": colours[at], "marker": markers[at], "linewidth": 1.3 if form == "lora" else 1.9}


def _figure(name: str, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_label(name)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(h_pad=0.1, w_pad=0.06)  # type: ignore[call-arg]
    return figure


def _curve_pair(axes: Axes, cell: Measured, split: str, unit: float = 1.0, bars: bool = False, label: str = "") -> None:
    """One cell's preference (solid, filled) and utility (dashed, open): points measured, lines fitted where there is a fit."""
    style = look(cell.place.method, cell.place.intervention)
    rows = cell.rows(split)
    x = rows["multiplier"].to_numpy(float) / unit
    for kind, line, face in (("preference", "-", style["color"]), ("utility", (0, (4, 2)), GROUND)):
        y = rows[kind].to_numpy(float)
        point = {"color": style["color"], "markerfacecolor": face, "markersize": 4.2, "markeredgewidth": 0.9, "zorder": 3}
        if bars and rows[f"{kind}_low"].notna().any():
            spread = np.abs(np.stack([y - rows[f"{kind}_low"].to_numpy(float), rows[f"{kind}_high"].to_numpy(float) - y]))
            axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=style["color"], elinewidth=0.8, alpha=0.7, zorder=2)
        axes.plot(x, y, linestyle="none", marker=style["marker"], **point)
        fit = cell.curve(split, kind)
        if fit.parameters is not None:
            fine = np.union1d(np.linspace(*fit.extent, 401), [0.0] if fit.extent[0] <= 0 <= fit.extent[1] else [])
            axes.plot(fine / unit, fit(fine), linestyle=line, color=style["color"], linewidth=style["linewidth"], zorder=2)
        if kind == "utility" and (rows["n_undefined"] > 0).any():
            some = (rows["n_undefined"] > 0).to_numpy()
            axes.plot(x[some], y[some], linestyle="none", marker="x", color=INK, markersize=3.4, markeredgewidth=0.9, zorder=4)


def _r2(cell: Measured, split: str, kind: str) -> str:
    value = cell.curve(split, kind).r2
    return "no fit" if value is None else f"{value:.3f}"


def _style_handles(undefined: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=MUTED, linestyle="-", marker="o", markersize=4.2, label="preference log-odds"),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 2)), marker="o", markersize=4.2, markerfacecolor=GROUND, label="utility log-odds"),
    ]
    if undefined:
        handles.append(Line2D([], [], color=INK, linestyle="none", marker="x", markersize=4, label="some utilities undefined"))
    return handles


def _shade(axes: Axes, spans: dict[str, list[list[float]]], unit: float = 1.0) -> None:
    """The three regions as tints, named along the top edge."""
    low, high = axes.get_xlim()
    for name, intervals in spans.items():
        for a, b in intervals:
            if name in TINTS:
                axes.axvspan(a / unit, b / unit, color=TINTS[name], linewidth=0, zorder=0)
            if (b - a) / unit > 0.13 * (high - low):
                place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
                axes.text((a + b) / 2 / unit, 1.01, name, color=MUTED, fontsize="x-small", **place)
    axes.set_xlim(low, high)


def _panel_regions(cells: Sequence[Measured], split: str, units: Sequence[float]) -> dict[str, list[list[float]]]:
    """Median region borders of the panel's cells, in the panel's x units."""
    found = [(r, u) for cell, u in zip(cells, units, strict=True) if (r := cell.fit["splits"][cell.split_for(split)]["regions"])]
    if not found:
        return {}
    left, right = (float(np.median([r["linear"][i] / u for r, u in found])) for i in (0, 1))
    ends = []
    for side, pick in ((0, min), (1, max)):
        borders = []
        for r, u in found:
            inner = r["linear"][side]
            outer = [span[side] for span in r["transitional"] if (span[side] - inner) * (-1, 1)[side] > 0]
            borders.append(pick([inner, *outer]) / u)
        ends.append(float(np.median(borders)))
    return {
        "linear": [[left, right]],
        "transitional": [[a, b] for a, b in ((ends[0], left), (right, ends[1])) if b > a],
    }


def _units(cells: Sequence[Measured], split: str) -> tuple[list[float], str]:
    """What m is divided by per cell: 1, or each sweep's end where the sweeps' lengths differ too much to share an axis."""
    ends = [float(cell.rows(split)["multiplier"].abs().max()) or 1.0 for cell in cells]
    if max(ends) > 1.6 * min(ends):
        return ends, "multiplier m as a share of each sweep's end (dimensionless)"
    return [1.0] * len(ends), "multiplier m (dimensionless)"


def paper_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure | None:
    """Picture 1: vector forms above, lora and local_weight below (in a panel each when narrow)."""
    from matplotlib.lines import Line2D

    groups = [["vector"], ["lora"], ["local_weight"]] if narrow else [["vector"], ["lora", "local_weight"]]
    groups[-1] = groups[-1] + sorted({c.place.intervention for c in cells} - set(FORMS))
    panels = [(forms, [c for c in cells if c.place.intervention in forms]) for forms in groups]
    panels = [(forms, some) for forms, some in panels if some]
    if not panels:
        return None
    with _drawing(narrow):
        figure = _figure("paper", NARROW, 4.3 * len(panels)) if narrow else _figure("paper", 10.2, 4.1 * len(panels))
        for axes, (forms, some) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            units, label = _units(some, split)
            relative = set(units) != {1.0}
            handles: list[Any] = []
            for cell, unit in zip(some, units, strict=True):
                style = look(cell.place.method, cell.place.intervention)
                _curve_pair(axes, cell, split, unit)
                name = cell.place.method if len(forms) == 1 else f"{cell.place.method} {form_name(cell.place.intervention)}"
                name += f" (end m = {unit:g})" if relative else ""
                name += f"\nR² {_r2(cell, split, 'preference')} | {_r2(cell, split, 'utility')}" if not narrow else ""
                name += f"  R² {_r2(cell, split, 'preference')} | {_r2(cell, split, 'utility')}" if narrow else ""
                handles.append(Line2D([], [], label=name, markersize=5, **style))
            axes.set_title(" and ".join(form_name(form) for form in forms if any(c.place.intervention == form for c in some)), pad=18)
            axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
            _shade(axes, _panel_regions(some, split, units))
            axes.set_xlabel(label.replace(" as a share of each sweep's end", " / end of sweep") if narrow else label)
            axes.set_ylabel("log-odds (nats)")
            handles += _style_handles(any(bool((c.rows(split)["n_undefined"] > 0).any()) for c in some))
            title = "method, R² of preference | utility"
            if narrow:
                axes.legend(handles=handles, title=title, loc="upper center", bbox_to_anchor=(0.5, -0.2), alignment="left")
            else:
                axes.legend(handles=handles, title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0), alignment="left", labelspacing=0.75)
        return figure


def trade_off_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure | None:
    """Picture 2: utility against preference along m, a panel per form; further right and higher is better."""
    from matplotlib.lines import Line2D

    forms = [form for form in dict.fromkeys(cell.place.intervention for cell in cells)]
    if not forms:
        return None
    with _drawing(narrow):
        figure = (
            _figure("trade_off", NARROW, 3.5 * len(forms) + 0.6)
            if narrow
            else _figure("trade_off", (5.5, 8.0, 10.5)[min(len(forms), 3) - 1], 4.4)
        )
        grid = (len(forms), 1) if narrow else (1, len(forms))
        all_axes = figure.subplots(*grid, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, form in zip(all_axes, forms, strict=True):
            for cell in (c for c in cells if c.place.intervention == form):
                style = look(cell.place.method, form)
                rows = cell.rows(split).sort_values("multiplier")
                x, y, m = (rows[name].to_numpy(float) for name in ("preference", "utility", "multiplier"))
                axes.plot(x[m >= 0], y[m >= 0], linestyle="-", markersize=4, markerfacecolor=style["color"], **style)
                axes.plot(x[m <= 0], y[m <= 0], linestyle=":", markersize=3, markerfacecolor=GROUND, alpha=0.75, **style)
                if (at := m == cell.best["multiplier"]).any():
                    axes.plot(
                        x[at], y[at], linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=INK, markeredgewidth=1.1
                    )
            base = next((c.rows(split) for c in cells if (c.rows(split)["multiplier"] == 0).any()), None)
            if base is not None:
                zero = base[base["multiplier"] == 0]
                axes.axhline(zero["utility"].iloc[0], color=MUTED, linewidth=0.6, zorder=1)
                axes.plot(zero["preference"], zero["utility"], marker="*", markersize=12, color=INK, linestyle="none", zorder=5)
            axes.set_title(form_name(form))
            axes.set_xlabel("preference log-odds (nats)")
            axes.label_outer(remove_inner_ticks=False)
        for axes in all_axes if narrow else all_axes[:1]:
            axes.set_ylabel("utility log-odds (nats)")
        methods = list(dict.fromkeys(cell.place.method for cell in cells))
        handles = [Line2D([], [], label=name, markersize=5, **look(name, "vector")) for name in methods]
        handles += [
            Line2D([], [], color=MUTED, linestyle="-", label="m ≥ 0"),
            Line2D([], [], color=MUTED, linestyle=":", label="m ≤ 0"),
            Line2D([], [], color=INK, linestyle="none", marker="*", markersize=9, label="m = 0 (no steering)"),
            Line2D([], [], color=INK, linestyle="none", marker="o", markersize=8, markerfacecolor="none", label="recommended m"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if narrow else 4)
        return figure


def control_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure | None:
    """Picture 3: the trained vector against random directions of the same norm: their mean, and the span of the middle 90%."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    some = [cell for cell in cells if cell.control is not None]
    if not some:
        return None
    with _drawing(narrow):
        n = len(some)
        figure = _figure("control", NARROW, 2.1 * n + 1.0) if narrow else _figure("control", (5.5, 8.0, 9.0, 11.0)[min(n, 4) - 1], 5.2)
        axes = figure.subplots(n, 2, squeeze=False, sharey="col").T if narrow else figure.subplots(2, n, squeeze=False, sharey="row")
        for column, cell in enumerate(some):
            style = look(cell.place.method, cell.place.intervention)
            rows = cell.rows(split)
            for row, kind in enumerate(("preference", "utility")):
                ax = axes[row][column]
                spread = control_spread(cell, split, kind)
                ax.fill_between(spread.index, spread["low"], spread["high"], color=BAND, linewidth=0, zorder=1)
                ax.plot(spread.index, spread["mean"], color=RANDOM, linestyle=(0, (4, 2)), linewidth=1.6, zorder=2)
                points = {"color": style["color"], "marker": style["marker"], "linewidth": 1.2, "markersize": 3.2}
                ax.plot(rows["multiplier"], rows[kind], markerfacecolor=style["color"] if row == 0 else GROUND, zorder=3, **points)
                ax.set_title(cell.place.method if row == 0 or not narrow else "")
                if row == 1 and not narrow:
                    ax.set_title("")
                if not narrow and row == 1 or narrow and column == n - 1:
                    ax.set_xlabel("m (dimensionless)" if narrow else "multiplier m (dimensionless)")
                if not narrow and column == 0 or narrow:
                    ax.set_ylabel(f"{kind} (nats)" if narrow else f"{kind} log-odds (nats)")
        handles = [
            Line2D([], [], color=INK, marker="o", markersize=4, label="the stored vector"),
            Line2D([], [], color=RANDOM, linestyle=(0, (4, 2)), label="random directions, mean"),
            Patch(color=BAND, label="middle 90% of them"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else 3)
        return figure


def control_spread(cell: Measured, split: str, kind: str) -> pd.DataFrame:
    """mean, low (5%) and high (95%) over the random directions at each multiplier (index)."""
    if cell.control is None:
        raise ValueError(f"no control stored for {cell.name}")
    table = cell.control[cell.control["split"] == split]
    table = table if len(table) else cell.control
    groups = table.groupby("multiplier")[kind]
    return pd.DataFrame({"mean": groups.mean(), "low": groups.quantile(0.05), "high": groups.quantile(0.95)})


def cell_figure(cell: Measured, split: str, narrow: bool = False) -> Figure:
    """curves.png: one cell with 95% intervals, its own regions and the recommended multiplier."""
    from matplotlib.lines import Line2D

    with _drawing(narrow):
        figure = _figure(f"cell {cell.name}", NARROW, 4.4) if narrow else _figure(f"cell {cell.name}", 8.2, 4.6)
        axes = figure.subplots()
        _curve_pair(axes, cell, split, bars=True)
        axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
        stored = cell.fit["splits"][cell.split_for(split)]
        found = stored["regions"]
        if found:
            _shade(axes, {"linear": [found["linear"]], "transitional": found["transitional"], "convergence": found["convergence"]})
        handles = _style_handles(bool((cell.rows(split)["n_undefined"] > 0).any()))
        handles[0].set_label(f"preference, R² {_r2(cell, split, 'preference')}")
        handles[1].set_label(f"utility, R² {_r2(cell, split, 'utility')}")
        best = cell.best["multiplier"]
        if best is not None:
            axes.axvline(best, color=INK, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=1)
            handles.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (1, 1.5)), label=f"recommended m = {best:g}"))
        axes.set_title(f"{cell.place.dataset}: {cell.place.method} {form_name(cell.place.intervention)}", pad=18)
        axes.set_xlabel("multiplier m (dimensionless)")
        axes.set_ylabel("log-odds (nats)")
        figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else 4)
        return figure
