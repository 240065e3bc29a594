"""How far a run is, on stderr: in a terminal a bar over all cells above that of the one in work, elsewhere a line for each finished
cell and, within long ones, a line a minute.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tqdm import tqdm

EVERY, REDRAWN = 60.0, 0.25  # seconds between two lines within a cell; between two pictures of a bar
NEVER = 1e9
Work = tuple[str, float]  # its kind, and its cost in any unit
log = logging.getLogger("spilt")


def time_left(todo: Iterable[Work], done: Iterable[tuple[str, float, float]]) -> float | None:
    """Seconds for `todo` at the speed of `done` (kind, cost, seconds): that of the same kind, else of all. None: nothing is known."""
    finished = [row for row in done if row[1] > 0]
    if not finished:
        return None
    total = 0.0
    for kind, cost in todo:
        rows = [row for row in finished if row[0] == kind] or finished
        total += cost * sum(row[2] for row in rows) / sum(row[1] for row in rows)
    return total


class Progress:
    """Of one run. work: name -> what is to be done; before: how many cells there is nothing to do for; tell: prints a line."""

    def __init__(self, work: Mapping[str, Work], before: int, tell: Callable[[str], None], *, quiet: bool) -> None:
        self.todo, self.finished = dict(work), list[tuple[str, float, float]]()
        self.count, self.total, self.tell, self.quiet = before, before + len(work), tell, quiet
        self.lively = not quiet and sys.stderr.isatty()
        self.start = self.since = time.monotonic()
        self.name, self.inner = "", None
        self.stop = threading.Event()

    def __enter__(self) -> Progress:
        about = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
        self.all = tqdm(total=self.total, initial=self.count, desc="cells", bar_format=about, leave=False, disable=not self.lively)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if not self.quiet:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.thread.is_alive():
            self.thread.join()
        self.all.close()

    def _watch(self) -> None:
        """All drawing is done here: ^C stops the main thread, and never in the middle of a bar."""
        while not self.stop.wait(REDRAWN if self.lively else EVERY):
            if self.lively:
                with tqdm.get_lock():
                    self.all.set_postfix_str(self._left(), refresh=False)
                    for bar in (self.all, self.inner):
                        if bar is not None and not bar.disable:  # closed
                            bar.refresh(nolock=True)
            elif self.name:
                self.tell(self._line())

    def bar(self, items: Iterable[Any] | None = None, **given: Any) -> Any:
        """A tqdm over a part of the cell in work; outside a terminal it only counts."""
        how = {"position": 1} if self.lively else {"file": io.StringIO()}
        self.inner = tqdm(items, leave=False, disable=self.quiet, mininterval=NEVER, maxinterval=NEVER, **how, **given)
        return self.inner

    def begin(self, name: str) -> None:
        self.name, self.since, self.inner = name, time.monotonic(), None
        log.info("[%d/%d] begins: %s", self.count + 1, self.total, name)

    def end(self, name: str, outcome: str, reason: str, seconds: float) -> None:
        """The cell is over."""
        kind, cost = self.todo.pop(name, ("", 0.0))
        self.finished.append((kind, cost, seconds))
        self.name, self.count = "", self.count + 1
        line = f"[{self.count}/{self.total}] {outcome}: {name}{reason and ': '}{reason} ({seconds:.1f} s); {self._so_far()}"
        if self.quiet:
            log.info("%s", line)
        else:
            self.tell(line)
        self.all.update()

    def _within(self) -> tuple[float, float | None]:
        """How much of the innermost bar is done (0 to 1), and the seconds that the rest of it takes."""
        at = self._at()
        if not at.get("total") or at["n"] <= at["initial"]:
            return 0.0, None
        return at["n"] / at["total"], at["elapsed"] * (at["total"] - at["n"]) / (at["n"] - at["initial"])

    def _at(self) -> Mapping[str, Any]:
        """The innermost bar's numbers; none while there is no bar."""
        return {} if self.inner is None or self.inner.disable else self.inner.format_dict

    def _rest(self) -> float | None:
        """Seconds for all that is left."""
        todo, own = dict(self.todo), self.todo.get(self.name)
        if own is None:
            return time_left(todo.values(), self.finished)
        part, within = self._within()
        spent = self._at().get("elapsed", time.monotonic() - self.since)
        done = [*self.finished, (own[0], own[1] * part, spent)]
        mine = time_left([todo.pop(self.name)], done)
        return None if mine is None else (time_left(todo.values(), done) or 0.0) + max(mine - spent, within or 0.0)

    def _left(self) -> str:
        rest = self._rest()
        return "" if rest is None else f"about {tqdm.format_interval(rest)} left"

    def _so_far(self) -> str:
        left = self._left() if self.todo else ""
        return f"{tqdm.format_interval(time.monotonic() - self.start)} so far{left and ', '}{left}"

    def _line(self) -> str:
        """What is in work, how far it is, and how long it still takes."""
        at, (_, within) = self._at(), self._within()
        how_far = f": {at['n']:g} of {at['total']:g} {at['unit']}s" if at.get("total") else ""
        still = "" if within is None else f", about {tqdm.format_interval(within)} left"
        what = at.get("prefix") or self.name
        return f"[{self.count + 1}/{self.total}] {what}{how_far}{still}; in all {self._so_far()}"
