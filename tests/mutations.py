"""Hostile input: 5,000 mutated inputs each (400 without CI=true) of settings, data, vector files and command lines.

Sound input succeeds, anything else is a UserError (exit 2): never a traceback, never a hang, never success on input that is
surely damaged. The mutations are seeded; a failure names the seed that makes it again.
"""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from counts import count as times

from spilt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COUNT = times(5_000, 400)
DEADLINE = 5.0  # seconds per input; the slowest sound one takes some milliseconds


class Hang(BaseException):
    """An input took longer than DEADLINE."""


@contextmanager
def deadline() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Findings:
    """What went wrong, one example per kind; `refused` and `taken` count the outcomes."""

    def __init__(self) -> None:
        self.wrong: dict[str, str] = {}
        self.refused = self.taken = self.hurt = 0

    def run(self, name: str, hurt: bool, work: Callable[[], Any]) -> None:
        """work() must succeed (unless the input is surely `hurt`) or raise UserError."""
        self.hurt += hurt
        try:
            with deadline():
                work()
        except UserError as error:
            self.refused += 1
            if not str(error).strip():
                self.wrong.setdefault("empty message", name)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = [frame for frame in traceback.extract_tb(error.__traceback__) if "spilt" in frame.filename]
            at = f"{where[-1].filename.rsplit('/', 1)[-1]}:{where[-1].name}" if where else "?"
            self.wrong.setdefault(f"{type(error).__name__} at {at}", f"{name}: {str(error)[:300]}")
        else:
            self.taken += 1
            if hurt:
                self.wrong.setdefault(f"taken although damaged: {name.split(' ')[0]}", name)

    def check(self, what: str) -> None:
        print(f"{what}: {self.refused + self.taken} inputs, {self.hurt} surely damaged; refused {self.refused}, taken {self.taken}")
        assert not self.wrong, "\n".join(f"{kind}\n    {example}" for kind, example in self.wrong.items())
        assert self.refused + self.taken >= COUNT
        assert self.taken > COUNT // 50  # the mutations leave sound input too: the test is not one of garbage only


PIECES: list[bytes] = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r\n", b"\t",
    b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"- ", b"? ", b"&a ", b"*a ", b"<<: ",
    b"!!python/object/apply:os.system ['true']", b"!!binary ", b"!!set ", b"%YAML 9.9\n", b"---\n", b"...\n", b"# ", b"| \n", b"> \n",
    b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b".inf", b".nan", b"1e999", b"1e-999", b"-0", b"0x", b"0x_", b"1_0", b"0b",
    b"0o9", b"1:60:60",
    b"9" * 400, b"9" * 5000, b"-1", b"1" * 20, b"2024-13-45", b"\\u0000", b"\\ud83d", "\u2028".encode(), "\ufeff".encode(),
    b"[" * 3000, b'{"a":' * 2000,
    b"../../etc", b"A" * 3000, b"layers", b"lr", b"steering_factors", b"generation_params", b"question", b"matching",
]  # fmt: skip


def mutated(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """1 to `most` small changes at random places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(8)
        span = rng.randint(1, 16)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at] = rng.choice(PIECES)
        elif kind == 2:
            del out[at : at + span]
        elif kind == 3:
            out[at : at + span] = rng.choice(PIECES)
        elif kind == 4:
            other = rng.randrange(len(out) + 1)
            out[at:at] = out[other : other + rng.randint(1, 60)]
        elif kind == 5:
            del out[rng.randrange(max(1, len(out))) :]
        elif kind == 6:
            lines = bytes(out).split(b"\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
            out = bytearray(b"\n".join(lines))
        else:
            out[at:at] = bytes(rng.randrange(256) for _ in range(span))
    return bytes(out)
