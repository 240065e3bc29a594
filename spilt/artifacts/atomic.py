"""Whole files or none: write to a temporary name beside the target, flush to disk, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # every unfinished file has this in its name, so that `verify` can find what a crash left
HALF_REPLACED = "half-replaced.json"  # names the files of its folder that atomic_write_together has begun to replace
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
    with _on_the_disk(files) as ready:
        for temporary, path in ready:
            os.replace(temporary, path)
    for folder in {path.parent for path, _ in files}:
        sweep(folder)


def atomic_write_together(files: Sequence[tuple[Path, bytes | str]]) -> None:
    """Files of one folder that mean something only together: a reader that asks `half_replaced` uses all the old ones or all the new.

    Two renames can't be one. A note in the folder names the files before the first rename and is removed after the last; a
    process killed between leaves it there, and the next one that writes these files whole removes it. One writer at a time.
    Raises OSError (EBUSY: another process is writing them).
    """
    folder = files[0][0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with _one_writer(folder), _on_the_disk(files) as ready:
        note, names = folder / HALF_REPLACED, [path.name for path, _ in files]
        known = _named(note) or []
        others = [name for name in known if name not in names]
        atomic_write(note, json.dumps([*names, *others]) + "\n")
        replaced = 0
        try:
            _flush(folder)  # the note is on the disk before the first rename, also when the machine stops
            for temporary, path in ready:
                os.replace(temporary, path)
                replaced += 1
        except BaseException:
            if not replaced and not known:
                note.unlink()
            raise
        _flush(folder)
        if others:
            atomic_write(note, json.dumps(others) + "\n")
        else:
            note.unlink()
    sweep(folder)


def half_replaced(path: Path) -> list[str]:
    """The names of the files that `path` belongs to, where atomic_write_together was cut off among them; [] where all is well."""
    names = _named(path.parent / HALF_REPLACED)
    if names is None:  # nobody can say that all is well
        return [path.name]
    return names if path.name in names else []


def _named(note: Path) -> list[str] | None:
    """What a note names: nothing where there is none, None where it can't be read."""
    try:
        names = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


@contextmanager
def _on_the_disk(files: Sequence[tuple[Path, bytes | str]]) -> Iterator[list[tuple[Path, Path]]]:
    """(temporary file, target) of each, written and flushed; an error in the block removes what was not renamed."""
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
        yield ready
    except BaseException:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """A lock on the folder itself; the system gives it back when its owner dies."""
    import fcntl  # not on every system that can read what was written

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process is writing there", str(folder)) from None
        yield
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    """The folder's names are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
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
