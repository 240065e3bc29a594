"""The paper's tables from what is stored, of any models and data sets: a function for each of paper.TABLES.

The paper's own numbers stand beside. Cells that differ by their seed alone are one row: means over the fits, and their range in place
of the interval over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spilt.analysis import claims, equal, odds, paper
from spilt.analysis.calibrate import CONVERGED
from spilt.analysis.claims import Case
from spilt.analysis.provenance import Artifact, of_one_vector
from spilt.analysis.questions import Questions
from spilt.artifacts.losses import KL_COLUMNS, TABLES, TRIED
from spilt.artifacts.scores import HEADLINES
from spilt.artifacts.store import Store
from spilt.errors import UserError, unknown
from spilt.report import cells as stored
from spilt.report import tables
from spilt.report.cells import Measured, label, shown

NO_STEERING = ("no steering", "")
PROMPT = "prompt"
ON = {"train": "training", "test": "held-out"}


class Table(NamedTuple):
    """name: as it is asked for; title and note: what stands above and below; shown: cells as text; values: as numbers."""

    name: str
    title: str
    note: str
    shown: pd.DataFrame
    values: pd.DataFrame


class Group(NamedTuple):
    """The fits of a method and form at the same layers, whatever their seeds."""

    cells: tuple[Measured, ...]

    @property
    def method(self) -> str:
        return self.cells[0].place.method

    @property
    def variant(self) -> str:
        return self.cells[0].place.fitted_as

    @property
    def name(self) -> str:
        return f"{self.method} {self.variant}"

    @property
    def label(self) -> str:
        fits = f" ({len(self.cells)} fits)" if len(self.cells) > 1 else ""
        return label(self.method, self.variant) + fits

    def numbers(self, read: Callable[[Measured], tuple[float | None, float | None, float | None]]) -> dict[str, float]:
        """value, low, high of one number that is read off each fit."""
        found = np.array([[np.nan if x is None else float(x) for x in read(cell)] for cell in self.cells])
        if len(found) == 1:
            return dict(zip(("value", "low", "high"), found[0].tolist(), strict=True))
        own = found[:, 0]
        return {"value": float(own.mean()), "low": float(own.min()), "high": float(own.max())}

    @property
    def reported(self) -> tuple[Questions, ...]:
        """Of each fit the questions that are reported on."""
        return tuple(Questions.of(cell.frame[cell.frame["split"] == _told_on(cell)]) for cell in self.cells)


class Set(NamedTuple):
    """What is measured of one model on one data set."""

    base: Path
    model: str
    dataset: str
    groups: tuple[Group, ...]
    problems: tuple[str, ...]

    @property
    def heading(self) -> str:
        return f"{self.model}, {self.dataset}"

    def named(self, values: pd.DataFrame) -> pd.DataFrame:
        return values.assign(model=self.model, dataset=self.dataset)


def collect(base: Path, models: Sequence[str], datasets: Sequence[str], names: Sequence[str], budget: float, seed: int) -> list[Set]:
    """Every model and data set with stored losses, or those named. Raises UserError for names without any.

    names: of the tables wanted; curves are fitted (and kept) for those that show fits alone.
    """
    read = stored.analyse if {"fits", "averages"} & {*names} else stored.judged
    have = stored.models(base)
    if not have:
        raise UserError(f"no stored losses below {base}; run --mode loss first, or check --base_dir")
    for model in models:
        if model not in have:
            raise unknown("model with stored losses", model, have)
    every = {model: stored.datasets(base, model) for model in (models or have)}
    for name in datasets:
        if not any(name in there for there in every.values()):
            raise unknown("dataset with stored losses", name, sorted({one for there in every.values() for one in there}))
    found = [
        _set(base, model, name, partial(read, norm="mean", budget=budget, seed=seed))
        for model, there in every.items()
        for name in there
        if not datasets or name in datasets
    ]
    return [one for one in found if one.groups]


def _set(base: Path, model: str, dataset: str, read: Callable[[stored.Place], Measured]) -> Set:
    groups: dict[tuple[str, str], list[Measured]] = {}
    problems = []
    for place in stored.find(base, model, dataset):
        try:
            groups.setdefault((place.method, place.fitted_as), []).append(read(place))
        except (UserError, OSError) as error:
            problems.append(f"{model} {dataset} {place.name}: {error}")
    return Set(base, model, dataset, tuple(Group(tuple(same)) for same in groups.values()), tuple(problems))


def spread(numbers: Mapping[str, float], spec: str = ".2f") -> str:
    """'0.83 [0.70, 0.95]'"""
    low, high = numbers["low"], numbers["high"]
    return shown(numbers["value"], spec) + (f" [{shown(low, spec)}, {shown(high, spec)}]" if np.isfinite([low, high]).all() else "")


def _told(cell: Measured) -> dict[str, Any]:
    """The numbers at the multiplier that the budget gives, on held-out questions where they were measured."""
    return dict(cell.best["reported"] or cell.best["chosen"] or {})


def _of(cell: Measured, name: str, low: str = "", high: str = "") -> tuple[float | None, float | None, float | None]:
    told = _told(cell)
    return told.get(name), told.get(low), told.get(high)


MAIN: dict[str, tuple[str, Callable[[Measured], tuple[float | None, float | None, float | None]]]] = {
    "m": (".3g", lambda cell: (cell.best["solved"], cell.best["low"], cell.best["high"])),
    "preferred": (".1%", lambda cell: _of(cell, "accuracy")),
    "preference gain, nats": (".2f", lambda cell: _of(cell, "preference_gain", "gain_low", "gain_high")),
    "utility drop, nats": (".2f", lambda cell: _of(cell, "utility_drop", "drop_low", "drop_high")),
}


class Behind(NamedTuple):
    """A prompt, of which `questions` have m = 0, the model without it, and m = 1, behind it."""

    name: str
    questions: Questions

    @property
    def label(self) -> str:
        return f"{PROMPT}: {self.name}"

    def numbers(self, seed: int) -> dict[str, dict[str, float]]:
        """value, low, high of what MAIN has, but for a strength."""
        q, weights = self.questions, self.questions.resamples(seed)
        alone = dict.fromkeys(("low", "high"), float("nan"))
        out = {"preferred": {"value": float(q.mean("accuracy")[0, 1]), **alone}}
        for name, of, sign in (("preference gain, nats", "preference", 1.0), ("utility drop, nats", "utility", -1.0)):
            out[name] = equal.told(q, partial(equal.change, of, 1.0), weights, sign)
        return out


def told_on(one: Set) -> str:
    """The split that its cells are reported on."""
    return _told_on(one.groups[0].cells[0])


def behind(one: Set) -> tuple[list[Behind], list[str]]:
    """The prompts measured on the questions of the cells, and the names of those that were measured on others or by another model."""
    cell, split = one.groups[0].cells[0], told_on(one)
    here, found, others = Artifact(one.base, cell.place.folder / TABLES[split]).parts, [], []
    plain = cell.frame[(cell.frame["split"] == split) & (cell.frame["multiplier"] == 0)]
    for path in Store(one.base).prompt_tables(one.model, one.dataset, split):
        parts = Artifact(one.base, path).parts
        settings, asked = here.get("settings", {}), parts.get("settings", {})
        same = {"model", "data"} <= parts.keys() and all(here.get(name, parts[name]) == parts[name] for name in ("model", "data"))
        if not same or any(settings.get(name, value) != value for name, value in asked.items()) or "example" not in plain:
            others.append(path.parent.name)
            continue
        frame = odds.per_question(odds.answers(odds.losses_table(path), "mean"), split).assign(multiplier=1.0)
        both = [part[part["example"].isin({*plain["example"]} & {*frame["example"]})] for part in (plain, frame)]
        if not len(both[0]):
            others.append(path.parent.name)
            continue
        found.append(Behind(path.parent.name, Questions.of(pd.concat(both, ignore_index=True))))
    return found, others


def _scores(cells: Sequence[Measured]) -> dict[str, dict[float, tuple[float, float, float]]]:
    """Headline measure -> multiplier -> mean, low, high of what `spilt evaluate` has stored of these fits' texts."""
    out: dict[str, dict[float, tuple[float, float, float]]] = {}
    for cell in cells:
        for row in stored.scored(cell.place)[0].to_dict("records"):
            if row["measure"] in HEADLINES:
                out.setdefault(str(row["measure"]), {}).setdefault(float(row["multiplier"]), (row["mean"], row["low"], row["high"]))
    return out


