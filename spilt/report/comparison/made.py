"""The paper's tables from what is stored, of any models and data sets: a function for each of paper.TABLES.

The paper's own numbers stand beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd

from spilt.analysis import claims, equal, paper, scores
from spilt.artifacts.store import Store
from spilt.cell import PROMPT
from spilt.report import tables
from spilt.report.cells import Measured
from spilt.report.comparison.disturbed import KEPT, at_equal, difference, strengths, tradeoff
from spilt.report.comparison.scored import NO_STEERING, scored
from spilt.report.comparison.sets import ON, Number, Set, behind, questions_of, told_on
from spilt.report.comparison.text import Table
from spilt.report.places import label, shown

VALUES = ["method", "intervention", "measure", "low", "high", "value", "recommended"]


def _told(cell: Measured) -> dict[str, Any]:
    """The numbers at the multiplier that the budget gives, on held-out questions where they were measured."""
    return dict(cell.best["reported"] or cell.best["chosen"] or {})


def _of(cell: Measured, name: str, low: str = "", high: str = "") -> Number:
    told = _told(cell)
    return Number.of(told.get(name), told.get(low), told.get(high))


# column of the main table -> its format, and where a cell's number is
MAIN: dict[str, tuple[str, Callable[[Measured], Number]]] = {
    "m": (".3g", lambda cell: Number.of(cell.best["solved"], cell.best["low"], cell.best["high"])),
    "preferred": (".1%", lambda cell: _of(cell, "accuracy")),
    "preference gain, nats": (".2f", lambda cell: _of(cell, "preference_gain", "gain_low", "gain_high")),
    "utility drop, nats": (".2f", lambda cell: _of(cell, "utility_drop", "drop_low", "drop_high")),
}


def main(one: Set, seed: int) -> Table:
    """The paper's main table: every cell at the multiplier that its training items give, on held-out items; before them prompts."""
    theirs = {(row["method"], row["intervention"]): row for row in paper.main_results(one.model, one.dataset)}
    measures = list(paper.MEASURES.get(one.dataset, {})) if theirs else []
    prompts, others = behind(one)
    cells = [cell for group in one.groups for cell in group.cells]
    found_scores = scored(one, {prompt.name: prompt.said for prompt in prompts})
    judged = {name: f"score: {name}" for name in found_scores.measures}

    def of_texts(row: str) -> dict[str, Number]:
        return {called: found_scores.of.get(row, {}).get(name, Number.of(None)) for name, called in judged.items()}

    # what each row is known by, how it is called, its numbers, and whether its strength is recommended
    unsteered = {"preferred": Number.of(_told(cells[0]).get("accuracy_at_0")), **of_texts(NO_STEERING)}
    lines = [((NO_STEERING, ""), NO_STEERING, unsteered, True)]
    measured = {prompt.name: prompt.numbers(seed) for prompt in prompts}
    for name in sorted({*measured, *found_scores.prompts}):
        lines.append(((PROMPT, name), f"{PROMPT}: {name}", measured.get(name, {}) | of_texts(f"{PROMPT} {name}"), True))
    for group in one.groups:
        numbers = {name: group.number(read) for name, (_, read) in MAIN.items()}
        numbers |= {called: group.number(lambda cell, called=called: of_texts(cell.name)[called]) for called in judged.values()}  # type: ignore[misc]
        lines.append(((group.method, group.variant), group.label, numbers, all(cell.best["multiplier"] for cell in group.cells)))

    formats = {name: spec for name, (spec, _) in MAIN.items()} | dict.fromkeys(judged.values(), ".2f")
    rows, values = [], []
    for (method, form), called, found, recommended in lines:
        row: dict[str, Any] = {"method": called}
        for name, spec in formats.items():
            row[name] = "–"
            if name in found:
                row[name] = found[name].text(spec) + ("" if recommended or name != "m" else " °")
                numbers = found[name]._asdict()
                values.append({"method": method, "intervention": form, "measure": name, **numbers, "recommended": recommended})
        for name in measures:
            value = theirs.get((method, form), {}).get(name)
            row[f"paper: {name}"] = shown(value, ".4g")
            values.append({"method": method, "intervention": form, "measure": f"paper: {name}", "value": value})
        rows.append(row)

    on = next((cell.best["reported_on"] or cell.best["chosen_on"] for cell in cells), "train")
    note = (
        f"m: of largest gain in preference within a utility drop of {cells[0].best['budget']:g} nat, chosen on training questions. "
        f"Preferred: {ON[on]} questions whose matching answer has the smaller loss. Gain and drop: from m = 0, 95% bootstrap intervals "
        "over questions; of several fits their range. °: not recommended (no gain, or random interventions reach it too)."
    )
    if judged:
        note += " Score: of stored texts at that m, by spilt evaluate; – where they were not scored there."
        store = Store(one.base)
        behind_prompts = [cell for cell in store.behind_prompts(one.model, one.dataset) if cell.intervention in found_scores.prompts]
        note += scores.several_judges(store, [*(cell.place.texts_of for cell in cells), *behind_prompts], judged)
        note += " The paper's power scores are on another scale (0 to 4)." if "power" in judged and measures else ""
    note += "".join(f" {said}" for said in found_scores.notes)
    if others:
        note += " Not shown, since damaged, or of other questions, settings or model: "
        note += f"prompt {', '.join(others)}; --prompt_baseline measures it again."
    return Table("main", f"{one.heading}: main results", note, pd.DataFrame(rows), one.named(pd.DataFrame(values, columns=VALUES)))


