"""What all judges share: replies are kept as they came, by what was asked, so that a killed run goes on and a rerun asks nothing."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.manifest import identity
from spilt.errors import UserError

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}
MODEL, KEY, URL, PRICES = "SPILT_JUDGE_MODEL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "SPILT_JUDGE_PRICES"
NEEDED = (MODEL, URL, KEY)  # of an endpoint, in the environment; the last two as the client itself reads them
MALFORMED = "malformed reply"
UNPLACED = "SPILT_JUDGE_UNPLACED"  # in the environment
log = logging.getLogger("spilt")


class Reply(NamedTuple):
    """What a judge said; None is missing. again: asked once more it may answer."""

    text: str | None
    why: str = ""  # it is missing
    read: int = 0  # tokens of the prompt, of the reply
    written: int = 0
    again: bool = False


@dataclass
class Tally:
    """What asking has come to. Tokens are of those that were asked now."""

    asked: int = 0
    known: int = 0  # from earlier runs
    missing: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    prices: tuple[float, float] | None = None  # USD per million tokens read, written

    def add(self, reply: Reply, known: bool) -> None:
        self.known, self.asked = self.known + known, self.asked + (not known)
        self.missing.update([reply.why] if reply.why else [])
        if not known:
            self.read, self.written = self.read + reply.read, self.written + reply.written

    @property
    def cost(self) -> float | None:
        """USD."""
        return None if self.prices is None else (self.read * self.prices[0] + self.written * self.prices[1]) / 1e6

    def __str__(self) -> str:
        lost = ", ".join(f"{why}: {count}" for why, count in sorted(self.missing.items()))
        paid = "" if self.cost is None else f", {self.cost:.4f} USD"
        return (
            f"{self.asked} asked, {self.known} known before, {self.missing.total()} missing{f' ({lost})' if lost else ''}; "
            f"{self.read} tokens read, {self.written} written{paid}"
        )


class Judge:
    """A kind of judge has a name and `_ask`. kept: the folder of all replies, one file for each; None keeps none.

    model: of the judge; address: where it is asked, of one that is elsewhere: under one model's name two addresses may serve two models.
    """

    unplaced = False  # replies that were kept without an address, as older versions did, are taken for this judge's

    def __init__(self, model: str, kept: Path | None = None, address: str = "") -> None:
        if kept is not None and kept.exists() and not kept.is_dir():
            raise UserError(f"{kept}: is no folder, and replies are kept there; move it away")
        self.model, self.address, self.kept, self.tally = model, address, kept, Tally()

    @property
    def name(self) -> str:
        """How it is known in results."""
        return self.model

    def judge(self, prompts: Sequence[Messages], parameters: Mapping[str, Any] | None = None) -> list[str | None]:
        """The replies in order; None where there is none (`replies` says why, `tally` counts)."""
        return [reply.text for reply in self.replies(prompts, parameters)]

    def replies(
        self, prompts: Sequence[Messages], parameters: Mapping[str, Any] | None = None, progress: Callable[[int], Any] | None = None
    ) -> list[Reply]:
        """The same with reasons and tokens. Equal prompts are asked once. parameters: of the request, such as max_tokens, temperature."""
        given = dict(parameters or {})
        asked = [{"model": self.model, "messages": list(prompt), "parameters": given} for prompt in prompts]
        keys = [identity({**one, "address": self.address} if self.address else one) for one in asked]
        older = dict(zip(keys, map(identity, asked), strict=True)) if self.address else {}
        found: dict[str, Reply] = {}
        for key in dict.fromkeys(keys):
            if self.unplaced and key in older:
                self._place_older(older[key], key)
            if (known := self._known(key)) is not None:
                found[key] = known
                self.tally.add(known, known=True)
        todo = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        if unused := sum(self._known(older[key]) is not None for key in todo if key in older):
            log.warning(
                "judge %s: %d replies in %s were kept without the address that gave them (by an older version): not used, asked again; "
                "%s=1 takes them for this address's",
                self.name, unused, self.kept, UNPLACED,
            )  # fmt: skip
        if progress is not None:
            progress(sum(key in found for key in keys))
        for key, raw in self._ask(todo, given) if todo else ():
            found[key] = raw if isinstance(raw, Reply) else reply_of(raw)
            if isinstance(raw, str) and self.kept is not None:
                about = {"model": self.model, "parameters": given, "messages": list(todo[key]), "reply": raw}
                about |= {"address": self.address} if self.address else {}
                atomic_write(self._place(key), json.dumps(about, ensure_ascii=True) + "\n")
            self.tally.add(found[key], known=False)
            if progress is not None:
                progress(keys.count(key))
        return [found[key] for key in keys]

    def _ask(self, prompts: Mapping[str, Messages], parameters: Mapping[str, Any]) -> Iterator[tuple[str, str | Reply]]:
        """(key, the reply as it came) in any order, or why there is none."""
        raise NotImplementedError(f"{type(self).__name__} asks nobody")

    def _place(self, key: str) -> Path:
        assert self.kept is not None
        return self.kept / key[:2] / f"{key}.json"

    def _place_older(self, older: str, key: str) -> None:
        """A reply that was kept without an address, under the key that has this one."""
        if self.kept is not None and self._known(key) is None and self._known(older) is not None:
            about = json.loads(self._place(older).read_text(encoding="utf-8"))
            atomic_write(self._place(key), json.dumps({**about, "address": self.address}, ensure_ascii=True) + "\n")

    def _known(self, key: str) -> Reply | None:
        """A stored reply; None where there is none, or the file is damaged: then it is asked again."""
        if self.kept is None:
            return None
        try:
            raw = json.loads(self._place(key).read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        found = reply_of(raw) if isinstance(raw, str) else None
        return None if found is None or found.again else found


def reply_of(raw: str) -> Reply:
    """A chat completion (OpenAI's JSON) as a Reply. One that is cut short has no last word, so it is missing."""
    try:
        content = json.loads(raw)
        choice = content["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Reply(None, MALFORMED, again=True)
    read, written = (_count(content, name) for name in ("prompt_tokens", "completion_tokens"))
    if ended in ("length", "content_filter"):
        return Reply(None, "reply cut short: raise the rubric's max_tokens" if ended == "length" else "content filter", read, written)
    if not isinstance(text, str) or not text.strip():
        return Reply(None, "empty reply", read, written)
    return Reply(text, "", read, written)


def _count(content: Mapping[str, Any], name: str) -> int:
    usage = content.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0
