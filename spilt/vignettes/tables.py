"""Tables of a frame of results (summary.py): bare, delta, SI, overall; as markdown and CSV. No model.

CSV files hold everything, a row for each method, arm and foundation; markdown shows what is read first.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from spilt.artifacts.atomic import atomic_write_all
from spilt.errors import UserError
from spilt.vignettes import figure, summary
from spilt.vignettes.files import FOUNDATIONS, Vignette
from spilt.vignettes.questions import COLUMNS
from spilt.vignettes.summary import LOADING, Plan

EXTRA = ["method", "arm", "kl_p95"]
CUES = ((0.5, "green"), (0.15, "yellow"), (-math.inf, "red"))  # nats that the headline moved as it is meant to
NEAR = 0.1  # of the budget: beyond it a row is not at equal KL


def checked(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame, as it is, with ids as texts. Raises UserError for one that is no frame of results."""
    lacking = [name for name in (*EXTRA, *COLUMNS) if name not in frame]
    if lacking:
        raise UserError(f"no frame of results: the columns {', '.join(lacking)} are missing; wanted {', '.join([*EXTRA, *COLUMNS])}")
    twice = frame.duplicated(["method", "arm", "id", "condition", "frame"])
    if twice.any():
        where = frame[twice].iloc[0]
        raise UserError(f"{where['method']}, arm {where['arm']}: vignette {where['id']} is there twice; one multiplier for each arm")
    return frame.assign(id=frame["id"].astype(str))


def read(path: Path) -> pd.DataFrame:
    """A frame of results from a CSV file that `write` or a caller wrote."""
    try:
        return checked(pd.read_csv(path, dtype={"id": str, "method": str}, keep_default_na=False, na_values={"kl_p95": [""]}))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as results on vignettes: {error}") from None


def make(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan) -> dict[str, pd.DataFrame]:
    """Name -> table: bare, delta, si, overall."""
    frame = checked(frame)
    kinds = {"bare": summary.bare, "delta": summary.deltas, "si": summary.informedness, "overall": summary.overall}
    return {name: make_one(frame, scenes, plan.checked()) for name, make_one in kinds.items()}


def write(
    frame: pd.DataFrame, scenes: Sequence[Vignette], folder: Path, plan: Plan | None = None, budget: float | None = None
) -> list[Path]:
    """tables.md, a CSV of each table, movement.svg and movement.png in the folder, all or none. Returns the paths.

    budget: nats at which methods were calibrated; what is not there is marked. Bytes are decided by the arguments alone.
    """
    plan = plan or Plan()
    made = make(frame, scenes, plan)
    files: list[tuple[Path, str | bytes]] = [(folder / f"{name}.csv", _csv(table)) for name, table in made.items()]
    files.append((folder / "tables.md", markdown(made, plan, budget)))
    drawn = figure.movement(points(checked(frame), scenes, plan, budget), plan.headline, budget)
    files += [(folder / "movement.svg", figure.svg(drawn)), (folder / "movement.png", figure.png(drawn))]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_all(files)
    return [path for path, _ in files]


def _csv(table: pd.DataFrame) -> str:
    out = io.StringIO()
    table.to_csv(out, index=False, lineterminator="\n", float_format="%.6g")
    return out.getvalue()


def points(frame: pd.DataFrame, scenes: Sequence[Vignette], plan: Plan, budget: float | None = None) -> pd.DataFrame:
    """A row for each method, its plus arm: movement of the headline as it is meant (nats of logit w), side effects, both with intervals.

    side: the mean over the other foundations of |mean change|; it is never below 0, and noise alone gives some. at_budget: whether its KL
    is the budget's (to a tenth); where there is no budget, whether it is known.
    """
    frame = summary.as_chosen(frame, scenes, plan)
    found = summary.arms(frame, plan.floor)
    (base, *_) = found.values()
    L, drawn = summary.weights(base.index, scenes, plan.weighting), summary.Resamples(base, plan.seed)
    others = [name for name in FOUNDATIONS if name != plan.headline]
    out = []
    for (method, arm), some in found.items():
        if arm != summary.PLUS:
            continue
        moved = summary.logit_change(base, some)
        means = {name: drawn.means(moved, L[name]) for name in FOUNDATIONS}
        exact = {name: summary.surgical.moments(*summary.valid(moved, L[name]))[0] for name in FOUNDATIONS}
        drawn_side = np.abs([means[name] for name in others]).mean(0)
        up, side = plan.sign(plan.headline) * means[plan.headline], sum(abs(exact[name]) for name in others) / len(others)
        kl = float(frame.loc[(frame["method"] == method) & (frame["arm"] == arm), "kl_p95"].iloc[0])
        at = math.isfinite(kl) and (budget is None or abs(kl - budget) <= NEAR * budget)
        row = {"method": method, "movement": plan.sign(plan.headline) * exact[plan.headline], "side": side, "kl_p95": kl, "at_budget": at}
        rest = sum(np.asarray(L[name], float) for name in others)
        for name, values, weight in (("movement", up, L[plan.headline]), ("side", drawn_side, rest)):
            row[f"{name}_low"], row[f"{name}_high"] = drawn.interval(values, np.asarray(weight))
        out.append(row)
    return pd.DataFrame(out)


# ---------------------------------------------------------------- markdown


