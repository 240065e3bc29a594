"""Measured cells: rebuild preference_utility.csv and fit.json of one, read its control and its texts. No model."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from spilt.analysis import odds, scores
from spilt.analysis.chance import Curves, beyond_chance
from spilt.analysis.chance import curves as random_curves
from spilt.analysis.curves import CurveFit, checked, fit_curve, r_squared, regions, utility_drops, utility_peak
from spilt.analysis.curves.fitting import Kind
from spilt.analysis.provenance import made_otherwise, of_one_vector, stored_texts
from spilt.analysis.recommend import BUDGET, recommendation, split_of
from spilt.artifacts import losses
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.manifest import digest, identity
from spilt.artifacts.store import Store
from spilt.cell import FORMS, PROMPT
from spilt.errors import UserError
from spilt.report.places import Place, label

log = logging.getLogger("spilt")
VERSION = 4  # of fit.json; a change makes `update` fit again
FIT_FILE, CURVES_FILE, CONTROL_FILE, CONTROL_TEXTS = "fit.json", "curves.png", "control.csv", "control_texts.csv"
STEPS = 10  # of a sweep, from 0 to the end of the trained range (verbs.measure.sweep_multipliers)
RANGES = ("trained", "sweep")
KINDS: tuple[Kind, ...] = ("preference", "utility")


@dataclass(frozen=True)
class Measured:
    """One cell's stored results: `frame` has a row per question and multiplier (the summary itself where only that is stored),
    `summary` is as in preference_utility.csv, `fit` as in fit.json, `control` as in control.csv."""

    place: Place
    frame: pd.DataFrame
    summary: pd.DataFrame
    fit: dict[str, Any]
    control: pd.DataFrame | None = None

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def label(self) -> str:
        return label(self.place.method, self.place.intervention)

    @property
    def names(self) -> dict[str, Any]:
        """The first columns of its rows in tables."""
        return {"method": self.place.method, "intervention": self.place.intervention}

    @property
    def best(self) -> dict[str, Any]:
        return dict(self.fit["recommendation"])

    def split_for(self, wanted: str) -> str:
        """The wanted split, or the one that was measured."""
        have = list(self.fit["splits"])
        return wanted if wanted in have else have[0]

    def stored(self, split: str) -> dict[str, Any]:
        """What fit.json holds of one split."""
        return dict(self.fit["splits"][self.split_for(split)])

    def rows(self, split: str) -> pd.DataFrame:
        return self._rows[self.split_for(split)]

    @cached_property
    def _rows(self) -> dict[str, pd.DataFrame]:
        """By split; those of fit.json."""
        return {split: self.summary[self.summary["split"] == split] for split in self.fit["splits"]}

    def curve(self, split: str, kind: str) -> CurveFit:
        """Over the whole sweep."""
        return CurveFit.from_dict(self.stored(split)[kind])

    def fitted(self, extent: str, kind: str) -> tuple[CurveFit, float | None]:
        """Over one of RANGES on the questions that choices are made on, and R^2 of it on the test points."""
        found = self.fit["fits"][extent][kind]
        return CurveFit.from_dict(found["fit"]), found["r2_test"]

    @property
    def random_curves(self) -> Curves | None:
        return random_curves(self.frame, self.control)

    def random(self, split: str) -> pd.DataFrame | None:
        """The control's rows of one split (all, where it has none of it)."""
        if self.control is None:
            return None
        table = self.control[self.control["split"] == split]
        return table if len(table) else self.control


