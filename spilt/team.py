"""Several processes on one request (`accelerate launch run_spilt.py ...`), through accelerate; one process is the usual case.

Fits are dealt out whole, so each is the same as with one process; the texts of a request and the batches of a
measurement are dealt out and gathered. Process 0 decides what is to be done and writes; the others see what it decided.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from spilt.errors import NotFinite, UserError
from spilt.memory import OutOfMemory

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)  # one waits while another works; where a process is lost, gloo says so at once, and a launcher ends the others


def place() -> tuple[int, int]:
    """(rank, number of processes) that a launcher says in RANK and WORLD_SIZE; (0, 1) without WORLD_SIZE: a RANK alone is no launcher's.

    Raises UserError for values that no launcher sets.
    """
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    if size < 1:
        raise _wrong(f"WORLD_SIZE={size}")
    if size == 1:
        return 0, 1
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise _wrong(f"WORLD_SIZE={size} without {' and '.join(missing)}")
    if rank >= size:
        raise _wrong(f"RANK={rank} with WORLD_SIZE={size}")
    return rank, size


def follows() -> bool:
    """Whether another process of a launcher's speaks for this one: what is the same for all is said once."""
    try:
        return place()[0] > 0
    except UserError:
        return False


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not re.fullmatch(r"[0-9]{1,9}", text):
        raise _wrong(f"{name}={text!r}")
    return int(text) if text else default


def _wrong(what: str) -> UserError:
    way_out = "start with `accelerate launch run_spilt.py ...`, or for one process: unset RANK WORLD_SIZE"
    return UserError(f"the environment has {what}, which no launcher of several processes sets; {way_out}")


class TeamError(RuntimeError):
    """Another process failed at this piece of work."""


def _elsewhere(error: Exception, rank: int) -> Exception:
    """An error of a process as the others raise it: what is told without a traceback there is so here."""
    for kind in (UserError, NotFinite, OutOfMemory):
        if isinstance(error, kind):
            return kind(f"process {rank}: {error}")
    return TeamError(f"process {rank}: {type(error).__name__}: {error}")


class Team:
    """rank of this process and number of processes. With one process every method is the identity.

    told: an error has been raised in all processes, so that process 0 can speak for them.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size, self.device = *place(), device
        self.told = False
        if self.size > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
            if device.startswith("cuda") and state.device.type == "cuda":
                self.device = str(state.device)  # each process its own card

    def end(self) -> None:
        """All wait for each other and part; a process that exits with the group open may be aborted by its threads."""
        if self.size > 1:
            from accelerate import PartialState

            state = PartialState()
            state.wait_for_everyone()
            state.destroy_process_group()

    def leave(self, code: int) -> NoReturn:
        """The end of one of several processes: the threads of a group sometimes abort a normal exit.

        A launcher ends the others when one exits with an error, so what all know is the exit code of process 0 alone.
        """
        if code == 0 or self.told:
            self.end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if self.told and not self.main else code)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether an error is this process's to tell: process 0 tells what all know."""
        return self.main or not self.told

    @property
    def writes(self) -> bool:
        """Whether this process keeps what it makes of a piece of work that is under way."""
        return True

    @property
    def parts(self) -> int:
        """Into how many shares whole items are dealt."""
        return self.size

    def of_one(self) -> Team:
        """The processes that do an item which was dealt out whole: this one."""
        return Alone(self.device)

    def agree(self, trouble: str = "") -> list[str]:
        """What went wrong in each process that does the same work; ''s where all is well."""
        return [trouble]

    def shard(self, items: Sequence[Value]) -> list[Value]:
        """The items dealt to this process, in order."""
        return list(items[self.rank :: self.size])

    def on_main(self, decide: Callable[[], Value]) -> Value:
        """Process 0's decision (or deed), everywhere: what is on disk may change while the others look. Its error is an error of all."""
        if self.size == 1:
            return decide()
        from accelerate.utils import broadcast_object_list

        error: Exception | None = None
        told: list[Any] = [None]
        if self.main:
            try:
                told = [(True, decide())]
            except Exception as caught:  # told to all, and raised below: the others must not wait for ever
                error, told = caught, [(False, _elsewhere(caught, 0))]
        (value,) = self._agreed(error, broadcast_object_list(told))
        return value

    def each(self, work: Callable[[], Value]) -> Value:
        """work() in every process, each keeping its own; an error of any (a shared folder that fails on one machine) is one of all."""
        own: list[Value] = []
        self.gather(lambda: own.append(work()))
        return own[0]

    def gather(self, work: Callable[[], Value]) -> list[Value]:
        """work() of every process, in rank order. An error of any process is an error of all, so that none waits for ever."""
        if self.size == 1:
            return [work()]
        from accelerate.utils import gather_object

        error: Exception | None = None
        try:
            result: Any = (True, work())
        except Exception as caught:  # told to all, and raised below
            error, result = caught, (False, _elsewhere(caught, self.rank))
        return self._agreed(error, gather_object([result]))

    def _agreed(self, own: Exception | None, every: Sequence[tuple[bool, Any]]) -> list[Any]:
        """The values, where all are good; else this process's own error, or what is known of the others'."""
        failed = [value for good, value in every if not good]
        self.told = bool(failed)
        if own is not None:
            raise own
        if failed:
            kinds = {type(error) for error in failed}
            raise (kinds.pop() if len(kinds) == 1 else TeamError)("; ".join(map(str, failed)))
        return [value for _, value in every]


class Alone(Team):
    """One process, whatever the launcher says: nobody is waited for."""

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size, self.device, self.told = 0, 1, device, False
