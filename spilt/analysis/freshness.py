"""Is a report page up to date? Its manifest says of which stored files, settings and code it was drawn. No pandas, no pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import spilt
from spilt.artifacts import losses, manifest
from spilt.artifacts.store import Store
from spilt.cell import Cell

DERIVED = ("fit.json", "curves.png", losses.SUMMARY_FILE)  # of a cell's folder: what the page's program writes there


def page(base_dir: Path, model: str, dataset: str) -> Path:
    return Store(base_dir).pages(model) / dataset / "report.html"


def card(base_dir: Path, model: str) -> Path:
    """The model's own, which may say that it is synthetic."""
    return Store(base_dir).model(model) / "README.md"


def made_from(base_dir: Path, model: str, dataset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the page: losses, vectors and texts as they are now. settings: those that are not the default."""
    files = _hashes(base_dir, _inputs(base_dir, model, dataset))
    return {"verb": "report", "settings": dict(settings), "code": _code(), "inputs": manifest.identity(files)}


def write(base_dir: Path, model: str, dataset: str, html: str, parts: dict[str, Any], problems: list[str], best: dict[str, str]) -> Path:
    """Store the page, last of all that is drawn; problems: what is told again when nothing has changed; best: for the list of pages."""
    path = page(base_dir, model, dataset)
    drawn = [*path.parent.iterdir(), *(leaf / name for leaf in _leaves(base_dir, model, dataset) for name in DERIVED)]
    outputs = _hashes(base_dir, (file for file in drawn if file not in (path, manifest.manifest_path(path))))
    manifest.write(path, html, parts, {"outputs": outputs, "problems": problems, "best": best})
    return path


def problems_of_current(base_dir: Path, model: str, dataset: str) -> list[str] | None:
    """None: the page, or something that was drawn with it, is to be drawn again; else what was told when it was drawn."""
    path = page(base_dir, model, dataset)
    if manifest.standing(path, made_from(base_dir, model, dataset, {})) != "done":
        return None
    notes = (manifest.read(path) or {})["notes"]
    there = notes["outputs"] == _hashes(base_dir, (base_dir / file for file in notes["outputs"]))
    return list(notes["problems"]) if there else None


def _hashes(base_dir: Path, files: Iterable[Path]) -> dict[str, str]:
    return {str(path.relative_to(base_dir)): _hash(path) for path in files if path.is_file()}


def _hash(path: Path) -> str:
    """Of a manifest, of all but the time of day: the same results are the same page."""
    if path.name.endswith(".manifest.json"):
        try:
            record = json.loads(path.read_bytes())
            return manifest.identity({key: value for key, value in record.items() if key not in ("created", "record_sha256")})
        except (ValueError, AttributeError, RecursionError):  # damaged: another one
            pass
    return manifest.file_hash(path)


def _leaves(base_dir: Path, model: str, dataset: str) -> list[Path]:
    """The folders of losses of all methods, forms and concepts."""
    found = Store(base_dir).loss_root(model).glob("*/*/*")
    names = {path: path.parts[-3:-1] for path in found if path.is_dir()}
    return sorted(p for p, (method, name) in names.items() if method != "report" and (name + "_concept_").startswith(f"{dataset}_concept_"))


def _inputs(base_dir: Path, model: str, dataset: str) -> Iterator[Path]:
    store, cells = Store(base_dir), dict[Cell, list[Path]]()
    yield card(base_dir, model)
    for leaf in _leaves(base_dir, model, dataset):
        method, folder = leaf.parts[-3:-1]
        form = leaf.name.removeprefix(f"{method}_")
        vectors = store.vector_folder(Cell(model, folder, method, form, ())).glob("layer_*")
        yield from (path for path in vectors if ".unfinished." not in path.name)
        cells.setdefault(Cell(model, dataset, method, form, ()), []).append(leaf)
    for leaves in cells.values():
        files = [path for leaf in leaves for path in leaf.rglob("*") if path.is_file() and path.suffix not in (".log", ".jsonl")]
        # a summary without loss rows (somebody's own) is used as it is
        yield from [path for path in files if path.name not in DERIVED] or [path for path in files if path.name == losses.SUMMARY_FILE]
    for cell in dict.fromkeys([*cells, *store.behind_prompts(model, dataset)]):
        for _, path in [*store.generated(cell), *store.scored(cell)]:
            yield from (path, manifest.manifest_path(path))


@lru_cache(maxsize=1)
def _code() -> str:
    """Of all that draws: an edited template is another page."""
    from importlib import metadata

    folder = Path(spilt.__file__).parent
    files = [path for room in ("analysis", "report") for path in (folder / room).rglob("*") if path.suffix != ".pyc"]
    return manifest.identity({**_hashes(folder, files), "pictures": metadata.version("matplotlib")})
