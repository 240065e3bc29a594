"""Several processes that hold the parts of one model (`--tensor_parallel`): all take the same steps, process 0 writes and speaks.

A forward pass adds up over all processes, so none may leave it alone: the others would wait in the next sum for ever. Where ways could part
(an error, memory that runs out, the end of a piece of work) they agree, through the launcher's key-value store and not by another sum: each
says in how many sums it has been and what went wrong. The same count: all stand at the same place, and an error of one is one of all.
Another count, or nothing for PATIENCE seconds: the one with the error says it, and the run ends.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from spilt import memory
from spilt.errors import NotFinite, UserError, first_line
from spilt.memory import OutOfMemory
from spilt.team import Team, TeamError
from spilt.terminal import complain

Value = TypeVar("Value")
PATIENCE = 30.0  # seconds that one with an error waits for the others: in step, they are there at once
GOES_ON = "what was finished is kept, the same command goes on from there"
KINDS = {kind.__name__: kind for kind in (UserError, NotFinite, OutOfMemory)}  # told without a traceback
_turns = itertools.count()  # of all agreements of this process: the others count the same


class InStep(Team):
    """The processes of a launcher, each with a part of the model."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        memory.agreed = self.all_ran_out

    @property
    def writes(self) -> bool:
        return self.main

    @property
    def parts(self) -> int:
        return 1

    def of_one(self) -> Team:
        return self

    def shard(self, items: Sequence[Value]) -> list[Value]:
        return list(items)

    def each(self, work: Callable[[], Value]) -> Value:
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # raised below, in all
            error = caught
        troubles = self.agree("" if error is None else f"{type(error).__name__}: {error}")
        self.told = any(troubles)
        if error is not None:
            raise error
        for rank, trouble in enumerate(troubles):
            if trouble:
                kind, _, said = trouble.partition(": ")
                raise KINDS[kind](f"process {rank}: {said}") if kind in KINDS else TeamError(f"process {rank}: {trouble}")
        return result

    def gather(self, work: Callable[[], Value]) -> list[Value]:
        """work() in every process; the result of process 0, everywhere: what each adds up by itself may differ in its last bit."""
        own = self.each(work)
        return [self.on_main(lambda: own)]

    def agree(self, trouble: str = "", what: str = "a piece of work") -> list[str]:
        """The trouble of every process at this place; '' of one that has none. Does not return where they are not at the same place."""
        from torch.distributed import DistError
        from torch.distributed.distributed_c10d import _get_default_store

        keys = [f"spilt/{next(_turns)}/{rank}" for rank in range(self.size)]
        try:
            store = _get_default_store()
            store.set(keys[self.rank], json.dumps([what, sums(), trouble]))
            begun, pause = time.monotonic(), 0.001
            while not store.check(keys):  # in Python, where ^C is heard
                if trouble and time.monotonic() - begun > PATIENCE:
                    self._part(trouble, store)
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            said = [json.loads(store.get(key)) for key in keys]
            if len({(about, count) for about, count, _ in said}) == 1:
                return [told for _, _, told in said]
            if not any(told for _, _, told in said) and self.main:
                trouble = "is at another place than the others, and none of them says why"
            self._part(trouble, store)
        except DistError as lost:  # the process, or the launcher, that held the store
            self._part(trouble or f"{type(lost).__name__}: {first_line(lost)}", None)

    def all_ran_out(self, error: Exception) -> None:
        """They go on with smaller batches if all have run out, else all end."""
        way_out = "smaller from the start: --batch_size N (texts), --set batch_size=N (fits), --set output_length=N"
        self.agree(f"out of memory, and not all are: {first_line(error)}; {way_out}", "memory")

    def _part(self, trouble: str, store: Any) -> NoReturn:
        """The end of a run that is not in step any more. The first in trouble speaks and exits; a launcher ends the others then."""
        if trouble and (store is None or store.add("spilt/spoken", 1) == 1):
            complain(f"error: process {self.rank}: {trouble}; a pass needs all processes, so all end; {GOES_ON}")
        else:
            time.sleep(2 * PATIENCE)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def end(self) -> None:
        """Not yet: they agree until they leave."""

    def leave(self, code: int) -> NoReturn:
        """The end of each, in step; after ^C at once. A launcher ends the others when one exits with an error: the code is process 0's."""
        if code != 130:
            super().end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if self.main or code == 130 else 0)


def sums() -> int:
    """In how many sums (or other exchanges) this process has been."""
    from torch.distributed import distributed_c10d

    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def same(model: Any, values: Any) -> Any:
    """A tensor as process 0 has it, where each process holds a part of the model; else as it is.

    What is computed in each may differ in its last bit, and then a token or the end of a text, on which all must agree.
    """
    if (getattr(model, "tp_size", None) or 1) > 1:
        import torch

        if torch.distributed.is_initialized() and torch.distributed.get_world_size() == model.tp_size:
            values = values.contiguous()
            torch.distributed.broadcast(values, src=0)
    return values
