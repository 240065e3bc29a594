"""Is what is stored sound? Every artifact under vectors/, generation/ and weights/ against its manifest and against itself. Reads only.

ok: as its manifest says (libraries of other versions are named).
stale: sound, but the model, the data or the vectors that it was made from have changed since.
damaged: not the bytes of its manifest, or not readable, complete and finite. foreign: no manifest (the released code's), and sound.
leftover: what a killed run left behind; a rerun of the same command uses it or makes it again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spilt import verbs
from spilt.analysis.provenance import Artifact
from spilt.artifacts import manifest, store
from spilt.artifacts.atomic import TEMPORARY
from spilt.contents import KINDS, Damaged
from spilt.errors import UserError
from spilt.model import checkpoint, identity, template
from spilt.terminal import program, say

OK, STALE, DAMAGED, FOREIGN, LEFTOVER = STATES = ("ok", "stale", "damaged", "foreign", "leftover")
MANIFEST = ".manifest.json"
WEIGHTS = "weights"  # the folder of `spilt weights`


class Found(NamedTuple):
    """One line of the list."""

    state: str
    path: Path
    reason: str = ""


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
    if path.relative_to(base_dir).parts[2:4] == ("get_sft_loss", "report"):
        return None
    contents = next((check for pattern, check in KINDS.items() if re.fullmatch(pattern, name)), None)
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


def _short(base_dir: Path, path: Path) -> str:
    return store.Store(base_dir).relative(path)


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
