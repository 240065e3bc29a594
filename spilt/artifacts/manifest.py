"""How an artifact came to be: a JSON file beside it, and the identity by which a rerun knows its own work.

Identity is computed alike from the plan and from a stored artifact: a hash over the resolved settings, the hashes of
model and data, and the version of the method's code. Device, batch size and the time of day are not in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from spilt import __version__
from spilt.artifacts.atomic import atomic_write_all
from spilt.errors import UserError

KNOWN_BY = ("torch", "transformers", "numpy")
UNSETTLED_NS = 100_000_000  # after a write, for this long a file's times cannot tell whether it was written again


def manifest_path(artifact: Path) -> Path:
    """layer_20.pt -> layer_20.manifest.json"""
    return artifact.with_name(artifact.stem + ".manifest.json")


def digest(data: bytes) -> str:
    """sha256, hex."""
    return hashlib.sha256(data).hexdigest()


class Signature(NamedTuple):
    """What changes when a file is written or another takes its place; `copy -p` keeps the first two, nothing keeps all."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Signature:
        """Raises UserError for what is neither file nor folder: a FIFO would be waited for, a device read without end."""
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path}: is no plain file (a FIFO, a socket or a device); put a file there")
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def settled(self) -> bool:
        """Old enough that another write would have another time: file systems count time in steps of some milliseconds."""
        return abs(time.time_ns() - self.ctime_ns) > UNSETTLED_NS


@lru_cache(maxsize=4096)
def _hash_file(path: Path, _: Signature) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else digest(file.read())


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, hex; read once as long as its signature stays."""
    signature = Signature.of(path)
    return (_hash_file if signature.settled else _hash_file.__wrapped__)(path, signature)


HASHES = {"model": "model", "data": "data", "vectors": "vector"}  # parts that are hashes: they differ without a value to show


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What decides a result and is not the same: 'limit 4 (now 8), another vector'. '' when all is."""
    said = []
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if old == new:
            continue
        if name in HASHES:
            said.append(f"another {HASHES[name]}")
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            said.append(differences(old, new))
        else:
            said.append(f"{name} {_short(old)} (now {_short(new)})")
    return ", ".join(said)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def identity(parts: dict[str, Any]) -> str:
    """One hash for everything that decides the result."""
    return digest(json.dumps(parts, sort_keys=True, default=str).encode())


@lru_cache(maxsize=1)
def versions() -> tuple[tuple[str, str], ...]:
    """(library, version) of those that a result may depend on."""
    from importlib import metadata  # brings the e-mail parser, a tenth of --help

    return tuple((name, metadata.version(name)) for name in KNOWN_BY)


def write(artifact: Path, data: bytes | str, parts: dict[str, Any], notes: dict[str, Any] | None = None) -> None:
    """Store an artifact with its manifest, each whole or not at all; a disk without room for both replaces neither.

    The manifest is renamed first: it holds the artifact's hash, so a crash between the two leaves a pair that does not
    match and is made again, never a result that nobody can place.
    """
    data = data.encode() if isinstance(data, str) else data
    record = {
        "artifact": artifact.name,
        "sha256": digest(data),
        "bytes": len(data),
        "identity": identity(parts),
        "parts": parts,
        "notes": notes or {},
        "spilt": __version__,
        "versions": dict(versions()),
        "python": platform.python_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    record = json.loads(json.dumps(record, default=str))  # as it will be read
    record["record_sha256"] = _own_hash(record)
    about = json.dumps(record, indent=1, sort_keys=True) + "\n"
    atomic_write_all([(manifest_path(artifact), about), (artifact, data)])


def _own_hash(record: dict[str, Any]) -> str:
    """Of everything but the time of day and itself: a digit that changed on the disk is seen."""
    kept = {key: value for key, value in record.items() if key not in ("created", "record_sha256")}
    return digest(json.dumps(kept, sort_keys=True).encode())


def read(artifact: Path) -> dict[str, Any] | None:
    """The manifest of an artifact; None when there is none (made by the released code), or it is not readable JSON or was changed."""
    path = manifest_path(artifact)
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, a folder in its place, no JSON, brackets without end
        return None
    if not isinstance(found, dict) or found.get("record_sha256", (own := _own_hash(found))) != own:
        return None
    return found


def matches(artifact: Path, record: dict[str, Any]) -> bool:
    """Whether the artifact's bytes are those that the manifest speaks of."""
    try:
        return os.path.getsize(artifact) == record.get("bytes") and file_hash(artifact) == record.get("sha256")
    except OSError:
        return False


def is_as_recorded(artifact: Path) -> bool:
    """Whether nothing speaks against its bytes: they are those of its manifest, or it has none (the released code's)."""
    return not manifest_path(artifact).exists() or matches(artifact, read(artifact) or {})


def standing(artifact: Path, parts: dict[str, Any]) -> str:
    """'missing' | 'done' (this very result) | 'foreign' (no manifest: the released code's) | 'stale' (other settings) | 'damaged'."""
    if not artifact.exists():
        return "missing"
    if not manifest_path(artifact).exists():
        return "foreign"
    record = read(artifact)
    if record is None or not matches(artifact, record):
        return "damaged"
    return "done" if record.get("identity") == identity(parts) else "stale"
