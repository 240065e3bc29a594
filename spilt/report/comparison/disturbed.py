"""Tables at equal KL, preference and utility: the strengths of equal KL, every cell by itself, SPLIT against the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from spilt.analysis import equal
from spilt.analysis.calibrate import CONVERGED
from spilt.analysis.claims import Case
from spilt.artifacts.losses import TRIED
from spilt.report.cells import Measured
from spilt.report.comparison.sets import ON, Number, Set, at_kl, ended, kl_at, kl_of, questions_of, told_on
from spilt.report.comparison.text import Table
from spilt.report.places import shown

KEPT = {"preference": "preference gain", "utility": "utility kept"}


def strengths(one: Set) -> Table | None:
    """Every cell's multipliers of equal KL, both signs, with what was reached; None where none are stored."""
    every = [(group, cell, table) for group in one.groups for cell in group.cells if (table := kl_of(cell)) is not None]
    if not every:
        return None
    rows, values = [], []
    for _, cell, table in every:
        row = {"method": cell.label}
        for line in table[table["status"] != TRIED].to_dict("records"):
            row |= {f"m, {line['side']}": shown(line["multiplier"], ".3g"), f"KL p95, {line['side']}": shown(line["kl_p95"], ".3f")}
            row |= {f"status, {line['side']}": str(line["status"])}
        rows.append(row)
        values.append(table.assign(**cell.names))
    budget = every[0][2]["budget"].iloc[0]
    note = f"KL(steered || unsteered) along the steered model's own greedy answers, 95th percentile over tokens; budget {budget:g} nat."
    return Table("strengths", f"{one.heading}: strengths of equal KL", note, pd.DataFrame(rows), one.named(pd.concat(values)))


def levels(one: Set, budget: float, seed: int) -> dict[str, tuple[float, dict[str, equal.Level]]]:
    """Cell -> the gain that its form is compared at, half of the largest within the budget of utility; kind -> its level."""
    asked = [(cell.place.form, cell, questions_of(cell)) for group in one.groups for cell in group.cells]
    most: dict[str, float] = {}
    for form, _, fit in asked:
        most[form] = max(most.get(form, 0.0), float(equal.gain_within(budget, fit, None)[0]) if fit.zero >= 0 else 0.0)
    return {cell.name: (most[form] / 2, equal.levels(fit, at_kl(cell), budget, most[form] / 2, seed)) for form, cell, fit in asked}


LEVEL: dict[str, tuple[str, Callable[[Measured, equal.Level], Number]]] = {
    "m": (".3g", lambda cell, level: Number(level.multiplier)),
    "preference gain, nats": (".2f", lambda cell, level: Number(**level.gain)),
    "utility drop, nats": (".2f", lambda cell, level: Number(**level.drop)),
    "KL p95, nats": (".2f", lambda cell, level: Number(kl_at(cell, level.multiplier))),
}


def tradeoff(one: Set, budget: float, seed: int) -> Table:
    """Every cell by itself at equal KL, at equal preference and at equal utility: the strength, and what the other two are there."""
    found, rows, values = levels(one, budget, seed), [], []
    for kind in (equal.KL, equal.PREFERENCE, equal.UTILITY):
        for group in one.groups:
            first = group.cells[0]
            at = {equal.KL: ended(first).get("budget"), equal.PREFERENCE: found[first.name][0], equal.UTILITY: budget}[kind]
            if at is None:
                continue
            reached = all(kind in found[cell.name][1] for cell in group.cells)
            why = sorted({str(ended(cell).get("status", "not known")) for cell in group.cells} - {CONVERGED}) if kind == equal.KL else []
            status = "reached" if reached else "; ".join(why) or ("not measured there" if kind == equal.KL else "not reached")
            row = {"at equal": f"{kind}, {at:.3g} nat", "method": group.label}
            for name, (spec, pick) in LEVEL.items():

                def read(cell: Measured, kind: str = kind, pick: Callable[[Measured, equal.Level], Number] = pick) -> Number:
                    return pick(cell, found[cell.name][1][kind])

                number = group.number(read) if reached else Number.of(None)
                row[name] = number.text(spec)
                known = {"at equal": kind, "nats": at, "method": group.method, "intervention": group.variant, "measure": name}
                values.append(known | number._asdict())
            rows.append(row | {"status": status})
    note = (
        f"On {ON[told_on(one)]} questions, from m = 0, 95% bootstrap intervals over questions; of several fits their range. Equal KL: "
        "see strengths. Equal preference: half of the largest gain of its form within the drop of utility, where it costs least. Equal "
        "utility: the largest gain within the drop. KL p95 is measured, or read between strengths where it was. Paired "
        "tests: table equal."
    )
    frame = pd.DataFrame(rows, columns=["at equal", "method", *LEVEL, "status"])
    return Table("tradeoff", f"{one.heading}: every cell at equal KL, preference and utility", note, frame, one.named(pd.DataFrame(values)))


def difference(line: Mapping[str, Any], own: str, other: str) -> dict[str, str]:
    """The last columns of a comparison. own, other: how the two are called."""
    better = "–" if not line["p"] < 0.05 else own if line["difference"] > 0 else other
    number = Number(line["difference"], line["low"], line["high"])
    return {"nats": number.text(), "p": shown(line["p"], ".3f"), "better": better}


def at_equal(one: Set, budget: float, seed: int) -> Table:
    """spilt against each other method of its form at equal KL, equal preference, equal utility, whatever comes out."""
    compared = {}
    for group in one.groups:
        case = Case(group.method, group.variant, tuple(map(questions_of, group.cells)))
        compared[group.name] = equal.Cell(case, tuple(map(at_kl, group.cells)))
    table = equal.pairs(compared, budget, seed=seed)
    labels = {group.name: group.label for group in one.groups}
    rows = []
    for line in table.to_dict("records"):
        own, other = labels[line["cell"]], labels[line["than"]]
        row = {"at equal": line["at equal"], "method": own, "against": other, "difference in": KEPT[line["of"]]}
        rows.append(row | difference(line, own, other))
    words = ["at equal", "method", "against", "difference in", "nats", "p", "better"]
    note = (
        f"On {ON[told_on(one)]} questions, paired; 95% intervals, p by Holm over the comparisons of a kind. At equal utility: within a "
        f"drop of {budget:g} nat. At equal preference: mean over the gains that both reach. At equal KL: both where the KL budget is met."
    )
    frame = pd.DataFrame(rows, columns=words)
    return Table("equal", f"{one.heading}: SPLIT at equal KL, preference and utility", note, frame, one.named(table))
