"""Chat templates, tried out before they are used: they come with the checkpoint, from anybody, and may never end. No torch.

A fixed conversation is rendered in a process of its own, with little time and memory, by jinja2's sandbox set up as
transformers sets it up; at two dates, so that a template which writes today's date is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from spilt.errors import UserError, first_line
from spilt.model import checkpoint

SECONDS, BYTES, LONGEST = 5, 2**30, 100_000  # of processor time and memory that a template may take, characters that it may write
WAIT = 120  # seconds of the clock: the machine may be busy
CLOCK = "strftime_now"  # the one word by which a template learns the date
USER, SYSTEM = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
SEVERAL = (SYSTEM, USER, {"role": "assistant", "content": "c"}, USER)  # tried out like CASES
CASES = tuple((turns, ask) for turns in ((USER,), (SYSTEM, USER)) for ask in (True, False))
OTHER_DAY = datetime(2001, 2, 3, 4, 5, 6)
WAY_OUT = "correct the template, or set use_chat_template: false"


class Look(NamedTuple):
    """What the fixed conversation becomes."""

    texts: tuple[str, ...]  # of CASES; an error's message where the template refuses one
    dated: bool  # other texts on another day
    trouble: str = ""  # why it cannot be used at all


def look(chat_template: Any, special: Mapping[str, Any]) -> Look:
    """Try a tokenizer's `chat_template` (text, or texts by name) with its special tokens by name (transformers 4: lists among them)."""
    text = chat_template.get("default") if isinstance(chat_template, Mapping) else chat_template
    if not isinstance(text, str):
        return Look((), False)  # none, or none that a plain conversation would take: the library says so
    day = datetime.now().date().isoformat() if CLOCK in text else ""
    return _look(text, tuple(sorted((name, token) for name, token in special.items() if isinstance(token, str))), day)


def check(chat_template: Any, special: Mapping[str, Any]) -> bool:
    """Whether the template writes the date. Raises UserError for one that does not end, or takes or writes too much."""
    found = look(chat_template, special)
    if found.trouble:
        raise UserError(f"the tokenizer's chat template {found.trouble}; {WAY_OUT}")
    return found.dated


def identity(folder: Path) -> list[str] | None:
    """What the template of a checkpoint writes today; None for all that write the same every day.

    Raises UserError as `check` does.
    """
    chat_template, special = of_folder(folder)
    texts = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template]
    if not any(isinstance(text, str) and CLOCK in text for text in texts) or not check(chat_template, special):
        return None
    return list(look(chat_template, special).texts)


def difference(then: Any, now: list[str] | None) -> str:
    """The first line in which two identities differ, for a message."""
    pairs = zip(then, now, strict=False) if isinstance(then, list) and now else ()
    lines = (pair for old, new in pairs for pair in zip(str(old).splitlines(), new.splitlines(), strict=False))
    return next((f" ({old[:80]!r}, now {new[:80]!r})" for old, new in lines if old != new), "")


def of_folder(folder: Path) -> tuple[Any, dict[str, str]]:
    """(chat template, special tokens by name) as the library reads them: files of their own go before tokenizer_config.json."""
    config = checkpoint.optional_json(folder / "tokenizer_config.json")
    tokens = {**checkpoint.optional_json(folder / "special_tokens_map.json"), **config}
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items() if _is_token(name, value)}
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / checkpoint.TEMPLATES).glob("*.jinja"))}
    if (own := folder / "chat_template.jinja").is_file():
        found["default"] = own.read_text(encoding="utf-8")
    if found:
        return found, special
    said = config.get("chat_template")
    if isinstance(said, list):
        said = {str(entry.get("name")): entry.get("template") for entry in said if isinstance(entry, dict)}
    return said, special


def _is_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and isinstance(value.get("content") if isinstance(value, dict) else value, str)


@lru_cache(maxsize=64)
def _look(text: str, special: tuple[tuple[str, str], ...], day: str) -> Look:
    """day: only so that tomorrow is looked at again."""
    job = json.dumps({"template": text, "special": dict(special), "seconds": SECONDS})
    command = [sys.executable, "-m", "spilt.model.template"]
    home = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    try:
        done = subprocess.run(command, input=job, capture_output=True, text=True, encoding="utf-8", timeout=WAIT, cwd=home, env=env)
    except subprocess.TimeoutExpired:
        return Look((), False, f"does not end within {WAIT} seconds")
    if done.returncode == 0:
        return Look(**json.loads(done.stdout))
    if done.returncode < 0:
        most = f"{SECONDS} seconds or {BYTES >> 20} MiB"
        return Look((), False, f"was stopped: it takes more than {most} for a conversation of one letter; an endless loop?")
    said = done.stderr.strip().splitlines()
    return Look((), False, f"cannot be tried out: {said[-1][:300] if said else f'exit code {done.returncode}'}")


# ---------------------------------------------------------------- in the other process


def main() -> None:
    """Read a job on stdin, write its Look."""
    job = json.load(sys.stdin)
    _limit(job["seconds"])
    print(json.dumps(_render(job["template"], job["special"])._asdict()))


def _limit(seconds: int) -> None:
    import contextlib
    import resource

    for name, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, BYTES)):
        with contextlib.suppress(ValueError, OSError):  # a system without this limit, or with a lower one: WAIT is left
            resource.setrlimit(name, (most, most))


def _render(text: str, special: dict[str, str]) -> Look:
    try:
        today, other = ([_text(text, special, turns, ask, clock) for turns, ask in CASES] for clock in (datetime.now(), OTHER_DAY))
        _text(text, special, SEVERAL, True, datetime.now())
    except _TooMuch as error:
        return Look((), False, str(error))
    return Look(tuple(today), today != other)


class _TooMuch(Exception):
    pass


def _text(text: str, special: dict[str, str], turns: Any, ask: bool, clock: datetime) -> str:
    try:
        template = _environment(clock).from_string(text)
        pieces = template.generate(messages=list(turns), tools=None, documents=None, add_generation_prompt=ask, **special)
        written: list[str] = []
        length = 0
        for piece in pieces:
            length += len(piece)
            written.append(piece)
            if length > LONGEST:
                raise _TooMuch(f"writes more than {LONGEST:,} characters for a conversation of one letter")
        return "".join(written)
    except MemoryError:
        raise _TooMuch(f"takes more than {BYTES >> 20} MiB for a conversation of one letter") from None
    except RecursionError:
        raise _TooMuch("calls itself without end") from None
    except _TooMuch:
        raise
    except Exception as error:  # noqa: BLE001 - refusing a conversation is a template's right; whoever needs this one is told by the library
        return f"{type(error).__name__}: {first_line(error)}"


def _environment(clock: datetime) -> Any:
    """As transformers makes it (utils/chat_template_utils.py)."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} only marks the model's part for training."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, CLOCK: clock.strftime}
    return made


if __name__ == "__main__":
    main()
