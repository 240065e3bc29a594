"""How a program speaks: what comes out of a file or a name never steers the terminal, no character ends it, a mistake is one message."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from spilt.errors import UserError, printable
from spilt.team import TeamError, follows, place

said = logging.getLogger("spilt.said")  # all that is printed, for a log file
said.propagate = False
said.setLevel(logging.INFO)
said.addHandler(logging.NullHandler())


def ready() -> None:
    """A character that the terminal's encoding lacks is shown as an escape, not a reason to stop; warnings go to stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = Handler(logging.WARNING)
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def say(text: str = "", *, lines: bool = False) -> None:
    """One line on stdout; `lines` as in printable."""
    said.info("%s", printable(text, lines))
    print(printable(text, lines))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def complain(text: str) -> None:
    """A message on stderr; its line breaks stay, indented (printable)."""
    said.log(logging.ERROR if text.startswith(("error", "Traceback")) else logging.INFO, "%s", printable(text, lines=True))
    _print(printable(text, lines=True))


def _print(text: str) -> None:
    """On stderr, above the bars where there are any."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def program(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], int], *, shared: bool = False
) -> int:
    """The exit code of a program that does `work` with its words; 2 with one message for what the user got wrong.

    shared: the processes of a launcher share the work; otherwise several are refused.

    Raises SystemExit as argparse does: for --help, and for words that the parser refuses.
    """
    ready()
    complete(parser)
    args = _parsed(parser, argv)
    with ExitStack() as stack:

        def begun() -> int:
            rank, size = place()
            if size > 1 and not shared:  # each would do the same work and write the same files
                if rank == 0:
                    complain(f"error: {parser.prog} is one process, and a launcher has started {size}; start it without the launcher")
                return 2
            if getattr(args, "log", None) is not None:
                stack.enter_context(logging_to(args.log, dry=args.dry_run))
            return work(args)

        return spoken(begun)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The words; they are the same for all processes of a launcher, so the first says what is wrong with them."""
    if not follows():
        return parser.parse_args(argv)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parser.parse_args(argv)
    except SystemExit:
        raise SystemExit(0) from None  # a launcher ends the first when another ends with an error, also before it has spoken


def spoken(work: Callable[[], int], speaks: Callable[[], bool] = lambda: True) -> int:
    """The exit code of `work`; what the user got wrong is one message and 2. speaks: whether it is this process that tells."""

    def tell(text: str) -> None:
        if speaks():
            complain(text)

    try:
        return work()
    except UserError as error:
        tell(f"error: {error}")
        return 2
    except TeamError as error:
        tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        if not follows():
            complain("")  # the terminal's ^C has a line of its own; what it left of a bar's second line goes
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[J")
            complain("interrupted; what was finished is kept, the same command goes on from there")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name too long for the file system, a file that went away while it was read
        tell(f"error: {error.filename or ''}: {error.strerror or error}")
        return 2
    except Exception:
        said.exception("not foreseen")
        raise


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


class Handler(logging.Handler):
    """Warnings where `complain` prints."""

    def emit(self, record: logging.LogRecord) -> None:
        _print(self.format(record))


class Formatter(logging.Formatter):
    """Warnings as `complain` prints them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


# ---------------------------------------------------------------- a log file

_NAME = r"[\w-]*(?:api[_-]?key|secret|passw(?:or)?d|authorization|(?:access|auth|hf|bearer)[_-]?token)[\w-]*"
_SECRET = re.compile(rf"""(--{_NAME}[=\s]\s*|{_NAME}["']?\s*[=:]\s*(?:bearer\s+)?["']?|://[^/\s:@]*:)[^\s"',}}@]+""", re.IGNORECASE)
_KEPT_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?$", re.IGNORECASE)  # names in the environment


def without_secrets(text: str) -> str:
    """Values of what is called a key or a password, and the environment's keys wherever they stand, as ***."""
    for name, value in os.environ.items():
        if _KEPT_SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET.sub(r"\1***", text)


class _LogFormatter(Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full ends the log, not the run."""
        for logger in (logging.getLogger(), said):
            logger.removeHandler(self)
        _print(printable(f"WARNING: {self.baseFilename}: {sys.exc_info()[1]}; nothing more is written there"))


def _refuse_no_log(path: Path) -> None:
    """A mistyped name must not add lines to a model or to data."""
    if path.exists() and not path.is_file():
        raise UserError(f"--log {path}: is no plain file; give the name of a new one, or of an earlier log")
    if path.exists():
        with path.open("rb") as file:
            start = file.read(11)
        if start and not re.fullmatch(rb"\d{4}-\d\d-\d\d ", start):
            raise UserError(f"--log {path}: holds something else than a log; give another name")


@contextmanager
def logging_to(path: Path, *, dry: bool = False) -> Iterator[None]:
    """Inside, everything that is said is appended to a file too, and more. Raises UserError where it cannot be. dry: nothing is written."""
    try:
        _refuse_no_log(path)
        if dry and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError("there is no such folder, or it may not be written to")
        handler = None if dry else _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--log {path}: cannot be written: {error.strerror or error}") from None
    if handler is None:
        yield
        return
    handler.setFormatter(_LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("spilt")
    before = ours.level
    ours.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    for logger in (logging.getLogger(), said):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in (logging.getLogger(), said):
            logger.removeHandler(handler)
        logging.captureWarnings(False)
        ours.setLevel(before)
        with suppress(OSError):  # of a full disk: it has been told
            handler.close()
