"""Preference and utility log-odds of stored loss rows (paper sections 3-4, design/analysis.md). No model, no torch.

L_p, L_n: loss in nats of the matching and the not-matching answer of one question at one multiplier m (dimensionless).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from spilt.analysis.provenance import of_one_request, of_one_vector
from spilt.analysis.questions import DRAWS, EXACT, Array, Questions
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.losses import APPLIED, LOSS, NEUTRAL, NEUTRAL_TARGET, PREFERENCE_TYPES, SPLITS, SUMMARY, TABLE, TABLES, TARGETS
from spilt.errors import UserError, first_line

Norm = Literal["mean", "sum"]
FOLDER = re.compile(r"^.+_m(?P<multiplier>[-+0-9.e]+)_(?P<kind>" + "|".join(PREFERENCE_TYPES) + ")$")
OURS = ["example", "target", "answer_tokens", "answer_loss_sum"]
COLUMNS = ["split", "example", "multiplier", "dose", "loss_matching", "loss_not_matching", "preference", "utility"]


def preference_log_odds(loss_matching: npt.ArrayLike, loss_not_matching: npt.ArrayLike) -> Array:
    """L_n - L_p, in nats: > 0 when the model prefers the matching answer."""
    return np.asarray(np.asarray(loss_not_matching, dtype=float) - np.asarray(loss_matching, dtype=float))


def utility_log_odds(loss_matching: npt.ArrayLike, loss_not_matching: npt.ArrayLike) -> Array:
    """log[(e^-L_p + e^-L_n) / (1 - e^-L_p - e^-L_n)], in nats: how much probability the two valid answers hold together.

    With a = logaddexp(-L_p, -L_n) this is a - log(1 - e^a). nan where a >= 0 (losses per token of two likely answers can sum to
    more than 1) or a loss is not finite: such a question has no utility, and the caller counts it.
    """
    with np.errstate(invalid="ignore"):
        a = np.logaddexp(-np.asarray(loss_matching, dtype=float), -np.asarray(loss_not_matching, dtype=float))
        a = np.where(np.isfinite(a) & (a < 0), a, np.nan)
        # log(1 - e^a), a < 0: each form is exact where the other one cancels (Maechler 2012, log1mexp)
        rest = np.where(a > -np.log(2), np.log(-np.expm1(np.maximum(a, -1.0))), np.log1p(-np.exp(a)))
    return np.asarray(a - rest)


def collect(cell_folder: str | Path, split: str = "train", norm: Norm = "mean") -> pd.DataFrame:
    """Every question at every multiplier that was really applied: columns COLUMNS, sorted by multiplier and example.

    From the cell's table of losses, which was measured as text is made; where there is none, from the released files.
    `frame.attrs`: "notes" says in words what could not be used, "positions" which tokens were steered (None: the released ones).
    Empty when the split was not measured.
    """
    folder = Path(cell_folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; run --mode loss first, or check --base_dir")
    table = folder / TABLES[split]
    if table.is_file():
        usable, notes = _belong_together(folder, {name: [folder / file] for name, file in TABLES.items()}, split)
        if table in usable:
            rows = losses_table(table)
            frame = per_question(answers(rows, norm), split)
            frame.attrs |= {"notes": [*notes, *frame.attrs["notes"]], "positions": str(rows["positions"].iloc[0])}
            return frame
    else:
        notes = []
    found = sorted((float(hit["multiplier"]), hit["kind"], sub) for sub in folder.iterdir() if (hit := FOLDER.match(sub.name)))
    usable, more = _belong_together(folder, {name: [sub / file for *_, sub in found] for name, file in SPLITS.items()}, split)
    notes += more
    files = [(m, kind, sub / SPLITS[split]) for m, kind, sub in found if split in SPLITS and sub / SPLITS[split] in usable]
    parts, broken = [], []
    for m, kind, path in files:
        try:
            parts.append(_read(path, m, kind, norm))
        except UserError as error:
            broken.append(error)
    if broken and not parts:
        raise broken[0]
    notes += [f"{split}: left out: {error}" for error in broken]
    frame = per_question(pd.concat(parts, ignore_index=True), split) if parts else _empty(COLUMNS)
    frame.attrs |= {"notes": [*notes, *frame.attrs.get("notes", [])], "positions": None}
    return frame


def per_question(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Rows (example, multiplier, target, loss, dose) of both answers -> one row per question and multiplier, columns COLUMNS.

    `attrs["notes"]`: what could not be used.
    """
    notes = []
    rows = rows.assign(multiplier=rows["multiplier"].round(9) + 0.0)  # -0.0 is 0.0
    keys = ["multiplier", "example", "target"]
    same = rows.replace(np.inf, np.nan).groupby(keys)["loss"]
    spread = (same.max() - same.min()).max()
    if spread > 1e-2:  # the same request measured twice (folders m and -m) gives the same number, up to the batch's rounding
        notes.append(f"{split}: the same answer has losses up to {spread:.3g} nats apart in two folders; they come from different runs")
    wide = rows.drop_duplicates(keys, keep="last").pivot(index=keys[:2], columns="target", values="loss")
    wide = wide.reindex(columns=[*TARGETS])
    had = set(rows["multiplier"])
    # pivot leaves nan where a row is missing; a measured nan is kept as an infinite loss until here
    wide = wide.dropna().replace(np.inf, np.nan)
    gone = sorted(had - set(wide.index.get_level_values(0)))
    if gone:
        notes.append(f"{split}: only one of the two answers was scored at m = {', '.join(f'{m:g}' for m in gone)}; left out")

    frame = wide.reset_index().rename(columns={"matching": "loss_matching", "not_matching": "loss_not_matching"})
    frame.columns.name = None
    frame["split"] = split
    frame["dose"] = frame["multiplier"].map(rows.groupby("multiplier")["dose"].first()).astype(float)
    frame["preference"] = preference_log_odds(frame["loss_matching"], frame["loss_not_matching"])
    frame["utility"] = utility_log_odds(frame["loss_matching"], frame["loss_not_matching"])
    frame = frame[COLUMNS]
    counts = frame.groupby("multiplier").size()
    if counts.nunique() > 1:
        notes.append(
            f"{split}: between {counts.min()} and {counts.max()} questions per multiplier; the averages are not over the same questions"
        )
    frame.attrs["notes"] = notes
    return frame


