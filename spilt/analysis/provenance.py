"""One stored file: what its path and its manifest say of it, and which stored results belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from spilt import verbs
from spilt.artifacts import manifest, store, texts
from spilt.cell import FORMS, Cell, variant_of
from spilt.data import entries, readers
from spilt.errors import UserError

K = TypeVar("K")


class Artifact:
    """One stored file with the place that its path names (model, dataset, form) and its manifest, each None where there is none."""

    def __init__(self, base_dir: Path, path: Path) -> None:
        self.base_dir, self.path = base_dir, path
        parts = path.relative_to(base_dir).parts
        self.kind, self.model = parts[0], parts[1] if len(parts) > 2 else ""
        losses = self.kind == "vectors" and parts[2:3] == ("get_sft_loss",)
        self.method, self.folder, self.leaf = (*parts[3 if losses else 2 : -1], "", "", "")[:3]
        try:
            self.record = manifest.read(path)
        except (OSError, RecursionError):  # a folder in its place, brackets without end
            self.record = None

    @cached_property
    def parts(self) -> dict[str, Any]:
        found = (self.record or {}).get("parts")
        return found if isinstance(found, dict) else {}

    @property
    def settings(self) -> dict[str, Any]:
        found = self.parts.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def dataset(self) -> str:
        """The folder's name without the concept that it may end in."""
        concept = self.parts.get("concept")
        return self.folder if concept is None else self.folder.removesuffix(f"_concept_{concept}")

    @property
    def form(self) -> str | None:
        form = variant_of(self.leaf.removeprefix(f"{self.method}_")).form
        return form if form in FORMS else None

    def data(self) -> readers.DatasetFormat:
        """The data file that the manifest's verb reads. Raises UserError when dataset_format.yaml has none."""
        sections = verbs.VERBS[self.parts["verb"]].sections
        split = self.parts.get("split") or next(iter(sections))
        return entries.dataset_format(self.base_dir, self.dataset, sections[split])

    def vectors(self) -> list[Path]:
        """The stored interventions that it was made from, in the manifest's order."""
        if self.form is None or self.parts["verb"] == "fit":
            return []
        layers = tuple(self.settings.get("layers", ()))
        concepts = self.parts.get("concepts", [self.parts.get("concept")])
        own = variant_of(self.leaf.removeprefix(f"{self.method}_"))
        one = Cell(self.model, self.dataset, self.method, self.form, layers, None, own.seed, own.layers is not None)
        cells = [replace(one, concept=concept) for concept in concepts]
        return [store.Store(self.base_dir).vector(cell, layer) for cell in cells for layer in layers]

    def texts(self) -> Path:
        """The results file that scores are of."""
        own, concepts = variant_of(self.leaf.removeprefix(f"{self.method}_")), self.parts.get("concepts") or [None]
        cell = Cell(self.model, self.dataset, self.method, own.form, own.layers or (), concepts[0], own.seed, own.layers is not None)
        return store.Store(self.base_dir).results(cell, float(self.parts["multiplier"]))

    @property
    def created(self) -> str:
        """When it was stored, as sortable text."""
        return str((self.record or {}).get("created", ""))

    def made_from(self) -> tuple[str, ...] | None:
        """Hashes of the vectors that it was made from; None when nobody can say."""
        found = self.parts.get("vectors")
        return tuple(map(str, found)) if isinstance(found, list) else None

    def vectors_now(self) -> tuple[str, ...] | None:
        """Hashes of those that lie there now; None when one is gone."""
        try:
            return tuple(manifest.file_hash(path) for path in self.vectors())
        except (OSError, KeyError, TypeError):  # gone, or a manifest that is not one of ours
            return None


