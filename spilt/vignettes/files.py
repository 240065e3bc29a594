"""Vignettes of the published schema (wassname/tiny-mfv), from the hub or a local folder, checked by one function.

`datasets.load_dataset(source, config, split=condition)` where that library is installed, in a process of its own; where it is not, a local
folder is read here: a README.md whose YAML header lists configs -> splits -> data files. A row: id, foundation, wrong (people's mean, 1 to
5), text, and how much each foundation is at stake, calibrated_Care ... calibrated_SocialNorms (0 to 100).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spilt.data import hub, sources
from spilt.data.sources import Record, columns_of, seen
from spilt.errors import UserError, first_line, printable, unknown

FOUNDATIONS = ("Care", "Sanctity", "Authority", "Loyalty", "Fairness", "Liberty", "Social Norms")
CONDITIONS = ("other_violate", "self_violate")  # `You see somebody ...` and `You ...`: the splits
SHIPPED = Path(__file__).parent / "shipped" / "synthetic"  # 28 of our own; their numbers are invented
CONFIG = "synthetic"
# what a column may be called, best first; {} is a foundation without spaces. Later releases have human_* beside ai_*
WRONG_NAMES = ("wrong", "human_wrong")
FOUNDATION_NAMES = ("foundation_coarse", "foundation")
LOADING_NAMES = ("calibrated_{}", "human_{}")
HEADER = "---"

log = logging.getLogger("spilt")


class Vignette(NamedTuple):
    """One scene in one condition. wrong: people's mean, nan where not known. loadings: of FOUNDATIONS in order, () where not known."""

    id: str
    condition: str
    foundation: str
    text: str
    wrong: float = math.nan
    loadings: tuple[float, ...] = ()


def read(source: str | Path = SHIPPED, config: str = CONFIG, download: bool = False) -> list[Vignette]:
    """Both conditions of the vignettes that have both, in the order of the first. source: a local folder, or a dataset of the hub (from
    the local cache; download fetches it). Raises UserError for what is not there or not of the schema.
    """
    rows = zip(CONDITIONS, _rows(source, config, download), strict=True)
    by_id = {condition: {one.id: one for one in checked(found, condition, source)} for condition, found in rows}
    first, second = by_id.values()
    both = [name for name in first if name in second]
    if not both:
        raise UserError(f"vignettes {source}: no id is in both {' and '.join(CONDITIONS)}")
    if alone := len(first) + len(second) - 2 * len(both):
        log.warning("vignettes %s: %d are left out, their ids are in one condition only", source, alone)
    for name in both:
        if first[name].foundation != second[name].foundation:
            raise UserError(f"vignettes {source}: {seen(name)} is about {first[name].foundation} and about {second[name].foundation}")
    return [by_id[condition][name] for name in both for condition in CONDITIONS]


def checked(rows: Iterable[Record], condition: str, source: str | Path = "") -> list[Vignette]:
    """Rows of one condition as vignettes, whatever their columns are called. Raises UserError with the row and the column."""
    out: dict[str, Vignette] = {}
    for row in rows:
        where = f"vignettes {source}, {condition}, {row.where}"
        name, text = (_text(row.values, column, where) for column in ("id", "text"))
        if name in out:
            raise UserError(f"{where}: id {seen(name)} is there twice")
        known = next((column for column in FOUNDATION_NAMES if row.values.get(column) is not None), FOUNDATION_NAMES[-1])
        about = foundation(_text(row.values, known, where))
        out[name] = Vignette(name, condition, about, text, _wrong(row.values, where), _loadings(row.values, where))
    if not out:
        raise UserError(f"vignettes {source}: {condition} has no rows")
    if len({bool(one.loadings) for one in out.values()}) > 1:
        raise UserError(f"vignettes {source}: {condition}: some rows have {LOADING_NAMES[0].format('*')} and some have not")
    return [*out.values()]