def losses_table(path: Path) -> pd.DataFrame:
    """A cell's table of losses, every number as it was written. Raises UserError."""
    way_out = "measure this cell again with --force"
    table = read_table(path, TABLE, way_out, **EXACT)
    for name in TABLE:
        if name not in ("positions", "target", "dose"):
            _numbers(table, name, path, least=-np.inf if name == "multiplier" else 0, way_out=way_out)
    targets = (NEUTRAL_TARGET,) if path.name == TABLES[NEUTRAL] else TARGETS
    if unknown := sorted(set(table["target"].astype(str)) - {*targets}):
        raise UserError(f"{path}: target {unknown[0]!r}; wanted {' or '.join(targets)}; {way_out}")
    return table


def collect_neutral(cell_folder: Path) -> pd.DataFrame:
    """Loss per token of neutral text, nats: columns example, multiplier, loss. `attrs["notes"]`. Empty where none was measured."""
    usable, notes = _belong_together(cell_folder, {NEUTRAL: [cell_folder / TABLES[NEUTRAL]]}, NEUTRAL)
    frame = pd.DataFrame({"example": [], "multiplier": [], "loss": []}, dtype=float)
    if usable:
        frame = answers(losses_table(next(iter(usable))), "mean")[["example", "multiplier", "loss"]]
    frame.attrs["notes"] = notes
    return frame


def answers(table: pd.DataFrame, norm: Norm) -> pd.DataFrame:
    """Rows of a table of losses as per_question wants them."""
    loss = table["answer_loss_sum"].to_numpy(float)
    loss = loss / table["answer_tokens"].to_numpy(float) if norm == "mean" else loss
    return table[["example", "multiplier", "target", "dose"]].assign(loss=np.where(np.isfinite(loss), loss, np.inf))


def _empty(columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=object if name == "split" else float) for name in columns})


