"""How something is printed: what comes out of a file or a name never steers the terminal, and no character ends the program."""

from __future__ import annotations

import io
import logging
import sys

from spilt.errors import printable


def ready() -> None:
    """A character that the terminal's encoding lacks is shown as an escape, not a reason to stop; warnings go to stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def say(text: str = "", *, lines: bool = False) -> None:
    """One line on stdout; `lines` as in printable."""
    print(printable(text, lines))


def complain(text: str) -> None:
    """A message on stderr; its line breaks stay, indented (printable)."""
    print(printable(text, lines=True), file=sys.stderr)


class Formatter(logging.Formatter):
    """Warnings as `complain` prints them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)
