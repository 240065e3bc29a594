"""Work that is done but not yet in a result: JSON lines in a file beside it, so that a killed run goes on from them."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("spilt")


def _plain(path: Path) -> bool:
    """A file of its own: no link, folder, FIFO or device."""
    return stat.S_ISREG(os.lstat(path).st_mode)


class Journal:
    """One file per process, `unfinished_{process}.jsonl`; it is there only while it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: int | None = None

    def every(self) -> list[Path]:
        """The files of all processes, also those of a run with another number of them."""
        return sorted(self.path.parent.glob("unfinished_*.jsonl"))

    @staticmethod
    def identities_in(path: Path) -> set[Any]:
        """Whose the lines of a file are: each begins with the identity of what it belongs to."""
        return {line[0] if isinstance(line, list) and line and isinstance(line[0], str) else None for line in _lines(path)}

    def whole(self) -> Iterator[Any]:
        """What the lines of all files hold; a line that is no JSON is left out."""
        for path in self.every():
            yield from _lines(path)

    def append(self, values: Iterable[Any]) -> None:
        """One line for each value, written at once: lines of two processes do not mix."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self.path) and not _plain(self.path):
                log.warning("%s: is a link or no plain file: it is not written to, but replaced", self.path)
                self.path.unlink()
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            size = os.fstat(self.file).st_size
            if size and os.pread(self.file, 1, size - 1) != b"\n":  # a kill cut the last line short
                os.write(self.file, b"\n")
        data = b"".join(json.dumps(value).encode() + b"\n" for value in values)
        while data:  # a disk that is nearly full takes a part; the next call takes the rest, or says why not
            data = data[os.write(self.file, data) :]

    def close(self) -> None:
        """The file is let go; it stays until it is removed."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def remove(self) -> None:
        """The results are stored: nobody needs the lines any more."""
        for path in self.every():
            path.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[Any]:
    """What the lines of a file hold; one that is no JSON is left out."""
    try:
        if not _plain(path):
            log.warning("%s: is a link or no plain file: its lines are not used", path)
            return
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:  # another run of the same cell has just finished
        return
    for line in lines:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):  # the line that a kill cut short, or one that is not ours
            continue
