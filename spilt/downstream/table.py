"""What was evaluated, side by side: accuracy with Wilson's interval, what was learned, and paired differences on the same rows.

Differences have Newcombe's interval for paired shares, p is McNemar's exact test on the rows where two runs differ, with Holm's correction
over all pairs of a task and model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from spilt.analysis import intervals
from spilt.analysis.claims import holm
from spilt.artifacts import manifest
from spilt.downstream import rows
from spilt.downstream.places import Place, runs
from spilt.downstream.words import PARTS, acting
from spilt.downstream.work import learned_at, summaries
from spilt.errors import UserError, unknown
from spilt.report import comparison
from spilt.report.comparison import Table
from spilt.terminal import complain

ASKED = ("reading", "max_new_tokens", "extract", "dtype")  # how a run was asked, and its answers were read; a strength is in its name


class Run(NamedTuple):
    """One evaluation. right: of each row, in the order of the data."""

    summary: Mapping[str, Any]
    right: tuple[bool, ...]
    data: str  # hash of the rows
    model: str  # hash of the checkpoint
    asked: Mapping[str, Any]  # of ASKED

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Runs that are compared: of the same rows and the same model."""
        return self.summary["task"], self.summary["model"], self.data, self.model


def read(place: Place, name: str) -> Run | None:
    """None where this was not evaluated. Raises UserError for results that are not what their manifest speaks of, or of what was
    learned in their place before."""
    summary = summaries(place).get(name)
    if summary is None:
        return None
    path = place.results(name)
    record = manifest.read(path)
    if record is None or not manifest.matches(path, record):
        raise UserError(f"{path}: is not what its manifest speaks of; spilt tasks evaluate --force makes it again")
    parts = record["parts"]
    learned = manifest.read(learned_at(place, str(summary["variant"])))
    if learned is not None and learned.get("identity") != parts.get("learned"):
        raise UserError(f"{path}: is of what was learned there before; spilt tasks evaluate measures what lies there now")
    right = tuple(bool(json.loads(text)["eval"]) for text in path.read_text(encoding="utf-8").splitlines())
    return Run(summary, right, parts["data"], parts["model"], {name: parts.get(name) for name in ASKED})


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact, two-sided: of the rows where just one of two is right, whether it is either with probability 1/2 (McNemar 1947)."""
    a, b = (sum(x and not y for x, y in zip(*pair, strict=True)) for pair in ((one, other), (other, one)))
    return float(stats.binomtest(a, a + b).pvalue) if a + b else 1.0


def collect(base_dir: Path, tasks: Sequence[str], models: Sequence[str], split: str, reference: str) -> list[Table]:
    """The tables of every task and model. Raises UserError where nothing was evaluated."""
    names = [rows.task(name).name if name.lower() in {n.lower() for n in (*rows.TASKS, *rows.ALIASES)} else name for name in tasks]
    found = [run for place in runs(base_dir) for run in _read(place, split)]
    known = sorted({str(run.summary["task"]) for run in found})
    for name in names:
        if name not in known:
            raise unknown("task (of those evaluated)", name, known)
    kept = [run for run in found if run.summary["task"] in (names or known) and run.summary["model"] in (models or [run.summary["model"]])]
    if not kept:
        raise UserError(f"{base_dir / 'tasks'}: nothing was evaluated on {split}; spilt tasks evaluate does it")
    groups: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in kept:
        groups.setdefault(run.group, []).append(run)
    return [table for group in groups.values() for table in _tables(group, reference, split)]


def _read(place: Place, split: str) -> list[Run]:
    """Everything that was evaluated of a split: the whole as it was trained, parts of it, other strengths."""
    found = []
    try:
        for name, summary in summaries(place).items():
            if summary.get("split") == split and (run := read(place, name)) is not None:
                found.append(run)
    except UserError as error:
        complain(f"warning: left out: {error}")
    return found


def _names(group: Sequence[Run]) -> list[str]:
    """The variant and what of it acts; with its run where there are several of it."""
    variants = [f"{run.summary['variant']}{acting(run.summary['multiplier'], run.summary.get('part', PARTS[0]))}" for run in group]
    return [name if variants.count(name) == 1 else f"{name} {run.summary['run']}" for name, run in zip(variants, group, strict=True)]


def _tables(group: Sequence[Run], reference: str, split: str) -> list[Table]:
    which = {"dataset": group[0].summary["task"], "model": group[0].summary["model"], "split": split}
    title, names = ", ".join(which.values()), _names(group)
    order = sorted(range(len(group)), key=lambda i: (names[i] != reference, -sum(group[i].right), names[i]))
    group, names = [group[i] for i in order], [names[i] for i in order]
    base = next((run for name, run in zip(names, group, strict=True) if name.partition(" ")[0] == reference), None)
    shown, numbers = [], []
    for name, run in zip(names, group, strict=True):
        s, found = run.summary, intervals.share(run.right)
        change = intervals.NONE if base is None or run is base else intervals.change(base.right, run.right)
        numbers.append(
            {
                "variant": name, "accuracy": found.value, "low": found.low, "high": found.high, "n": found.n, "parameters": s["parameters"],
                "share": s["share"], "no_answer": s["no_answer"], "cut_off": s["cut_off"], "difference": change.value,
                "difference_low": change.low, "difference_high": change.high,
            }
        )  # fmt: skip
        told: dict[str, Any] = {"variant": name, "accuracy": _told(found), "n": found.n, "learned": f"{s['parameters']:,}"}
        told |= {"of the model": f"{s['share']:.4%}", f"less {reference}": _told(change, "+")}
        shown.append({**told, "no answer": s["no_answer"], "cut off": s["cut_off"]})
    note = "Accuracy in percent with Wilson's 95% interval; differences are paired (Newcombe). No answer: counted as wrong. "
    note += "Cut off: answers that reached max_new_tokens."
    if base is None:
        note += f" {reference} was not evaluated on these rows, so there is no difference to it."
    for name, run in zip(names[1:], group[1:], strict=True):
        if other := manifest.differences(group[0].asked, run.asked).replace("(now", f"({name}:"):
            note += f" Not asked alike: {names[0]} with {other}."
    made = [Table("accuracy", title, note, pd.DataFrame(shown), pd.DataFrame(numbers).assign(**which))]
    return [*made, _pairs(title, names, group, which)] if len(group) > 1 else made


def _pairs(title: str, names: Sequence[str], group: Sequence[Run], which: Mapping[str, Any]) -> Table:
    found: list[dict[str, Any]] = []
    for (a, one), (b, other) in combinations(zip(names, group, strict=True), 2):
        change = intervals.change(other.right, one.right)
        numbers = {"difference": change.value, "low": change.low, "high": change.high, "p": mcnemar(one.right, other.right)}
        found.append({"one": a, "other": b, **numbers})
    values = pd.DataFrame(found)
    values["p_holm"] = holm(np.asarray(values["p"], dtype=float))
    shown = pd.DataFrame(
        {
            "one": values["one"],
            "other": values["other"],
            "difference": [_told(intervals.Estimate(r["difference"], r["low"], r["high"], 0), "+") for r in found],
            "p": [f"{p:.3g}" for p in values["p"]],
            "p (Holm)": [f"{p:.3g}" for p in values["p_holm"]],
        }
    )
    note = (
        f"One less other, in points, paired over the same {len(group[0].right)} rows; McNemar's exact test, Holm over {len(found)} pairs."
    )
    return Table("pairs", f"{title}: pairs", note, shown, values.assign(**which))


def _told(found: intervals.Estimate, sign: str = "") -> str:
    if found.value != found.value:
        return ""
    return f"{100 * found.value:{sign}.1f} [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


markdown, latex, csv, html = comparison.markdown, comparison.latex, comparison.csv, comparison.html