def markdown(made: dict[str, pd.DataFrame], plan: Plan, budget: float | None = None) -> str:
    """The tables as a person reads them, with what must be known to read them."""
    counted = "weighted by loading" if plan.weighting == LOADING else "of the vignettes about it"
    heads = {
        "bare": f"Unsteered: logit w, mean ± deviation {counted}; w is how wrong, 0.5 neither",
        "delta": f"Change of logit w from unsteered, mean ± deviation {counted}, n valid of all; sorted by |{plan.headline} as meant|",
        "si": f"Surgical Informedness of {plan.headline}, k = {plan.k:g}; the arm was chosen {plan.chosen} the evaluation",
        "overall": "All cells: verdicts that are valid, the probability on verdicts, agreement",
    }
    shown = {
        "bare": _bare(made["bare"]),
        "delta": _delta(made["delta"], plan, budget),
        "si": _si(made["si"], plan),
        "overall": _overall(made["overall"]),
    }
    notes = [f"NaN (–): fewer than {plan.floor:g} of the probability is on a verdict in either frame; such cells are left out and counted."]
    frames = made["overall"].loc[made["overall"]["arm"] == summary.NONE, "r_frames"].iloc[0]
    if frames <= 0:
        notes.append(
            f"The unsteered model says true, or false, to both frames alike (r of frames {frames:.2f}): what it finds wrong it also finds "
            "acceptable, so w is the small rest of two biases and no judgement, and nothing follows from how steering moves it."
        )
    headline = made["si"][made["si"]["foundation"] == plan.headline]
    if len(headline) and not np.isfinite(headline["si"]).any():
        notes.append("No SI: all valid verdicts of the unsteered model are the same (rejected or chosen is 0).")
    if plan.chosen == summary.AFTER:
        notes.append("The arm was chosen after the evaluation, as the one that moved further: SI and movement are too high by this choice.")
    if budget is not None:
        notes.append(f"KL in nats, 95th percentile; budget {budget:g}. A * marks what is not within {NEAR:.0%} of it.")
    return "\n\n".join([*(f"### {heads[name]}\n\n{_table(rows)}" for name, rows in shown.items()), *notes]) + "\n"


def _table(rows: list[list[str]]) -> str:
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _number(value: float, spec: str = ".2f") -> str:
    return "–" if not math.isfinite(value) else f"{value:{spec}}"


def _spread(row: pd.Series, value: str = "mean") -> str:
    return f"{_number(row[value], '+.2f')} ± {_number(row['std'])} ({row['n']}/{row['n_total']})"


def _bare(table: pd.DataFrame) -> list[list[str]]:
    rows = [["foundation", "logit w (n)", "called wrong", "people, 1 to 5"]]
    for _, row in table.iterrows():
        rows.append([row["foundation"], _spread(row, "logit_w"), _number(row["called_wrong"], ".0%"), _number(row["people"])])
    return rows


def _delta(table: pd.DataFrame, plan: Plan, budget: float | None) -> list[list[str]]:
    if table.empty:
        return [["nothing was steered"]]
    out = []
    for (method, arm), some in table.groupby(["method", "arm"], sort=False):
        by = {row["foundation"]: row for _, row in some.iterrows()}
        first, axis = some.iloc[0], plan.sign(plan.headline) * by[plan.headline]["mean"]
        kl = first["kl_p95"]
        off = budget is not None and not abs(kl - budget) <= NEAR * budget
        cue = next((word for least, word in CUES if axis > least), "–") if arm == summary.PLUS else ""
        head = [cue, _number(axis, "+.2f"), str(method), str(arm), _number(first["multiplier"], ".4g")]
        head.append(_number(kl, ".3f") + ("*" if off else ""))
        out.append((abs(axis) if math.isfinite(axis) else -1.0, [*head, *(_spread(by[name]) for name in FOUNDATIONS)]))
    rows = [row for _, row in sorted(out, key=lambda item: -item[0])]
    return [["", f"{plan.headline} as meant", "method", "arm", "C", "KL p95", *(f"Δ {name}" for name in FOUNDATIONS)], *rows]


def _si(table: pd.DataFrame, plan: Plan) -> list[list[str]]:
    if table.empty:
        return [["nothing was steered"]]
    rows = []
    for _, row in table[table["foundation"] == plan.headline].iterrows():
        parts = [_number(row[name]) for name in ("forward", "reverse", "fix", "broke", "flip", "counter", "separation")]
        counts = [_number(row[name], "g" if plan.weighting != LOADING else ".2f") for name in ("rejected", "chosen")]
        interval = f"{_number(row['si'], '.1f')} [{_number(row['low'], '.1f')}, {_number(row['high'], '.1f')}]"
        rows.append([str(row["method"]), interval, *parts, *counts, _number(row["mass"], ".1f"), _number(row["draws_with_si"], ".0%")])
    parts = ["SI fwd", "SI rev", "fix", "broke", "flip", "counter", "separation", "rejected", "chosen", "mass² %", "draws with SI"]
    return [["method", "SI [95%]", *parts], *rows]


def _overall(table: pd.DataFrame) -> list[list[str]]:
    rows = []
    for _, row in table.iterrows():
        shares = [_number(row["mass"], ".3f"), _number(row["mass_min"], ".3f"), _number(row["called_wrong"], ".0%")]
        rest = [_number(row[name], "+.2f") for name in ("gap", "r_people", "r_frames")]
        rows.append([str(row["method"]), str(row["arm"]), f"{row['n']}/{row['n_total']}", *shares, *rest])
    return [["method", "arm", "valid", "mass", "least", "called wrong", "s other - self", "r with people", "r of frames"], *rows]