def foundation(word: str) -> str:
    """Its name in FOUNDATIONS, of a word in any case, with or without the space. Raises UserError."""
    plain = {_plain(name): name for name in FOUNDATIONS}
    if _plain(word) not in plain:
        raise unknown("foundation", printable(word)[:60], FOUNDATIONS)
    return plain[_plain(word)]


def _plain(word: str) -> str:
    return "".join(word.split()).replace("_", "").lower()


def _text(values: Mapping[str, Any], column: str, where: str) -> str:
    value = values.get(column)
    if isinstance(value, int) and not isinstance(value, bool) and column == "id":
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column} is {seen(value)}; wanted a text; {columns_of(values)}")
    return value


def _number(value: Any, column: str, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # nan is not
        raise UserError(f"{where}: {column} is {seen(value)}; wanted a number from {low:g} to {high:g}")
    return float(value)


def _wrong(values: Mapping[str, Any], where: str) -> float:
    column = next((name for name in WRONG_NAMES if values.get(name) is not None), None)
    return math.nan if column is None else _number(values[column], column, where, 1, 5)


def _loadings(values: Mapping[str, Any], where: str) -> tuple[float, ...]:
    for pattern in LOADING_NAMES:
        names = [pattern.format(name.replace(" ", "")) for name in FOUNDATIONS]
        there = [name for name in names if values.get(name) is not None]
        if there and len(there) < len(names):
            raise UserError(f"{where}: {', '.join(name for name in names if name not in there)} missing beside {there[0]}")
        if there:
            found = tuple(_number(values[name], name, where, 0, 100) for name in names)
            if not sum(found) > 0:
                raise UserError(f"{where}: {pattern.format('*')} are all 0; a vignette is about something")
            return found
    return ()


# ---------------------------------------------------------------- where the rows come from


def _rows(source: str | Path, config: str, download: bool) -> Iterable[Iterable[Record]]:
    """Of each condition."""
    folder = Path(source)
    if not folder.is_dir() and not hub.SPEC.fullmatch(f"{hub.SCHEME}{source}:{config}:{CONDITIONS[0]}"):
        raise UserError(f"vignettes {printable(str(source))}: no such folder, and no name of a dataset of the hub, as org/name")
    if find_spec("datasets") is not None:
        return hub.tables(str(folder.resolve()) if folder.is_dir() else str(source), config, CONDITIONS, download)
    if not folder.is_dir():
        raise UserError(f"vignettes {source}: no such folder, and a dataset of the hub needs the datasets library: pip install datasets")
    return [local(folder, config, condition) for condition in CONDITIONS]


def local(folder: Path, config: str, split: str) -> list[Record]:
    """The rows of a split of a local dataset folder, as the datasets library reads them. Raises UserError."""
    configs = {str(one.get("config_name", "default")): one for one in _header(folder)}
    if config not in configs:
        raise unknown(f"config of {folder}", config, configs)
    listed = configs[config].get("data_files") or ()
    splits = {str(one.get("split")): one.get("path") for one in listed if isinstance(one, Mapping)}
    if split not in splits:
        raise unknown(f"split of {folder}", split, splits)
    paths = [splits[split]] if isinstance(splits[split], str) else splits[split]
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise UserError(f"{folder / 'README.md'}: split {split} has the path {seen(paths)}; wanted a file name or several")
    out: list[Record] = []
    for path in paths:
        file = folder / path
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / 'README.md'}: {printable(path)} is not in the folder")
        out += sources.read_rows(file)
    return out


def _header(folder: Path) -> list[dict[str, Any]]:
    """`configs` of README.md's YAML header."""
    card = folder / "README.md"
    try:
        lines = card.read_text(encoding="utf-8").splitlines()
        end = lines.index(HEADER, 1) if lines[:1] == [HEADER] else 0
        found = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{card}: its YAML header cannot be read ({first_line(error)}); wanted configs with data_files") from None
    configs = found.get("configs") if isinstance(found, dict) else None
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise UserError(f"{card}: has no `configs` in a YAML header; wanted config_name and data_files (split, path) of each")
    return configs
