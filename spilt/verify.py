"""Is what is stored sound? Every artifact under vectors/, generation/ and weights/ against its manifest and against itself. Reads only.

ok: as its manifest says (libraries of other versions are named).
stale: sound, but the model, the data or the vectors that it was made from have changed since.
damaged: not the bytes of its manifest, or not readable, complete and finite. foreign: no manifest (the released code's), and sound.
leftover: what a killed run left behind; a rerun of the same command uses it or makes it again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spilt import verbs
from spilt.analysis.provenance import Artifact
from spilt.artifacts import losses, manifest, scores, store
from spilt.artifacts.atomic import TEMPORARY
from spilt.artifacts.texts import CONCEPT_KEYS, ROW_KEYS
from spilt.cell import FORMS
from spilt.data import readers, sources
from spilt.errors import UserError
from spilt.model import checkpoint, identity, template
from spilt.steering import layer_file
from spilt.terminal import program, say

OK, STALE, DAMAGED, FOREIGN, LEFTOVER = STATES = ("ok", "stale", "damaged", "foreign", "leftover")
MANIFEST = ".manifest.json"
WEIGHTS = "weights"  # the folder of `spilt weights`
LOSSES = {name: split for split, name in losses.SPLITS.items()}


class Found(NamedTuple):
    """One line of the list."""

    state: str
    path: Path
    reason: str = ""


class Damaged(Exception):
    """An artifact is not what it should be; the message says how."""


# ---------------------------------------------------------------- what is there


def check(base_dir: Path) -> Iterator[Found]:
    """Every artifact and leftover under a base_dir, in the order of their paths."""
    for path in sorted(_files(base_dir)):
        if found := _check_file(base_dir, path):
            yield found


def unusable(base_dir: Path, path: Path) -> str:
    """Why a stored vector, the released code's too, can't be read or used; '' where it can."""
    found = _check_file(base_dir, path)
    return found.reason if found is not None and found.state == DAMAGED else ""


def _files(base_dir: Path) -> Iterator[Path]:
    """Files below vectors/, generation/ and weights/, through links too, each folder once."""
    been: set[tuple[int, int]] = set()
    for top in ("vectors", "generation", WEIGHTS):
        for folder, inside, names in os.walk(base_dir / top, followlinks=True):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in been:
                inside.clear()
                continue
            been.add((here.st_dev, here.st_ino))
            yield from (Path(folder) / name for name in names)


def _check_file(base_dir: Path, path: Path) -> Found | None:
    """None for a file that is no artifact: logs, and what the report makes anew."""
    name = path.name
    if TEMPORARY in name:
        return Found(LEFTOVER, path, "a write that was cut off; may be deleted")
    if path.relative_to(base_dir).parts[0] == WEIGHTS:
        return _of_weights(base_dir, path)
    if re.fullmatch(r"unfinished_\d+\.jsonl", name):
        what = "losses" if path.relative_to(base_dir).parts[0] == "vectors" else "scores" if path.parent.name == "scores" else "texts"
        return Found(LEFTOVER, path, f"{what} of a run that did not finish; the same command goes on from them")
    if re.fullmatch(r"layer_\d+\.unfinished\.pt", name):
        return Found(LEFTOVER, path, "state of a fit that did not finish; the same command goes on from it")
    if name.endswith(MANIFEST):
        stem = name.removesuffix(MANIFEST)
        if any((path.with_name(stem + ending)).exists() for ending in (".pt", ".json", ".csv", ".html")):
            return None
        return Found(LEFTOVER, path, "a manifest without its artifact; the same command makes it again")
    contents = None if path.relative_to(base_dir).parts[2:4] == ("get_sft_loss", "report") else _contents_of(path)
    return None if contents is None else _judge(Artifact(base_dir, path), contents)


def _of_weights(base_dir: Path, path: Path) -> Found | None:
    """What `spilt weights` has stored: its bytes, and whether model and inputs are those that it was made of."""
    if path.name == "unfinished.pt" or path.parent.name.startswith("unfinished_"):
        return Found(LEFTOVER, path, "work of a stage that did not finish; the same command goes on from it")
    if path.name.endswith(MANIFEST) or not manifest.manifest_path(path).exists():
        return None
    record = manifest.read(path)
    if record is None or not manifest.matches(path, record):
        return Found(DAMAGED, path, "not the bytes of its manifest")
    name, behaviour, parts = *path.relative_to(base_dir / WEIGHTS).parts[:2], record.get("parts") or {}
    model, root = store.Store(base_dir).model(name), base_dir / WEIGHTS / name / behaviour
    if checkpoint.there(model) and identity.model_hash(model) != parts.get("model"):
        return Found(STALE, path, "the model has changed")
    changed = [one for one, sha in parts.get("inputs", {}).items() if (root / one).is_file() and manifest.file_hash(root / one) != sha]
    return Found(STALE, path, f"made of another {changed[0]}") if changed else Found(OK, path)


def _contents_of(path: Path) -> Any:
    """The function that checks what is in such a file."""
    return next((check for pattern, check in KINDS.items() if re.fullmatch(pattern, path.name)), None)


def _judge(artifact: Artifact, contents: Any) -> Found:
    path = artifact.path
    has_manifest = manifest.manifest_path(path).exists()
    try:
        if not path.is_file():  # a FIFO would be waited for
            raise Damaged("is no plain file, or a link to nothing")
        if has_manifest:
            _as_recorded(artifact)
        note = contents(artifact)
    except (Damaged, UserError) as error:
        return Found(DAMAGED, path, str(error).removeprefix("data file ").removeprefix(str(path)).lstrip(": "))
    except OSError as error:
        return Found(DAMAGED, path, f"cannot be read: {error.strerror or error}")
    except (TypeError, ValueError, KeyError, AttributeError, LookupError) as error:  # a manifest with our keys and another's values
        return Found(DAMAGED, path, f"its manifest is not one of ours ({type(error).__name__}: {error})")
    if not has_manifest:
        return Found(FOREIGN, path, note or "no manifest: made by the released code, or copied without it")
    try:
        changed = _changed(artifact)
    except (OSError, TypeError, ValueError) as error:
        return Found(DAMAGED, path, f"what it was made from cannot be read: {error}")
    return Found(STALE, path, changed) if changed else Found(OK, path, "; ".join(filter(None, (note, _libraries(artifact)))))


def _as_recorded(artifact: Artifact) -> None:
    """The bytes are those of the manifest, and the manifest says what it must."""
    record = artifact.record
    if record is None:
        raise Damaged("its manifest is not readable JSON, or was changed")
    needed = {"sha256": str, "bytes": int, "identity": str, "parts": dict}
    if wrong := [name for name, kind in needed.items() if not isinstance(record.get(name), kind)]:
        raise Damaged(f"its manifest has no usable {wrong[0]!r}")
    verb, concepts = artifact.parts.get("verb"), artifact.parts.get("concepts", [])
    if verb not in verbs.VERBS or not isinstance(concepts, list):
        raise Damaged(f"its manifest has a verb {verb!r}; have: {', '.join(verbs.VERBS)}")
    if manifest.identity(artifact.parts) != record["identity"]:
        raise Damaged("its manifest was changed: identity is not that of its parts")
    size = artifact.path.stat().st_size
    if size != record["bytes"]:
        raise Damaged(f"has {size} bytes, its manifest says {record['bytes']}")
    if manifest.file_hash(artifact.path) != record["sha256"]:
        raise Damaged("its bytes are not those of its manifest (sha256 differs)")


def _changed(artifact: Artifact) -> str:
    """What lies there now and is not what the artifact was made from; '' when nothing is."""
    said, parts = list[str](), artifact.parts
    if parts.get("version") != (now := verbs.VERBS[parts["verb"]].version):
        said.append(f"made by version {parts.get('version')} of the code, this is {now}")
    model = artifact.base_dir / "models" / artifact.model
    if checkpoint.there(model):
        try:
            if identity.model_hash(model) != parts.get("model"):
                said.append(f"model {artifact.model} has changed")
            elif (today := _template(artifact, model)) != parts.get("template"):
                shown = template.difference(parts.get("template"), today)
                said.append(f"the chat template writes the date, and this was made on another day{shown}")
        except UserError as error:
            said.append(str(error))
    try:
        data = artifact.data().path
    except UserError:
        data = None  # not listed any more: nothing to compare with
    if data is not None and data.is_file() and manifest.file_hash(data) != parts.get("data"):
        said.append(f"data {_short(artifact.base_dir, data)} has changed")
    if parts["verb"] == "evaluate" and (changed := _texts_changed(artifact)):  # others keep other things by that name
        said.append(changed)
    then = parts.get("vectors", [])
    for path, before in zip(artifact.vectors(), then, strict=False) if isinstance(then, list) else ():
        if not path.is_file():
            said.append(f"vector {_short(artifact.base_dir, path)} is gone")
        elif manifest.file_hash(path) != before:
            said.append(f"vector {_short(artifact.base_dir, path)} has changed")
    return "; ".join(said)


def _texts_changed(artifact: Artifact) -> str:
    """What became of the texts that scores are of."""
    path = artifact.texts()
    if not path.is_file():
        return f"texts {_short(artifact.base_dir, path)} are gone"
    return "" if manifest.file_hash(path) == artifact.parts["texts"] else f"texts {_short(artifact.base_dir, path)} have changed"


def _template(artifact: Artifact, model: Path) -> list[str] | None:
    return template.identity(model) if artifact.settings.get("use_chat_template", True) else None


def _libraries(artifact: Artifact) -> str:
    """Libraries that were others when it was made: results are then equal up to rounding, as a rule."""
    then = (artifact.record or {}).get("versions")
    then = then if isinstance(then, dict) else {}
    others = [f"{name} {then[name]} (here {now})" for name, now in manifest.versions() if then.get(name, now) != now]
    return f"made with {', '.join(others)}" if others else ""


# ---------------------------------------------------------------- contents


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


# ---------------------------------------------------------------- small helpers


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


def _short(base_dir: Path, path: Path) -> str:
    return store.Store(base_dir).relative(path)


# names of stored files -> what looks into them: (artifact) -> a note, or Damaged with what is wrong
KINDS: dict[str, Callable[[Artifact], str]] = {
    r"layer_\d+\.pt": _vector,
    "|".join(map(re.escape, LOSSES)): _losses,
    "|".join(map(re.escape, (*losses.TABLES.values(), *losses.PROMPTS.values()))): _table,
    r"control\.csv": _control,
    r"control_texts\.csv": _control_texts,
    r"scores_m.+\.csv": _scores,
    r".+_results\.json|all_generation_results_m.+\.json": _results,
}


# ---------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing is damaged. 1: something is. 2: the request is wrong."""
    parser = argparse.ArgumentParser(
        prog="spilt verify", description="Check stored vectors, texts and losses against their manifests; writes nothing."
    )
    parser.add_argument("--base_dir", type=Path, default=Path("."), help="folder that holds vectors/ and generation/ (default: here)")
    parser.add_argument("--quiet", action="store_true", help="list only what is not ok")
    parser.add_argument("--verify", action="store_true", help=argparse.SUPPRESS)  # run_spilt.py --verify
    try:
        return program(parser, argv, _verify)
    except SystemExit as stop:
        return int(stop.code or 0)


def _verify(args: argparse.Namespace) -> int:
    base_dir: Path = args.base_dir
    if not any((base_dir / top).is_dir() for top in ("vectors", "generation")):
        fact = "has neither vectors/ nor generation/" if base_dir.is_dir() else "is no folder"
        raise UserError(f"--base_dir {base_dir} {fact}; give the folder that the runs were started with")
    counts: Counter[str] = Counter()
    for found in check(base_dir):
        counts[found.state] += 1
        if found.state != OK or not args.quiet:
            say(f"{found.state:8}  {_short(base_dir, found.path)}{f': {found.reason}' if found.reason else ''}")
    say()
    say("state     files")
    for state in STATES:
        say(f"{state:8}  {counts[state]:5}")
    if counts[DAMAGED]:
        say()
        say(f"{counts[DAMAGED]} damaged: the command that made a file makes it again (damaged files are never taken for done)")
    return 1 if counts[DAMAGED] else 0


if __name__ == "__main__":
    sys.exit(main())
