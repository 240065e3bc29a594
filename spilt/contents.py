"""What is in a stored file: is it readable, complete and finite, as its manifest says or, without one, as the released code wrote it?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from spilt.analysis.provenance import Artifact
from spilt.artifacts import losses, manifest, scores
from spilt.artifacts.texts import CONCEPT_KEYS, ROW_KEYS
from spilt.cell import FORMS
from spilt.data import readers, sources
from spilt.errors import UserError
from spilt.model import checkpoint
from spilt.steering import layer_file


class Damaged(Exception):
    """An artifact is not what it should be; the message says how."""


def _vector(artifact: Artifact) -> str:
    """Loads as plain tensors; shapes of one concept go together and are the model's; every value is finite."""
    stored = layer_file.read(artifact.path)
    form = artifact.form or layer_file.form_of(stored)
    if layer_file.has_linears(stored):
        return f"{len(layer_file.linears(stored, artifact.path, form))} linear maps"
    if FORMS[form].bare:
        shape = tuple(getattr(stored, "shape", ()))
        if not hasattr(stored, "shape"):  # the words of a run that reads it
            layer_file.one_concept(stored, artifact.path, form, None)
        if len(shape) not in (1, 2) or 0 in shape:
            raise Damaged(f"holds a {type(stored).__name__} of shape {list(shape)}; a vector is [D] or, for several concepts, [n, D]")
        concepts: list[Any] = list(range(shape[0])) if len(shape) == 2 else [None]
    else:
        several = isinstance(stored, dict) and stored and all(isinstance(value, dict) for value in stored.values())
        concepts = list(stored) if several else [None]
    for concept in concepts:
        state = layer_file.one_concept(stored, artifact.path, form, concept)
        hidden, width = _sizes(state, form, artifact)
        layer_file.check_shapes(state, artifact.path, form, hidden, width, None)
    return f"{len(concepts)} concepts" if len(concepts) > 1 else ""


def _sizes(state: Any, form: str, artifact: Artifact) -> tuple[int, int]:
    """D of the model where config.json says it, else the file's own; F is the file's own: the read point decides it."""
    found: dict[str, int] = {}
    for name, axes in FORMS[form].tensors.items():
        shape = tuple(getattr(state if FORMS[form].bare else state.get(name), "shape", ()))
        found.update(zip(axes, shape, strict=False))
    config = checkpoint.text_config(checkpoint.optional_json(artifact.base_dir / "models" / artifact.model / checkpoint.CONFIG))
    said = config.get("hidden_size", config.get("n_embd"))
    return said if isinstance(said, int) else found.get("D", 0), found.get("F", 0)


