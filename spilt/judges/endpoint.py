"""A judge behind any OpenAI-compatible endpoint, by the openai client. Where it is and its key stand in the environment alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spilt.artifacts.manifest import digest
from spilt.errors import UserError
from spilt.judges.base import KEY, MALFORMED, MODEL, PRICES, UNPLACED, URL, Judge, Messages, Reply, reply_of

AT_ONCE, RETRIES, SECONDS, PAUSE = 8, 5, 60.0, 0.5  # requests under way; more tries of each; that one may take; before the second
OPENAI = "api.openai.com"  # where the client asks by itself
GIVE_UP = 32  # failures in a row, after which no more is asked
REFUSED = {
    401: f"is {KEY} right for it?",
    403: f"may the key of {KEY} use {MODEL}?",
    404: f"does it have {MODEL}, and does {URL} end in /v1?",
}


def model() -> str:
    """The judge's model. Raises UserError where the environment does not say it."""
    found = os.environ.get(MODEL, "").strip()
    if not found:
        raise UserError(f"--judge endpoint: {MODEL} is not set; export {MODEL}=NAME, {KEY}=... and, for another than OpenAI's, {URL}=...")
    return found


def address(base_url: str) -> str:
    """Host and port of an address; of a path other than /v1 a hash, since it may hold a key. Raises ValueError for no address."""
    found = urlsplit(base_url)
    port, path = f":{found.port}" if found.port else "", found.path.rstrip("/")
    return f"{found.hostname or 'nowhere'}{port}" + (f"/{digest(path.encode())[:8]}" if path not in ("", "/v1") else "")


def name() -> str:
    """How the judge of the environment is known in results: its model, and where it is unless that is OpenAI's own."""
    try:
        where = address(os.environ[URL]) if os.environ.get(URL) else OPENAI
    except ValueError:  # told when it is asked
        return model()
    return _named(model(), where)


def _named(model: str, where: str) -> str:
    return model if where == OPENAI else f"{model} at {where}"


def _prices() -> tuple[float, float] | None:
    said = os.environ.get(PRICES)
    if not said:
        return None
    try:
        read, written = map(float, said.split(","))
    except ValueError:
        read = written = -1.0
    if not (0 <= read < 1e6 and 0 <= written < 1e6):
        raise UserError(f"{PRICES}={said}: wanted USD per million tokens read and written, such as 0.15,0.6")
    return read, written


def from_environment(kept: Path | None) -> Endpoint:
    """Raises UserError where something is missing."""
    made = Endpoint(model(), os.environ.get(URL) or None, os.environ.get(KEY) or "none", kept)
    made.tally.prices = _prices()
    made.unplaced = os.environ.get(UNPLACED) == "1"
    return made


class Endpoint(Judge):
    """The client tries again by itself after 408, 409, 429, 5xx and lost connections, with back-off, as long as the server asks it to."""

    def __init__(
        self,
        model: str,
        base_url: str | None,
        key: str,
        kept: Path | None = None,
        *,
        at_once: int = AT_ONCE,
        retries: int = RETRIES,
        seconds: float = SECONDS,
        pause: float = PAUSE,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("--judge endpoint: the package openai is not installed here: pip install 'spilt[judge]'") from None
        self.openai, self.key, self.at_once, self.retries, self.pause, self.lost = openai, key, at_once, retries, pause, 0
        try:
            self.client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=retries, timeout=seconds)
            where = address(str(self.client.base_url))  # never the whole of it: it may hold a password
            if self.client.base_url.scheme not in ("http", "https") or not self.client.base_url.host:
                raise ValueError("no scheme, or no host")
        except Exception:  # noqa: BLE001 - of the client or its libraries; their words may repeat the address
            raise UserError(f"{URL} is no address that can be asked; wanted one such as http://127.0.0.1:8000/v1") from None
        super().__init__(model, kept, where)

    @property
    def name(self) -> str:
        return _named(self.model, self.address)

    def _ask(self, prompts: Mapping[str, Messages], parameters: Mapping[str, Any]) -> Iterator[tuple[str, str | Reply]]:
        waiting = iter(prompts.items())
        under_way: dict[Future[str | Reply], str] = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                while True:  # no more is asked than was taken: a kill loses `at_once` replies, however slow the disk is
                    for key, prompt in islice(waiting, self.at_once - len(under_way)):
                        under_way[pool.submit(self._one, prompt, parameters)] = key
                    if not under_way:
                        return
                    for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                        yield under_way.pop(done), done.result()
            finally:  # the key is refused, or somebody has had enough
                pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, messages: Messages, parameters: Mapping[str, Any]) -> str | Reply:
        if self.lost >= GIVE_UP:
            return Reply(None, f"not asked after {GIVE_UP} failures in a row", again=True)
        found = self._tried(messages, parameters)
        self.lost = self.lost + 1 if isinstance(found, Reply) else 0
        return found

    def _tried(self, messages: Messages, parameters: Mapping[str, Any]) -> str | Reply:
        """The body of the reply, or why there is none. What the server says of an error is not repeated: it may hold the key."""
        asked: Any = {"model": self.model, "messages": [*messages], **parameters}
        for attempt in range(1 + self.retries):
            try:
                raw = self.client.chat.completions.with_raw_response.create(**asked).text
            except self.openai.APIStatusError as error:
                if error.status_code in REFUSED:
                    raise UserError(
                        f"the judge at {self.address} refuses: HTTP {error.status_code}; {REFUSED[error.status_code]}"
                    ) from None
                return Reply(None, f"HTTP {error.status_code}", again=True)
            except self.openai.APITimeoutError:
                return Reply(None, "timed out", again=True)
            except self.openai.APIConnectionError:
                return Reply(None, "no connection", again=True)
            raw = (raw() if callable(raw) else raw).replace(self.key, "***")  # a server may send back what it was sent
            if not reply_of(raw).again:
                return raw
            time.sleep(min(8.0, self.pause * 2**attempt) if attempt < self.retries else 0)
        return Reply(None, MALFORMED, again=True)
