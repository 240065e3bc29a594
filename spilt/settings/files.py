"""Read one YAML file into plain values, or say what is wrong with it, with file and line.

The file comes from outside: nothing in it may hang, exhaust memory or raise anything but `UserError`.
"""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from spilt.errors import UserError, half_pair

MAX_BYTES = 1_000_000  # a settings file has some 30 lines
MAX_DEPTH = 20  # nested lists and mappings; the deepest released file has 4
MAX_ALIASES = 8  # `*name` nodes; each can double what was read before ("YAML bomb")
MAX_INT = 10**15  # larger than any count or seed
TAG = "tag:yaml.org,2002:"  # of YAML's own kinds
DATA, SOURCE = Path("data"), "source.json"  # data/{name}/source.json: what data/own.py made the files beside it of

log = logging.getLogger("spilt.settings")


def load_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file; only str, int, finite float, bool, None, list, dict[str, ...] come out.

    A key given twice takes its last value and is logged as a warning, once per file. `1e-2` stays a string here (YAML 1.1);
    the settings read it as a number where they want one.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; wanted a YAML file")
        if path.exists() and not path.is_file():  # a pipe would wait for its writer
            raise UserError(f"{path}: is no plain file; wanted a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path}: cannot be read ({error})") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes; a settings file has some thousand")
    return deepcopy(_mapping(str(path), data))  # a private copy: the cached one must not change under the next reader


def tree_of(base_dir: Path, part: Path) -> Path:
    """The folder below which `part` of hparams/ is read: base_dir or, where that has models but no hparams, what comes with the package.

    An installed package has it inside (setup.py puts it there), a checkout beside it. A folder without models is no base folder.
    """
    return next((base for base in trees(base_dir) if (base / part).is_dir()), base_dir) if (base_dir / "models").is_dir() else base_dir


def trees(base_dir: Path) -> tuple[Path, ...]:
    """Where hparams/ may lie, best first."""
    package = Path(__file__).resolve().parents[1]
    return (base_dir, package, package.parent)


def is_own(base_dir: Path, dataset: str) -> bool:
    """Whether the data were made of a user's files (data/own.py): they need no settings files."""
    try:
        return (base_dir / DATA / dataset / SOURCE).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


@lru_cache(maxsize=512)  # config.yaml serves every cell of a sweep; the cache also makes its warnings come once
def _mapping(name: str, data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    values = parse_yaml(text, name)
    if values is None:
        raise UserError(f"{name}: is empty; wanted a mapping of `key: value` lines (`{{}}` if nothing is to be set)")
    if not isinstance(values, dict):
        raise UserError(f"{name}: holds a {kind(values)}; wanted a mapping of `key: value` lines")
    return values


def parse_yaml(text: str, name: str) -> Any:
    """Any YAML text as plain values (also a single scalar, for `--set key=value`); `name` stands for the file in messages."""
    try:
        _refuse_bombs(text, name)
        loader = _Loader(text, name)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = " (a tab? indent with spaces)" if "start any token" in str(error.problem) else ""
        raise UserError(f"{_where(name, mark)}: broken YAML: {error.problem or error.context}{hint}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{name}: broken YAML: character {error.position} cannot be read ({error.reason})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: broken YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # PyYAML lets these through for a value that contradicts its explicit tag, such as `!!bool perhaps` or `0x_`
        raise UserError(f"{name}: broken YAML: a value cannot be read ({type(error).__name__}: {error})") from None


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster, and not in every build


class _Loader(_Base):  # type: ignore[misc]
    """SafeLoader that knows its file's name, reports keys given twice and refuses numbers that no setting can mean."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.file = name

    def wrong(self, node: yaml.Node, fact: str) -> UserError:
        return UserError(f"{_where(self.file, node.start_mark)}: {fact}")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if key.tag == f"{TAG}merge":
                    continue
                if key.tag != f"{TAG}str":
                    shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                    raise self.wrong(key, f"the key {shown} is not a word; put it in quotes if it is a name")
                if key.value in seen:
                    log.warning(str(self.wrong(key, f"the key {key.value!r} is given twice; the last value is used")))
                seen.add(key.value)
        mapping = super().construct_mapping(node, deep)
        if odd := [key for key in mapping if not isinstance(key, str)]:  # brought in by a merge, `<<: {1: 2}`
            raise self.wrong(node, f"the key {odd[0]!r} is not a word; put it in quotes if it is a name")
        return mapping

    def construct_text(self, node: yaml.ScalarNode) -> str:
        value = self.construct_scalar(node)
        if half_pair(value):
            raise self.wrong(node, "the text holds half of a surrogate pair, which no file can store")
        return value

    def construct_int(self, node: yaml.ScalarNode) -> int:
        if len(self.construct_scalar(node)) > 70 or abs(value := self.construct_yaml_int(node)) > MAX_INT:  # 70: binary digits
            raise self.wrong(node, f"the number {node.value[:30]} is beyond {MAX_INT:,}")
        return value

    def construct_float(self, node: yaml.ScalarNode) -> float:
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise self.wrong(node, f"{node.value[:30]} is not a finite number")
        return value

    def refuse_tag(self, node: yaml.Node) -> Any:
        raise self.wrong(node, f"the tag {node.tag.replace(TAG, '!!')} is not allowed; wanted plain text, numbers and lists")


# Dates are of no use in settings: left as the text they are, so that `2024-13-45` cannot fail and everything stays JSON-able.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != f"{TAG}timestamp"] for first, rules in _Base.yaml_implicit_resolvers.items()
}
_made_by = {"str": _Loader.construct_text, "int": _Loader.construct_int, "float": _Loader.construct_float}
for _tag, _made in {**_made_by, **dict.fromkeys(("timestamp", "binary", "omap", "pairs", "set"), _Loader.refuse_tag)}.items():
    _Loader.add_constructor(f"{TAG}{_tag}", _made)
_Loader.add_constructor(None, _Loader.refuse_tag)


def _refuse_bombs(text: str, name: str) -> None:
    """Look at the events, which cost no recursion and no memory, before anything is built from them."""
    open_anchors: list[str | None] = []
    aliases = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            if len(open_anchors) > MAX_DEPTH:
                raise UserError(f"{_where(name, event.start_mark)}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            open_anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in open_anchors:
                raise UserError(f"{_where(name, event.start_mark)}: *{event.anchor} contains itself")
            if aliases > MAX_ALIASES:
                raise UserError(f"{_where(name, event.start_mark)}: more than {MAX_ALIASES} aliases (*name); write the values out")


def _where(name: str, mark: Any) -> str:
    return name if mark is None else f"{name}, line {mark.line + 1}"


def kind(value: Any) -> str:
    """The word for a value's type in messages."""
    names = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)
