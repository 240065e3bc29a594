"""Stored scores -> means with intervals. Texts to one prompt are averaged first, then prompts within a concept, then concepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spilt.analysis.provenance import of_one_vector
from spilt.analysis.questions import Questions
from spilt.artifacts.scores import TABLE, UNPARSABLE
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.errors import UserError, first_line

COLUMNS = ("measure", "multiplier", "mean", "low", "high", "n", "missing", "reasons")
AS_ZERO = "{}, unparsable as 0"  # a second line of a judged measure: as the released code has it


def read(path: Path) -> pd.DataFrame:
    """The rows of one file. Raises UserError for a file that is not one of ours."""
    try:
        kinds = {"measure": str, "reason": str, "value": float, "multiplier": float, "concept": int, "item": int, "response": int}
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values={"value": [""]}, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as scores ({first_line(error)}); --mode evaluate makes it again") from None
    if tuple(table.columns) != TABLE:
        raise UserError(f"{path}: has columns {', '.join(map(str, table.columns))}; wanted {', '.join(TABLE)}")
    return table


def read_all(paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of several."""
    return pd.concat(map(read, paths), ignore_index=True) if paths else pd.DataFrame(columns=[*TABLE])


def collect(store: Store, cell: Cell) -> tuple[pd.DataFrame, list[Path]]:
    """All scores of a cell of the vector that lies there now, and the files that are of another one."""
    kept, others = of_one_vector(store.base_dir, [path for _, path in store.scored(cell)])
    return read_all(kept), others


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
