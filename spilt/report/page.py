"""report.html: one file that needs nothing else. Every text goes through `escape`; scripts and requests are shut off by its policy."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import pandas as pd

from spilt.analysis import paper
from spilt.analysis.curves.fit import GOOD_R2
from spilt.report import style, tables
from spilt.report.cells import Measured, Sample
from spilt.report.figures import dark, form_name
from spilt.report.words import Finding, coverage, name_of, number, short


class Picture(NamedTuple):
    """One figure as SVG in light colours, wide and narrow, with its alternative text and caption (plain text)."""

    wide: str
    narrow: str
    alt: str
    caption: str


class Column(NamedTuple):
    """One table column: the data's name, its heading, a unit below it, how a value is printed (None: text), and what stands below it."""

    name: str
    heading: str
    unit: str = ""
    show: Callable[[object], str] | None = None
    kind: str = ""
    below: str = ""


def digits(count: int) -> Callable[[object], str]:
    return lambda value: number(value, count)


def absent(value: object) -> bool:
    return value is None or value != value  # only nan differs from itself


def percent(value: object) -> str:
    return "–" if absent(value) else f"{float(str(value)):.0%}"


def m_of(value: object) -> str:
    return "–" if absent(value) else short(float(str(value)))


def table(frame: pd.DataFrame, columns: Sequence[Column], caption: str) -> str:
    """A sortable table in its own scroll box; the first column heads its row."""
    heads = "".join(
        f'<th scope="col" aria-sort="none"{" class=n" if c.show else ""}><button type="button"><span>{escape(c.heading)}</span>'
        f"{f'<small>{escape(c.unit)}</small>' if c.unit else ''}</button></th>"
        for c in columns
    )
    rows = []
    for record in frame.to_dict("records"):
        cells = []
        for at, c in enumerate(columns):
            value = record.get(c.name)
            missing = absent(value)
            if c.show:
                key, shown = "" if missing else escape(str(value)), escape(c.show(None if missing else value))
                below = f"<small>{escape(str(record[c.below]))}</small>" if c.below else ""
                cells.append(f'<td class="n" data-v="{key}">{shown}{below}</td>')
            elif at == 0:
                cells.append(f'<th scope="row">{escape(str(value))}</th>')
            else:
                cells.append(f'<td class="{c.kind or "nobr"}">{"" if missing else escape(str(value))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption.split(". ")[0])}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def picture(item: Picture) -> str:
    """Four versions of one figure: wide or narrow, light or dark, chosen by the browser."""
    sources = [
        (dark(item.narrow), "(max-width: 640px) and (prefers-color-scheme: dark)"),
        (item.narrow, "(max-width: 640px)"),
        (dark(item.wide), "(prefers-color-scheme: dark)"),
    ]
    inner = "".join(f'<source media="{media}" srcset="{_data(svg)}"{_size(svg)}>' for svg, media in sources)
    small = " class=small" if _width(item.wide) < 600 else ""
    shown = f'<img src="{_data(item.wide)}" alt="{escape(item.alt)}"{_size(item.wide)}>'
    return f"<figure{small}><picture>{inner}{shown}</picture><figcaption>{escape(item.caption)}</figcaption></figure>"


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _size(svg: str) -> str:
    """width and height attributes, so that the page does not jump while images decode."""
    found = _box(svg)
    return f' width="{float(found[1]):.0f}" height="{float(found[2]):.0f}"' if found else ""


def _width(svg: str) -> float:
    """Width in points; a small figure is not blown up to the page's width."""
    found = _box(svg)
    return float(found[1]) if found else 0.0


def _box(svg: str) -> re.Match[str] | None:
    return re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)


CELL = [Column("cell", "cell")]
NATS = digits(2)


def recommendation_table(cells: Sequence[Measured]) -> str:
    frame = _named(tables.recommendations(cells))
    frame["reason"] = frame["reason"].replace("largest preference gain within the budget", "")
    has_test = bool((frame["reported_on"] == "test").any())
    columns = [*CELL, Column("multiplier", "m", "chosen", m_of)]
    if has_test:
        columns += [
            Column("preference_gain_train", "preference gain", "train, nats", NATS),
            Column("utility_drop_train", "utility drop", "train, nats", NATS),
        ]
    s = "test" if has_test else "train"
    for value, label, ends in (("preference_gain", "preference gain", "gain"), ("utility_drop", "utility drop", "drop")):
        frame[f"{ends}_interval"] = [_between(row[f"{ends}_low_{s}"], row[f"{ends}_high_{s}"]) for row in frame.to_dict("records")]
        columns.append(Column(f"{value}_{s}", label, f"{s}, nats", NATS, below=f"{ends}_interval"))
    columns += [
        Column(f"accuracy_at_0_{s}", "prefer matching", f"{s}, m = 0", percent),
        Column(f"accuracy_{s}", "prefer matching", f"{s}, m", percent),
        Column(f"n_{s}", "asked", s, digits(0)),
        Column(f"n_undefined_{s}", "utility undefined", f"{s}, m", digits(0)),
    ]
    if frame["reason"].any():
        columns.append(Column("reason", "note", kind="text"))
    budget = frame["budget"].iloc[0]
    where = (
        "chosen on train questions, test numbers beside it"
        if has_test
        else f"chosen and reported on {frame['chosen_on'].iloc[0]} questions"
    )
    return table(
        frame,
        columns,
        f"Recommended multiplier per cell. The measured m with the largest preference gain over m = 0 whose utility drop is at "
        f"most {budget:g} "
        f"nat, {where}. Prefer matching: share of questions with preference > 0. "
        "Below gain and drop: their 95% intervals, over questions.",
    )