def of_one_vector(base_dir: Path, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(kept, left out): results that may stand in one table, since they are of one vector.

    That is the one that lies there now; if it is gone, the one that was measured last. Files without a manifest (the
    released code's) are kept when nothing else is.
    """
    artifacts = [Artifact(base_dir, path) for path in paths]
    known = [artifact for artifact in artifacts if artifact.made_from() is not None]
    kept = [artifact for artifact in known if artifact.made_from() == artifact.vectors_now()]
    if not kept:
        gone = [artifact for artifact in known if artifact.vectors_now() is None]
        last = max(gone, key=lambda artifact: artifact.created).made_from() if gone else None
        kept = [artifact for artifact in gone if artifact.made_from() == last]
    if not known:
        kept = artifacts
    chosen = {artifact.path for artifact in kept}
    return [path for path in paths if path in chosen], [path for path in paths if path not in chosen]


def stored_texts(where: store.Store, cell: Cell) -> tuple[list[tuple[float, list[texts.Row]]], list[float], list[UserError]]:
    """(multiplier, rows) of the vector that lies there now, the multipliers whose texts are of another, why files cannot be read."""
    there = where.generated(cell)
    kept, _ = of_one_vector(where.base_dir, [path for _, path in there])
    found, broken = [], []
    for multiplier, path in there:
        if path in kept:
            try:
                found.append((multiplier, texts.read(path)))
            except UserError as error:
                broken.append(error)
    return found, [multiplier for multiplier, path in there if path not in kept], broken


def made_otherwise(where: store.Store, cell: Cell) -> list[str]:
    """Sentences on the texts that were not made as those made last (how long, how drawn, of how many prompts): they are not comparable."""
    kept, _ = of_one_vector(where.base_dir, [path for _, path in where.generated(cell)])
    known = [path for path in kept if Artifact(where.base_dir, path).parts]
    at = {path: f"{m:g}" for m, path in where.generated(cell)}
    return [
        f"texts at m = {', '.join(at[path] for path in paths)} were made otherwise than the last: {why}; --mode apply makes them alike"
        for why, paths in of_one_request(where.base_dir, known)[1].items()
    ]


OF_A_FILE = ("multiplier", "preference_type")  # what the loss tables of one request differ in


def of_one_request(base_dir: Path, paths: Sequence[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
    """(kept, why -> left out): of the loss tables of a split, those of the request that was measured last."""
    asked: dict[str, list[Artifact]] = {}
    for path in paths:
        artifact = Artifact(base_dir, path)
        asked.setdefault(manifest.identity(_request(artifact)), []).append(artifact)
    groups = sorted(asked.values(), key=lambda group: max(artifact.created for artifact in group))
    out: dict[str, list[Path]] = {}
    for group in groups[:-1]:
        why = manifest.differences(_request(group[0]), _request(groups[-1][0]))
        out.setdefault(why, []).extend(artifact.path for artifact in group)
    return [artifact.path for artifact in groups[-1]] if groups else [], out


SAME = ("model", "data", "columns")  # the model, and the rows as they were read


def of_other_inputs(base_dir: Path, tables: Mapping[K, Mapping[str, Sequence[Path]]]) -> dict[K, str]:
    """Cell -> how its losses differ from those measured last: a data file that was edited since, another model under the same name.

    tables: cell -> split -> its files, of which the newest counts. Questions are known by their numbers, so that cells which are compared
    must be of the same rows. What has no manifest is taken as it is.
    """
    newest: dict[tuple[K, str], Artifact] = {}
    for cell, splits in tables.items():
        for split, paths in splits.items():
            if known := [artifact for path in paths if (artifact := Artifact(base_dir, path)).parts]:
                newest[cell, split] = max(known, key=lambda artifact: artifact.created)
    order = sorted(newest.items(), key=lambda item: item[1].created)
    last = {split: artifact.parts for (_, split), artifact in order}
    model = {"model": order[-1][1].parts.get("model")} if order else {}
    out: dict[K, str] = {}
    for (cell, split), artifact in newest.items():
        then, now = ({name: parts.get(name) for name in SAME} for parts in (artifact.parts, {**last[split], **model}))
        if why := manifest.differences(then, now):
            out.setdefault(cell, f"{split}: {why}")
    return out


def found_unlike(base_dir: Path, path: Path) -> str:
    """How a cell's strengths of equal KL were found otherwise than those found last of its model and data set: another budget (a search of
    all that was killed on its way), other prompts; '' where alike."""
    beside = [other for other in path.parents[3].glob(f"*/*/*/{path.name}") if other.parts[-3] == path.parts[-3]]
    known = [artifact for other in of_one_vector(base_dir, beside)[0] if (artifact := Artifact(base_dir, other)).parts.get("kl")]
    own = next((artifact for artifact in known if artifact.path == path), None)
    if own is None:
        return ""
    last = max(known, key=lambda artifact: artifact.created)
    then, now = ({name: made.parts.get(name) for name in ("kl", "model", "data")} for made in (own, last))
    return manifest.differences(then, now)


def _request(artifact: Artifact) -> dict[str, Any]:
    return {name: value for name, value in artifact.parts.items() if name not in OF_A_FILE}