def _read(path: Path, folder_multiplier: float, kind: str, norm: Norm) -> pd.DataFrame:
    """One loss file as rows (example, multiplier, target, loss); a loss that is not finite becomes inf."""
    table = read_table(path, (LOSS, APPLIED), "measure this multiplier again with --force")
    # a file that the released code appended to holds the earlier run's rows first, with a header or a restart of the steps between
    again = table.index[table[LOSS].astype(str) == LOSS]
    if len(again):
        table = table.loc[again[-1] + 1 :].reset_index(drop=True)
    if {"epoch", "step"} <= set(table) and not set(OURS) <= set(table):
        order = table[["epoch", "step"]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
        restart = np.flatnonzero((np.diff(order[:, 1]) < 0) & (np.diff(order[:, 0]) <= 0))
        table = table.iloc[restart[-1] + 1 :] if len(restart) else table
    applied = _numbers(table, APPLIED, path)
    if set(OURS) <= set(table):
        loss = pd.to_numeric(table["answer_loss_sum"], errors="coerce").to_numpy(float)
        loss = loss / _numbers(table, "answer_tokens", path, least=1) if norm == "mean" else loss
        example, target = _numbers(table, "example", path, least=0).astype(int), table["target"].astype(str).to_numpy(str)
        if len(unknown := sorted(set(target) - {"matching", "not_matching"})):
            raise UserError(f"{path}: target {unknown[0]!r}; wanted matching or not_matching; measure this multiplier again with --force")
    elif norm == "sum":
        raise UserError(f"{path}: only mean losses are stored (released format); use --norm mean")
    else:
        loss = pd.to_numeric(table[LOSS], errors="coerce").to_numpy(float)
        example, target = _released_rows(applied, folder_multiplier, kind)
    loss = np.where(np.isfinite(loss), loss, np.inf)
    return pd.DataFrame({"example": example, "multiplier": applied, "target": target, "loss": loss, "dose": np.nan})


def read_table(path: Path, columns: Sequence[str], way_out: str, **how: Any) -> pd.DataFrame:
    """A CSV that has these columns. Raises UserError naming the file, what was found and the way out."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: is no plain file; {way_out}")
        table = pd.read_csv(path, low_memory=False, **how)
    except (ValueError, OSError, OverflowError, MemoryError, RecursionError) as error:  # the library's own are ValueErrors
        raise UserError(f"{path}: not a readable CSV ({first_line(error)}); {way_out}") from None
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; have: {', '.join(map(str, table.columns[:40]))}; {way_out}")
    if not len(table):
        raise UserError(f"{path}: has no rows; {way_out}")
    return table


AGAIN = "measure this multiplier again with --force"


def _numbers(table: pd.DataFrame, name: str, path: Path, least: float = -np.inf, way_out: str = AGAIN) -> Array:
    """A column as numbers. Raises UserError at the first field that is none, or below `least`."""
    values = pd.to_numeric(table[name], errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= least) & (np.abs(values) < 1e12)))
    if len(bad):
        found = str(table[name].iloc[bad[0]])[:40]
        raise UserError(f"{path}: row {bad[0]} (0-based): {name} is {found!r}; {way_out}")
    return values


def _belong_together(cell_folder: Path, tables: Mapping[str, Sequence[Path]], split: str) -> tuple[set[Path], list[str]]:
    """The files of a split that are of one vector and one request, and a sentence for each reason why others are left out."""
    tables = {name: [path for path in paths if path.is_file()] for name, paths in tables.items()}
    if not tables.get(split):
        return set(), []
    if cell_folder.parent.parent.parent.name != "get_sft_loss":  # not in a base_dir: nothing is known of vectors
        return set(tables[split]), []
    base_dir = cell_folder.parents[5]
    kept, others = of_one_vector(base_dir, [path for paths in tables.values() for path in paths])
    own, older = of_one_request(base_dir, [path for path in kept if path in tables[split]])
    why = {"another vector than the one that lies there now": [path for path in others if path in tables[split]], **older}
    return set(own), [
        f"{split}: {_at(paths)} left out: measured with {reason}; --mode loss measures it again" for reason, paths in why.items() if paths
    ]


def _at(paths: Sequence[Path]) -> str:
    """The multipliers of loss tables, for a sentence."""
    values = sorted({float(hit["multiplier"]) for path in paths if (hit := FOLDER.match(path.parent.name))})
    if not values:
        return ", ".join(sorted({path.name for path in paths}))
    return f"m = {', '.join(f'{value:g}' for value in values)}"


def _released_rows(applied: Array, folder_multiplier: float, kind: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
    """Example numbers and scored texts of a file with the released five columns: row order, and the sign of the factor.

    orig_add rows carry the folder's multiplier, orig_sub rows its opposite; at m = 0 the sign is lost and the two alternate.
    """
    add = applied * folder_multiplier > 0 if folder_multiplier else np.arange(len(applied)) % 2 == 0
    example = np.where(add, np.cumsum(add), np.cumsum(~add)) - 1
    target = np.where(add == (kind == "winning_only"), "matching", "not_matching")
    return example, target


MEANS = ("preference", "utility", "loss_matching", "loss_not_matching", "accuracy", "answer_mass", "moved_wrong", "dose")


def summarise(frame: pd.DataFrame, seed: int = 0, draws: int = DRAWS, neutral: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per split and multiplier (columns SUMMARY): means over questions with 95% bootstrap intervals over questions.

    With a column `concept`, means are taken within a concept and then over concepts, in every bootstrap draw too.
    n: questions scored; n_undefined: those without a utility (left out of its mean, and only of its mean). A loss that is not
    finite makes the preference mean of its row nan. accuracy: share of questions with preference > 0. gain_*, drop_*: intervals
    of preference(m) - preference(0) and of utility(0) - utility(m), the same questions resampled at both, so that what questions
    differ by cancels. moved_wrong: share of questions whose preference moves against the sign of m. answer_mass: mean of
    e^-L_p + e^-L_n (of losses per token, geometric means of the tokens' probabilities: it can pass 1). utility_pooled: the
    utility of the mean losses. neutral_loss: mean loss per token of neutral texts (`neutral`: example, multiplier, loss).
    """
    parts = [_summarise_split(split, part, seed, draws) for split, part in frame.groupby("split", sort=False)]
    if not parts:
        return _empty(SUMMARY)
    out = pd.concat(parts, ignore_index=True)
    out["utility_pooled"] = utility_log_odds(out["loss_matching"], out["loss_not_matching"])
    if neutral is not None and len(neutral):
        out["neutral_loss"] = out["multiplier"].map(neutral.groupby(neutral["multiplier"].round(9) + 0.0)["loss"].mean())
    return out.reindex(columns=[*SUMMARY])


def _summarise_split(split: object, frame: pd.DataFrame, seed: int, draws: int) -> pd.DataFrame:
    frame = frame.assign(answer_mass=np.exp(-frame["loss_matching"]) + np.exp(-frame["loss_not_matching"]))
    questions = Questions.of(frame)
    m, zero, preference = questions.multipliers, questions.zero, questions.values["preference"]
    if zero >= 0:
        against = np.sign(m) * (preference - preference[:, [zero]]) < 0
        questions.values["moved_wrong"] = np.where(np.isfinite(preference - preference[:, [zero]]), against, np.nan)
    weights = questions.resamples(seed, draws)
    out = pd.DataFrame({"split": split, "multiplier": m})
    for name in (name for name in MEANS if name in questions.values):
        out[name] = questions.mean(name)[0]
        if name not in ("preference", "utility"):
            continue
        drawn = questions.mean(name, weights)
        out[f"{name}_low"], out[f"{name}_high"] = questions.interval(drawn)
        label, sign = ("gain", 1.0) if name == "preference" else ("drop", -1.0)
        base = drawn[:, [zero]] if zero >= 0 else np.full((draws, 1), np.nan)
        out[f"{label}_low"], out[f"{label}_high"] = questions.interval(sign * (drawn - base))
    return out.assign(n=questions.asked.astype(int), n_undefined=questions.undefined.astype(int))


def write_summary(path: str | Path, summary: pd.DataFrame) -> None:
    """preference_utility.csv, atomically. Empty fields are undefined values."""
    atomic_write(Path(path), summary.to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def read_summary(path: str | Path) -> pd.DataFrame:
    """A stored preference_utility.csv, ours or another tool's with at least split, multiplier, preference and utility."""
    table = read_table(Path(path), [*SUMMARY[1:3], "utility"], "run --mode loss again")
    for name in SUMMARY[1:]:  # an empty field is an undefined value
        if name in table and not pd.api.types.is_numeric_dtype(column := table[name]):
            first = str(column[pd.to_numeric(column, errors="coerce").isna() & column.notna()].iloc[0])[:40]
            raise UserError(f"{path}: column {name!r} has {first!r} where a number was wanted; run --mode loss again")
    if table["multiplier"].isna().any() or not np.isfinite(table["multiplier"]).all():
        raise UserError(f"{path}: a multiplier is missing or not finite; run --mode loss again")
    if "split" in table:
        table["split"] = table["split"].astype(str)
    else:
        table.insert(0, "split", "train")
    return table.reindex(columns=SUMMARY).sort_values(["split", "multiplier"], ascending=[False, True]).reset_index(drop=True)