AGAINST = ["method", "intervention", "than", *equal.COLUMNS[equal.COLUMNS.index("of") :]]
PROMPTS = ["prompt", "on", "accuracy", "preference_gain", "gain_low", "gain_high", "utility_drop", "drop_low", "drop_high"]


def prompts(one: Set, seed: int) -> pd.DataFrame:
    """Every prompt by itself, on the questions that the cells are reported on: PROMPTS, in nats from the model without it."""
    rows = []
    for prompt in behind(one)[0]:
        preferred, gain, drop = prompt.numbers(seed).values()
        rows.append((prompt.name, told_on(one), preferred.value, *gain, *drop))
    return pd.DataFrame(rows, columns=PROMPTS)


def against_prompts(one: Set, seed: int) -> Table | None:
    """Every cell at its strength of the main table against each prompt, paired over questions; None where there are no prompts."""
    prompts, rows, values = behind(one)[0], list[dict[str, Any]](), list[dict[str, Any]]()
    if not prompts:
        return None
    for prompt in prompts:
        for group in one.groups:
            strengths = [cell.best["solved"] for cell in group.cells]
            if None in strengths:
                continue
            for of, words in KEPT.items():
                fits = zip(group.cells, strengths, strict=True)
                own: list[Any] = [(questions_of(cell), partial(equal.change, of, m)) for cell, m in fits]
                if told := equal.compared(own, [(prompt.questions, partial(equal.change, of, 1.0))], seed):
                    values.append({"method": group.method, "intervention": group.variant, "than": prompt.name, "of": of, **told})
                    rows.append({"method": group.label, "against": prompt.label, "difference in": words})
    table = pd.DataFrame(values, columns=AGAINST)
    for _, part in table.groupby("of"):
        table.loc[part.index, "p"] = claims.holm(part["p"].to_numpy(float))
    for row, line in zip(rows, table.to_dict("records"), strict=True):
        row |= difference(line, row["method"], row["against"])
    note = (
        f"On {ON[told_on(one)]} questions, paired, from the model without either; methods at m of the main table. "
        "95% intervals, p by Holm over the comparisons of a kind."
    )
    frame = pd.DataFrame(rows, columns=["method", "against", "difference in", "nats", "p", "better"])
    return Table("prompts", f"{one.heading}: steering against prompts", note, frame, one.named(table))


