"""Measured cells under base_dir: find them, rebuild preference_utility.csv and fit.json, read control and generations. No model."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from spilt.analysis import odds
from spilt.analysis.curves import BUDGET, CurveFit, fit_curve, recommendation, regions, utility_drops, utility_peak
from spilt.analysis.provenance import of_one_vector, stored_texts
from spilt.artifacts import losses
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.manifest import digest, identity
from spilt.artifacts.store import Store
from spilt.artifacts.texts import Row
from spilt.cell import FORMS, Cell
from spilt.errors import UserError, printable, unknown

log = logging.getLogger("spilt")
VERSION = 3  # of fit.json; a change makes `update` fit again
FIT_FILE, CURVES_FILE, CONTROL_FILE = "fit.json", "curves.png", "control.csv"
METHODS = ("caa", "sft", "reps", "spilt")  # order of tables and legends; other names follow
KINDS = ("preference", "utility")
CONCEPT = re.compile(r"_concept_(\d+)$")


def label(method: str, form: str) -> str:
    """A method and form as they are shown; a folder that somebody made may be called anything."""
    return printable(f"{method} {FORMS[form].label if form in FORMS else form}").strip()


def name_of(cell: str) -> str:
    """'spilt local_weight' -> 'spilt local weight', as printed."""
    method, _, form = cell.partition(" ")
    return label(method, form)


def absent(value: object) -> bool:
    return value is None or value != value  # only nan differs from itself


def shown(value: Any, spec: str = ".2f") -> str:
    """A number as printed: -1 -> '−1.00' (a real minus, never of zero), nothing -> '–'."""
    if absent(value) or math.isinf(value):
        return "–"
    text = format(float(value), spec)
    return text.removeprefix("-") if not text.strip("-0.%") else text.replace("-", "−")


@dataclass(frozen=True)
class Place:
    """Where the losses of one method and form lie: one folder, or one per concept that are averaged into `folder`."""

    base: Path
    model: str
    dataset: str
    method: str
    intervention: str
    folder: Path
    concepts: dict[int, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return printable(f"{self.method} {self.intervention}")


@dataclass(frozen=True)
class Measured:
    """One cell's stored results: `summary` as in preference_utility.csv, `fit` as in fit.json, `control` as in control.csv."""

    place: Place
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
        return self.summary[self.summary["split"] == self.split_for(split)]

    def curve(self, split: str, kind: str) -> CurveFit:
        return CurveFit.from_dict(self.stored(split)[kind])

    def random(self, split: str) -> pd.DataFrame | None:
        """The control's rows of one split (all, where it has none of it)."""
        if self.control is None:
            return None
        table = self.control[self.control["split"] == split]
        return table if len(table) else self.control


def models(base: Path) -> list[str]:
    """Those with stored losses."""
    return [path.parent.name for path in Store(base).loss_roots()]


def datasets(base: Path, model: str) -> list[str]:
    """Those with stored losses of a model."""
    folders = (path for path in Store(base).loss_root(model).glob("*/*") if path.is_dir() and path.parent.name != "report")
    return sorted({CONCEPT.sub("", path.name) for path in folders})


def find(base_dir: str | Path, model: str, dataset: str) -> list[Place]:
    """Every method and form with stored losses (or a stored preference_utility.csv), in the order of METHODS and FORMS."""
    base = Path(base_dir)
    if not models(base):
        raise UserError(f"no stored losses below {base}; run --mode loss first, or check --base_dir")
    if model not in models(base):
        raise unknown("model with stored losses", model, models(base))
    if dataset not in datasets(base, model):
        raise unknown("dataset", dataset, datasets(base, model))
    root, found = Store(base).loss_root(model), dict[tuple[str, str], dict[int, Path]]()
    for leaf in sorted(root.glob("*/*/*")):
        method, folder = leaf.parts[-3:-1]
        concept = CONCEPT.search(folder)
        ours = method != "report" and CONCEPT.sub("", folder) == dataset and leaf.name.startswith(f"{method}_")
        if ours and leaf.is_dir() and _measured(leaf):
            concepts = found.setdefault((method, leaf.name[len(method) + 1 :]), {})
            if concept:
                concepts[int(concept[1])] = leaf
    places = [
        Place(base, model, dataset, method, form, root / method / dataset / f"{method}_{form}", dict(sorted(concepts.items())))
        for (method, form), concepts in found.items()
    ]
    return sorted(places, key=lambda place: (_rank(place.intervention, list(FORMS)), _rank(place.method, list(METHODS))))


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _measured(leaf: Path) -> bool:
    tables = (losses.SUMMARY_FILE, *losses.TABLES.values())
    return any((leaf / name).is_file() for name in tables) or any(odds.FOLDER.match(sub.name) for sub in leaf.iterdir())


