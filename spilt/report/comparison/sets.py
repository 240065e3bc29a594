"""What is compared: the measured cells of a model and data set, by method and form, and the prompts beside them.

Cells that differ by their seed alone are one group: means over the fits, and their range in place of the interval over questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spilt.analysis import equal, odds
from spilt.analysis.calibrate import CONVERGED
from spilt.analysis.provenance import Artifact, found_unlike, of_one_vector
from spilt.analysis.questions import Questions
from spilt.artifacts import manifest
from spilt.artifacts.losses import KL_COLUMNS, TRIED
from spilt.artifacts.store import Store
from spilt.cell import PROMPT
from spilt.errors import UserError, unknown
from spilt.report import cells, places
from spilt.report.cells import Measured
from spilt.report.places import label, shown

ON = {"train": "training", "test": "held-out"}


class Number(NamedTuple):
    """With its interval over questions, or its range over fits; nan where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, *given: float | None) -> Number:
        """None: there is none."""
        return cls(*(math.nan if one is None else float(one) for one in given))

    def text(self, spec: str = ".2f") -> str:
        """'0.83 [0.70, 0.95]'"""
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return shown(self.value, spec) + (f" [{shown(self.low, spec)}, {shown(self.high, spec)}]" if known else "")


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

    def number(self, read: Callable[[Measured], Number]) -> Number:
        """One that is read off each fit."""
        found = [read(cell) for cell in self.cells]
        own = np.array([number.value for number in found])
        return found[0] if len(found) == 1 else Number(float(own.mean()), float(own.min()), float(own.max()))


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
    read = cells.analyse if {"fits", "averages"} & {*names} else cells.judged
    have = places.models(base)
    if not have:
        raise UserError(f"no stored losses below {base}; run --mode loss first, or check --base_dir")
    for model in models:
        if model not in have:
            raise unknown("model with stored losses", model, have)
    every = {model: places.datasets(base, model) for model in (models or have)}
    for name in datasets:
        if not any(name in there for there in every.values()):
            raise unknown("dataset with stored losses", name, sorted({one for there in every.values() for one in there}))
    return [
        _set(base, model, name, partial(read, norm="mean", budget=budget, seed=seed))
        for model, there in every.items()
        for name in there
        if not datasets or name in datasets
    ]


def _set(base: Path, model: str, dataset: str, read: Callable[[places.Place], Measured]) -> Set:
    measured = []
    found, others = places.comparable(places.find(base, model, dataset))
    problems = [f"{model} {dataset} {other}" for other in others]
    for place in found:
        if why := found_unlike(base, place.folder / Store.KL):
            problems.append(f"{model} {dataset} {place.name}: strengths of equal KL left out: found with {why}; --kl finds them again")
        try:
            measured.append(read(place))
        except (UserError, OSError) as error:
            problems.append(f"{model} {dataset} {place.name}: {error}")
    return Set(base, model, dataset, grouped(measured), tuple(problems))


def grouped(measured: Sequence[Measured]) -> tuple[Group, ...]:
    """By method, form and layers."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for cell in measured:
        found.setdefault((cell.place.method, cell.place.fitted_as), []).append(cell)
    return tuple(Group(tuple(same)) for same in found.values())


def told_on(one: Set) -> str:
    """The split that its cells are reported on."""
    return split_of(one.groups[0].cells[0])


def split_of(cell: Measured) -> str:
    """The split that is reported on: held-out questions where they were measured."""
    return "test" if "test" in set(cell.frame["split"]) else str(cell.frame["split"].iloc[0])


def questions_of(cell: Measured) -> Questions:
    """Those of that split."""
    return Questions.of(cell.frame[cell.frame["split"] == split_of(cell)])


class Behind(NamedTuple):
    """A prompt, of which `questions` have m = 0, the model without it, and m = 1, behind it."""

    name: str
    questions: Questions
    said: Any  # its turns, by the manifest

    @property
    def label(self) -> str:
        return f"{PROMPT}: {self.name}"

    def numbers(self, seed: int) -> dict[str, Number]:
        """What the main table has, but for a strength."""
        q, weights = self.questions, self.questions.resamples(seed)
        out = {"preferred": Number(float(q.mean("accuracy")[0, 1]))}
        for name, of, sign in (("preference gain, nats", "preference", 1.0), ("utility drop, nats", "utility", -1.0)):
            out[name] = Number(**equal.told(q, partial(equal.change, of, 1.0), weights, sign))
        return out


def behind(one: Set) -> tuple[list[Behind], list[str]]:
    """The prompts measured on the questions of the cells, and the names of those that were measured on others or by another model, or are
    damaged."""
    cell, split = one.groups[0].cells[0], told_on(one)
    here = next((Artifact(one.base, path).parts for path in cell.place.losses_of(split)), {})
    found, others = [], []
    plain = cell.frame[(cell.frame["split"] == split) & (cell.frame["multiplier"] == 0)]
    for path in Store(one.base).prompt_tables(one.model, one.dataset, split):
        parts = Artifact(one.base, path).parts
        settings, asked = here.get("settings", {}), parts.get("settings", {})
        same = manifest.is_as_recorded(path) and {"model", "data"} <= parts.keys()
        same = same and all(here.get(name, parts[name]) == parts[name] for name in ("model", "data"))
        if not same or any(settings.get(name, value) != value for name, value in asked.items()) or "example" not in plain:
            others.append(path.parent.name)
            continue
        frame = odds.per_question(odds.answers(odds.losses_table(path), "mean"), split).assign(multiplier=1.0)
        both = [part[part["example"].isin({*plain["example"]} & {*frame["example"]})] for part in (plain, frame)]
        if not len(both[0]):
            others.append(path.parent.name)
            continue
        found.append(Behind(path.parent.name, Questions.of(pd.concat(both, ignore_index=True)), parts.get("prompt")))
    return found, others


def kl_of(cell: Measured) -> pd.DataFrame | None:
    """The stored multipliers of equal KL, of the vector that lies there now, and found as those of the other cells were."""
    path = cell.place.folder / Store.KL
    if not path.is_file() or path not in of_one_vector(cell.place.base, [path])[0] or found_unlike(cell.place.base, path):
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


def ended(cell: Measured) -> dict[str, Any]:
    """Where the search for equal KL ended, on the side of the recommended multiplier; {} where none is stored."""
    table = kl_of(cell)
    found = [] if table is None else table[(table["side"] == _side(cell.best["solved"])) & (table["status"] != TRIED)].to_dict("records")
    return {str(name): value for name, value in found[0].items()} if found else {}


def at_kl(cell: Measured) -> float | None:
    """The multiplier there, if the budget was met within what was measured (with the digits that a table has of it)."""
    row, m = ended(cell), cell.frame["multiplier"]
    if not row or row["status"] != CONVERGED:
        return None
    inside = min(max(row["multiplier"], m.min()), m.max())
    return float(inside) if math.isclose(inside, row["multiplier"], rel_tol=1e-6) else None


def kl_at(cell: Measured, m: float) -> float:
    """95th percentile of KL at a strength between those that were tried: lines through its root, since KL goes as m^2 near 0."""
    table = kl_of(cell)
    if table is None or not (tried := table[table["side"].isin([_side(m), "none"]) & (table["status"] == TRIED)]).size:
        return float("nan")
    tried = tried.assign(size=tried["multiplier"].abs()).sort_values("size")
    most = tried["size"].max()
    size = most if math.isclose(abs(m), most, rel_tol=1e-6) else abs(m)  # as a table rounds it
    return float(np.interp(size, tried["size"], np.sqrt(tried["kl_p95"]), right=np.nan) ** 2)
