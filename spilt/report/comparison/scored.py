"""Scores of stored texts for the main table: of the methods at their strengths, of the unsteered model, and behind prompts; and which of
them are of texts that were made otherwise, so that they say nothing of one beside the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spilt.analysis import scores
from spilt.analysis.provenance import Artifact
from spilt.artifacts import manifest
from spilt.artifacts.scores import HEADLINES
from spilt.artifacts.store import Store
from spilt.cell import PROMPT, Cell
from spilt.report import cells as stored
from spilt.report.comparison.sets import Number, Set
from spilt.report.places import Place

NO_STEERING = "no steering"
Means = dict[str, dict[float, Number]]  # headline measure -> multiplier -> mean of the stored texts


class Scored(NamedTuple):
    """measures: those that there are. of: row -> measure -> its mean. notes: what is not shown, or not comparable."""

    measures: tuple[str, ...]
    of: Mapping[str, Mapping[str, Number]]
    notes: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        """Names of the prompts with scores."""
        return [row.removeprefix(f"{PROMPT} ") for row in self.of if row.startswith(f"{PROMPT} ")]


def scored(one: Set, prompts: Mapping[str, Any]) -> Scored:
    """What `spilt evaluate` has stored of the rows of the main table. prompts: name -> what those say whose losses stand there."""
    store, means, made, left = Store(one.base), dict[str, Means](), dict[str, dict[str, Any]](), list[str]()
    asked: dict[str, tuple[Place, float | None]] = {
        cell.name: (cell.place, cell.best["solved"]) for group in one.groups for cell in group.cells
    }
    methods = list(asked)
    for cell in store.behind_prompts(one.model, one.dataset):
        place = Place(one.base, one.model, one.dataset, PROMPT, cell.intervention, Path())
        if other := _another(store, cell, prompts):
            left.append(f"{place.name}: {other}")
            continue
        asked[place.name] = (place, 0.0)
    for row, (place, m) in asked.items():
        table, gone = stored.scored(place)
        left += [gone] if gone else []
        means[row] = _means(table.to_dict("records"))
        if m is not None and any(_known(_at(values, m)) for values in means[row].values()):
            made[row] = scores.made_how(store, place.texts_of, m)
    others = [row for row in methods if any(_known(_at(values, 0.0)) for values in means[row].values())]
    unsteered = {row: scores.made_how(store, asked[row][0].texts_of, 0.0) for row in others}
    by = {row: how for row, how in {**made, **{f"{row} at m = 0": how for row, how in unsteered.items()}}.items() if how}
    # all are held against those of which there are most, at equal numbers the first
    first = max(by, key=lambda row: sum(not _other(how, by[row]) for how in by.values()), default="")

    unlike = {row: why for row, how in made.items() if how and (why := _other(how, by[first]))}
    of: dict[str, dict[str, Number]] = {
        row: _numbers(means[row], m) for row, (_, m) in asked.items() if row in methods or row not in unlike
    }
    apart = {row: _other(how, by[first]) if how else "" for row, how in unsteered.items()}
    for row in sorted(others, key=lambda row: bool(apart[row])):  # of texts like the others', where there are some
        for name, values in means[row].items():
            if _known(number := _at(values, 0.0)) and name not in of.setdefault(NO_STEERING, {}):
                of[NO_STEERING][name] = number
                unlike |= {NO_STEERING: apart[row]} if apart[row] else {}
    of = {row: numbers for row, numbers in of.items() if numbers}

    notes = []
    if flagged := [f"{row} ({why})" for row, why in unlike.items() if row == NO_STEERING or row in methods]:
        notes.append(f"Not to be compared with {first}, since of texts that were made or scored otherwise: scores of {'; '.join(flagged)}.")
    if hidden := [f"{row} ({why})" for row, why in unlike.items() if row not in methods and row != NO_STEERING]:
        notes.append(f"Not shown, since of texts that were made or scored otherwise than those of {first}: scores of {'; '.join(hidden)}.")
    notes += [f"Not shown: {'; '.join(left)}."] if left else []
    return Scored(tuple(name for name in HEADLINES if any(name in values for values in means.values())), of, tuple(notes))


def _another(store: Store, cell: Cell, prompts: Mapping[str, Any]) -> str:
    """Why the scores are not of the prompt whose losses stand in the table; '' where they are, or it has none."""
    said = next((Artifact(store.base_dir, path).parts.get("prompt") for _, path in store.scored(cell)), None)
    if said is None or cell.intervention not in prompts or prompts[cell.intervention] == said:
        return ""
    return "its scores are of another prompt under that name than its losses; --prompt_baseline with one file makes both alike"


def _means(rows: list[dict[Any, Any]]) -> Means:
    out: Means = {}
    for row in rows:
        if row["measure"] in HEADLINES:
            out.setdefault(str(row["measure"]), {})[float(row["multiplier"])] = Number.of(row["mean"], row["low"], row["high"])
    return out


def _numbers(means: Means, m: float | None) -> dict[str, Number]:
    return {} if m is None else {name: number for name, values in means.items() if _known(number := _at(values, m))}


def _known(number: Number) -> bool:
    return math.isfinite(number.value)


def _at(values: Mapping[float, Number], m: float) -> Number:
    return next((found for there, found in values.items() if scores.same(there, m)), Number.of(None))


def _other(how: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """What is not alike, of what is known of both."""
    both = how.keys() & first.keys()
    found = manifest.differences({name: how[name] for name in both}, {name: first[name] for name in both})
    return found.replace("(now ", "(there ")
