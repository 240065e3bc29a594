"""Pictures from stored results: the paper's figure, the trade-off, the random-direction control, one per cell (analysis.md "Pictures")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spilt.cell import FORMS, spans
from spilt.report.cells import KINDS, Measured
from spilt.report.drawing import (
    BAND,
    DASHED,
    DOTTED,
    GROUND,
    INK,
    MUTED,
    NARROW,
    OTHER,
    RANDOM,
    SERIES,
    TINTS,
    drawing,
    key,
    look,
    zero_line,
)
from spilt.report.places import label, shown
from spilt.report.tables import layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOSE = "|Δ| / |h|"
INTERVAL: dict[str, Any] = {"alpha": 0.16, "linewidth": 0, "zorder": 1.5}  # 95% over questions
UNDEFINED: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": INK}


def _curve_pair(axes: Axes, cell: Measured, split: str, unit: float = 1.0) -> None:
    """One cell's preference (solid, filled) and utility (dashed, open): points with 95% bands, lines fitted where there is a fit."""
    style = look(cell.place.method, cell.place.form)
    colour, rows = style["color"], cell.rows(split)
    x = rows["multiplier"].to_numpy(float) / unit
    for kind, line, face in (("preference", "-", colour), ("utility", DASHED, GROUND)):
        y = rows[kind].to_numpy(float)
        axes.fill_between(x, *(rows[f"{kind}_{end}"].to_numpy(float) for end in ("low", "high")), color=colour, **INTERVAL)
        point = {"color": colour, "markerfacecolor": face, "markersize": 4.2, "markeredgewidth": 0.9, "zorder": 3}
        axes.plot(x, y, linestyle="none", marker=style["marker"], **point)
        fit = cell.curve(split, kind)
        if fit.parameters is not None:
            fine = np.union1d(np.linspace(*fit.extent, 401), [0.0] if fit.extent[0] <= 0 <= fit.extent[1] else [])
            axes.plot(fine / unit, fit(fine), linestyle=line, color=colour, linewidth=style["linewidth"], zorder=2)
        if kind == "utility" and (some := (rows["n_undefined"] > 0).to_numpy()).any():
            axes.plot(x[some], y[some], markersize=3.4, markeredgewidth=0.9, zorder=4, **UNDEFINED)


def _r2(cell: Measured, split: str, kind: str) -> str:
    value = cell.curve(split, kind).r2
    return "no fit" if value is None else f"{value:.3f}"


def _style_keys(cells: Sequence[Measured], split: str, names: Sequence[str]) -> list[Any]:
    keys = [key(names[0], color=MUTED, linestyle="-", marker="o", markersize=4.2)]
    keys.append(key(names[1], color=MUTED, linestyle=DASHED, marker="o", markersize=4.2, markerfacecolor=GROUND))
    if any((cell.rows(split)["n_undefined"] > 0).any() for cell in cells):
        keys.append(key("some utilities undefined", markersize=4, **UNDEFINED))
    return keys


def _shade(axes: Axes, regions: dict[str, list[list[float]]]) -> None:
    """The three regions as tints, named along the top edge."""
    low, high = axes.get_xlim()
    for name, intervals in regions.items():
        for a, b in intervals:
            if name in TINTS:
                axes.axvspan(a, b, color=TINTS[name], linewidth=0, zorder=0)
            if b - a > 0.13 * (high - low):
                place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
                axes.text((a + b) / 2, 1.01, name, color=MUTED, fontsize="x-small", **place)
    axes.set_xlim(low, high)


def _panel_regions(cells: Sequence[Measured], split: str, units: Sequence[float]) -> dict[str, list[list[float]]]:
    """Median region borders of the panel's cells, in the panel's x units."""
    found = [(r, unit) for cell, unit in zip(cells, units, strict=True) if (r := cell.stored(split)["regions"])]
    if not found:
        return {}
    inner = [float(np.median([r["linear"][side] / unit for r, unit in found])) for side in (0, 1)]
    outer = []
    for side, pick in ((0, min), (1, max)):
        borders = [pick([r["linear"][side], *(span[side] for span in r["transitional"])]) / unit for r, unit in found]
        outer.append(float(np.median(borders)))
    sides = ((outer[0], inner[0]), (inner[1], outer[1]))
    return {"linear": [inner], "transitional": [[a, b] for a, b in sides if b > a]}


