"""The report's findings in words: what stands at the top of the page. Plain text, templates escape it; they have all other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from spilt.analysis.claims import FITS, HOLDS, OPEN
from spilt.analysis.curves.fitting import GOOD_R2
from spilt.report.cells import RANGES, Measured
from spilt.report.places import label, name_of, shown

GAIN = "Preference gain"


class Finding(NamedTuple):
    """One tile: a short label, the one figure to remember, the sentence that says what it means, and whether it is a warning."""

    label: str
    figure: str
    sentence: str
    warning: bool = False


def findings(cells: Sequence[Measured], split: str, frames: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """`frames`: the report's tables; a tile says nothing that they do not."""
    out = [_kept(frames["equal_preference"]), _fits(frames), _undefined(cells, split), _control(frames["control"])]
    return [finding for finding in out if finding]


def coverage(cells: Sequence[Measured]) -> str:
    """What was measured, in one sentence."""
    methods = dict.fromkeys(cell.place.method for cell in cells)
    forms = dict.fromkeys(label("", cell.place.form) for cell in cells)
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


def _kept(pairs: pd.DataFrame) -> Finding | None:
    if pairs.empty:
        return None
    told = pairs[pairs["verdict"] != OPEN]
    sentences = []
    for row in told.to_dict("records"):
        ahead, behind = (row["cell"], row["than"]) if row["verdict"] == HOLDS else (row["than"], row["cell"])
        sentences.append(f"{name_of(ahead)} keeps {shown(abs(row['estimate']))} nat more than {name_of(behind)}.")
    many = f"{len(told)} of {len(pairs)} pairs"
    sentences.insert(0, f"{many} of methods within a form can be told apart, each over the preferences that both reach.")
    return Finding("Utility kept at equal preference", f"{many} differ", " ".join(sentences))


def winner(cells: Sequence[Measured], table: pd.DataFrame) -> tuple[Measured, pd.Series] | None:
    """The cell with the largest gain of those with a recommended multiplier, and its row of `recommendations`."""
    some = table.assign(gain=table["preference_gain_train"].astype(float))[table["multiplier"].fillna(0) != 0]
    best = some.sort_values(["gain", "choice_stands"], na_position="first", kind="stable").index[-1:]
    return (cells[best[0]], table.loc[best[0]]) if len(best) else None


class Fact(NamedTuple):
    """One number of the cell told first: what, how much, and its interval or what else it needs to be read."""

    name: str
    value: str
    beside: str = ""


def numbers(cell: Measured, row: pd.Series, makeup: pd.Series) -> list[Fact]:
    """Of the winner: its rows of `recommendations` and `makeup`."""
    on = "test" if row["reported_on"] == "test" else "train"
    drop, gain = row[f"utility_drop_{on}"], row[f"preference_gain_{on}"]
    out = [Fact("Multiplier", f"m = {shown(row['multiplier'], '.4g')}", _between(row["multiplier_low"], row["multiplier_high"], ".3g"))]
    if pd.notna(row["usable_from"]):
        ends = shown(row["usable_from"], ".3g"), shown(row["usable_to"], ".3g")
        out.append(Fact("Usable range", " to ".join(ends), "gain above 0, drop within the budget"))
    out.append(Fact(GAIN, f"{shown(gain)} nats", _between(row[f"gain_low_{on}"], row[f"gain_high_{on}"])))
    out.append(Fact("Utility drop", f"{shown(drop)} nat", _between(row[f"drop_low_{on}"], row[f"drop_high_{on}"])))
    if pd.notna(row[f"accuracy_{on}"]):
        share = f"{row[f'accuracy_at_0_{on}']:.0%} → {row[f'accuracy_{on}']:.0%}"
        out.append(Fact("Prefer the matching answer", share, f"of {row[f'n_{on}']:.0f} {on} questions"))
    if pd.notna(row["chance_p"]):
        rank = f"gain ranks {row['chance_rank']:.0f} of {row['chance_of']:.0f}, with random ones of its size"
        out.append(Fact("Chance", f"p = {row['chance_p']:.3f}", rank))
    if pd.notna(makeup["moved_wrong"]):
        out.append(Fact("Moved the wrong way", f"{makeup['moved_wrong']:.0%}", "of questions, at this m"))
    if pd.notna(makeup["dose"]):
        out.append(Fact("Relative dose", shown(makeup["dose"], ".3g"), "|Δ| / |h| at the steered block"))
    return out


def _between(low: float, high: float, spec: str = ".2f") -> str:
    return f"95%: {shown(low, spec)} to {shown(high, spec)}" if pd.notna(low) else "no interval"


