"""The stored multipliers of equal KL (kl.csv beside a cell's losses), of cells that were all calibrated alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from spilt.analysis.provenance import Artifact, of_one_vector
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.errors import UserError
from spilt.report.cells import Measured

COLUMNS = ("side", "multiplier", "status", "tokens", "kl_mean", "kl_p95", "kl_max", "budget")


def read(cells: Iterable[Measured]) -> tuple[dict[str, pd.DataFrame], str]:
    """Cell -> its multipliers, and a sentence on those that are left out: of another budget or other prompts than those found last."""
    found = {cell.name: table for cell in cells if (table := _of(cell)) is not None}
    if not found:
        return {}, ""
    how = _how(*max(found.values(), key=lambda one: one[0].created))
    kept = {name: table for name, (made, table) in found.items() if _how(made, table) == how}
    others = [f"{name} ({manifest.differences(_how(*one), how)})" for name, one in found.items() if name not in kept]
    return kept, f" Not found alike, and left out: {', '.join(others)}; --kl finds them again." if others else ""


def _of(cell: Measured) -> tuple[Artifact, pd.DataFrame] | None:
    """Of the vector that lies there now."""
    path = cell.place.folder / Store.KL
    if not path.is_file() or path not in of_one_vector(cell.place.base, [path])[0]:
        return None
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); spilt table --kl makes it again") from None
    if tuple(table.columns) != COLUMNS:
        raise UserError(f"{path}: has columns {', '.join(table.columns)}; spilt table --kl makes it again")
    return Artifact(cell.place.base, path), table


def _how(made: Artifact, table: pd.DataFrame) -> dict[str, object]:
    """How it was found: budget, prompts, length of the answers, and of which model on which rows."""
    kl = made.parts.get("kl")
    own = dict(kl) if isinstance(kl, Mapping) else {"budget": float(table["budget"].iloc[0])}
    return own | {name: made.parts[name] for name in ("model", "data") if name in made.parts}


def at(cell: Measured, table: pd.DataFrame | None) -> float | None:
    """The multiplier on the side of the recommended one, where the budget was met within what was measured."""
    side = "negative" if (cell.best["solved"] or 0) < 0 else "positive"
    for row in () if table is None else table[table["side"] == side].to_dict("records"):
        m = np.sort(cell.frame["multiplier"].unique())
        if row["status"] == "converged" and m[0] <= row["multiplier"] <= m[-1]:
            return float(row["multiplier"])
    return None
