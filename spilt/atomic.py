"""Whole files or none: write to a temporary name beside the target, flush to disk, rename."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TEMPORARY = ".tmp-"  # every unfinished file has this in its name, so that `verify` can find what a crash left


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8). A reader sees the old file or the new one, never a part.

    Two writers: the later rename wins, with a whole file. Parent folders are made. Errors of the disk pass through,
    after the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
