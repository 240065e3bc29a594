"""Mutated data files: pairs or one message."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from counts import count as times
from mutations import COUNT, ROOT, Findings, mutated

from spilt.data import readers
from spilt.errors import half_pair

PAIR = ("question", "matching", "not_matching")


ROWS: list[dict[str, Any]] = [
    {"question": f"is {i} odd, or \"even\"?", "matching": f" yes {i}", "not_matching": " no\u2028no", "n": i, "tags": ["a",
    None]} for i in range(6)
]  # fmt: skip


def encoded(rows: list[dict[str, Any]], ending: str) -> bytes:
    if ending == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if ending == ".json":
        return json.dumps(rows, indent=1).encode()
    if ending == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(list(dict.fromkeys(key for row in rows for key in row)))
        writer.writerows([list(row.values()) for row in rows])
        return text.getvalue().encode()
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def hurt_data(ending: str, rng: random.Random) -> tuple[str, bytes]:
    """A name, and a file that is surely damaged."""
    rows = [dict(row) for row in ROWS]
    row, field = rng.choice(rows), rng.choice(PAIR)
    kind = rng.randrange(6)
    if kind == 0:
        row[rng.choice(PAIR[1:])] = rng.choice(["", " ", "\t\n"])
        return "empty-answer", encoded(rows, ending)
    if kind == 1:
        for one in rows:
            one.pop(field)
        return f"no-column-{field}", encoded(rows, ending)
    data = encoded(rows, ending)
    if kind == 2:
        text = rng.choice([b"odd", b"yes"])
        at = data.index(text, rng.randrange(data.rindex(text)))
        return "not-utf8", data[:at] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"]) + data[at:]
    if kind == 3 and ending != ".csv":
        value = rng.choice([None, 5, 1.5, True, ["a"], {"a": 1}])
        if ending == ".parquet" and field == "not_matching" and value is None:
            value = " "  # null in all rows are one-sided rows, which is no damage
        for one in rows if ending == ".parquet" else [row]:  # a parquet column has one type
            one[field] = value
        return f"wrong-type-{field}", encoded(rows, ending)
    if ending == ".csv":
        lines = data.split(b"\r\n")
        at = rng.randrange(1, len(lines) - 1)
        lines[at] = rng.choice([lines[at] + b",more", b"short", lines[at].replace(b'"', b"", 1), b'"open' + lines[at]])
        return "ragged", b"\r\n".join(lines)
    if ending == ".jsonl":
        lines = data.split(b"\n")
        at = rng.randrange(len(lines) - 1)
        junk = [b"{", b"[]", b"3", b"null", b'"text"', b"{} {}", b"[" * 2000, b"9" * 5000, lines[at][:-1], lines[at] + b"}", lines[at][1:]]
        lines[at] = rng.choice(junk)
        return "broken-line", b"\n".join(lines)
    return "cut", data[: rng.randrange(1, len(data.rstrip()) - 1)]


def check_pairs(path: Path) -> None:
    """What is taken is what the module promises."""
    fmt = readers.DatasetFormat("mine", "train", path, {name: name for name in PAIR}, False)
    prompts = fmt._replace(section="generation", field_names={"input": "question", "reference_response": "matching"})
    for pair in readers.read_pairs(fmt):
        assert all(isinstance(getattr(pair, name), str) and not half_pair(getattr(pair, name)) for name in PAIR)
        assert pair.matching.strip() and pair.not_matching.strip()
    for prompt in readers.read_prompts(prompts):
        json.dumps(prompt.extra, allow_nan=False).encode()


SHARES = {".jsonl": 4000, ".csv": 3500, ".json": 2500}


def test_data(tmp_path: Path) -> None:
    findings = Findings()
    for ending, count in SHARES.items():
        path, sound = tmp_path / f"rows{ending}", encoded(ROWS, ending)
        path.write_bytes(sound)
        check_pairs(path)
        for seed in range(count * COUNT // 10_000):
            rng = random.Random(f"{ending} {seed}")
            hurt = rng.random() < 0.3
            name, data = hurt_data(ending, rng) if hurt else ("bytes", mutated(sound, rng, 3))
            path.write_bytes(data)
            findings.run(f"{name} seed={ending} {seed}", hurt, partial(check_pairs, path))
    findings.check("data")


PARQUET = """
import random, sys
from pathlib import Path
import test_fuzz_data as t
folder, count = Path(sys.argv[1]), int(sys.argv[2])
path, sound, findings = folder / "rows.parquet", t.encoded(t.ROWS, ".parquet"), t.Findings()
for seed in range(count):
    rng = random.Random(f".parquet {seed}")
    hurt = rng.random() < 0.2
    if hurt:
        name, data = t.hurt_data(".parquet", rng)
        hurt = name != "not-utf8"  # inserting bytes moves what the footer points to: mostly, not surely, an error
    else:
        name, data = "bytes", t.mutated(sound, rng, 3)
    path.write_bytes(data)
    (folder / "seed").write_text(f"{name} {seed}")
    findings.run(f"{name} seed=.parquet {seed}", hurt, lambda: t.check_pairs(path))
findings.check("parquet")
"""


@pytest.mark.long
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the reader is compiled code, and a crash there would take the tests along."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", PARQUET, str(tmp_path), str(times(10_000, 2_000))]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"exit {done.returncode} at {(tmp_path / 'seed').read_text()}\n{done.stderr[-3000:]}"
