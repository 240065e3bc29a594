"""What stands beside the numbers: how each cell came to be, the texts at recommended multipliers, and the lists of pages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from spilt import __version__
from spilt.analysis import freshness
from spilt.analysis.provenance import Artifact
from spilt.artifacts import losses, manifest
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.store import Store
from spilt.cell import FORMS, PROMPT
from spilt.errors import UserError
from spilt.report import page
from spilt.report.cells import CONTROL_FILE, FIT_FILE, Measured, Sample

POSITIONS = {"all": "every token, as text is made"}
RELEASED = "released: the template prefix is not steered"


def facts(cell: Measured) -> dict[str, str]:
    """How a cell was measured, from the manifests of its losses; what they do not say is left out."""
    files = [path for split in losses.SPLITS for path in cell.place.losses_of(split)[:1]]
    tables = [path for path in files if path.name in losses.TABLES.values()]
    made = [artifact for path in files if (artifact := Artifact(cell.place.base, path)).record is not None]
    settings = made[0].settings if made else {}
    where = settings.get("intervention_positions")
    as_released = files and not tables and cell.place.form in FORMS and FORMS[cell.place.form].positional
    counts = ((name, cell.fit["splits"].get(name, {}).get("n_questions")) for name in losses.SPLITS)
    layers = settings.get("layers")
    found = {
        "layer": ", ".join(map(str, layers)) if isinstance(layers, list) else None,
        "dtype": settings.get("dtype"),
        "seed": settings.get("seed"),
        "steered": RELEASED if as_released else POSITIONS.get(str(where), where),
        "questions": ", ".join(f"{n[-1]} {name}" for name, n in counts if n),
        "data": ", ".join(dict.fromkeys(filter(None, map(_data, made)))),
        "measured": max((artifact.created[:10] for artifact in made), default=None),
        "measured by": ", ".join(dict.fromkeys(f"spilt {artifact.record['spilt']}" for artifact in made if artifact.record)),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _data(artifact: Artifact) -> str:
    """The data file that it was measured on, as dataset_format.yaml names it now; '' where that is gone."""
    try:
        return Store(artifact.base_dir).relative(artifact.data().path)
    except (UserError, OSError, KeyError, StopIteration):
        return ""


def shared(told: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The facts that all cells have in common."""
    first, *others = told.values()
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def synthetic(base: Path, model: str) -> bool:
    """Whether the model's own card has the tag `synthetic` in its front matter."""
    path = freshness.card(base, model)
    try:
        front = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1]) if path.is_file() else None
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError):  # a card of another kind
        return False
    tags = front.get("tags") if isinstance(front, dict) else None
    return isinstance(tags, list) and "synthetic" in tags


class Answer(NamedTuple):
    """One text of a prompt: the cell's name, as printed (empty: unsteered), its multiplier (0: behind a prompt), the text."""

    cell: str
    label: str
    multiplier: float
    text: str


class Asked(NamedTuple):
    """One prompt with its unsteered text, then that of each cell at its recommended multiplier, then those behind prompts."""

    sample: Sample
    answers: list[Answer]


def side_by_side(texts: Sequence[tuple[Measured, list[Sample]]], first: Measured | None, behind: Mapping[str, list[Sample]]) -> list[Asked]:
    """The prompts that the first cell was asked (any cell, where it has no texts at its multiplier), each with all cells' answers.

    behind: name of a prompt that stands before them -> the unsteered model's texts, at m = 0.
    """
    said = {cell.name: {sample.prompt: sample for sample in some if cell.best["multiplier"] in sample.texts} for cell, some in texts}
    steered = [cell for cell, _ in texts if cell.best["multiplier"] and said[cell.name]]
    out = []
    for sample in said[min(steered, key=lambda cell: cell is not first).name].values() if steered else ():
        own = [(cell, there) for cell in steered if (there := said[cell.name].get(sample.prompt))]
        plain = [Answer("", "", 0.0, there.texts[0.0]) for _, there in own if 0.0 in there.texts][:1]
        at = [(cell, cell.best["multiplier"], there) for cell, there in own]
        answers = [Answer(cell.name, cell.label, m, there.texts[m]) for cell, m, there in at]
        for name, some in behind.items():
            said_behind = [there.texts[0.0] for there in some if there.prompt == sample.prompt and 0.0 in there.texts]
            answers += [Answer(f"{PROMPT} {name}", f"{PROMPT}: {name}", 0.0, text) for text in said_behind[:1]]
        out.append(Asked(sample, plain + answers))
    return out


def address(path: Path, page: Path) -> str:
    """A file as a link on a page."""
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


def files(cell: Measured, page: Path) -> dict[str, str]:
    """Name -> link of what is stored of a cell."""
    place, names = cell.place, (losses.SUMMARY_FILE, FIT_FILE, *losses.TABLES.values(), CONTROL_FILE)
    there = [folder / name for folder in dict.fromkeys([place.folder, *place.folders]) for name in names if (folder / name).is_file()]
    short = {path: path.name if path.parent == place.folder else f"{path.parent.parent.name}/{path.name}" for path in there}
    return {short[path]: address(path, page) for path in there}


def write_indexes(base: Path, model: str) -> None:
    """The list of a model's pages, and that of all models' pages."""
    store = Store(base)
    pages = {root.parent.name: sorted(root.glob("report/*/report.html")) for root in store.loss_roots()}
    for path, title, names in ((store.index(model), model, [model]), (store.index(), "all models", list(pages))):
        rows = {name: [_entry(found, path) for found in pages[name]] for name in names if pages[name]}
        atomic_write(path, page.render("index.html", title=title, models=rows, up=address(store.index(), path), version=__version__))


def _entry(found: Path, index: Path) -> dict[str, Any]:
    record = manifest.read(found) or {}
    notes = record.get("notes")
    best = notes.get("best") if isinstance(notes, dict) else None
    best = best if isinstance(best, dict) else {}
    told = {name: str(best.get(name, "")) for name in ("cell", "gain")}
    return {"dataset": found.parent.name, "link": address(found, index), "date": str(record.get("created", ""))[:10], **told}