def _between(low: object, high: object) -> str:
    return "" if absent(low) or absent(high) else f"{number(low)} to {number(high)}"


def fit_tables(cells: Sequence[Measured], model: str, dataset: str, split: str) -> str:
    """The fits of the shown split; those of the others folded below."""
    frame = _named(tables.fits(cells, model, dataset))
    shown = pd.concat(
        [part[part["split"] == cell.split_for(split)] for cell in cells for part in [frame[frame["cell"] == name_of(cell.name)]]]
    )
    rest = frame.drop(shown.index)
    html = _fit_table(shown)
    for other, part in rest.groupby("split", sort=False):
        html += f"<details><summary>The same fits on {escape(str(other))} questions</summary>{_fit_table(part)}</details>"
    return html


def _fit_table(frame: pd.DataFrame) -> str:
    three = digits(3)
    columns = [*CELL, Column("curve", "curve"), Column("r2", "R²", "all points", three)]
    columns.append(Column("r2_held_out", "R²", "held out", three))
    if frame["r2_paper"].notna().any():
        columns.append(Column("r2_paper", "R²", "paper", digits(2)))
    columns += [
        Column("n_points", "points", "", digits(0)),
        Column("warnings", "warnings", kind="text"),
        Column("bound_hits", "at a bound"),
    ]
    names = ("alpha", "beta", "b", "m_plus", "L_plus", "p_plus", "m_minus", "L_minus", "p_minus")
    columns += [
        Column(name, name, "", lambda v: "–" if v is None else f"{float(str(v)):.4g}".replace("-", "−")) for name in names if name in frame
    ]
    return table(
        frame,
        columns,
        f"Fits on {frame['split'].iloc[0]} questions. Held out: fitted on every second multiplier, scored on the others. The parameters "
        "trade off against each other: read the curve, not one parameter. b and beta in nats, alpha in nats per unit of m, "
        "L in units of m².",
    )


def reading_table(cells: Sequence[Measured], split: str) -> str:
    frame = _named(tables.readings(cells, split))
    drop = frame["drop"].iloc[0]
    columns = [
        *CELL,
        Column("slope", "slope", "linear region, nats per m", digits(3)),
        Column("r2_linear", "R²", "of the line", digits(3)),
        *(Column(f"linear_{end}", "linear", f"{end}, m", NATS) for end in ("from", "to")),
        *(Column(f"converged_{end}", "converged", f"{end}, m", NATS) for end in ("below", "above")),
        *(Column("utility_peak_at", "utility peak", "at m", NATS), Column("utility_peak", "utility peak", "nats", NATS)),
        *(Column(f"drop_at_{side}", f"−{drop:g} nat", f"at {sign}m", NATS) for side, sign in (("minus", "−"), ("plus", "+"))),
        Column("n_undefined", "undefined utility", "of all m", digits(0)),
        Column("n_scored", "scored", "of all m", digits(0)),
    ]
    return table(
        frame,
        columns,
        f"Read off the curves ({frame['split'].iloc[0]} questions). Linear: the widest interval around 0 within 5% of the curve's "
        f"range of one "
        f"straight line. Converged: slope under 10% of that line's, out to the end. −{drop:g} nat: where utility has first "
        f"dropped that far below "
        "m = 0. A dash: not reached in this sweep, or no fit to read from.",
    )


def trade_tables(trade: pd.DataFrame) -> str:
    """Within each form; over all cells folded below."""
    if trade.empty:
        return '<p class="quiet">Fewer than two cells can be compared at equal preference.</p>'
    shown = trade.assign(form=trade["cell"].str.partition(" ")[2].map(form_name), cell=trade["cell"].map(name_of))
    within, over = shown[shown["among"] != "all"], shown[shown["among"] == "all"]
    title = "Utility kept at equal preference"
    html = _trade_table(within, f"{title}, within each form") if len(within) else ""
    if len(over):
        html += f"<details><summary>The same over all cells</summary>{_trade_table(over, f'{title}, all cells')}</details>"
    return html


