"""How a program speaks: what comes out of a file or a name never steers the terminal, no character ends it, a mistake is one message."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

from spilt.errors import UserError, printable


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


def program(parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], int]) -> int:
    """The exit code of a program that does `work` with its words; 2 with one message for what the user got wrong.

    Raises SystemExit as argparse does: for --help, and for words that the parser refuses.
    """
    ready()
    complete(parser)
    args = parser.parse_args(argv)
    try:
        return work(args)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        complain("")  # the terminal's ^C has a line of its own
        complain("interrupted; what was finished is kept, the same command goes on from there")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name too long for the file system, a file that went away while it was read
        complain(f"error: {error.filename or ''}: {error.strerror or error}")
        return 2


COMPLETING = "_ARGCOMPLETE"  # set by the shell that asks what may come next: the number of words that are the command's name


def words_so_far() -> list[str] | None:
    """The words typed up to the one that a shell wants completed; None when this is an ordinary run, or argcomplete is not installed."""
    if COMPLETING not in os.environ:
        return None
    try:
        from argcomplete import split_line
    except ImportError:
        return None
    before: list[str] = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    return before[int(os.environ[COMPLETING]) :]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and end; in an ordinary run nothing happens."""
    if words_so_far() is not None:
        from argcomplete import autocomplete

        autocomplete(parser)


class Formatter(logging.Formatter):
    """Warnings as `complain` prints them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)