def fits(one: Set) -> Table:
    """Paper table 2: R^2 of both curves of every cell, the paper's beside."""
    every = tables.fits([cell for group in one.groups for cell in group.cells], one.model, one.dataset)
    every = every[every["range"] == "trained"]
    rows = []
    for group in one.groups:
        own = every[(every["method"] == group.method) & every["intervention"].isin([cell.place.intervention for cell in group.cells])]
        row = {"method": group.label}
        for curve, part in own.groupby("curve", sort=False):
            for name, words in {"r2": "R²", "r2_held_out": "held out", "r2_test": "on test", "r2_paper": "paper"}.items():
                row[f"{curve} {words}"] = shown(part[name].astype(float).mean(), ".3f" if name != "r2_paper" else ".2f")
        rows.append(row)
    note = (
        "Over the trained range, as in the paper. Held out: fitted on every second multiplier, scored on the others. "
        "On test: the fit of the training questions, scored on the held-out ones."
    )
    return Table("fits", f"{one.heading}: fits of the curves", note, pd.DataFrame(rows), one.named(every))


def averages(sets: Sequence[Set]) -> list[Table]:
    """Paper tables 6 and 7: R^2 averaged over data sets and methods, by form; how many reach 0.95; on the test questions."""
    out = []
    for model in dict.fromkeys(one.model for one in sets):
        every = pd.concat([fits(one).values for one in sets if one.model == model], ignore_index=True)
        every["form"] = [label("", name.partition("@")[0]) for name in every["intervention"]]
        parts = [*every.groupby("form", sort=False), ("all", every)]
        means = [tables.fit_averages(part).assign(form=form) for form, part in parts]
        table = pd.concat(means, ignore_index=True)
        rows = []
        for form, part in table.groupby("form", sort=False):
            row = {"form": str(form)}
            for line in part.to_dict("records"):
                curve = line["curve"]
                row |= {f"{curve} R²": shown(line["r2"], ".3f"), f"{curve} on test": shown(line["r2_test"], ".3f")}
                row |= {f"{curve} paper": shown(line["r2_paper"], ".3f"), f"{curve} R² from 0.95": f"{line['good']} of {line['fitted']}"}
            rows.append(row)
        names = ", ".join(one.dataset for one in sets if one.model == model)
        out.append(
            Table(
                "averages",
                f"{model}: averages of the fits",
                f"Over methods and data sets: {names}.",
                pd.DataFrame(rows),
                table.assign(model=model),
            )
        )
    return out


def train_test(one: Set) -> Table:
    """What was chosen on the training questions, there and on the held-out ones."""
    rows, values = [], []
    for group in one.groups:
        row: dict[str, Any] = {"method": group.label}
        for part, on in (("chosen", "train"), ("reported", "test")):
            for name, low, high in (("preference_gain", "gain_low", "gain_high"), ("utility_drop", "drop_low", "drop_high")):

                def read(cell: Measured, part: str = part, names: tuple[str, str, str] = (name, low, high)) -> Number:
                    return Number.of(*((cell.best[part] or {}).get(key) for key in names))

                found = group.number(read)
                row[f"{name.replace('_', ' ')}, {on}"] = found.text()
                values.append({"method": group.method, "intervention": group.variant, "measure": name, "on": on, **found._asdict()})
        rows.append(row)
    note = "At the multiplier chosen on the training questions; nats, from m = 0, 95% intervals."
    return Table("train_test", f"{one.heading}: training to held-out questions", note, pd.DataFrame(rows), one.named(pd.DataFrame(values)))


def make(sets: Sequence[Set], names: Sequence[str], budget: float, seed: int) -> list[Table]:
    """The tables that are asked for, by model and data set; averages over data sets last."""
    of_set: dict[str, Callable[[Set], Table | None]] = {
        "main": partial(main, seed=seed),
        "equal": partial(at_equal, budget=budget, seed=seed),
        "prompts": partial(against_prompts, seed=seed),
        "strengths": strengths,
        "tradeoff": partial(tradeoff, budget=budget, seed=seed),
        "train_test": train_test,
        "fits": fits,
    }
    made = [table for one in sets for name in paper.TABLES if name in names and name in of_set and (table := of_set[name](one)) is not None]
    return [*made, *(averages(sets) if "averages" in names else [])]