def _trade_table(frame: pd.DataFrame, title: str) -> str:
    columns = [
        *CELL,
        Column("form", "form"),
        Column("utility", "utility kept", "mean, nats", NATS),
        Column("margin", "ahead of next", "nats", NATS),
        Column("half_interval", "± interval", "95%, nats", NATS),
        *(Column(end, "preference", f"{end}, nats", NATS) for end in ("from", "to")),
    ]
    return table(
        frame,
        columns,
        f"{title}. Mean, over the preferences that all compared cells reach, of the largest utility at or beyond that preference. "
        "A lead smaller than the interval is too close to call.",
    )


def control_table(frame: pd.DataFrame) -> str:
    shown = _named(frame)
    shown["verdict"] = ["no slope" if flat else "has a slope" for flat in shown["no_slope"]]
    columns = [
        *CELL,
        Column("draws", "draws", "", digits(0)),
        Column("slope", "mean slope", "nats per m", digits(4)),
        *(Column(f"slope_{end}", "95% interval", end, digits(4)) for end in ("low", "high")),
        Column("slope_of_the_vector", "stored vector", "nats per m", digits(4)),
        Column("verdict", "verdict"),
        Column("utility_drop_at_ends", "utility drop", "at the ends, nats", NATS),
    ]
    return table(
        shown,
        columns,
        "Random directions of the stored vector's norm. Slope of preference against m, mean over draws; no slope: the interval "
        "holds 0, or the "
        "mean is under 5% of the stored vector's.",
    )


def claim_table(frame: pd.DataFrame) -> str:
    shown = frame.assign(
        verdict=[f"{row['holds']} of {row['judged']}" if row["judged"] else "not judged" for row in frame.to_dict("records")]
    )
    shown["exceptions"] = [", ".join(name_of(name) for name in row.split(", ") if name) for row in shown["exceptions"]]
    columns = [Column("claim", "claim", kind="text"), Column("verdict", "holds in"), Column("exceptions", "not in", kind="text")]
    html = table(shown, columns, "The paper's claims on these cells. A cell that cannot be judged (no fit, m = 0 missing) is not counted.")
    return html.replace('<th scope="row">', '<th scope="row" class="claim">')


def paper_table(model: str, dataset: str) -> str:
    rows = paper.main_results(model, dataset)
    if not rows:
        return ""
    frame = _named(pd.DataFrame(rows))
    measures = [Column(name, name, "paper", NATS) for name in frame.columns if name not in ("method", "intervention", "cell")]
    title = (
        f"The paper's main results for {paper.MODELS[paper.model_key(model) or '']} on {dataset}. Generated text, judged: another measure"
    )
    return table(frame, [*CELL, *measures], f"{title} than the log-odds above, for reference only.")


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(cell=[f"{row['method']} {form_name(row['intervention'])}".strip() for row in frame.to_dict("records")])


def tiles(findings: Sequence[Finding]) -> str:
    parts = []
    for at, item in enumerate(findings):
        kind = "tile" + (" warning" if item.warning else "") + (" wide" if at == 0 and len(findings) % 2 else "")
        parts.append(
            f'<div class="{kind}"><dt>{escape(item.label)}</dt><dd><p class="figure">{escape(item.figure)}</p>'
            f'<p class="said">{escape(item.sentence)}</p></dd></div>'
        )
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def notes(title: str, lines: Sequence[str], most: int = 5) -> str:
    """A box of remarks; those beyond `most` are folded."""
    if not lines:
        return ""
    shown, rest = ("".join(f"<li>{escape(line)}</li>" for line in part) for part in (lines[:most], lines[most:]))
    folded = f"<details><summary>{len(lines) - most} more</summary><ul>{rest}</ul></details>" if rest else ""
    return f'<div class="note"><p>{escape(title)}</p><ul>{shown}</ul>{folded}</div>'


