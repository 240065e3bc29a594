"""Measured cells under base_dir: find them, rebuild preference_utility.csv and fit.json, read control and generations. No model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from spilt.analysis import odds
from spilt.analysis.curves import BUDGET, Fit, fit_curve, recommendation, regions, utility_drops, utility_peak
from spilt.analysis.provenance import of_one_vector
from spilt.artifacts import texts
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.errors import UserError, printable, unknown

log = logging.getLogger("spilt")
VERSION = 3  # of fit.json; a change makes `update` fit again
FIT_FILE, CURVES_FILE, CONTROL_FILE = "fit.json", "curves.png", "control.csv"
METHODS = ("caa", "sft", "reps", "spilt")  # order of tables and legends; other names follow
FORMS = ("vector", "lora", "local_weight")
CONCEPT = re.compile(r"_concept_(\d+)$")


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
        """As it is shown; a folder that somebody made may be called anything."""
        return printable(f"{self.method} {self.intervention}")


@dataclass(frozen=True)
class Measured:
    """One cell's stored results: `summary` as in preference_utility.csv, `fit` as in fit.json."""

    place: Place
    summary: pd.DataFrame
    fit: dict[str, Any]
    control: pd.DataFrame | None = None

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def best(self) -> dict[str, Any]:
        return dict(self.fit["recommendation"])

    def split_for(self, wanted: str) -> str:
        """The wanted split, or the one that was measured."""
        have = list(self.fit["splits"])
        return wanted if wanted in have else have[0]

    def rows(self, split: str) -> pd.DataFrame:
        return self.summary[self.summary["split"] == self.split_for(split)]

    def curve(self, split: str, kind: str) -> Fit:
        return Fit.from_dict(self.fit["splits"][self.split_for(split)][kind])


def losses_root(base: Path, model: str) -> Path:
    return Store(base).loss_root(model)


def models(base: Path) -> list[str]:
    return [path.parent.name for path in Store(base).loss_roots()]


def datasets(base: Path, model: str) -> list[str]:
    names = {CONCEPT.sub("", path.name) for path in losses_root(base, model).glob("*/*") if path.is_dir() and path.parent.name != "report"}
    return sorted(names)


def find(base_dir: str | Path, model: str, dataset: str) -> list[Place]:
    """Every method and form with stored losses (or a stored preference_utility.csv), in the order of METHODS and FORMS."""
    base = Path(base_dir)
    if not models(base):
        raise UserError(f"no stored losses below {base}; run --mode loss first, or check --base_dir")
    if model not in models(base):
        raise unknown("model with stored losses", model, models(base))
    if dataset not in datasets(base, model):
        raise unknown("dataset", dataset, datasets(base, model))
    places = []
    for parent in sorted(path for path in losses_root(base, model).iterdir() if path.is_dir() and path.name != "report"):
        method = parent.name
        forms: dict[str, dict[int, Path]] = {}
        for leaf in parent.glob(f"{dataset}*/{method}_*"):
            hit = CONCEPT.search(leaf.parent.name)
            if leaf.is_dir() and leaf.parent.name == dataset + (hit[0] if hit else "") and _measured(leaf):
                found = forms.setdefault(leaf.name[len(method) + 1 :], {})
                if hit:
                    found[int(hit[1])] = leaf
        for form, concepts in forms.items():
            folder = parent / dataset / f"{method}_{form}"
            places.append(Place(base, model, dataset, method, form, folder, dict(sorted(concepts.items()))))
    return sorted(places, key=lambda place: (_rank(place.intervention, FORMS), _rank(place.method, METHODS)))


