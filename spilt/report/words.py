"""The report's findings in words: what stands at the top of the page. Plain text; the page escapes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from spilt.analysis.curves.fit import GOOD_R2
from spilt.report import tables
from spilt.report.cells import Measured
from spilt.report.figures import form_name


class Finding(NamedTuple):
    """One tile: a short label, the one figure to remember, the sentence that says what it means, and whether it is a warning."""

    label: str
    figure: str
    sentence: str
    warning: bool = False


def number(value: object, digits: int = 2) -> str:
    """1234.5 -> '1234.50', -1 -> '−1.00' (a real minus), nothing -> '–'."""
    if value is None or isinstance(value, (int, float)) and not math.isfinite(value):
        return "–"
    if not isinstance(value, (int, float)):
        return str(value)
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0 and text.startswith("-") else text).replace("-", "−")


def short(value: float | None) -> str:
    """A multiplier: 6.0 -> '6', -0.2 -> '−0.2'."""
    return "–" if value is None else f"{value:g}".replace("-", "−")


def name_of(cell: str) -> str:
    """'spilt local_weight' -> 'spilt local weight', as printed."""
    method, _, form = cell.partition(" ")
    return f"{method} {form_name(form)}"


def findings(cells: Sequence[Measured], split: str, trade: pd.DataFrame, control: pd.DataFrame) -> list[Finding]:
    out = [_kept(trade), _recommended(cells), _fits(cells, split), _undefined(cells, split), _control(control)]
    return [finding for finding in out if finding]


def coverage(cells: Sequence[Measured]) -> str:
    """What was measured, in one sentence."""
    methods = list(dict.fromkeys(c.place.method for c in cells))
    forms = list(dict.fromkeys(form_name(c.place.intervention) for c in cells))
    counts = [f"{n} {name} questions" for name in ("train", "test") if (n := max(_asked(c, name) for c in cells))]
    points = sorted({len(c.rows("train")) for c in cells})
    many = f"{points[0]}" if len(points) == 1 else f"{points[0]} to {points[-1]}"
    concepts = max(len(c.place.concepts) for c in cells)
    over = f", averaged over {concepts} concepts" if concepts else ""
    cells_word = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    return f"{cells_word}: {_list(methods)} as {_list(forms)}; {many} multipliers each, on {_list(counts) or 'stored averages'}{over}."


def _asked(cell: Measured, split: str) -> int:
    return (
        int(cell.fit["splits"].get(split, {}).get("n_questions", [0, 0])[-1:][0])
        if cell.fit["splits"].get(split, {}).get("n_questions")
        else 0
    )


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _kept(trade: pd.DataFrame) -> Finding | None:
    if trade.empty:
        return None
    sentences, top = [], ""
    for among, part in reversed(list(trade.groupby("among", sort=False))):
        top_row = part.iloc[0]
        near = part[part["utility"] > top_row["utility"] - top_row["half_interval"]]["cell"].tolist() or [top_row["cell"]]
        where = "Over all cells" if among == "all" else f"Among {form_name(str(among))} cells"
        printed = [name_of(cell) if among == "all" else str(cell).partition(" ")[0] for cell in near]
        methods = {str(cell).partition(" ")[0] for cell in near}
        behind = part.iloc[len(near)] if len(near) < len(part) else None
        lead = ""
        if behind is not None:
            name = name_of(behind["cell"]) if among == "all" else str(behind["cell"]).partition(" ")[0]
            lead = f", {number(top_row['utility'] - behind['utility'])} nat more than {name}"
        if len(near) == 1:
            sentences.append(f"{where} {printed[0]} keeps most{lead}.")
        elif len(near) == len(part):
            sentences.append(f"{where} nothing can be told apart: all lie within one 95% interval.")
        else:
            sentences.append(f"{where} {_list(printed)} keep most and lie within one 95% interval of each other.")
        top = top or (
            name_of(near[0]) if len(near) == 1 else f"{methods.pop()}, in {len(near)} forms" if len(methods) == 1 else "too close to call"
        )
    return Finding("Keeps most utility at equal preference", top, " ".join(sentences))


def _recommended(cells: Sequence[Measured]) -> Finding | None:
    table = tables.recommendations(cells)
    table = table[table["multiplier"].notna()]
    if table.empty:
        reason = cells[0].best["reason"]
        return Finding("Recommended multiplier", "none", f"No multiplier can be recommended: {reason}.", True)
    budget = table["budget"].iloc[0]
    best = table.sort_values("preference_gain_train", na_position="first", kind="stable").iloc[-1]
    suffix = "test" if best["reported_on"] == "test" else "train"
    shown = "test" if suffix == "test" else str(best["chosen_on"])
    cell = name_of(f"{best['method']} {best['intervention']}")
    if best["multiplier"] == 0:
        return Finding(
            "Recommended multiplier", "0", f"No measured multiplier gains preference for at most {budget:g} nat of utility.", True
        )
    drop, gain = best[f"utility_drop_{suffix}"], best[f"preference_gain_{suffix}"]
    cost = f"utility falls by {number(drop)} nat" if drop > 0 else f"utility rises by {number(-drop)} nat"
    share = ""
    if pd.notna(best[f"accuracy_{suffix}"]):
        share = f" ({best[f'accuracy_at_0_{suffix}']:.0%} → {best[f'accuracy_{suffix}']:.0%} of questions prefer the matching answer)"
    sentence = (
        f"The largest gain within a utility budget of {budget:g} nat, chosen on {best['chosen_on']} questions: "
        f"{cell} at m = {short(best['multiplier'])}. On {shown} questions preference moves by {number(gain)} nats{share} and {cost}."
    )
    sentence += " On test questions the cost is over the budget." if suffix == "test" and drop > budget else ""
    chance = bool(best["within_chance"])
    sentence += " The gain cannot be told from 0: its 95% interval holds 0." if chance else ""
    figure = "no gain beyond chance" if chance else f"m = {short(best['multiplier'])}, {cell}"
    return Finding("Recommended multiplier", figure, sentence, chance)


def _fits(cells: Sequence[Measured], split: str) -> Finding:
    curves = [(cell, kind, cell.curve(split, kind)) for cell in cells for kind in ("preference", "utility")]
    good = [fit for _, _, fit in curves if fit.r2 is not None and fit.r2 >= GOOD_R2]
    missing = [f"{name_of(c.name)} ({kind})" for c, kind, fit in curves if fit.r2 is None]
    low = [f"{name_of(c.name)} ({kind}, {fit.r2:.3f})" for c, kind, fit in curves if fit.r2 is not None and fit.r2 < GOOD_R2]
    weak = [f"{name_of(c.name)} ({kind}, {fit.r2_held_out:.2f})" for c, kind, fit in curves if _weak(fit.r2, fit.r2_held_out)]
    sentence = f"{len(good)} of {len(curves)} curves reach R² {GOOD_R2:g}."
    if good:
        least = min((fit.r2 or 0.0, f"{name_of(c.name)}, {kind}") for c, kind, fit in curves if fit in good)
        sentence += f" The lowest of these: {least[0]:.3f} ({least[1]})."
    sentence += f" Short of it: {_list(low)}." if low else ""
    sentence += f" Not fitted: {_list(missing)}." if missing else ""
    sentence += f" Good on all points but not between them (held-out R²): {_list(weak)}." if weak else ""
    return Finding("Curve fits", f"{len(good)} of {len(curves)}", sentence, bool(low or missing or weak))


def _weak(r2: float | None, held_out: float | None) -> bool:
    return r2 is not None and held_out is not None and r2 >= GOOD_R2 > held_out


def _undefined(cells: Sequence[Measured], split: str) -> Finding:
    table = tables.undefined(cells, split)
    unknown = [name_of(cell.name) for cell in cells if cell.rows(split)["n_undefined"].isna().any()]
    if table.empty and unknown:
        return Finding(
            "Undefined utilities", "not counted", f"The stored averages of {_list(unknown)} do not say how many were left out.", True
        )
    if table.empty:
        return Finding("Undefined utilities", "none", "Every question has a utility value at every multiplier.")
    worst = table.assign(share=table["n_undefined"] / table["n"]).sort_values("share").iloc[-1]
    total, scored = int(table["total"].sum()), int(sum(cell.rows(split)["n"].sum() for cell in cells))
    return Finding(
        "Undefined utilities",
        f"{total} of {scored}",
        f"{total} of {scored} values (questions × multipliers × cells) have no utility: the two answers are so likely per token that their "
        f"probabilities sum to 1 or more. They are left out of the mean utility only, and never clipped. Most: {name_of(worst['cell'])} at "
        f"m = {short(worst['multiplier'])}, {worst['n_undefined']:.0f} of {worst['n']:.0f} questions."
        + (f" Not counted in the stored averages of {_list(unknown)}." if unknown else ""),
        bool((table["n_undefined"] / table["n"] > 0.1).any()),
    )


def _control(table: pd.DataFrame) -> Finding | None:
    if table.empty:
        return None
    sloped = [name_of(f"{row.method} {row.intervention}") for row in table[~table["no_slope"].astype(bool)].itertuples()]
    lost = table["utility_drop_at_ends"].mean()
    falls = (
        f"utility falls by {number(lost)} nats at the ends of the sweep" if lost > 0 else "utility does not fall at the ends of the sweep"
    )
    if sloped:
        slopes = f"mean preference has a slope beside {_list(sloped)}"
    else:
        slopes = "mean preference has no slope"
    return Finding(
        "Random directions of the same norm",
        "a preference slope" if sloped else "no preference slope",
        f"Over {table['draws'].sum()} random directions as a control, {slopes}, and {falls}.",
        bool(sloped) or not lost > 0,
    )