def _at(scores: Mapping[float, tuple[float, float, float]], m: float | None) -> tuple[float | None, float | None, float | None]:
    """At a strength to nine digits, which is as it stands in a folder's name."""
    near = (found for there, found in scores.items() if m is not None and abs(there - m) <= 1e-9 * max(1.0, abs(m)))
    return next(near, (None, None, None))


def main(one: Set, seed: int) -> Table:
    """The paper's main table: every cell at the multiplier that its training items give, on held-out items; before them prompts."""
    theirs = {(row["method"], row["intervention"]): row for row in paper.main_results(one.model, one.dataset)}
    measures = list(paper.MEASURES.get(one.dataset, {})) if theirs else []
    prompts, others = behind(one)
    first = _told(one.groups[0].cells[0])
    unsteered = {"preferred": dict.fromkeys(("low", "high"), float("nan")) | {"value": _number(first.get("accuracy_at_0"))}}
    of_cell = {cell.name: _scores([cell]) for group in one.groups for cell in group.cells}
    every = _scores([cell for group in one.groups for cell in group.cells])
    judged = {name: f"score: {name}" for name in HEADLINES if name in every}
    unsteered |= {
        called: dict(zip(("value", "low", "high"), map(_number, _at(every[name], 0.0)), strict=True)) for name, called in judged.items()
    }
    lines = [(NO_STEERING, NO_STEERING[0], unsteered, True)]
    lines += [((PROMPT, prompt.name), prompt.label, prompt.numbers(seed), True) for prompt in prompts]
    for group in one.groups:
        numbers = {name: group.numbers(read) for name, (_, read) in MAIN.items()}
        for name, called in judged.items():
            numbers[called] = group.numbers(lambda cell, name=name: _at(of_cell[cell.name].get(name, {}), cell.best["solved"]))  # type: ignore[misc]
        lines.append(((group.method, group.variant), group.label, numbers, all(cell.best["multiplier"] for cell in group.cells)))
    rows, values = [], []
    for names, called, found, chosen in lines:
        row: dict[str, Any] = {"method": called}
        for name, spec in {**{name: spec for name, (spec, _) in MAIN.items()}, **dict.fromkeys(judged.values(), ".2f")}.items():
            row[name] = spread(found[name], spec) + ("" if chosen or name != "m" else " °") if name in found else "–"
            if name in found:
                values.append({"method": names[0], "intervention": names[1], "measure": name, **found[name], "recommended": chosen})
        for name in measures:
            row[f"paper: {name}"] = shown(theirs.get(names, {}).get(name), ".4g")
            values.append(
                {"method": names[0], "intervention": names[1], "measure": f"paper: {name}", "value": theirs.get(names, {}).get(name)}
            )
        rows.append(row)
    on = next((cell.best["reported_on"] or cell.best["chosen_on"] for group in one.groups for cell in group.cells), "train")
    budget = one.groups[0].cells[0].best["budget"]
    note = (
        f"m: of largest gain in preference within a utility drop of {budget:g} nat, chosen on training questions. Preferred: "
        f"{ON[on]} questions whose matching answer has the smaller loss. Gain and drop: from m = 0, 95% bootstrap intervals over "
        "questions; of several fits their range. °: not recommended (no gain, or random interventions reach it too)."
    )
    if judged:
        note += " Score: of stored texts at that m, by spilt evaluate; – where they were not scored there."
        note += " The paper's power scores are on another scale (0 to 4)." if "power" in judged and measures else ""
    if others:
        note += f" Not shown, since of other questions, settings or model: prompt {', '.join(others)}; --prompt_baseline measures it again."
    return Table("main", f"{one.heading}: main results", note, pd.DataFrame(rows), one.named(pd.DataFrame(values)))