def frame_of(place: Place, norm: odds.Norm = "mean", seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """(frame, summary, notes on what could not be used). Without loss rows, the stored preference_utility.csv is both."""
    frames, notes = [], []
    folders: list[tuple[int | None, Path]] = [*place.concepts.items()] or [(None, place.folder)]
    for concept, folder in folders:
        for split in losses.SPLITS:
            frame = odds.collect(folder, split, norm)
            where = "" if concept is None else f"concept {concept}, "
            notes += [where + note for note in frame.attrs["notes"]]
            if len(frame):
                frames.append(frame if concept is None else frame.assign(concept=concept))
    if frames:
        every = pd.concat(frames, ignore_index=True)
        neutral = [odds.collect_neutral(folder) for _, folder in folders]
        notes += [note for texts in neutral for note in texts.attrs["notes"]]
        there = [texts for texts in neutral if len(texts)]
        return every, odds.summarise(every, seed, neutral=pd.concat(there) if there else None), notes
    stored = place.folder / losses.SUMMARY_FILE
    if notes or not stored.is_file():  # a summary of rows that were left out is as old as they are
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{place.folder}: no losses of both answers at any multiplier{why}; run --mode loss again")
    summary = odds.read_summary(stored)
    return summary, summary, ["no loss rows are stored: preference_utility.csv is used as it is"]


def judged(place: Place, norm: odds.Norm, budget: float, seed: int) -> Measured:
    """A place with its recommendation, nothing fitted, nothing written."""
    frame, summary, notes = frame_of(place, norm, seed)
    control, of_others = read_control(place)
    texts, unread = _control_texts(place)
    chance = beyond_chance(random_curves(frame, control), texts, budget)
    best = recommendation(frame, budget, seed, chance)
    return Measured(place, frame, summary, plain({"recommendation": best, "notes": notes + of_others + unread}), control)


def analyse(place: Place, norm: odds.Norm = "mean", budget: float = BUDGET, seed: int = 0) -> Measured:
    """Summarise, judge and fit one place; writes preference_utility.csv and fit.json. Nothing is fitted again when nothing changed."""
    cell = judged(place, norm, budget, seed)
    summary, fit = cell.summary, _stored(place.folder / FIT_FILE)
    source = digest(f"{VERSION} {norm} {seed} {budget} {cell.fit} {summary.to_csv(float_format='%.10g')}".encode())
    if fit.get("source") != source:
        names = {name: getattr(place, name) for name in ("model", "dataset", "method", "intervention")}
        fit = {
            "version": VERSION,
            "source": source,
            "cell": {**names, "concepts": list(place.concepts) or None},
            "norm": norm,
            "seed": seed,
            "units": "log-odds in nats, multipliers dimensionless, slope in nats per unit of multiplier",
            "about_parameters": "alpha, beta, b, m, L and p trade off against each other: read the curve, not one parameter",
            "splits": {split: _fits(rows, budget, seed) for split, rows in summary.groupby("split", sort=False)},
            **cell.fit,
        }
        fit = plain(fit | {"fits": _both_ranges(place, summary, fit["splits"], seed)})
        odds.write_summary(place.folder / losses.SUMMARY_FILE, summary)
        # the picture of the old fit goes first: a run killed between the two files draws it again
        (place.folder / CURVES_FILE).unlink(missing_ok=True)
        atomic_write(place.folder / FIT_FILE, json.dumps({**fit, "check": identity(fit)}, indent=1, allow_nan=False) + "\n")
    return dataclasses.replace(cell, fit=fit)


def trained_range(form: str, multipliers: Sequence[float]) -> float:
    """The largest |m| of the training: of a sweep 10 of its steps (a wider one has more of them), else of the released factors."""
    m = sorted(multipliers)
    step = sorted(b - a for a, b in zip(m, m[1:], strict=False))[(len(m) - 1) // 2] if len(m) > 2 * STEPS else 0.0
    top = STEPS * step or max(map(abs, FORMS[form].factors if form in FORMS else m))
    return min(top, max(map(abs, m)))


def _fit(rows: pd.DataFrame, kind: Kind, seed: int) -> CurveFit:
    m, y, low, high = (rows[name].to_numpy(float) for name in ("multiplier", kind, f"{kind}_low", f"{kind}_high"))
    return checked(fit_curve(m, y, kind, seed), m, y, low, high)


def _both_ranges(place: Place, summary: pd.DataFrame, stored: dict[str, Any], seed: int) -> dict[str, Any]:
    """RANGES -> curve -> {fit, r2_test}: the fit of the questions that choices are made on, scored on the test questions' points."""
    split = split_of(summary)
    rows, test = summary[summary["split"] == split], summary[summary["split"] == "test"] if split != "test" else summary[:0]
    top = trained_range(place.form, list(rows["multiplier"])) * (1 + 1e-9)
    out: dict[str, Any] = {}
    for extent, end in zip(RANGES, (top, math.inf), strict=True):
        some, other = (table[table["multiplier"].abs() <= end] for table in (rows, test))
        fits = {k: _fit(some, k, seed) if len(some) < len(rows) else CurveFit.from_dict(stored[str(split)][k]) for k in KINDS}
        out[extent] = {kind: {"fit": fit.as_dict(), "r2_test": _on_test(fit, other)} for kind, fit in fits.items()}
    return out


def _on_test(fit: CurveFit, rows: pd.DataFrame) -> float | None:
    rows = rows[rows[fit.kind].notna()]
    return None if fit.parameters is None or rows.empty else r_squared(rows[fit.kind], fit(rows["multiplier"]))


def _fits(rows: pd.DataFrame, budget: float, seed: int) -> dict[str, Any]:
    m, preference, utility = (rows[name].to_numpy(float) for name in ("multiplier", "preference", "utility"))
    fits = {kind: _fit(rows, kind, seed) for kind in KINDS}
    undefined = rows[rows["n_undefined"] > 0]
    worst = undefined.sort_values("n_undefined").iloc[-1] if len(undefined) else None
    return {
        "n_questions": [int(v) for v in (rows["n"].min(), rows["n"].max()) if math.isfinite(v)],
        "undefined": {
            "total": int(rows["n_undefined"].sum()),
            "scored": int(rows["n"].sum()),
            "worst": None if worst is None else {name: float(worst[name]) for name in ("multiplier", "n_undefined", "n")},
        },
        **{kind: fit.as_dict() for kind, fit in fits.items()},
        "regions": regions(fits["preference"], m, preference),
        "utility_peak": utility_peak(fits["utility"], m, utility),
        "utility_drops": utility_drops(fits["utility"], m, utility, budget),
    }


def _stored(path: Path) -> dict[str, Any]:
    """A stored fit.json; {} where there is none, or none of this version that is as it was written: it is made again."""
    if not path.is_file():
        return {}
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(fit, dict) and fit.pop("check", None) == identity(fit)  # one digit that changed is found
    except (OSError, ValueError, RecursionError):
        good = False
    if not good:
        log.warning("%s: is damaged, or of an older version; made again from the stored losses", path)
    return fit if good else {}


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """The same nested value as strict JSON holds it: nan and infinity become None, tuples lists."""
    return dict(json.loads(json.dumps(value), parse_constant=lambda name: None))


def _table(place: Place, name: str, keys: Sequence[str], columns: Sequence[str]) -> tuple[pd.DataFrame | None, list[str]]:
    """A control's file, of several concepts their mean, and a sentence for each that is broken or of another vector: left out.

    keys: what a row is of, `multiplier` last.
    """
    parts, notes, way_out = [], [], "--mode loss --multipliers sweep makes it again"
    for path in (folder / name for folder in place.folders):
        if not path.is_file():
            continue
        try:
            if of_one_vector(place.base, [path])[1]:
                raise UserError(f"{path.relative_to(place.base)} is of another vector; --mode loss makes it again")
            part = odds.read_table(path, [*keys, *columns], way_out)
            for column in part.columns.drop("split", errors="ignore"):
                if not pd.api.types.is_numeric_dtype(part[column]):
                    raise UserError(f"{path}: column {column!r} holds more than numbers; {way_out}")
            # concepts have their own units of m: means over them are of the same place in the order
            parts.append(part.assign(at=part.groupby([*keys][:-1])["multiplier"].rank()))
        except UserError as error:
            notes.append(f"control left out: {error}")
    if not parts:
        return None, notes
    return pd.concat(parts, ignore_index=True).groupby([*keys[:-1], "at"]).mean().reset_index().drop(columns="at"), notes


def read_control(place: Place) -> tuple[pd.DataFrame | None, list[str]]:
    """Random interventions of the same form and size: split, draw, multiplier, means; notes on what is left out."""
    return _table(place, CONTROL_FILE, ["split", "draw", "multiplier"], KINDS)


def _control_texts(place: Place) -> tuple[pd.DataFrame | None, list[str]]:
    """Share of generated answers that show the behaviour: draw (-1: the stored intervention), multiplier, score."""
    return _table(place, CONTROL_TEXTS, ["draw", "multiplier"], ["score"])


@dataclass(frozen=True)
class Sample:
    """One prompt and the texts generated for it, by multiplier; `reference` is the dataset's own answer or None."""

    prompt: str
    texts: dict[float, str]
    reference: str | None = None


def samples(place: Place, limit: int = 3) -> list[Sample]:
    """The first prompts of a place (of the first concepts for axbench) with every stored multiplier's text; [] when none was generated."""
    found: dict[tuple[int, int, str], Sample] = {}
    for multiplier, rows in stored_texts(Store(place.base), place.texts_of)[0]:
        for row in rows:
            sample = found.setdefault(row.key, Sample(row.prompt, {}, row.reference))
            if row.texts:
                sample.texts[multiplier] = row.texts[0]
            if row.plain:
                sample.texts.setdefault(0.0, row.plain[0])
    # one prompt per concept first, then the second ones
    order = sorted(found, key=lambda key: (key[1], key[0]))
    return [dataclasses.replace(found[key], texts=dict(sorted(found[key].texts.items()))) for key in order[:limit]]


def behind_prompts(base: Path, model: str, dataset: str) -> list[Place]:
    """Those of texts of the unsteered model behind a prompt, each with the prompt's name as the form."""
    return [Place(base, model, dataset, PROMPT, cell.intervention, Path()) for cell in Store(base).behind_prompts(model, dataset)]


def scored(place: Place) -> tuple[pd.DataFrame, str]:
    """analysis.scores.summarise of a place's stored scores (empty where there are none), and a sentence on what is left out."""
    try:
        table, others = scores.collect(Store(place.base), place.texts_of)
    except UserError as error:
        return pd.DataFrame(columns=[*scores.COLUMNS]), f"{place.name}: scores left out: {error}"
    gone = [f"{place.name}: {len(paths)} files of scores left out: {why}" for why, paths in others.items()]
    return scores.summarise(table), "; ".join(gone)


def left_out_texts(place: Place) -> str:
    """A sentence when texts lie there that are of another vector, cannot be read, or were not made as the others; else ''."""
    _, others, broken = stored_texts(Store(place.base), place.texts_of)
    at = ", ".join(f"{m:g}" for m in others)
    said = [f"texts at m = {at} left out: of another vector than the one that lies there now; --mode apply makes them again"] if at else []
    said += made_otherwise(Store(place.base), place.texts_of)
    return "; ".join(f"{place.name}: {why}" for why in [*said, *(f"texts left out: {error}" for error in broken)])
