"""The report's findings in words: what stands at the top of the page. Plain text, templates escape it; they have all other words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from spilt.analysis.curves.fitting import GOOD_R2
from spilt.report.cells import KINDS, Measured, label, name_of, shown
from spilt.report.tables import recommendations


class Finding(NamedTuple):
    """One tile: a short label, the one figure to remember, the sentence that says what it means, and whether it is a warning."""

    label: str
    figure: str
    sentence: str
    warning: bool = False


def findings(cells: Sequence[Measured], split: str, trade: pd.DataFrame, control: pd.DataFrame) -> list[Finding]:
    out = [_kept(trade), _recommended(cells), _fits(cells, split), _undefined(cells, split), _control(control)]
    return [finding for finding in out if finding]


def coverage(cells: Sequence[Measured]) -> str:
    """What was measured, in one sentence."""
    methods = dict.fromkeys(cell.place.method for cell in cells)
    forms = dict.fromkeys(label("", cell.place.intervention) for cell in cells)
    asked = {name: max((cell.fit["splits"].get(name, {}).get("n_questions") or [0])[-1] for cell in cells) for name in ("train", "test")}
    questions = _list([f"{n} {name} questions" for name, n in asked.items() if n])
    points = sorted({len(cell.rows("train")) for cell in cells})
    many = f"{points[0]}" if len(points) == 1 else f"{points[0]} to {points[-1]}"
    concepts = max(len(cell.place.concepts) for cell in cells)
    over = f", averaged over {concepts} concepts" if concepts else ""
    counted = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    return f"{counted}: {_list([*methods])} as {_list([*forms])}; {many} multipliers each, on {questions or 'stored averages'}{over}."


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _kept(trade: pd.DataFrame) -> Finding | None:
    if trade.empty:
        return None
    sentences, top = [], ""
    for among, part in reversed(list(trade.groupby("among", sort=False))):
        everything = among == "all"
        first = part.iloc[0]
        near = part[part["utility"] > first["utility"] - first["half_interval"]]["cell"].tolist() or [first["cell"]]
        names = [name_of(cell) if everything else str(cell).partition(" ")[0] for cell in part["cell"]]
        where = "Over all cells" if everything else f"Among {label('', str(among))} cells"
        if len(near) == len(part) > 1:
            sentences.append(f"{where} nothing can be told apart: all lie within one 95% interval.")
        elif len(near) > 1:
            sentences.append(f"{where} {_list(names[: len(near)])} keep most and lie within one 95% interval of each other.")
        else:
            lead = f", {shown(first['utility'] - part['utility'].iloc[1])} nat more than {names[1]}" if len(part) > 1 else ""
            sentences.append(f"{where} {names[0]} keeps most{lead}.")
        if not top:
            methods = {str(cell).partition(" ")[0] for cell in near}
            top = f"{methods.pop()}, in {len(near)} forms" if len(methods) == 1 else "too close to call"
            top = name_of(near[0]) if len(near) == 1 else top
    return Finding("Keeps most utility at equal preference", top, " ".join(sentences))


def _recommended(cells: Sequence[Measured]) -> Finding:
    title = "Recommended multiplier"
    table = recommendations(cells)
    table = table[table["multiplier"].notna()]
    if table.empty:
        return Finding(title, "none", f"No multiplier can be recommended: {cells[0].best['reason']}.", True)
    best = table.sort_values("preference_gain_train", na_position="first", kind="stable").iloc[-1]
    budget, tested, chance = best["budget"], best["reported_on"] == "test", bool(best["within_chance"])
    if best["multiplier"] == 0:
        return Finding(title, "0", f"No measured multiplier gains preference for at most {budget:g} nat of utility.", True)
    on = "test" if tested else "train"
    m, cell = shown(best["multiplier"], "g"), label(best["method"], best["intervention"])
    drop, gain = best[f"utility_drop_{on}"], best[f"preference_gain_{on}"]
    share = ""
    if pd.notna(best[f"accuracy_{on}"]):
        share = f" ({best[f'accuracy_at_0_{on}']:.0%} → {best[f'accuracy_{on}']:.0%} of questions prefer the matching answer)"
    sentence = (
        f"The largest gain within a utility budget of {budget:g} nat, chosen on {best['chosen_on']} questions: {cell} at m = {m}. "
        f"On {'test' if tested else best['chosen_on']} questions preference moves by {shown(gain)} nats{share} and "
        f"utility {'falls' if drop > 0 else 'rises'} by {shown(abs(drop))} nat."
    )
    sentence += " On test questions the cost is over the budget." if tested and drop > budget else ""
    sentence += " The gain cannot be told from 0: its 95% interval holds 0." if chance else ""
    return Finding(title, "no gain beyond chance" if chance else f"m = {m}, {cell}", sentence, chance)


def _fits(cells: Sequence[Measured], split: str) -> Finding:
    curves = [(cell.label, kind, cell.curve(split, kind)) for cell in cells for kind in KINDS]
    fitted = [(name, kind, fit.r2, fit.r2_held_out) for name, kind, fit in curves if fit.r2 is not None]
    good = [(r2, f"{name}, {kind}") for name, kind, r2, _ in fitted if r2 >= GOOD_R2]
    short = {
        "Short of it": [f"{name} ({kind}, {r2:.3f})" for name, kind, r2, _ in fitted if r2 < GOOD_R2],
        "Not fitted": [f"{name} ({kind})" for name, kind, fit in curves if fit.r2 is None],
        "Good on all points but not between them (held-out R²)": [
            f"{name} ({kind}, {held_out:.2f})" for name, kind, r2, held_out in fitted if held_out is not None and r2 >= GOOD_R2 > held_out
        ],
    }
    sentence = f"{len(good)} of {len(curves)} curves reach R² {GOOD_R2:g}."
    if good:
        sentence += " The lowest of these: {:.3f} ({}).".format(*min(good))
    sentence += "".join(f" {why}: {_list(names)}." for why, names in short.items() if names)
    return Finding("Curve fits", f"{len(good)} of {len(curves)}", sentence, any(short.values()))


def _undefined(cells: Sequence[Measured], split: str) -> Finding:
    title = "Undefined utilities"
    uncounted = _list([cell.label for cell in cells if cell.rows(split)["n_undefined"].isna().any()])
    found = [(cell.label, cell.stored(split)["undefined"]) for cell in cells]
    found = [(name, undefined) for name, undefined in found if undefined["total"]]
    if not found and uncounted:
        return Finding(title, "not counted", f"The stored averages of {uncounted} do not say how many were left out.", True)
    if not found:
        return Finding(title, "none", "Every question has a utility value at every multiplier.")
    figure = f"{sum(undefined['total'] for _, undefined in found)} of {sum(int(cell.rows(split)['n'].sum()) for cell in cells)}"
    name, worst = sorted(((name, undefined["worst"]) for name, undefined in found), key=lambda one: _share(one[1]))[-1]
    sentence = (
        f"{figure} values (questions × multipliers × cells) have no utility: the two answers are so likely per token that their "
        f"probabilities sum to 1 or more. They are left out of the mean utility only, and never clipped. Most: {name} at "
        f"m = {shown(worst['multiplier'], 'g')}, {worst['n_undefined']:.0f} of {worst['n']:.0f} questions."
    )
    sentence += f" Not counted in the stored averages of {uncounted}." if uncounted else ""
    return Finding(title, figure, sentence, _share(worst) > 0.1)


def _share(counted: dict[str, float]) -> float:
    return counted["n_undefined"] / counted["n"]


def _control(table: pd.DataFrame) -> Finding | None:
    if table.empty:
        return None
    sloped = [label(row["method"], row["intervention"]) for row in table[~table["no_slope"].astype(bool)].to_dict("records")]
    lost = table["utility_drop_at_ends"].mean()
    slopes = f"mean preference has a slope beside {_list(sloped)}" if sloped else "mean preference has no slope"
    falls = f"falls by {shown(lost)} nats" if lost > 0 else "does not fall"
    return Finding(
        "Random directions of the same norm",
        "a preference slope" if sloped else "no preference slope",
        f"Over {table['draws'].sum()} random directions as a control, {slopes}, and utility {falls} at the ends of the sweep.",
        bool(sloped) or not lost > 0,
    )