def summary_of(place: Place, norm: odds.Norm = "mean", seed: int = 0) -> tuple[pd.DataFrame, list[str]]:
    """The summary of a place, and notes on what could not be used. Without loss rows, the stored preference_utility.csv as it is."""
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
        return odds.summarise(pd.concat(frames, ignore_index=True), seed), notes
    stored = place.folder / losses.SUMMARY_FILE
    if notes or not stored.is_file():  # a summary of rows that were left out is as old as they are
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{place.folder}: no losses of both answers at any multiplier{why}; run --mode loss again")
    return odds.read_summary(stored), ["no loss rows are stored: preference_utility.csv is used as it is"]


def analyse(place: Place, norm: odds.Norm = "mean", budget: float = BUDGET, seed: int = 0) -> Measured:
    """Summarise and fit one place; writes preference_utility.csv and fit.json. Nothing is fitted again when nothing changed."""
    summary, notes = summary_of(place, norm, seed)
    control, of_others = read_control(place)
    notes += of_others
    source = digest(f"{VERSION} {norm} {seed} {budget} {notes} {summary.to_csv(float_format='%.10g')}".encode())
    fit = _stored(place.folder / FIT_FILE)
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
            "recommendation": recommendation(summary, budget),
            "notes": notes,
        }
        fit = plain(fit)
        odds.write_summary(place.folder / losses.SUMMARY_FILE, summary)
        # the picture of the old fit goes first: a run killed between the two files draws it again
        (place.folder / CURVES_FILE).unlink(missing_ok=True)
        atomic_write(place.folder / FIT_FILE, json.dumps({**fit, "check": identity(fit)}, indent=1, allow_nan=False) + "\n")
    return Measured(place, summary, fit, control)


def _fits(rows: pd.DataFrame, budget: float, seed: int) -> dict[str, Any]:
    m, preference, utility = (rows[name].to_numpy(float) for name in ("multiplier", "preference", "utility"))
    fits = {"preference": fit_curve(m, preference, "preference", seed), "utility": fit_curve(m, utility, "utility", seed)}
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


def read_control(place: Place) -> tuple[pd.DataFrame | None, list[str]]:
    """Random directions of the vector's norm: split, draw, multiplier, preference, utility (mean over concepts).

    And a sentence for each file that cannot be read, or was made for another vector than the one that lies there: it is left out.
    """
    keys, parts, notes = ["split", "draw", "multiplier"], [], []
    for path in (folder / CONTROL_FILE for folder in place.concepts.values() or [place.folder]):
        if not path.is_file():
            continue
        try:
            if of_one_vector(place.base, [path])[1]:
                raise UserError(f"{path.relative_to(place.base)} is of another vector; --mode loss makes it again")
            part = odds.read_table(path, [*keys, *KINDS], "--mode loss --multipliers sweep makes it again")
            for name in (*keys[1:], *KINDS):
                if not pd.api.types.is_numeric_dtype(part[name]):
                    raise UserError(f"{path}: column {name!r} holds more than numbers; --mode loss --multipliers sweep makes it again")
            parts.append(part)
        except UserError as error:
            notes.append(f"control left out: {error}")
    if not parts:
        return None, notes
    return pd.concat(parts, ignore_index=True).groupby(keys, as_index=False, sort=True)[list(KINDS)].mean(), notes


@dataclass(frozen=True)
class Sample:
    """One prompt and the texts generated for it, by multiplier; `reference` is the dataset's own answer or None."""

    prompt: str
    texts: dict[float, str]
    reference: str | None = None


def _texts(place: Place) -> tuple[list[tuple[float, list[Row]]], list[float], list[UserError]]:
    return stored_texts(Store(place.base), Cell(place.model, place.dataset, place.method, place.intervention, ()))


def samples(place: Place, limit: int = 3) -> list[Sample]:
    """The first prompts of a place (of the first concepts for axbench) with every stored multiplier's text; [] when none was generated."""
    found: dict[tuple[int, int, str], Sample] = {}
    for multiplier, rows in _texts(place)[0]:
        for row in rows:
            sample = found.setdefault(row.key, Sample(row.prompt, {}, row.reference))
            if row.texts:
                sample.texts[multiplier] = row.texts[0]
            if row.plain:
                sample.texts.setdefault(0.0, row.plain[0])
    # one prompt per concept first, then the second ones
    order = sorted(found, key=lambda key: (key[1], key[0]))
    return [dataclasses.replace(found[key], texts=dict(sorted(found[key].texts.items()))) for key in order[:limit]]


def left_out_texts(place: Place) -> str:
    """A sentence when texts lie there that are of another vector or cannot be read, else ''."""
    _, others, broken = _texts(place)
    at = ", ".join(f"{m:g}" for m in others)
    said = [f"texts at m = {at} left out: of another vector than the one that lies there now; --mode apply makes them again"] if at else []
    return "; ".join(f"{place.name}: {why}" for why in [*said, *(f"texts left out: {error}" for error in broken)])
