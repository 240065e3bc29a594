"""Whole files or none: write to a temporary name beside the target, flush to disk, rename."""

from __future__ import annotations

import os
import re
import secrets
import socket
import zlib
from collections.abc import Sequence
from pathlib import Path

TEMPORARY = ".tmp-"  # every unfinished file has this in its name, so that `verify` can find what a crash left
HERE = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # process ids of another machine on a shared folder say nothing here
_OWNER = re.compile(re.escape(TEMPORARY) + r"([0-9a-f]{8})-(\d{1,9})-[0-9a-f]+\Z")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8). A reader sees the old file or the new one, never a part.

    Two writers: the later rename wins, with a whole file. Parent folders are made. Errors of the disk pass through,
    after the temporary file is removed. What a killed process of this machine left in the folder is removed too.
    """
    atomic_write_all([(path, data)])


def atomic_write_all(files: Sequence[tuple[Path, bytes | str]]) -> None:
    """Several files, renamed one after the other once all of them are on the disk: no room for one means that none is replaced."""
    ready: list[tuple[Path, Path]] = []
    try:
        for path, data in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}{TEMPORARY}{HERE}-{os.getpid()}-{secrets.token_hex(4)}")
            ready.append((temporary, path))
            with open(temporary, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in ready:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path, _ in files}:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are no more."""
    for name in os.listdir(folder):
        owner = _OWNER.search(name)
        if owner and owner[1] == HERE and not _alive(int(owner[2])):
            (folder / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, but there
        return True
    return True