def recommended(cells: Sequence[Measured], table: pd.DataFrame) -> Finding:
    """The winner in a sentence, or why there is none."""
    title = "Recommended multiplier"
    found, table = winner(cells, table), table.assign(of=[cell.label for cell in cells])
    some = table[table["multiplier"].fillna(0) != 0]
    if found is None:
        reasons = _list([f"{row['of']}: {row['reason']}" for row in table.head(3).to_dict("records")])
        return Finding(title, "none", f"No multiplier can be recommended: {reasons}.", True)
    best = table.loc[found[1].name]
    tested, m = best["reported_on"] == "test", shown(best["multiplier"], ".3g")
    on = "test" if tested else "train"
    drop, gain = best[f"utility_drop_{on}"], best[f"preference_gain_{on}"]
    share = ""
    if pd.notna(best[f"accuracy_{on}"]):
        share = f" ({best[f'accuracy_at_0_{on}']:.0%} → {best[f'accuracy_{on}']:.0%} of questions prefer the matching answer)"
    between = f" (95% of resamples: {shown(best['multiplier_low'], '.3g')} to {shown(best['multiplier_high'], '.3g')})"
    sentence = (
        f"The largest gain within a utility budget of {best['budget']:g} nat, chosen on {best['chosen_on']} questions: {best['of']} at "
        f"m = {m}{between if pd.notna(best['multiplier_low']) else ''}. On {'test' if tested else best['chosen_on']} questions preference "
        f"moves by {_with_interval(best, 'gain', gain, on)} nats{share} and utility {'falls' if drop > 0 else 'rises'} by "
        f"{_with_interval(best, 'drop', drop, on)} nat."
    )
    if pd.notna(best["choice_stands"]) and len(some) > 1:
        sentence += f" The choice among cells stands in {best['choice_stands']:.0%} of resamples."
    others = [row["of"] for row in some.to_dict("records") if row["tied"] and row["of"] != best["of"]]
    sentence += f" It cannot be told from {_list(others)}." if best["tied"] and others else ""
    sentence += " Not tested against chance." if pd.isna(best["chance_p"]) else ""
    return Finding(title, f"m = {m}, {best['of']}", sentence, bool(pd.isna(best["chance_p"])))


def _with_interval(row: pd.Series, name: str, value: float, on: str) -> str:
    low, high = row[f"{name}_low_{on}"], row[f"{name}_high_{on}"]
    sign = -1 if name == "drop" and value <= 0 else 1
    ends = sorted((sign * low, sign * high)) if pd.notna(low) else []
    return shown(sign * value) + (f" [{', '.join(map(shown, ends))}]" if ends else "")


def _fits(frames: Mapping[str, pd.DataFrame]) -> Finding:
    table, claims = frames["fits"], frames["claims"]
    sentences, figures = [], []
    for extent, name in zip(RANGES, ("the trained range", "the whole sweep"), strict=True):
        part = table[table["range"] == extent]
        good, known = part[part["r2"].astype(float) >= GOOD_R2], part["r2"].notna()
        figures.append(f"{len(good)} of {len(part)}")
        sentences.append(f"Over {name} {len(good)} of {len(part)} curves reach R² {GOOD_R2:g}")
        if on_test := [value for value in part["r2_test"] if pd.notna(value)]:
            mean = sum(on_test) / len(on_test)
            flat = ", worse than a flat line" if mean < 0 else ""  # R^2 has no least value
            sentences[-1] += f" (mean {part['r2'].astype(float).mean():.3f}; on test questions {mean:.3f}{flat})"
        for why, some in {"short of it": part[known & ~part.index.isin(good.index)], "not fitted": part[~known]}.items():
            named = [f"{label(row['method'], row['intervention'])} ({row['curve']})" for row in some.to_dict("records")]
            sentences[-1] += f"; {why}: {_list(named)}" if named else ""
    verdicts = claims.loc[claims["claim"] == FITS, "verdict"]
    sentences.append(f"Both curves reach it over the trained range, and held out, in {(verdicts == HOLDS).sum()} of {len(verdicts)} cells")
    return Finding("Curve fits", figures[0], ". ".join(sentences) + ".", bool((verdicts != HOLDS).any() or verdicts.empty))


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
    beyond = table["beyond"].astype(bool)
    named = [label(row["method"], row["intervention"]) for row in table[~beyond].to_dict("records")]
    sentence = f"{beyond.sum()} of {len(table)} cells gain more at equal drop than random interventions of the same size do (p ≤ 5%)."
    sentence += f" Not beyond chance: {_list(named)}." if named else ""
    return Finding("Beyond chance", f"{beyond.sum()} of {len(table)} cells", sentence, bool(named))
