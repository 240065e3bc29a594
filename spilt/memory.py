"""How much memory is free; and out of memory is no end: the work is halved and goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger("spilt")
Item = TypeVar("Item")
agreed: Callable[[Exception], None] | None = None  # set by processes that hold parts of one model: all have run out here, or all end


class OutOfMemory(MemoryError):
    """One sequence alone does not fit: the cell fails, others go on. The message names length, layer and the way out."""


def max_tokens(device: str, backward: bool = False) -> int:
    """Padded tokens per batch of recording and scoring (`backward`: of fitting) on a kind of device: 'cpu', 'cuda'.

    A block of Gemma-2-9B keeps some 0.2 MB per token for the backward pass, so 1024 tokens through 21 blocks keep 4 GB.
    """
    if device == "cpu":
        return 512  # fits the processor's caches
    return 1024 if backward else 16384


def free(device: Any = None) -> int:
    """Bytes that can still be had: of a torch device with memory of its own, else of this machine, as far as its control groups allow."""
    if device is not None and device.type != "cpu":
        import torch

        own: Any = getattr(torch, device.type, None)
        if hasattr(own, "mem_get_info"):
            return int(own.mem_get_info(device)[0] + own.memory_reserved(device) - own.memory_allocated(device))
    import psutil

    return int(min(psutil.virtual_memory().available, *_of_groups()))


def _of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What is left to each control group that this process is in: a container, a job of a scheduler. Pages of files count as free."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, kinds, path in lines:
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "memory" if kinds else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(top):
                try:
                    most, used = (int((folder / name).read_text()) for name in names)
                    about = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield most - used + int(about.get("inactive_file", 0))
                except (OSError, ValueError):  # no such file, or 'max'
                    continue


def ran_out(error: Exception) -> bool:
    """Whether an exception is the device's or the host's 'out of memory'; its cached blocks are given back then.

    Of processes in step (in_step.py): whether it is so in all of them, at the same place; they go on together, or end.
    """
    if not isinstance(error, MemoryError) or isinstance(error, OutOfMemory):
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # slow to import, seldom needed

        if not should_reduce_batch_size(error):
            return False
        clear_device_cache(garbage_collection=True)
    if agreed is not None:
        agreed(error)
    return True


def halved(work: Callable[[Sequence[Item]], None], items: Sequence[Item], what: str, smallest: str) -> None:
    """work(items); when memory runs out, the two halves one after the other, down to single items.

    what: names the work in the warning; smallest: in the error, when one item alone does not fit.
    """
    try:
        work(items)
        return
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        if len(items) == 1:
            raise OutOfMemory(smallest) from error
    log.warning(
        "out of memory: %s, %d at once; going on with %d (from the start: --set output_length=N, --device auto)",
        what, len(items), (len(items) + 1) // 2,
    )  # fmt: skip
    middle = (len(items) + 1) // 2
    halved(work, items[:middle], what, smallest)
    halved(work, items[middle:], what, smallest)
