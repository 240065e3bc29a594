"""Stored scores -> means with intervals. Texts to one prompt are averaged first, then prompts within a concept, then concepts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spilt.analysis.provenance import Artifact, of_one_vector
from spilt.analysis.questions import EXACT, Questions
from spilt.artifacts import manifest
from spilt.artifacts.scores import HARMONIC, TABLE, UNPARSABLE
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.errors import UserError, first_line
from spilt.verbs.base import OF_STEERING

COLUMNS = ("measure", "multiplier", "mean", "low", "high", "n", "missing", "reasons")
AS_ZERO = "{}, unparsable as 0"  # a second line of a judged measure: as the released code has it


def read(path: Path) -> pd.DataFrame:
    """The rows of one file. Raises UserError for a file that is not one of ours."""
    try:
        kinds = {"measure": str, "reason": str, "value": float, "multiplier": float, "concept": int, "item": int, "response": int}
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values={"value": [""]}, **EXACT)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as scores ({first_line(error)}); --mode evaluate makes it again") from None
    if tuple(table.columns) != TABLE:
        raise UserError(f"{path}: has columns {', '.join(map(str, table.columns))}; wanted {', '.join(TABLE)}")
    return table


def read_all(paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of several."""
    return pd.concat(map(read, paths), ignore_index=True) if paths else pd.DataFrame(columns=[*TABLE])


def collect(store: Store, cell: Cell) -> tuple[pd.DataFrame, dict[str, list[Path]]]:
    """All scores of a cell of the vector and the texts that lie there now, each rating by one judge; and why -> files that are left out.

    Of several judges, or versions of a rubric, who rated last is kept: a difference between two multipliers is none between judges.
    """
    kept, of_others = of_one_vector(store.base_dir, [path for _, path in store.scored(cell)])
    files = [Artifact(store.base_dir, path) for path in kept]
    damaged = [file for file in files if not manifest.is_as_recorded(file.path)]
    older = [file for file in files if file not in damaged and _of_other_texts(file)]
    files = [file for file in files if file not in (*damaged, *older)]
    last = _last_judges(files)
    frames, by_others = [], []
    for file in files:
        foreign = [measure for measure, who in rated_by(file.parts).items() if who != last[measure]]
        table = read(file.path)
        frames.append(table[~table["measure"].isin(foreign)])
        by_others += [file.path] if foreign else []
    why = {
        "of another vector than the one that lies there now": of_others,
        "(damaged, or changed by hand)": [file.path for file in damaged],
        "of other texts than those that lie there now": [file.path for file in older],
        "(their ratings) by another judge or rubric than the last": by_others,
    }
    found = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*TABLE])
    return found, {reason: paths for reason, paths in why.items() if paths}


def _of_other_texts(file: Artifact) -> bool:
    """Whether the texts were made anew since; what nobody can say, or of texts that are gone, is not."""
    then = file.parts.get("texts")
    if then is None:
        return False
    texts = file.texts()
    return texts.is_file() and manifest.file_hash(texts) != then


def rated_by(parts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Measure -> (the judge, the identity of what it was asked), of a file's manifest."""
    scoring = parts.get("scoring") or {}
    rubrics = {str(rubric["name"]): rubric for rubric in scoring.get("rubrics") or ()}
    asked = {**rubrics, **({HARMONIC: rubrics} if rubrics else {})}
    return {measure: (str(scoring.get("judge")), manifest.identity({"asked": what})) for measure, what in asked.items()}


def _last_judges(files: Iterable[Artifact]) -> dict[str, tuple[str, str]]:
    """Measure -> who rated last."""
    return {measure: who for file in sorted(files, key=lambda file: file.created) for measure, who in rated_by(file.parts).items()}


def several_judges(store: Store, cells: Iterable[Cell], measures: Iterable[str]) -> str:
    """A sentence for each measure that not all cells have by one judge with one rubric; '' where they have."""
    last = {cell: _last_judges(Artifact(store.base_dir, path) for _, path in store.scored(cell)) for cell in cells}
    said = ""
    for measure in measures:
        by: dict[tuple[str, str], list[str]] = {}
        for cell, judges in last.items():
            if measure in judges:
                by.setdefault(judges[measure], []).append(f"{cell.method} {cell.intervention}")
        if len(by) > 1:
            whose = "; ".join(f"{', '.join(names)} by {judge} (rubric {asked[:8]})" for (judge, asked), names in by.items())
            said += f" Scores of {measure} are not of one judge and rubric, and not to be compared: {whose}."
    return said


def same(there: float, m: float) -> bool:
    """A strength to nine digits, which is as it stands in a file's name."""
    return abs(there - m) <= 1e-9 * max(1.0, abs(m))


def made_how(store: Store, cell: Cell, m: float) -> dict[str, Any]:
    """How the scored texts at a multiplier were made, whatever steers them, and how many of them were scored; {} where nobody can say."""
    path = next((path for there, path in store.scored(cell) if same(there, m)), None)
    if path is None or not (file := Artifact(store.base_dir, path)).parts:
        return {}
    texts = Artifact(store.base_dir, file.texts())
    if not texts.parts:
        return {}
    settings = {name: value for name, value in texts.settings.items() if name not in (*OF_STEERING, "generate_orig_output")}
    found = {name: texts.parts.get(name) for name in ("limit", "engine", "model", "data")} | {"settings": settings}
    scoring = file.parts.get("scoring") or {}
    return found | {"evaluate --limit": file.parts.get("limit")} | ({"judge_limit": scoring.get("limit")} if scoring else {})


def per_item(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure: columns concept, example, multiplier, value (mean over the responses that have one, else nan)."""
    own = table[table["measure"] == measure].rename(columns={"item": "example"}).astype({"value": float})
    return own.groupby(["concept", "example", "multiplier"], as_index=False)["value"].mean()


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row per measure and multiplier: mean over items that have a value, 95% bootstrap interval over items, how many, and why others
    are missing. Measures in the order in which they come; a judged one with unparsable replies once more, these counted as 0."""
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys(table["measure"]):
        own = table[table["measure"] == name]
        rows += _of_measure(str(name), own, seed)
        if (unparsable := own["reason"] == UNPARSABLE).any():
            zero = own.assign(value=own["value"].mask(unparsable, 0.0), reason=own["reason"].mask(unparsable, ""))
            rows += _of_measure(AS_ZERO.format(name), zero.assign(measure=AS_ZERO.format(name)), seed)
    return pd.DataFrame(rows, columns=[*COLUMNS])


def _of_measure(name: str, own: pd.DataFrame, seed: int) -> list[dict[str, object]]:
    questions = Questions.of(per_item(own, name))
    means = questions.mean("value")[0]
    low, high = questions.interval(questions.mean("value", questions.resamples(seed)))
    out: list[dict[str, object]] = []
    for k, m in enumerate(questions.multipliers):
        here = own[own["multiplier"] == m]
        lost = here.loc[here["value"].isna(), "reason"].value_counts()
        reasons = "; ".join(f"{why}: {count}" for why, count in sorted(lost.items()))
        numbers: Sequence[object] = (name, m, means[k], low[k], high[k], int(here["value"].notna().sum()), int(lost.sum()), reasons)
        out.append(dict(zip(COLUMNS, numbers, strict=True)))
    return out
