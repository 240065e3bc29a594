"""engineered_prompt: system prompts from a file, a pair for each foundation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from spilt.errors import UserError, first_line, unknown

SHIPPED = Path(__file__).parent / "shipped" / "engineered.yaml"


class Prompts(NamedTuple):
    """less: towards judging a breach of the foundation less wrong; more: the other way."""

    less: str
    more: str


def read(path: Path = SHIPPED) -> dict[str, Prompts]:
    """foundation -> its prompts, of a YAML file with `less` and `more` of each. Raises UserError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: wanted a name of a foundation with {' and '.join(Prompts._fields)} for each")
    out = {}
    for name, texts in found.items():
        if not isinstance(texts, dict) or not all(isinstance(texts.get(side), str) and texts[side].strip() for side in Prompts._fields):
            raise UserError(f"{path}: {name}: wanted the texts {' and '.join(Prompts._fields)}")
        out[str(name)] = Prompts(*(texts[side].strip() for side in Prompts._fields))
    return out


def engineered(foundation: str, intent: int, path: Path = SHIPPED) -> tuple[str, str]:
    """(of the arm plus, of the arm minus). intent: -1 where plus is meant to make a breach less wrong, 1 more. Raises UserError."""
    known = read(path)
    if foundation not in known:
        raise unknown(f"foundation with prompts in {path.name}", foundation, known)
    less, more = known[foundation]
    return (less, more) if intent < 0 else (more, less)
