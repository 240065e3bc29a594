"""Where measured cells lie under base_dir, and how they are called on the page. No model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from spilt.analysis import odds
from spilt.analysis.provenance import Artifact, of_other_inputs
from spilt.artifacts import losses
from spilt.artifacts.store import Store
from spilt.cell import FORMS, SEED, Cell, variant_of
from spilt.errors import UserError, printable, unknown

METHODS = ("caa", "sft", "reps", "spilt")  # order of tables and legends; other names follow
CONCEPT = re.compile(r"_concept_(\d+)$")


def label(method: str, form: str) -> str:
    """A method and form as they are shown; a folder that somebody made may be called anything."""
    own = variant_of(form)
    return printable(f"{method} {FORMS[own.form].label if own.form in FORMS else own.form}{own}").strip()


def anchor(cell: str) -> str:
    """Where a cell's details are on the page: as an id and in an address, another one for each name."""
    return "cell-" + re.sub(r"[^A-Za-z0-9]", lambda hit: f"-{ord(hit[0]):x}-", cell)


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

    @property
    def form(self) -> str:
        """`intervention` without layers and the seed of one of several fits."""
        return variant_of(self.intervention).form

    @property
    def fitted_as(self) -> str:
        """`intervention` without the seed: fits that differ in that alone."""
        return self.intervention.partition(SEED)[0]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The steered ones, by the folder's name or the manifests of its losses; () where neither says."""
        if found := variant_of(self.intervention).layers:
            return found
        said = next((Artifact(self.base, path).settings.get("layers") for split in losses.SPLITS for path in self.losses_of(split)), None)
        return tuple(said) if isinstance(said, list) and all(isinstance(layer, int) for layer in said) else ()

    def losses_of(self, split: str) -> list[Path]:
        """Of each folder one file that holds losses of a split: its table, where there is none the first of the released ones."""
        there = ([folder / losses.TABLES[split], *sorted(folder.glob(f"*/{losses.SPLITS[split]}"))] for folder in self.folders)
        return [found for files in there if (found := next(filter(Path.is_file, files), None))]

    @property
    def folders(self) -> list[Path]:
        """Those with losses."""
        return [*self.concepts.values()] or [self.folder]

    @property
    def texts_of(self) -> Cell:
        """The cell that its texts and scores are stored by."""
        return Cell(self.model, self.dataset, self.method, self.intervention, ())


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
    return sorted(places, key=lambda p: (_rank(p.form, list(FORMS)), _rank(p.method, list(METHODS)), p.layers, p.intervention))


def comparable(places: Sequence[Place]) -> tuple[list[Place], list[str]]:
    """Those measured with the model and on the rows of what was measured last, and a sentence for each of the others.

    Curves, claims and differences are paired over questions by their numbers: an older cell beside newer ones would be compared on rows
    that it never saw.
    """
    tables = {
        (number, folder): {
            split: [path for path in (folder / losses.TABLES[split], *folder.glob(f"*/{name}")) if path.is_file()]
            for split, name in losses.SPLITS.items()
        }
        for number, place in enumerate(places)
        for folder in place.folders
    }
    others: dict[int, str] = {}
    found = of_other_inputs(places[0].base, tables) if places else {}
    for (number, _), why in found.items():
        others.setdefault(number, why)
    said = [
        f"{places[number].name} left out: {why} than the cells measured last; --mode loss measures it again"
        for number, why in sorted(others.items())
    ]
    return [place for number, place in enumerate(places) if number not in others], said


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _measured(leaf: Path) -> bool:
    tables = (losses.SUMMARY_FILE, *losses.TABLES.values())
    return any((leaf / name).is_file() for name in tables) or any(odds.FOLDER.match(sub.name) for sub in leaf.iterdir())