def _results(artifact: Artifact) -> str:
    """Rows of the contract's keys and types; with a manifest as many as were asked for."""
    try:
        rows = json.loads(artifact.path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not readable as JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise Damaged(f"holds a {type(rows).__name__}{'' if rows else ' that is empty'}; wanted a list of rows")
    if artifact.path.name.startswith("all_generation_results_m"):
        for number, block in enumerate(rows):
            _keys(block, CONCEPT_KEYS, f"entry {number}", exactly=artifact.record is not None)
            if not isinstance(block["generated_results"], list):
                raise Damaged(f"entry {number}: generated_results is no list")
            _rows(artifact, block["generated_results"], f"entry {number}, ", block["concept_id"])
        have, wanted = [block["concept_id"] for block in rows], artifact.parts.get("concepts")
        if artifact.record is not None and have != wanted:
            raise Damaged(f"has concepts {have}; wanted {wanted}")
        return ""
    _rows(artifact, rows, "", None)
    return ""


def _rows(artifact: Artifact, rows: list[Any], where: str, concept: int | None) -> None:
    settings, ours = artifact.settings, artifact.record is not None
    for number, row in enumerate(rows):
        here = f"{where}row {number}"
        _keys(row, ROW_KEYS, here, exactly=ours)
        for name in ("orig_pred", "pred", "complete_output"):
            texts = row[name]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise Damaged(f"{here}: {name} is no list of texts")
            count = settings.get("num_responses", len(texts)) if name != "orig_pred" or settings.get("generate_orig_output") else 0
            if ours and len(texts) != count:
                raise Damaged(f"{here}: {name} has {len(texts)} texts; wanted {count}")
        if not isinstance(row["input"], str) or not isinstance(row["reference_response"], str | None):
            raise Damaged(f"{here}: input or reference_response is no text")
    if ours and (wanted := _wanted_rows(artifact, concept)) is not None and len(rows) != wanted:
        raise Damaged(f"{where}{len(rows)} rows; wanted {wanted}, one per prompt")


def _losses(artifact: Artifact) -> str:
    """Columns, one row per (example, pair), every number finite. A file of the released code only has to be readable."""
    rows = sources.read_rows(artifact.path)
    if not rows:
        raise Damaged("no rows")
    if artifact.record is None:
        if missing := [name for name in (losses.LOSS, losses.APPLIED) if name not in rows[0].values]:
            raise Damaged(f"no column {missing[0]!r}; {sources.columns_of(rows[0].values)}")
        return ""
    _numbers(rows, losses.COLUMNS, ("pair", "target"))
    pairs = artifact.settings.get("preference_pairs") or ["orig_add", "orig_sub"]
    order = [(str(example), pair) for example in range(len(rows) // len(pairs)) for pair in pairs]
    if [(row.values["example"], row.values["pair"]) for row in rows] != order:
        raise Damaged(f"its {len(rows)} rows are not one per example and pair ({', '.join(pairs)}) in order")
    wanted = _wanted_rows(artifact, artifact.parts.get("concept"))
    if wanted is not None and len(rows) != wanted * len(pairs):
        raise Damaged(f"{len(rows)} rows; wanted {wanted * len(pairs)}, one per example and pair")
    return ""


def _table(artifact: Artifact) -> str:
    """Columns, finite numbers, and one row for each multiplier of the manifest, example and answer."""
    rows = sources.read_rows(artifact.path)
    _numbers(rows, losses.TABLE, ("positions", "target"))
    if artifact.record is None:
        return ""
    there = list(dict.fromkeys(float(row.values["multiplier"]) for row in rows))
    wanted = artifact.record.get("notes", {}).get("multipliers")
    if there != wanted:
        raise Damaged(f"multipliers {there}; its manifest speaks of {wanted}")
    asked = [(row.values["multiplier"], row.values["example"], row.values["target"]) for row in rows]
    if len(set(asked)) != len(rows) or len(rows) % len(there):
        raise Damaged(f"its {len(rows)} rows are not one per multiplier, example and answer")
    examples, count = _wanted_rows(artifact, artifact.parts.get("concept")), len({example for _, example, _ in asked})
    if examples is not None and examples != count:
        raise Damaged(f"{count} examples; wanted {examples}")
    return ""


def _control(artifact: Artifact) -> str:
    rows = sources.read_rows(artifact.path)
    if artifact.record is None:
        return ""
    _numbers(rows, losses.CONTROL, ("split", "utility", "multiplier"))
    drawn = artifact.parts.get("control")
    if isinstance(drawn, dict):
        wanted = drawn.get("draws", 0) * (2 * len(drawn.get("doses", [])) + 1)
        if len(rows) != wanted:
            raise Damaged(f"{len(rows)} rows; wanted {wanted}, one per draw and dose")
    return ""


def _control_texts(artifact: Artifact) -> str:
    _numbers(sources.read_rows(artifact.path), losses.CONTROL_TEXTS, ())
    return ""


def _scores(artifact: Artifact) -> str:
    """Columns; each row has either a finite value or a reason; of one multiplier; with a manifest as many as it speaks of."""
    rows = sources.read_rows(artifact.path)
    for row in rows:
        if bool(row.values.get("value")) == bool(row.values.get("reason")):
            raise Damaged(f"{row.where}: wanted a value, or the reason why there is none")
    _numbers([row for row in rows if row.values["value"]], scores.TABLE, ("measure", "reason"))
    wanted = (artifact.record or {}).get("notes", {}).get("rows", len(rows))
    if len(rows) != wanted:
        raise Damaged(f"{len(rows)} rows; its manifest speaks of {wanted}")
    return ""


def _wanted_rows(artifact: Artifact, concept: int | None) -> int | None:
    """How many examples or prompts the manifest's request reads; None when its data is not here any more."""
    try:
        fmt = artifact.data()
        if manifest.file_hash(fmt.path) != artifact.parts.get("data"):
            return None
        sizes = (artifact.parts.get("limit"), artifact.settings.get("generation_data_size"), artifact.settings.get("max_num_of_examples"))
        limit = min((size for size in sizes if isinstance(size, int)), default=None)
        return len(readers.read_entry(fmt, concept if fmt.multi_concept else None, limit))
    except (UserError, OSError):
        return None


def _keys(value: Any, wanted: Sequence[str], where: str, exactly: bool) -> None:
    if not isinstance(value, dict):
        raise Damaged(f"{where}: a {type(value).__name__} where an object was wanted")
    if missing := [name for name in wanted if name not in value]:
        raise Damaged(f"{where}: no {missing[0]!r}; has: {', '.join(value)}")
    if exactly and (extra := [name for name in value if name not in wanted]):
        raise Damaged(f"{where}: {extra[0]!r} does not belong there")


def _numbers(rows: Sequence[sources.Record], columns: Sequence[str], but: Sequence[str]) -> None:
    """A table has just these columns, and a finite number in all of them but some."""
    if rows and tuple(rows[0].values) != tuple(columns):
        raise Damaged(f"columns {', '.join(rows[0].values)}; wanted {', '.join(columns)}")
    for row in rows:
        for value in (row.values[name] for name in columns if name not in but):
            try:
                finite = math.isfinite(float(value))
            except ValueError:
                raise Damaged(f"{row.where}: {value!r} is not a number") from None
            if not finite:
                raise Damaged(f"{row.where}: {value} is not finite; measure at a smaller multiplier or with --dtype float32")


# names of stored files -> what looks into them: (artifact) -> a note, or Damaged with what is wrong
KINDS: dict[str, Callable[[Artifact], str]] = {
    r"layer_\d+\.pt": _vector,
    "|".join(map(re.escape, losses.SPLITS.values())): _losses,
    "|".join(map(re.escape, (*losses.TABLES.values(), *losses.PROMPTS.values()))): _table,
    r"control\.csv": _control,
    r"control_texts\.csv": _control_texts,
    r"scores_m.+\.csv": _scores,
    r".+_results\.json|all_generation_results_m.+\.json": _results,
}