def against_prompts(one: Set, seed: int) -> Table | None:
    """Every cell at its strength of the main table against each prompt, paired over questions; None where there are no prompts."""
    prompts, rows, values = behind(one)[0], list[dict[str, Any]](), list[dict[str, Any]]()
    for prompt in prompts:
        for group in one.groups:
            strengths = [cell.best["solved"] for cell in group.cells]
            for of, words in {"preference": "preference gain", "utility": "utility kept"}.items():
                own = [
                    (Questions.of(cell.frame[cell.frame["split"] == _told_on(cell)]), partial(equal.change, of, m))
                    for cell, m in zip(group.cells, strengths, strict=True)
                    if m is not None
                ]
                behind_it = (prompt.questions, partial(equal.change, of, 1.0))
                if len(own) == len(strengths) and (told := equal.compared(own, [behind_it], seed)):
                    values.append({"method": group.method, "intervention": group.variant, "than": prompt.name, "of": of, **told})
                    rows.append({"method": group.label, "against": prompt.label, "difference in": words})
    if not prompts:
        return None
    table = pd.DataFrame(values, columns=["method", "intervention", "than", *equal.COLUMNS[equal.COLUMNS.index("of") :]])
    for _, part in table.groupby("of"):
        table.loc[part.index, "p"] = claims.holm(part["p"].to_numpy(float))
    for row, line in zip(rows, table.to_dict("records"), strict=True):
        better = "–" if not line["p"] < 0.05 else row["method"] if line["difference"] > 0 else row["against"]
        numbers = {"value": line["difference"], "low": line["low"], "high": line["high"]}
        row |= {"nats": spread(numbers), "p": shown(line["p"], ".3f"), "better": better}
    note = (
        f"On {ON[told_on(one)]} questions, paired, from the model without either; methods at m of the main table. "
        "95% intervals, p by Holm over the comparisons of a kind."
    )
    frame = pd.DataFrame(rows, columns=["method", "against", "difference in", "nats", "p", "better"])
    return Table("prompts", f"{one.heading}: steering against prompts", note, frame, one.named(table))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


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

                def read(cell: Measured, part: str = part, names: tuple[str, str, str] = (name, low, high)) -> Any:
                    return tuple((cell.best[part] or {}).get(key) for key in names)

                found = group.numbers(read)
                row[f"{name.replace('_', ' ')}, {on}"] = spread(found)
                values.append({"method": group.method, "intervention": group.variant, "measure": name, "on": on, **found})
        rows.append(row)
    note = "At the multiplier chosen on the training questions; nats, from m = 0, 95% intervals."
    return Table("train_test", f"{one.heading}: training to held-out questions", note, pd.DataFrame(rows), one.named(pd.DataFrame(values)))