def _units(cells: Sequence[Measured], split: str) -> tuple[list[float], str]:
    """What m is divided by per cell: 1, or each sweep's end where the sweeps' lengths differ too much to share an axis."""
    ends = [float(cell.rows(split)["multiplier"].abs().max()) or 1.0 for cell in cells]
    if max(ends) > 1.6 * min(ends):
        return ends, "multiplier m as a share of each sweep's end (dimensionless)"
    return [1.0] * len(ends), "multiplier m (dimensionless)"


def dose_per_m(cell: Measured, split: str) -> float | None:
    """Relative dose |delta| / |h| per unit of m; None where it is unknown, or not proportional to m within 5%."""
    rows = cell.rows(split)
    rows = rows[(rows["multiplier"] != 0) & rows["dose"].notna()]
    each = (rows["dose"] / rows["multiplier"].abs()).to_numpy(float)
    return float(np.median(each)) if len(each) and (np.abs(each / np.median(each) - 1) <= 0.05).all() else None


def dose_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure | None:
    """Picture 1 against the relative dose, on which cells and layers compare; None where it is known of no cell."""
    known = [cell for cell in cells if dose_per_m(cell, split)]
    return paper_figure(known, split, narrow, dose=True) if known else None


def paper_figure(cells: Sequence[Measured], split: str, narrow: bool = False, dose: bool = False) -> Figure:
    """Picture 1: forms that read nothing (vector) above, those that do below; in a panel each when narrow."""
    there = list(dict.fromkeys(cell.place.form for cell in cells))  # in the order of FORMS
    bare = [form for form in there if form in FORMS and not FORMS[form].reads]
    groups = [[form] for form in there] if narrow else [bare, [form for form in there if form not in bare]]
    panels = [(forms, some) for forms in groups if (some := [cell for cell in cells if cell.place.form in forms])]
    size = (NARROW, 4.3 * len(panels)) if narrow else (10.2, 4.1 * len(panels))
    with drawing("dose" if dose else "paper", narrow, size) as figure:
        for axes, (forms, some) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            units, x_label = _units(some, split)
            if dose:
                units, x_label = [1 / (dose_per_m(cell, split) or np.nan) for cell in some], f"relative dose {DOSE}, signed as m"
            keys: list[Any] = []
            for cell, unit in zip(some, units, strict=True):
                _curve_pair(axes, cell, split, unit)
                name = cell.place.method if len(forms) == 1 else cell.label
                name += f" (end m = {unit:.4g})" if set(units) != {1.0} and not dose else ""
                name += "  " if narrow else "\n"
                name += f"R² {_r2(cell, split, 'preference')} | {_r2(cell, split, 'utility')}"
                keys.append(key(name, markersize=5, **look(cell.place.method, cell.place.form)))
            axes.set_title(" and ".join(label("", form) for form in forms), pad=18)
            zero_line(axes)
            _shade(axes, _panel_regions(some, split, units))
            axes.set_xlabel(x_label.replace(" as a share of each sweep's end", " / end of sweep") if narrow else x_label)
            axes.set_ylabel("log-odds (nats)")
            where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "labelspacing": 0.75}
            if narrow:
                where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
            keys += _style_keys(some, split, [f"{kind} log-odds" for kind in KINDS])
            axes.legend(handles=keys, title="method, R² of preference | utility", alignment="left", **where)
        return figure


def movement_figure(table: pd.DataFrame) -> Figure:
    """What was trained against side effects, at equal KL: a point for each method and side with 95% intervals; filled: +, empty: -.

    table: rows of method, way, movement and side_effect with _low and _high. Far from 0 in height and near to it in width is better.
    """
    names = list(dict.fromkeys(table["method"]))
    with drawing("movement", False, (6.6, 4.4)) as figure:
        axes = figure.subplots()
        for number, name in enumerate(names):
            (dark, _), (marker, _) = [*SERIES.values(), OTHER][number % (len(SERIES) + 1)]
            for row in table[table["method"] == name].to_dict("records"):
                x, y = row["side_effect"], row["movement"]
                spread = [[[at - row[f"{of}_low"]], [row[f"{of}_high"] - at]] for of, at in (("side_effect", x), ("movement", y))]
                face = dark if row["way"] > 0 else GROUND
                how: dict[str, Any] = {"fmt": marker, "color": dark, "ecolor": dark, "markersize": 7, "markerfacecolor": face}
                axes.errorbar(x, y, spread[1], spread[0], elinewidth=0.9, **how)
            axes.plot([], [], linestyle="none", marker=marker, color=dark, label=name)
        zero_line(axes)
        axes.axvline(0, color=MUTED, linewidth=0.6, zorder=1)
        axes.set_xlabel("side effect: change of utility, nats")
        axes.set_ylabel("movement of preference, nats per token")
        axes.set_title("Held-out answers at equal KL; filled +alpha, empty −alpha")
        axes.legend(loc="best")
    return figure


