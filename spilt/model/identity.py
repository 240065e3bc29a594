"""What was read: the hash of a checkpoint, and the inputs of a run as it found them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from spilt.artifacts.manifest import Signature, file_hash
from spilt.errors import UserError
from spilt.model import checkpoint

SAMPLES, SAMPLE = 64, 65536  # a large weight file is known by its size, its head and this many pieces of this many bytes
TENSOR_SAMPLE = 4096  # and by as many bytes from the middle of every tensor: one that is replaced whole is always seen


def model_hash(folder: Path) -> str:
    """What makes a checkpoint this checkpoint: every file that is loaded, whole up to SAMPLES * SAMPLE bytes, else in samples.

    A change that touches no sample (a few rows of one large tensor) goes unseen. Raises UserError for a shard outside the folder.
    """
    signed = tuple((path, Signature.of(path)) for path in checkpoint.loaded_files(folder))
    return (_hash_model if all(signature.settled for _, signature in signed) else _hash_model.__wrapped__)(folder, signed)


@lru_cache(maxsize=64)
def _hash_model(folder: Path, files: tuple[tuple[Path, Signature], ...]) -> str:
    total = hashlib.sha256()
    for path, (size, *_) in files:
        total.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= SAMPLES * SAMPLE:
                total.update(file.read())
                continue
            for start, length in _samples(path, size):
                file.seek(start)
                total.update(file.read(length))
    return total.hexdigest()


def _samples(path: Path, size: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of the pieces of a large file: evenly spaced, and of each tensor of a safetensors file."""
    even = [(k * (size - SAMPLE) // (SAMPLES - 1), SAMPLE) for k in range(SAMPLES)]
    if path.suffix != ".safetensors":
        return even
    try:
        places = sorted(checkpoint.tensors(path).values())
    except UserError:  # not whole: known by its even pieces; loading it is refused
        return even
    return even + [((start + max(start, end - TENSOR_SAMPLE)) // 2, min(TENSOR_SAMPLE, end - start)) for start, end in places]


class Changed(Exception):
    """An input was exchanged while the run that had read it went on. The request is right: the same command does it again."""


class Seen:
    """The inputs of a run as it found them: each is hashed at the first look, and a later look that finds another is an error.

    What the run makes itself (a fitted vector) is to be forgotten when it is written.
    """

    def __init__(self) -> None:
        self.hashes: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """The hash of a file, or of a checkpoint folder, as the run first saw it."""
        if path not in self.hashes:
            self.hashes[path] = _hash(path)
        return self.hashes[path]

    def again(self, paths: Iterable[Path]) -> None:
        """Look once more. Raises Changed when one is not what it was, or is gone."""
        for path in paths:
            try:
                now = _hash(path)
            except OSError as error:
                raise Changed(f"{path}: went away while the run was using it ({error.strerror}); put it back and run again") from None
            if now != self.hashes.setdefault(path, now):
                raise Changed(
                    f"{path}: was exchanged while the run was using it, so nothing is stored that may be made from both; "
                    "the same command makes it from what lies there now"
                )

    def forget(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self.hashes.pop(path, None)


def _hash(path: Path) -> str:
    return model_hash(path) if path.is_dir() else file_hash(path)