def kl_of(cell: Measured) -> pd.DataFrame | None:
    """The stored multipliers of equal KL, of the vector that lies there now."""
    path = cell.place.folder / Store.KL
    if not path.is_file() or path not in of_one_vector(cell.place.base, [path])[0]:
        return None
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); spilt table --kl makes it again") from None
    if tuple(table.columns) != KL_COLUMNS:
        raise UserError(f"{path}: has columns {', '.join(table.columns)}; spilt table --kl makes it again")
    return table


def _side(m: float | None) -> str:
    return "negative" if (m or 0) < 0 else "positive"


def _ended(cell: Measured) -> dict[str, Any]:
    """Where the search for equal KL ended, on the side of the recommended multiplier; {} where none is stored."""
    table = kl_of(cell)
    found = [] if table is None else table[(table["side"] == _side(cell.best["solved"])) & (table["status"] != TRIED)].to_dict("records")
    return {str(name): value for name, value in found[0].items()} if found else {}


def _at_kl(cell: Measured) -> float | None:
    """The multiplier there, if the budget was met within what was measured."""
    row, m = _ended(cell), cell.frame["multiplier"]
    return float(row["multiplier"]) if row and row["status"] == CONVERGED and m.min() <= row["multiplier"] <= m.max() else None


def _kl_at(cell: Measured, m: float) -> float:
    """95th percentile of KL at a strength between those that were tried: lines through its root, since KL goes as m^2 near 0."""
    table = kl_of(cell)
    if table is None or not (tried := table[table["side"].isin([_side(m), "none"]) & (table["status"] == TRIED)]).size:
        return float("nan")
    tried = tried.assign(size=tried["multiplier"].abs()).sort_values("size")
    return float(np.interp(abs(m), tried["size"], np.sqrt(tried["kl_p95"]), right=np.nan) ** 2)


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