def trade_off_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure:
    """Picture 2: utility against preference along m, a panel per form; further right and higher is better."""
    forms = list(dict.fromkeys(cell.place.form for cell in cells))
    n = len(forms)
    size = (NARROW, 3.5 * n + 0.6) if narrow else ((5.5, 8.0, 10.5)[min(n, 3) - 1], 4.4)
    with drawing("trade_off", narrow, size) as figure:
        all_axes = figure.subplots(*((n, 1) if narrow else (1, n)), squeeze=False, sharex=True, sharey=True).ravel()
        for axes, form in zip(all_axes, forms, strict=True):
            for cell in (cell for cell in cells if cell.place.form == form):
                style = look(cell.place.method, form)
                rows = cell.rows(split).sort_values("multiplier")
                x, y, m = (rows[name].to_numpy(float) for name in (*KINDS, "multiplier"))
                low_high = (rows[f"{kind}_{end}"].to_numpy(float) for kind in KINDS for end in ("low", "high"))
                left, right, down, up = (np.abs(edge - at) for edge, at in zip(low_high, (x, x, y, y), strict=True))
                axes.errorbar(x, y, (down, up), (left, right), fmt="none", ecolor=style["color"], elinewidth=0.7, alpha=0.35, zorder=1.5)
                axes.plot(x[m >= 0], y[m >= 0], linestyle="-", markersize=4, markerfacecolor=style["color"], **style)
                axes.plot(x[m <= 0], y[m <= 0], linestyle=":", markersize=3, markerfacecolor=GROUND, alpha=0.75, **style)
                if (at := m == cell.best["multiplier"]).any():
                    ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.1}
                    axes.plot(x[at], y[at], linestyle="none", color=INK, **ring)
            zeros = (rows[rows["multiplier"] == 0] for rows in (cell.rows(split) for cell in cells))
            if (zero := next((rows for rows in zeros if len(rows)), None)) is not None:
                axes.axhline(zero["utility"].iloc[0], color=MUTED, linewidth=0.6, zorder=1)
                axes.plot(zero["preference"], zero["utility"], marker="*", markersize=12, color=INK, linestyle="none", zorder=5)
            axes.set_title(label("", form))
            axes.set_xlabel("preference log-odds (nats)")
            axes.label_outer(remove_inner_ticks=False)
        for axes in all_axes if narrow else all_axes[:1]:
            axes.set_ylabel("utility log-odds (nats)")
        keys = [key(name, markersize=5, **look(name, "vector")) for name in dict.fromkeys(cell.place.method for cell in cells)]
        keys += [
            key("m ≥ 0", color=MUTED, linestyle="-"),
            key("m ≤ 0", color=MUTED, linestyle=":"),
            key("m = 0 (no steering)", color=INK, linestyle="none", marker="*", markersize=9),
            key("recommended m", color=INK, linestyle="none", marker="o", markersize=8, markerfacecolor="none"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=2 if narrow else 4)
        return figure


def control_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure | None:
    """Picture 3: the trained vector against random directions of the same norm: their mean, and the span of the middle 90%."""
    from matplotlib.patches import Patch

    some = [(cell, table) for cell in cells if (table := cell.random(split)) is not None]
    n = len(some)
    if not n:
        return None
    wide = 1 if narrow else min(n, 4)  # cells beside each other
    high = -(-n // wide)
    size = (NARROW, 2.1 * n + 1.0) if narrow else ((5.5, 8.0, 9.0, 11.0)[wide - 1], 4.6 * high + 0.6)
    with drawing("control", narrow, size) as figure:
        shape = (n, 2) if narrow else (2 * high, wide)
        grid = figure.subplots(*shape, squeeze=False, sharey="col" if narrow else "row")
        pairs = [grid[i] if narrow else grid[2 * (i // wide) : 2 * (i // wide) + 2, i % wide] for i in range(high * wide)]
        for empty in (ax for pair in pairs[n:] for ax in pair):
            empty.remove()
        for column, (cell, table) in enumerate(some):
            style = look(cell.place.method, cell.place.form)
            rows = cell.rows(split)
            for kind, ax, face in zip(KINDS, pairs[column], (style["color"], GROUND), strict=True):
                draws = table.groupby("multiplier")[kind]
                mean = draws.mean()
                ax.fill_between(mean.index, draws.quantile(0.05), draws.quantile(0.95), color=BAND, linewidth=0, zorder=1)
                ax.plot(mean.index, mean, color=RANDOM, linestyle=DASHED, linewidth=1.6, zorder=2)
                points = {"color": style["color"], "marker": style["marker"], "linewidth": 1.2, "markersize": 3.2}
                ax.plot(rows["multiplier"], rows[kind], markerfacecolor=face, zorder=3, **points)
                ax.fill_between(rows["multiplier"], rows[f"{kind}_low"], rows[f"{kind}_high"], color=style["color"], **INTERVAL)
                ax.set_title(cell.label if kind == "preference" else "")
                ax.locator_params(axis="x", nbins=5)
                if (column == n - 1) if narrow else (kind == "utility"):
                    ax.set_xlabel("m (dimensionless)" if narrow else "multiplier m (dimensionless)")
                if narrow or column % wide == 0:
                    ax.set_ylabel(f"{kind} (nats)" if narrow else f"{kind} log-odds (nats)")
        keys = [
            key("the stored vector", color=INK, marker="o", markersize=4),
            key("random directions, mean", color=RANDOM, linestyle=DASHED),
            Patch(color=BAND, label="middle 90% of them"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=1 if narrow else 3)
        return figure


def layers_figure(cells: Sequence[Measured], split: str, narrow: bool = False) -> Figure | None:
    """Picture 4: gain at the utility budget, a row per method and form, a column per layer; None where all are of one layer."""
    table = layers(cells).astype({"gain": float, "recommended": float})
    table["cell"] = [label(method, form) for method, form in zip(table["method"], table["intervention"], strict=True)]
    grids = [table.pivot_table(index="cell", columns="layer", values=name, sort=False, dropna=False) for name in ("gain", "recommended")]
    columns = sorted(grids[0].columns, key=lambda name: [int(n) for n in name.split("+")])
    if len(columns) < 2 or not (top := np.nanmax(np.abs(grids[0].to_numpy()), initial=0.0)):
        return None
    gain, bold = (grid[columns].T if narrow else grid[columns] for grid in grids)
    called = [re.sub(r"(.{4,}?\+)", r"\1\n", spans([int(n) for n in name.split("+")])) for name in columns]  # broken, where it is long
    lines = [name.count("\n") + 1 for name in called]
    tall = 2.2 + 0.26 * sum(lines) if narrow else 1.5 + 0.45 * len(grids[0]) + 0.15 * max(lines)
    size = (NARROW if narrow else max(5.5, 2.2 + 0.34 * len(columns) + 0.1 * sum(len(name) > 2 for name in called)), tall)
    with drawing("layers", narrow, size) as figure:
        axes = figure.subplots()
        mesh = axes.pcolormesh(gain.to_numpy(), cmap="RdBu", vmin=-top, vmax=top, edgecolors=GROUND, linewidth=0.8)
        for (y, x), value in np.ndenumerate(gain.to_numpy()):
            style: dict[str, Any] = {"color": "white" if abs(value) > 0.6 * top else "black", "weight": "bold" if bold.iloc[y, x] else None}
            if np.isfinite(value):
                axes.text(x + 0.5, y + 0.5, shown(value, ".1f"), ha="center", va="center", fontsize="x-small", **style)
        across, down = (gain.columns, called) if narrow else (called, gain.index)
        axes.set_xticks(np.arange(gain.shape[1]) + 0.5, list(across), rotation=30 if narrow else 0, ha="right" if narrow else "center")
        axes.set_yticks(np.arange(len(gain)) + 0.5, list(down))
        axes.invert_yaxis()
        axes.grid(visible=False)
        (axes.set_ylabel if narrow else axes.set_xlabel)("steered layer")
        figure.colorbar(mesh, ax=axes, label="gain at the\nbudget (nats)", location="bottom" if narrow else "right")
        return figure


OVER_CELLS = {"paper": paper_figure, "dose": dose_figure, "trade_off": trade_off_figure, "control": control_figure}


def cell_figure(cell: Measured, split: str, narrow: bool = False) -> Figure:
    """curves.png: one cell with its own regions and the recommended multiplier; below, the losses and the probability behind it."""
    parts = cell.rows(split)["loss_matching"].notna().any()
    size = ((NARROW, 8.6) if narrow else (8.2, 6.8)) if parts else ((NARROW, 4.4) if narrow else (8.2, 4.6))
    with drawing(f"cell {cell.name}", narrow, size) as figure:
        shape: Any = [["odds"], ["loss"], ["mass"]] if narrow else [["odds", "odds"], ["loss", "mass"]]
        panels = figure.subplot_mosaic(shape if parts else [["odds"]], height_ratios=[5, *[3] * (len(shape) - 1)] if parts else None)
        axes = panels["odds"]
        _curve_pair(axes, cell, split)
        zero_line(axes)
        if found := cell.stored(split)["regions"]:
            _shade(axes, {"linear": [found["linear"]], "transitional": found["transitional"], "convergence": found["convergence"]})
        keys = _style_keys([cell], split, [f"{kind}, R² {_r2(cell, split, kind)}" for kind in KINDS])
        best, per_m = cell.best["multiplier"], dose_per_m(cell, split)
        if best is not None:
            line: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": DOTTED}
            for panel in panels.values():
                panel.axvline(best, zorder=1, **line)
            keys.append(key(f"recommended m = {best:g}", **line))
        axes.set_title(f"{cell.place.dataset}: {cell.label}", pad=18)
        axes.set_xlabel("multiplier m (dimensionless)")
        axes.set_ylabel("log-odds (nats)")
        if per_m:
            second = axes.secondary_xaxis(-0.22 if parts else -0.17, functions=(lambda m: m * per_m, lambda h: h / per_m))
            second.set_xlabel(f"relative dose {DOSE}, signed as m")
        if parts:
            _parts_of_odds(panels["loss"], panels["mass"], cell, split)
        figure.legend(handles=keys, loc="outside lower center", ncols=1 if narrow else 4)
        return figure


def _parts_of_odds(loss: Axes, mass: Axes, cell: Measured, split: str) -> None:
    """Mean losses of both answers and of neutral text, and what probability the two answers hold, against m."""
    rows, colour = cell.rows(split), look(cell.place.method, cell.place.form)["color"]
    answers = [("loss_matching", "matching answer", colour, "-"), ("loss_not_matching", "not-matching answer", colour, DASHED)]
    for name, said, drawn_in, line in [*answers, ("neutral_loss", "neutral text", RANDOM, DOTTED)]:
        if rows[name].notna().any():
            loss.plot(rows["multiplier"], rows[name], label=said, color=drawn_in, linestyle=line, linewidth=1.5)
    mass.plot(rows["multiplier"], rows["answer_mass"], color=colour, linewidth=1.5)
    loss.set_title("loss (nats)", fontsize="medium")
    mass.set_title("probability of both answers, summed", fontsize="medium")
    loss.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, fontsize="x-small", columnspacing=1.0, handlelength=1.6)
    for axes in (loss, mass):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("m")


def oracle_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Of a fine-tuned model, by block: rank of what is added, KL with that block alone put right, share of the MLP (`spilt oracle`).

    rows: ranks (of 90% and 99%; None: nothing is added), kl in nats, mlp (None: it has no share).
    """
    with drawing("oracle", False, (10.0, 3.1)) as figure:
        rank, kl, share = figure.subplots(1, 3)
        blocks = range(len(rows))
        for number, (part, line) in enumerate((("90%", "-"), ("99%", DASHED))):
            rank.plot(
                blocks,
                [row["ranks"][number] if row["ranks"] else 0 for row in rows],
                color=INK,
                linestyle=line,
                label=f"{part} of the squares",
            )
        rank.set(title="rank of what is added", ylabel="rank", ylim=(0, None))
        rank.legend()
        kl.plot(blocks, [row["kl"] for row in rows], color=INK, marker="o", markersize=3)
        kl.set(title="this block alone put right", ylabel="KL(steered || fine-tuned), nats per token", ylim=(0, None))
        share.plot(blocks, [float("nan") if row["mlp"] is None else row["mlp"] for row in rows], color=INK, marker="o", markersize=3)
        share.set(title="the MLP's share of the change", ylabel="|ΔMLP| / (|ΔMLP| + |Δskip|)", ylim=(0, 1))
        for axes in (rank, kl, share):
            axes.set_xlabel("block")
        return figure