def _rank(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _measured(leaf: Path) -> bool:
    return (leaf / odds.SUMMARY_FILE).is_file() or any(odds.FOLDER.match(sub.name) for sub in leaf.iterdir())


def summary_of(place: Place, norm: odds.Norm = "mean", seed: int = 0) -> tuple[pd.DataFrame, list[str]]:
    """The summary of a place, and notes on what could not be used. Without loss rows, the stored preference_utility.csv as it is."""
    frames, notes = [], []
    folders: list[tuple[int | None, Path]] = [*place.concepts.items()] or [(None, place.folder)]
    for concept, folder in folders:
        for split in odds.LOSS_FILES:
            frame = odds.collect(folder, split, norm)
            where = "" if concept is None else f"concept {concept}, "
            notes += [where + note for note in frame.attrs["notes"]]
            if len(frame):
                frames.append(frame if concept is None else frame.assign(concept=concept))
    if frames:
        return odds.summarise(pd.concat(frames, ignore_index=True), seed), notes
    stored = place.folder / odds.SUMMARY_FILE
    if notes or not stored.is_file():  # a summary of rows that were left out is as old as they are
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{place.folder}: no losses of both answers at any multiplier{why}; run --mode loss again")
    return odds.read_summary(stored), ["no loss rows are stored: preference_utility.csv is used as it is"]


def analyse(place: Place, norm: odds.Norm = "mean", budget: float = BUDGET, seed: int = 0) -> Measured:
    """Summarise and fit one place; writes preference_utility.csv and fit.json. Nothing is fitted again when nothing changed."""
    summary, notes = summary_of(place, norm, seed)
    control, of_others = read_control(place)
    notes += of_others
    source = hashlib.sha256(f"{VERSION} {norm} {seed} {budget} {notes} {summary.to_csv(float_format='%.10g')}".encode()).hexdigest()
    fit = _stored(place.folder / FIT_FILE)
    if fit.get("source") != source:
        fit = {
            "version": VERSION,
            "source": source,
            "cell": {
                **{name: getattr(place, name) for name in ("model", "dataset", "method", "intervention")},
                "concepts": list(place.concepts) or None,
            },
            "norm": norm,
            "seed": seed,
            "units": "log-odds in nats, multipliers dimensionless, slope in nats per unit of multiplier",
            "about_parameters": "alpha, beta, b, m, L and p trade off against each other: read the curve, not one parameter",
            "splits": {split: _fits(rows, budget, seed) for split, rows in summary.groupby("split", sort=False)},
            "recommendation": recommendation(summary, budget),
            "notes": notes,
        }
        fit = plain(fit)
        fit["check"] = _check(fit)
        odds.write_summary(place.folder / odds.SUMMARY_FILE, summary)
        # the picture of the old fit goes first: a run killed between the two files draws it again
        (place.folder / CURVES_FILE).unlink(missing_ok=True)
        atomic_write(place.folder / FIT_FILE, json.dumps(fit, indent=1, allow_nan=False) + "\n")
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


def stored_source(place: Place) -> str | None:
    """Fingerprint of what the stored fit.json was made from, or None."""
    return _stored(place.folder / FIT_FILE).get("source")


def _stored(path: Path) -> dict[str, Any]:
    """A stored fit.json; {} where there is none, or none of this version that is as it was written: it is made again."""
    if not path.is_file():
        return {}
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(fit, dict) and fit.get("check") == _check(fit)
    except (OSError, ValueError, RecursionError):
        good = False
    if not good:
        log.warning("%s: is damaged, or of an older version; made again from the stored losses", path)
    return fit if good else {}


def _check(fit: dict[str, Any]) -> str:
    """Hash of all but itself: one digit that changed is found."""
    rest = {name: value for name, value in fit.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """The same nested value as strict JSON holds it: nan and infinity become None, tuples lists."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_control(place: Place) -> tuple[pd.DataFrame | None, list[str]]:
    """Random directions of the vector's norm: split, draw, multiplier, preference, utility (mean over concepts), n, n_undefined.

    And a sentence for each file that was made for another vector than the one that lies there: it is left out.
    """
    there = [path for folder in (place.concepts.values() or [place.folder]) if (path := folder / CONTROL_FILE).is_file()]
    others = [path for path in there if of_one_vector(place.base, [path])[1]]
    notes = [f"control left out: {path.relative_to(place.base)} is of another vector; --mode loss makes it again" for path in others]
    keys, parts = ["split", "draw", "multiplier"], []
    for path in there:
        if path in others:
            continue
        try:
            part = odds.read_table(path, [*keys, "preference", "utility"], "--mode loss --multipliers sweep makes it again")
            for name in ("draw", "multiplier", "preference", "utility"):
                if not pd.api.types.is_numeric_dtype(part[name]):
                    raise UserError(f"{path}: column {name!r} holds more than numbers; --mode loss --multipliers sweep makes it again")
            parts.append(part)
        except UserError as error:
            notes.append(f"control left out: {error}")
    if not parts:
        return None, notes
    table = pd.concat(parts, ignore_index=True)
    return table.groupby(keys, as_index=False, sort=True)[["preference", "utility"]].mean(), notes


@dataclass(frozen=True)
class Sample:
    """One prompt and the texts generated for it, by multiplier; `reference` is the dataset's own answer or None."""

    prompt: str
    texts: dict[float, str]
    reference: str | None = None


def samples(place: Place, limit: int = 3) -> list[Sample]:
    """The first prompts of a place (of the first concepts for axbench) with every stored multiplier's text; [] when none was generated."""
    found: dict[tuple[int, int, str], Sample] = {}
    for multiplier, path in _texts(place)[0]:
        try:
            rows = texts.read(path)
        except UserError:  # named by left_out_texts
            continue
        for row in rows:
            sample = found.setdefault(row.key, Sample(row.prompt, {}, row.reference))
            if row.texts:
                sample.texts[multiplier] = row.texts[0]
            for plain_text in row.plain[:1]:
                sample.texts.setdefault(0.0, plain_text)
    # one prompt per concept first, then the second ones
    order = sorted(found, key=lambda key: (key[1], key[0]))
    return [Sample(found[key].prompt, dict(sorted(found[key].texts.items())), found[key].reference) for key in order[:limit]]


def _texts(place: Place) -> tuple[list[tuple[float, Path]], list[float]]:
    """(multiplier, results file) of the vector that lies there now, and the multipliers whose texts are of another."""
    found = Store(place.base).generated(Cell(place.model, place.dataset, place.method, place.intervention, ()))
    kept, _ = of_one_vector(place.base, [path for _, path in found])
    return [(m, path) for m, path in found if path in kept], [m for m, path in found if path not in kept]


def left_out_texts(place: Place) -> str:
    """A sentence when texts lie there that are of another vector or cannot be read, else ''."""
    kept, others = _texts(place)
    at = ", ".join(f"{m:g}" for m in others)
    why = "of another vector than the one that lies there now; --mode apply makes them again"
    said = [f"{place.name}: texts at m = {at} left out: {why}"] if at else []
    for _, path in kept:
        try:
            texts.read(path)
        except UserError as error:
            said.append(f"{place.name}: texts left out: {error}")
    return "; ".join(said)
