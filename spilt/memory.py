"""How much memory is free; and out of memory is no end: the work is halved and goes on."""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
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

    return int(min(psutil.virtual_memory().available, *(left for _, left in _of_groups())))


def total() -> int:
    """Bytes of this machine, as far as its control groups allow."""
    import psutil

    return int(min(psutil.virtual_memory().total, *(most for most, _ in _of_groups())))


def _of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """Of each control group that this process is in (a container, a job of a scheduler): its bytes, and how many are left.

    Pages of files count as left.
    """
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
                    yield most, most - used + int(about.get("inactive_file", 0))
                except (OSError, ValueError):  # no such file, or 'max'
                    continue


HELD, SWAPPED, OF_FILE = (1 << bit for bit in (63, 62, 61))  # bits of /proc/self/pagemap, 8 bytes a page
DONTNEED = 4  # madvise(2): read again from the file when they are looked at


def let_go(tensor: Any) -> bool:
    """Pages of a mapped file in which a tensor lies leave this process's memory; they come back, from the system's cache, when they are
    read. Whether they did: not where any holds what the file does not (memory of the process, or written into), nor beside Linux.
    """
    import numpy as np

    page = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page  # those wholly within it
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            pages = np.frombuffer(file.read(8 * max(0, last - first)), dtype=np.uint64)
    except OSError:
        return False
    own = (pages & np.uint64(HELD) > 0) & (pages & np.uint64(OF_FILE) == 0)
    if len(pages) < last - first or first >= last or own.any() or (pages & np.uint64(SWAPPED)).any():
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return bool(madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page), DONTNEED) == 0)


def trim() -> None:
    """What was freed goes back to the system; the C library keeps pieces of it otherwise, which large blocks do not fit into."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        library.malloc_trim(0)


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
