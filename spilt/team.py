"""Several processes on one request (`accelerate launch run_spilt.py ...`), through accelerate; one process is the usual case.

Fits are dealt out whole, so each is the same as with one process; the texts of a request and the batches of a
measurement are dealt out and gathered. Process 0 decides what is to be done and writes; the others see what it decided.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from spilt.errors import UserError

Value = TypeVar("Value")


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


class Team:
    """rank of this process and number of processes. With one process every method is the identity."""

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size, self.device = *place(), device
        if self.size > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device == "cpu")
            if device.startswith("cuda"):
                self.device = str(state.device)  # each process its own card

    def end(self) -> None:
        """All wait for each other and part; a process that exits with the group open may be aborted by its threads."""
        if self.size > 1:
            from accelerate import PartialState

            state = PartialState()
            state.wait_for_everyone()
            state.destroy_process_group()

    @property
    def main(self) -> bool:
        return self.rank == 0

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
                error, told = caught, [(False, f"process 0: {type(caught).__name__}: {caught}")]
        good, value = broadcast_object_list(told)[0]
        if error is not None:
            raise error
        if not good:
            raise TeamError(value)
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
            error, result = caught, (False, f"process {self.rank}: {type(caught).__name__}: {caught}")
        every = gather_object([result])
        if error is not None:
            raise error
        failed = [value for good, value in every if not good]
        if failed:
            raise TeamError("; ".join(failed))
        return [value for _, value in every]