def sample_section(cells: Sequence[Measured], samples: dict[str, list[Sample]]) -> str:
    """Generated texts side by side, one strip of multipliers per prompt, folded per cell."""
    parts: list[str] = []
    for cell in cells:
        strips = []
        for sample in samples.get(cell.name, []):
            cards = []
            best = min(sample.texts, key=lambda m: abs(m - (cell.best["multiplier"] or 0)), default=None)
            for m, text in sample.texts.items():
                marks = [words for words, yes in (("no steering", m == 0), ("recommended", m == best == cell.best["multiplier"])) if yes]
                mark = f"<small>{', '.join(marks)}</small>" if marks else ""
                chosen = ' class="best"' if "recommended" in marks else ""
                cards.append(
                    f'<li{chosen}><div class="m">m = {short(m)}{mark}</div><div class="answer" dir="auto">{escape(text)}</div></li>'
                )
            wanted = f'<p class="quiet">Reference answer: {escape(sample.reference)}</p>' if sample.reference else ""
            strip = f'<ul class="strip" tabindex="0" aria-label="answers by multiplier">{"".join(cards)}</ul>'
            strips.append(f'<p class="prompt" dir="auto">{escape(sample.prompt)}</p>{wanted}{strip}')
        if strips:
            multipliers = sorted({m for sample in samples[cell.name] for m in sample.texts})
            opened = "" if parts else " open"
            parts.append(
                f"<details{opened}><summary>{escape(cell.place.method)} {escape(form_name(cell.place.intervention))}"
                f"<small>{len(strips)} prompts, {len(multipliers)} multipliers</small></summary>{''.join(strips)}</details>"
            )
    return "".join(parts)


def page(
    model: str,
    dataset: str,
    split: str,
    cells: Sequence[Measured],
    pictures: dict[str, Picture],
    findings: Sequence[Finding],
    trade: pd.DataFrame,
    control: pd.DataFrame,
    claims: pd.DataFrame,
    samples: dict[str, list[Sample]],
    problems: Sequence[str] = (),
) -> str:
    """The whole page."""
    norm = cells[0].fit["norm"]
    per = "mean per answer token" if norm == "mean" else "summed over the answer's tokens"
    short_of = tables.shortfalls(cells, split)
    stored = [f"{cell.name}: {note}" for cell in cells for note in cell.fit["notes"] if f"{cell.name}: {note}" not in problems]
    texts = sample_section(cells, samples)
    folded = "".join(
        f"<details><summary>{escape(c.place.method)} {escape(form_name(c.place.intervention))}"
        f"<small>recommended m = {m_of(c.best['multiplier'])}</small></summary>{picture(pictures[c.name])}</details>"
        for c in cells
        if c.name in pictures
    )
    sections = [
        ("curves", "Preference and utility against the multiplier", _shown(pictures, "paper") + notes("To read with care", short_of)),
        ("recommended", "Recommended multipliers", recommendation_table(cells) + paper_table(model, dataset)),
        ("trade-off", "The trade-off", _shown(pictures, "trade_off") + trade_tables(trade)),
        ("control", "Control: random directions", _shown(pictures, "control") + control_table(control) if len(control) else _no_control()),
        ("claims", "What the paper claims", claim_table(claims)),
        ("fits", "Fits and readings", reading_table(cells, split) + fit_tables(cells, model, dataset, split)),
        ("cells", "Every cell", folded),
        ("texts", "What the model writes", texts or '<p class="quiet">No generations are stored for this dataset and model.</p>'),
    ]
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{escape(title)}</h2>{inner}</section>'
        for key, title, inner in sections
    )
    fingerprint = base64.b64encode(hashlib.sha256(style.JS.encode()).digest()).decode()
    look = base64.b64encode(hashlib.sha256(style.CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{look}'; script-src 'sha256-{fingerprint}'"
    policy += "; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(dataset)} on {escape(model)} · spilt</title>
<link rel="icon" href="data:,">
<style>{style.CSS}</style>
</head>
<body>
<header>
<p class="over">Preference and utility under steering</p>
<h1>{escape(dataset)} on {escape(model)}</h1>
<p class="lede">{escape(coverage(cells))} Figures show {escape(split)} questions. Losses are {per}.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
<section id="found" aria-labelledby="found-h"><h2 id="found-h">What was found</h2>{tiles(findings)}
{notes("Left out", problems)}{notes("About the stored losses", stored)}</section>
{body}
</main>
<footer>
<p>Preference log-odds = L<sub>n</sub> − L<sub>p</sub>: above 0 the model prefers the matching answer. Utility log-odds =
log[(e<sup>−L<sub>p</sub></sup> + e<sup>−L<sub>n</sub></sup>) / (1 − e<sup>−L<sub>p</sub></sup> − e<sup>−L<sub>n</sub></sup>)]: how much
probability the two valid answers hold together. L: loss in nats of the matching (p) and not-matching (n) answer; all values in nats,
multipliers dimensionless, intervals 95% bootstrap over questions. A fit counts as good from R² {GOOD_R2:g}.</p>
<p>Why Steering Works, arXiv 2602.02343. Written by <code>spilt report</code> from stored results only.</p>
</footer>
<script>{style.JS}</script>
</body>
</html>
"""


def _shown(pictures: dict[str, Picture], key: str) -> str:
    return picture(pictures[key]) if key in pictures else ""


def _no_control() -> str:
    return '<p class="quiet">No random-direction control is stored (control.csv in a vector cell); none can be shown.</p>'