def _told_on(cell: Measured) -> str:
    """The split that is reported on: held-out questions where they were measured."""
    return "test" if "test" in set(cell.frame["split"]) else str(cell.frame["split"].iloc[0])


def levels(one: Set, budget: float, seed: int) -> dict[str, tuple[float, dict[str, equal.Level]]]:
    """Cell -> the gain that its form is compared at, half of the largest within the budget of utility; kind -> its level."""
    asked = [(cell.place.form, cell, fit) for group in one.groups for cell, fit in zip(group.cells, group.reported, strict=True)]
    most: dict[str, float] = {}
    for form, _, fit in asked:
        most[form] = max(most.get(form, 0.0), float(equal.gain_within(budget, fit, None)[0]) if fit.zero >= 0 else 0.0)
    return {cell.name: (most[form] / 2, equal.levels(fit, _at_kl(cell), budget, most[form] / 2, seed)) for form, cell, fit in asked}


LEVEL: dict[str, tuple[str, Callable[[Measured, equal.Level], Any]]] = {
    "m": (".3g", lambda cell, level: (level.multiplier, None, None)),
    "preference gain, nats": (".2f", lambda cell, level: level.gain.values()),
    "utility drop, nats": (".2f", lambda cell, level: level.drop.values()),
    "KL p95, nats": (".2f", lambda cell, level: (_kl_at(cell, level.multiplier), None, None)),
}


def tradeoff(one: Set, budget: float, seed: int) -> Table:
    """Every cell by itself at equal KL, at equal preference and at equal utility: the strength, and what the other two are there."""
    found, rows, values = levels(one, budget, seed), [], []
    for kind in (equal.KL, equal.PREFERENCE, equal.UTILITY):
        for group in one.groups:
            first = group.cells[0]
            at = {equal.KL: _ended(first).get("budget"), equal.PREFERENCE: found[first.name][0], equal.UTILITY: budget}[kind]
            if at is None:
                continue
            reached = [kind in found[cell.name][1] for cell in group.cells]
            ended = sorted({str(_ended(cell).get("status", "not known")) for cell in group.cells} - {CONVERGED}) if kind == equal.KL else []
            status = "reached" if all(reached) else "; ".join(ended) or ("not measured there" if kind == equal.KL else "not reached")
            row = {"at equal": f"{kind}, {at:.3g} nat", "method": group.label}
            for name, (spec, pick) in LEVEL.items():

                def read(cell: Measured, kind: str = kind, pick: Callable[[Measured, equal.Level], Any] = pick) -> Any:
                    return pick(cell, found[cell.name][1][kind])

                numbers = group.numbers(read) if all(reached) else dict.fromkeys(("value", "low", "high"), float("nan"))
                row[name] = spread(numbers, spec)
                values.append(
                    {"at equal": kind, "nats": at, "method": group.method, "intervention": group.variant, "measure": name} | numbers
                )
            rows.append(row | {"status": status})
    note = (
        f"On {ON[told_on(one)]} questions, from m = 0, 95% bootstrap intervals over questions; of several fits their range. Equal KL: "
        "see strengths. Equal preference: half of the largest gain of its form within the drop of utility, where it costs least. Equal "
        "utility: the largest gain within the drop. KL p95 is measured, or read between strengths where it was. Paired "
        "tests: table equal."
    )
    frame = pd.DataFrame(rows, columns=["at equal", "method", *LEVEL, "status"])
    return Table("tradeoff", f"{one.heading}: every cell at equal KL, preference and utility", note, frame, one.named(pd.DataFrame(values)))


