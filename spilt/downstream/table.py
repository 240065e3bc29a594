"""What was evaluated, side by side: accuracy with Wilson's interval, what was learned, and paired differences on the same rows.

Differences have Newcombe's interval for paired shares, p is McNemar's exact test on the rows where two runs differ, with Holm's correction
over all pairs of a task and model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from spilt import __version__
from spilt.analysis import intervals
from spilt.analysis.claims import holm
from spilt.artifacts import manifest
from spilt.downstream import rows
from spilt.downstream.places import Place, runs, summaries
from spilt.downstream.rows import SPLITS
from spilt.downstream.words import PARTS, acting
from spilt.downstream.work import learned_at
from spilt.errors import UserError, unknown
from spilt.report import comparison
from spilt.report.comparison import Table
from spilt.terminal import complain

BASE = "base"
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
    said = summaries(place).get(name)
    if said is None:
        return None
    path = place.results(name)
    record = manifest.read(path)
    if record is None or not manifest.matches(path, record):
        raise UserError(f"{path}: is not what its manifest speaks of; spilt tasks evaluate --force makes it again")
    parts, summary = record["parts"], record["notes"]
    if other := manifest.differences(said, summary):
        raise UserError(f"{place.summary}: {name} is not what was evaluated: {other}; spilt tasks evaluate with the same words mends it")
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
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    names = [rows.task(name).name if name.lower() in {n.lower() for n in (*rows.TASKS, *rows.ALIASES)} else name for name in tasks]
    found = [run for place in runs(base_dir) for run in _read(place, split)]
    known = sorted({str(run.summary["task"]) for run in found})
    for name in names:
        if name not in known:
            raise unknown("task (of those evaluated)", name, known)
    have = sorted({str(run.summary["model"]) for run in found})
    for name in models:
        if found and name not in have:
            raise unknown("model (of those evaluated)", name, have)
    kept = [run for run in found if run.summary["task"] in (names or known) and run.summary["model"] in (models or [run.summary["model"]])]
    if not kept:
        raise UserError(f"{base_dir / 'tasks'}: nothing was evaluated on {split}; spilt tasks evaluate does it")
    groups: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in kept:
        groups.setdefault(run.group, []).append(run)
    variants = {name for group in groups.values() for name in _bare(group)}
    if reference not in {*variants, BASE}:
        raise unknown("reference (of the variants evaluated)", reference, variants)
    alike = Counter(key[:2] for key in groups)
    return [table for key, group in groups.items() for table in _tables(group, reference, split, _apart(key) if alike[key[:2]] > 1 else "")]


def _apart(group: tuple[str, str, str, str]) -> str:
    """What tells a group from another one of the same task and model: its rows, its checkpoint."""
    return f", rows {group[2][:8]}, checkpoint {str(group[3])[:8]}"


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


def _bare(group: Sequence[Run]) -> list[str]:
    """The variant and what of it acts."""
    return [f"{run.summary['variant']}{acting(run.summary['multiplier'], run.summary.get('part', PARTS[0]))}" for run in group]


def _names(group: Sequence[Run]) -> list[str]:
    """The variant and what of it acts; with its run where there are several of it."""
    variants = _bare(group)
    return [name if variants.count(name) == 1 else f"{name} {run.summary['run']}" for name, run in zip(variants, group, strict=True)]


def _tables(group: Sequence[Run], reference: str, split: str, apart: str) -> list[Table]:
    which = {"dataset": group[0].summary["task"], "model": group[0].summary["model"], "split": split}
    title, names = ", ".join(which.values()) + apart, _names(group)
    order = sorted(range(len(group)), key=lambda i: (names[i] != reference, -sum(group[i].right), names[i]))
    group, names = [group[i] for i in order], [names[i] for i in order]
    than, base = next((pair for pair in zip(names, group, strict=True) if pair[0].partition(" ")[0] == reference), ("", None))
    shown, numbers = [], []
    for name, run in zip(names, group, strict=True):
        s, found = run.summary, intervals.share(run.right)
        change = intervals.NONE if base is None or run is base else intervals.change(base.right, run.right)
        numbers.append(
            {
                "variant": name, "accuracy": found.value, "low": found.low, "high": found.high, "n": found.n, "parameters": s["parameters"],
                "share": s["share"], "no_answer": s["no_answer"], "cut_off": s["cut_off"], "prompts_truncated": s["prompts_truncated"],
                "prompts_left_out": s["prompts_left_out"], "seen_in_train": s["seen_in_train"], "reference": than,
                "difference": change.value, "difference_low": change.low, "difference_high": change.high,
            }
        )  # fmt: skip
        told: dict[str, Any] = {"variant": name, "accuracy": _told(found), "n": found.n, "learned": f"{s['parameters']:,}"}
        told |= {"of the model": f"{s['share']:.4%}", f"less {reference}": _told(change, "+")}
        shown.append({**told, "no answer": s["no_answer"], "cut off": s["cut_off"]})
    note = "Accuracy in percent with Wilson's 95% interval; differences are paired (Newcombe). No answer: counted as wrong. "
    note += "Cut off: answers that reached max_new_tokens."
    note += "".join(f" {sentence}" for sentence in _of_the_rows(names, group))
    if base is None:
        note += f" {reference} was not evaluated on these rows, so there is no difference to it."
    elif than != reference:
        note += f" Of several runs of {reference} the best, {than}, is what the others are compared to."
    for name, run in zip(names[1:], group[1:], strict=True):
        if other := manifest.differences(group[0].asked, run.asked).replace("(now", f"({name}:"):
            note += f" Not asked alike: {names[0]} with {other}."
    made = [Table("accuracy", title, note, pd.DataFrame(shown), pd.DataFrame(numbers).assign(**which))]
    return [*made, _pairs(title, names, group, which)] if len(group) > 1 else made


def _of_the_rows(names: Sequence[str], group: Sequence[Run]) -> list[str]:
    """What the rows are, as far as an accuracy is not what it seems without it."""
    said, first = [], group[0].summary
    if (share := first.get("commonest")) is not None:
        said.append("Every label is the same." if share == 1 else f"The commonest label is that of {share:.1%} of the rows.")
    if number := first["rows_without_answer"]:
        said.append(f"{number} rows without an answer were left out.")
    said += [f"Here {part}."] if (part := first.get("part_of_file")) else []
    for name, run in zip(names, group, strict=True):
        if number := run.summary["seen_in_train"]:
            said.append(f"{name}: {number} of these prompts are also training prompts.")
        if number := run.summary["prompts_left_out"]:
            said.append(f"{name}: {number} prompts were too long and left out, which counts as wrong.")
        if number := run.summary["prompts_truncated"]:
            said.append(f"{name}: {number} prompts lost their beginning.")
    if any(run.summary["seen_in_train"] is None for run in group):
        said.append("Whether training prompts are among these rows was not counted for all: the training rows were not at hand.")
    return said


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


def html(made: Sequence[Table]) -> str:
    """A page of its own that needs nothing else: of each task and model a picture, the accuracies, and the pairs."""
    from spilt.downstream import picture  # brings matplotlib
    from spilt.report import page

    groups = list[dict[str, Any]]()
    for table in made:
        values = table.values.to_dict("records")
        if table.name == "accuracy":
            drawn = [picture.accuracy(table.values, narrow) for narrow in (False, True)]
            groups.append({"title": table.title, "note": table.note, "rows": values, "picture": page.picture(*drawn), "pairs": None})
        else:
            groups[-1]["pairs"] = {"rows": values, "note": table.note}
    return page.render("tasks.html", groups=groups, shown=picture.MOST, version=__version__)


def _told(found: intervals.Estimate, sign: str = "") -> str:
    if found.value != found.value:
        return ""
    return f"{100 * found.value:{sign}.1f} [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


markdown, latex, csv = comparison.markdown, comparison.latex, comparison.csv
