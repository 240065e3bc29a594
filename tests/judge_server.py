"""A local HTTP server that speaks as an OpenAI-compatible endpoint does, or misbehaves as it is told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

KEY = "sk-test-0123456789abcdef-secret"


class Said(NamedTuple):
    """One reply. body: None drops the connection; a dict is sent as JSON."""

    body: Any
    status: int = 200
    delay: float = 0.0
    headers: tuple[tuple[str, str], ...] = (("retry-after-ms", "1"),)  # of errors: how long the client is to wait
    part: bool = False  # only the first half is sent before the connection goes


def completion(text: Any, finish: str = "stop", read: Any = 11, written: Any = 3) -> dict[str, Any]:
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": 0}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "stand-in", "choices": [choice], "usage": usage}


class Server:
    """say: (what was asked: the user's text, how often before) -> Said."""

    def __init__(self, say: Callable[[str, int], Said]) -> None:
        self.say, self.lock = say, threading.Lock()
        self.asked: Counter[str] = Counter()
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.under_way = self.most = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                user = body["messages"][-1]["content"]
                with outer.lock:
                    before = outer.asked[user]
                    outer.asked[user] += 1
                    outer.seen.append(body)
                    outer.keys.add(self.headers.get("Authorization"))
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                try:
                    self.answer(outer.say(user, before))
                except OSError:  # the client had enough
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.under_way -= 1

            def answer(self, said: Said) -> None:
                time.sleep(said.delay)
                if said.body is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
                self.send_response(said.status)
                for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *said.headers):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if said.part else data)
                if said.part:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def serving(say: Callable[[str, int], Said]) -> Iterator[Server]:
    server = Server(say)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def answer_in(prompt: str) -> str:
    """The text that a rubric's prompt puts between its marks."""
    found = re.search(r"<answer (\w+)>\n(.*)\n</answer \1>", prompt, re.S)
    assert found is not None
    return found[2]