def at_equal(one: Set, budget: float, seed: int) -> Table:
    """spilt against each other method of its form at equal KL, equal preference, equal utility, whatever comes out."""
    compared = {}
    for group in one.groups:
        split = _told_on(group.cells[0])
        compared[group.name] = equal.Cell(Case(group.method, group.variant, group.reported), tuple(_at_kl(cell) for cell in group.cells))
    table = equal.pairs(compared, budget, seed=seed)
    labels = {group.name: group.label for group in one.groups}
    rows = []
    for line in table.to_dict("records"):
        better = "–" if not line["p"] < 0.05 else labels[line["cell"] if line["difference"] > 0 else line["than"]]
        numbers = {"value": line["difference"], "low": line["low"], "high": line["high"]}
        of = {"preference": "preference gain", "utility": "utility kept"}[line["of"]]
        row = {"at equal": line["at equal"], "method": labels[line["cell"]], "against": labels[line["than"]], "difference in": of}
        rows.append({**row, "nats": spread(numbers), "p": shown(line["p"], ".3f"), "better": better})
    words = ["at equal", "method", "against", "difference in", "nats", "p", "better"]
    note = (
        f"On {ON[split]} questions, paired; 95% intervals, p by Holm over the comparisons of a kind. At equal utility: within a "
        f"drop of {budget:g} nat. At equal preference: mean over the gains that both reach. At equal KL: both where the KL budget is met."
    )
    frame = pd.DataFrame(rows, columns=words)
    return Table("equal", f"{one.heading}: SPLIT at equal KL, preference and utility", note, frame, one.named(table))


def make(sets: Sequence[Set], names: Sequence[str], budget: float, seed: int) -> list[Table]:
    """The tables that are asked for, by model and data set; averages over data sets last."""
    of_set: dict[str, Callable[[Set], Table | None]] = {
        **{
            "main": partial(main, seed=seed),
            "prompts": partial(against_prompts, seed=seed),
            "strengths": strengths,
            "tradeoff": partial(tradeoff, budget=budget, seed=seed),
            "train_test": train_test,
            "fits": fits,
        },
        "equal": lambda one: at_equal(one, budget, seed),
    }
    made = [table for one in sets for name in paper.TABLES if name in names and name in of_set and (table := of_set[name](one)) is not None]
    return [*made, *(averages(sets) if "averages" in names else [])]


# ---------------------------------------------------------------- as text


def markdown(made: Sequence[Table]) -> str:
    parts = []
    for table in made:
        cells = [list(table.shown.columns), *table.shown.astype(str).to_numpy().tolist()]
        lines = ["| " + " | ".join(str(text).replace("|", "\\|") for text in row) + " |" for row in cells]
        lines.insert(1, "|---" * len(table.shown.columns) + "|")
        parts.append("\n".join([f"## {table.title}", "", *(lines if len(table.shown) else ["nothing to compare"]), "", table.note, ""]))
    return "\n".join(parts)


def latex(made: Sequence[Table]) -> str:
    """booktabs; needs no package of fonts: the signs that plain LaTeX does not have are written with its commands."""
    parts = [
        table.shown.to_latex(index=False, escape=True, caption=table.title, label=f"tab:{n}-{table.name}") for n, table in enumerate(made)
    ]
    text = "\n".join(parts)
    for sign, command in {"−": "$-$", "–": "--", "²": "\\textsuperscript{2}", "°": "\\textdegree{}"}.items():
        text = text.replace(sign, command)
    return text


def csv(made: Sequence[Table], name: str) -> str:
    """All tables of one name in one file, as numbers."""
    values = [table.values for table in made if table.name == name]
    frame = pd.concat(values, ignore_index=True)
    first = [column for column in ("model", "dataset") if column in frame]
    return frame[[*first, *(column for column in frame if column not in first)]].to_csv(
        index=False, float_format="%.10g", lineterminator="\n"
    )


def html(made: Sequence[Table], version: str) -> str:
    from spilt.report import page

    return page.render("comparison.html", tables=made, version=version)
