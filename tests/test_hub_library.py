"""Datasets of a hub by the `datasets` library itself, with a hub of our own on this machine that counts what it is asked.

It serves what the library asks a hub for (the list of a repository's files, and the files), so that the cache is made by the library.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import families
import pytest
from refusal import message

from spilt import cli
from spilt.data import hub
from spilt.downstream import load

pytest.importorskip("datasets", reason="the datasets library (requirements-test.txt) is not installed here")
COMMIT = "a" * 40
BOOLQ = [{"question": f"is {n} even", "passage": f"{n} is a number.", "answer": n % 2 == 0} for n in range(20)]
PAIRS = families.pairs(8)
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {config}\n  data_files:\n" + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in splits)
    for config, splits in {"easy": ("train", "held"), "hard": ("train",)}.items()
)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


REPOSITORIES: dict[str, dict[str, bytes]] = {
    "google/boolq": {"train.jsonl": lines(BOOLQ), "validation.jsonl": lines(BOOLQ[:10])},
    "org/pairs": {
        "README.md": f"{CARD}---\n".encode(),
        "easy/train.jsonl": lines(PAIRS),
        "easy/held.jsonl": lines(PAIRS[:2]),
        "hard/train.jsonl": lines(PAIRS[:3]),
    },
}


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the hub's interface, as far as a public dataset needs it."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        for name, files in REPOSITORIES.items():
            api = f"/api/datasets/{name}"
            if path == api or path.startswith(f"{api}/revision/"):
                return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}).encode())
            if path.startswith(f"{api}/tree/{COMMIT}"):
                below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                found = [{"type": "file", "path": f, "size": len(c), "oid": _id(c)} for f, c in files.items() if f.startswith(below)]
                return self.answer(json.dumps(found).encode())
            if path.startswith(f"/datasets/{name}/resolve/") and (file := path.split("/", 6)[-1]) in files:
                return self.answer(files[file], ETag=f'"{_id(files[file])}"', **{"X-Repo-Commit": COMMIT})
        known = any(f"/{name}" in path for name in REPOSITORIES)
        self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, data: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was asked is in `asked`."""


def _id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the hub was asked for, by the libraries of other processes whose caches are empty at first."""
    found: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"asked": found}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    hub.rows.cache_clear()
    yield found
    server.shutdown()
    server.server_close()
    hub.rows.cache_clear()


@pytest.mark.long
def test_without_download_the_hub_is_asked_nothing(asked: list[str], tmp_path: Path) -> None:
    said = message(load.source("BoolQ").split, "train")
    assert said.startswith("hf:google/boolq:train: is not in the local cache of datasets, or cannot be reached: ")
    assert said.endswith("; --download fetches it from the hub") and asked == []


@pytest.mark.long
def test_a_task_is_fetched_once_and_then_read_from_the_cache(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, to an accuracy; the parts of its official splits are those of the same rows as files."""
    base = families.make_base(tmp_path / "base", train=4)
    words = ["--model-name", base.model, "--base_dir", str(base.path), "--dataset-name", "BoolQ", "--device", "cpu", "--variant", "base"]
    words += ["--max-new-tokens", "2", "--json"]
    assert cli.main(["tasks", "evaluate", *words]) == 2 and asked == []
    assert "--download fetches it from the hub" in capsys.readouterr().err
    assert cli.main(["tasks", "evaluate", *words, "--download"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["test"]["n"] == 2 and any("/resolve/" in path for path in asked)
    asked.clear()
    hub.rows.cache_clear()  # as another process has it
    (tmp_path / "files").mkdir()
    for name, content in REPOSITORIES["google/boolq"].items():
        (tmp_path / "files" / name).write_bytes(content)
    files = load.source("BoolQ", str(tmp_path / "files"))
    for split, count in (("train", 20), ("validation", 8), ("test", 2)):
        found = load.source("BoolQ").split(split)
        assert len(found.examples) == count and found == files.split(split)
    assert asked == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    hub.rows.cache_clear()
    said = message(load.source("BoolQ", download=True).split, "train")
    assert said.startswith("hf:google/boolq:train: is not in the local cache of datasets, or cannot be reached: ")
    assert "--download" not in said


@pytest.mark.long
def test_configurations_and_splits_that_are_not_there(asked: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Each by what there is; of a cache that has one of several, the one that is taken is told."""
    assert "cannot be read: Config name is missing" in message(hub.rows, "hf:org/pairs", True)
    assert "BuilderConfig 'hrd' not found. Available: ['easy', 'hard']" in message(hub.rows, "hf:org/pairs:hrd:train", True)
    assert "doesn't exist on the Hub" in message(hub.rows, "hf:org/none", True)
    assert [record.values for record in hub.rows("hf:org/pairs:easy:held", True)] == PAIRS[:2]
    asked.clear()
    assert [record.values for record in hub.rows("hf:org/pairs:easy:train")] == PAIRS and caplog.text == ""
    assert "Should be one of ['train', 'held']" in message(hub.rows, "hf:org/pairs:easy:test")
    said = message(hub.rows, "hf:org/pairs:hard:train")
    assert "Available configs in the cache: ['easy']" in said and said.endswith("--download fetches it from the hub")
    assert [record.values for record in hub.rows("hf:org/pairs")] == PAIRS
    assert "hf:org/pairs: no configuration was named, and easy was taken" in caplog.text and asked == []


@pytest.mark.long
def test_folders_of_one_name_are_themselves_and_edits_are_seen(tmp_path: Path) -> None:
    """What the library keeps of a folder goes by the folder's last name: none of it is taken."""
    for place, text in {"a": "one", "b": "two"}.items():
        folder = tmp_path / place / "scenes"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: c\n  data_files:\n  - {split: s, path: x.jsonl}\n---\n")
        for said in (text, f"{text} again"):
            (folder / "x.jsonl").write_text(json.dumps({"text": said}) + "\n")
            assert [row.values for row in hub.table(str(folder), "c", "s")] == [{"text": said}]
