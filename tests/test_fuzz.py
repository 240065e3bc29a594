"""Hostile input: 10,000 mutated inputs each (400 without CI=true) of settings, data, vector files and command lines.

Sound input succeeds, anything else is a UserError (exit 2): never a traceback, never a hang, never success on input that is
surely damaged. The mutations are seeded; a failure names the seed that makes it again.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from counts import count as times

from spilt import cli
from spilt.data import readers
from spilt.errors import UserError, half_pair
from spilt.settings import resolve_fit, resolve_generate, resolve_measure
from spilt.steering import layer_file

ROOT = Path(__file__).resolve().parents[1]
COUNT = times(10_000, 400)
DEADLINE = 5.0  # seconds per input; the slowest sound one takes some milliseconds
PAIR = ("question", "matching", "not_matching")


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


# ---------------------------------------------------------------- mutations of bytes

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


# ---------------------------------------------------------------- settings

FIT = """alg_name: spilt
layers: [2]
intervention_method: lora
batch_size: 4
gradient_accumulation_steps: 2
n_epochs: 3
lr: 1e-2
low_rank_dimension: 4
steering_factors: [0.2, 0.4, 1.0]
preference_pairs: [orig_add, orig_sub]
substraction_type: normal
intervention_positions: all
intervention_components: mlp_mid
dropout: 0.1
margin_threshold: 0.5
concept_id: 0
seed: 42
"""
APPLY = """alg_name: spilt
layers: [2]
multipliers: [1.0, -1.0]
generation_data_size: 100
num_responses: 1
generate_orig_output: true
generation_params:
  max_new_tokens: 20
  do_sample: false
  temperature: 0.9
"""
FORMATS = """train:
  mine: {file_path: data/mine/train.jsonl, field_names: {question: question, matching: matching, not_matching: not_matching}}
valid:
  mine: {file_path: data/mine/valid.jsonl, field_names: {question: question, matching: matching, not_matching: not_matching}}
generation:
  mine:
    file_path: data/mine/valid.jsonl
    field_names: {input: question, reference_response: matching}
    multi_concept: false
"""
# lines that make a sound settings file surely wrong
WRONG_LINES = [
    "lerning_rate: 1", "layers: []", "layers: [-1]", "layers: [1.5]", "layers: [2, 2]", "layers: {a: 1}", "lr: .nan", "lr: .inf",
    "lr: -1", "lr: fast",
    "lr: [1, 2]", "n_epochs: 0", "n_epochs: 1e999", "batch_size: 0", "batch_size: 99999999999999999999", "dropout: 1.5", "dropout: yes",
    "steering_factors: []", "steering_factors: [a]", "steering_factors: [.inf]", "intervention_positions: g5",
    "intervention_components: mlp_end",
    "preference_pairs: [orig_mul]", "substraction_type: odd", "low_rank_dimension: 0", "seed: 1.5", "seed: [1]", "x: &a [*a]",
    "? [1]\n: 2", "lr: !!python/name:os.system",
    "1: 2", "\tlr: 1", "lr: 'open", "lr: [1", "lr: {a: ", "lr: !!float x", "use_chat_template: 3", "torch_dtype: float7",
    "site: everywhere",
]  # fmt: skip


def bomb(rng: random.Random) -> str:
    """Aliases that double what was read before."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * rng.randint(2, 9))}]" for i in range(1, rng.randint(10, 25))]
    return "\n".join(lines)


def test_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "hparams/Steer/experiment_hparams/spilt_experiment/mine/tiny/spilt"
    folder.mkdir(parents=True)
    fit, apply, formats = folder / "generate_spilt_lora.yaml", folder / "apply_spilt.yaml", tmp_path / readers.FORMATS_FILE
    loss = folder.parent / "sft/generate_sft_loss.yaml"
    loss.parent.mkdir()
    texts = {fit: FIT, apply: APPLY, formats: FORMATS, loss: "alg_name: sft\nlayers: [2]\nbatch_size: 1\noutput_length: 512\n"}
    for path, text in texts.items():
        path.write_text(text)
    place = (tmp_path, "tiny", "mine", "spilt", "lora")
    jobs: dict[Path, Callable[[], Any]] = {
        fit: lambda: [resolve_fit(*place).settings.as_dict(), resolve_measure(*place)],
        apply: lambda: resolve_generate(*place).settings.as_dict(),
        formats: lambda: [readers.load_formats(tmp_path), *(readers.dataset_format(tmp_path, "mine", s) for s in readers.SECTIONS)],
        loss: lambda: resolve_measure(*place).settings.as_dict(),
    }
    for work in jobs.values():
        work()
    findings = Findings()
    for seed in range(COUNT):
        rng = random.Random(seed)
        path = rng.choices([fit, apply, formats, loss], [5, 2, 2, 1])[0]
        hurt = rng.random() < 0.3
        if not hurt:
            name, data = "bytes", mutated(texts[path].encode(), rng, 2)
        elif rng.random() < 0.1:
            name, data = "bomb", f"{texts[path]}{bomb(rng)}\n".encode()
        elif path == fit:
            lines, wrong = FIT.splitlines(), rng.choice(WRONG_LINES)
            kept = [line for line in lines if line.split(":")[0] != wrong.split(":")[0].strip()]
            kept.insert(rng.randrange(len(kept) + 1), wrong)
            name, data = f"line {wrong!r}", "\n".join(kept).encode()
        else:
            lines = texts[path].splitlines(keepends=True)
            at, junk = (
                rng.randrange(len(lines)),
                rng.choice(["]\n", "key_of_nobody: 1\n", "%\n", "\0\n", "{{\n", "'\n", "!!python/none x\n"]),
            )
            name, data = f"junk {junk!r}", "".join([*lines[:at], junk, *lines[at:]]).encode()
        path.write_bytes(data)
        findings.run(f"{name} seed={seed} {path.name}", hurt, jobs[path])
        path.write_text(texts[path])
    findings.check("settings")


# ---------------------------------------------------------------- data

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
import test_fuzz as t
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


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the reader is compiled code, and a crash there would take the tests along."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", PARQUET, str(tmp_path), str(times(10_000, 2_000))]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"exit {done.returncode} at {(tmp_path / 'seed').read_text()}\n{done.stderr[-3000:]}"


# ---------------------------------------------------------------- vector files

HIDDEN, WIDTH, RANK = 8, 12, 2
MARK = "spilt-fuzz-code-was-run"


class Evil:
    """Unpickles to a call."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.call = (function, words)

    def __reduce__(self) -> Any:
        return self.call


def vector_files() -> dict[str, tuple[Any, str, bool]]:
    """name -> (content, form, whether the file has checksums)."""
    import torch

    torch.manual_seed(0)
    lora = {"lora_A": torch.randn(WIDTH, RANK), "lora_B": torch.randn(RANK, HIDDEN), "r": RANK, "alpha": 32.0}
    lora |= {"intervention_components": "mlp_mid", "concept_id": 0}
    local = {"weight": torch.randn(WIDTH, HIDDEN), "bias": torch.randn(HIDDEN), "intervention_components": "mlp_mid", "concept_id": 0}
    return {
        "vector": (torch.randn(HIDDEN), "vector", True),
        "rows": (torch.randn(3, HIDDEN), "vector", True),
        "lora": (lora, "lora", True),
        "loras": ({0: lora, 1: lora}, "lora", True),
        "local": (local, "local_weight", True),
        "old": (torch.randn(HIDDEN), "vector", False),
    }


def saved(content: Any, new: bool = True) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def hostile(form: str, marker: Path, rng: random.Random) -> tuple[str, bytes]:
    """A well-formed file with the wrong things in it."""
    import builtins

    import torch

    shape = tuple(rng.choice([0, 1, 7, 8, 9, 12, 13, 1000]) for _ in range(rng.choice([0, 1, 2, 3])))
    tensors: list[Callable[[], Any]] = [
        lambda: torch.full((HIDDEN,), rng.choice([float("nan"), float("inf"), -float("inf")])),
        lambda: torch.zeros(HIDDEN, dtype=rng.choice([torch.int64, torch.bool, torch.complex64, torch.uint8])),
        lambda: torch.zeros((*shape, 5)),
        lambda: torch.zeros(1).expand(10**15),  # a huge shape in four bytes
        lambda: torch.zeros(1).expand(10**9, 10**6),
        lambda: torch.zeros(HIDDEN).to_sparse(),
        lambda: torch.zeros(HIDDEN, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(HIDDEN), 0.1, 0, torch.qint8),
        lambda: torch.zeros(HIDDEN + 1).to(rng.choice([torch.float8_e4m3fn, torch.bfloat16, torch.float16])),
    ]
    code: list[Callable[[], Any]] = [
        lambda: Evil(os.system, f"touch {marker}"),
        lambda: Evil(builtins.eval, f"open({str(marker)!r}, 'w')"),
        lambda: Evil(builtins.exec, f"open({str(marker)!r}, 'w')"),
        lambda: Evil(subprocess.call, ["touch", str(marker)]),
        lambda: Evil(open, str(marker), "w"),
        lambda: {"lora_A": Evil(os.system, f"touch {marker}")},
    ]
    others: list[Callable[[], Any]] = [
        lambda: None, lambda: [], lambda: {}, lambda: 3, lambda: "text", lambda: {"a": {}}, lambda: {0: {}},
        lambda: {None: {"weight": 1}},
        lambda: {"lora_A": 1, "lora_B": 2}, lambda: {"lora_A": torch.zeros(WIDTH, RANK)}, lambda: {"weight": torch.zeros(WIDTH,
        HIDDEN)},
        lambda: {"lora_A": torch.zeros(WIDTH, RANK), "lora_B": torch.zeros(RANK, HIDDEN), "r": torch.zeros(3)},
        lambda: {"lora_A": torch.zeros(WIDTH, RANK), "lora_B": torch.zeros(RANK, HIDDEN), "alpha": "much"},
        lambda: {"lora_A": torch.zeros(WIDTH, RANK), "lora_B": torch.zeros(RANK, HIDDEN), "alpha": []},
        lambda: {"lora_A": torch.zeros(WIDTH, RANK), "lora_B": torch.zeros(RANK, HIDDEN), "r": 99},
        lambda: {"lora_A": torch.zeros(WIDTH, RANK), "lora_B": torch.zeros(RANK, HIDDEN), "intervention_components": ["mlp"]},
        lambda: {"weight": torch.zeros(WIDTH, HIDDEN), "bias": torch.zeros(HIDDEN), "intervention_components": "nowhere"},
        lambda: {"weight": torch.zeros(WIDTH, HIDDEN), "bias": torch.full((HIDDEN,), float("nan"))},
    ]  # fmt: skip
    kind = rng.choice(["tensor", "code", "other", "plain-pickle", "nested-pickle"])
    if kind == "tensor":
        content = rng.choice(tensors)()
        if form == "lora":
            content = {"lora_A": content, "lora_B": torch.zeros(RANK, HIDDEN)}
        elif form == "local_weight":
            content = {"weight": torch.zeros(WIDTH, HIDDEN), "bias": torch.zeros(HIDDEN), rng.choice(["weight", "bias"]): content}
            if (
                tuple(content["weight"].shape) == (WIDTH, HIDDEN)
                and content["bias"].dtype.is_floating_point
                and len(content["bias"]) == HIDDEN
            ):
                content["bias"] = torch.full((HIDDEN,), float("nan"))
    elif kind == "code":
        content = rng.choice(code)()
    elif kind == "other":
        content = rng.choice(others)()
    elif kind == "plain-pickle":
        return kind, pickle.dumps(rng.choice([*code, *others[:6]])(), protocol=rng.randint(0, 5))
    else:
        content = {"a": {"b": [rng.choice(code)() for _ in range(3)]}}
    return kind, saved(content, rng.random() < 0.8)


def test_vectors(tmp_path: Path) -> None:
    import torch

    files = vector_files()
    sound = {name: saved(content, new) for name, (content, _, new) in files.items()}
    path, marker = tmp_path / "layer_2.pt", tmp_path / MARK
    widths = {"mlp_mid": WIDTH, "mlp": HIDDEN, "attn": HIDDEN, "block": HIDDEN}

    def load(form: str) -> Any:
        made = layer_file.load(path, form, 0, HIDDEN, widths, "mlp_mid", "block")
        return [parameter.detach() for parameter in made.parameters()]

    want = {}
    for name, data in sound.items():
        path.write_bytes(data)
        want[name] = load(files[name][1])
    findings = Findings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(COUNT):
            rng = random.Random(f"vector {seed}")
            name = rng.choice(list(files))
            form, checked = files[name][1:]
            hurt = rng.random() < 0.3
            if hurt:
                what, data = hostile(form, marker, rng)
            elif rng.random() < 0.3:
                what, data = "cut", sound[name][: rng.randrange(len(sound[name]))]
            elif rng.random() < 0.6:
                flipped = bytearray(sound[name])
                for _ in range(rng.choice([1, 1, 1, 2, 8])):
                    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
                what, data = "flipped", bytes(flipped)
            else:
                what, data = "bytes", mutated(sound[name], rng, 3)
            path.write_bytes(data)

            def work(name: str = name, form: str = form, checked: bool = checked, hurt: bool = hurt) -> None:
                got = load(form)
                if checked and not hurt and not all(a.equal(b) for a, b in zip(got, want[name], strict=True)):
                    raise AssertionError("other values than were stored, taken without a word")
                assert all(torch.isfinite(value).all() for value in got)

            findings.run(f"{what} seed={seed} {name}", hurt, work)
            assert not marker.exists(), f"code of the file was run: seed {seed}"
    findings.check("vectors")


# ---------------------------------------------------------------- command lines

WORDS = [
    "--dataset", "mine", "axbench", "--method", "sft", "caa", "all", "split", "--model_name", "tiny", "../tiny",
    "--intervention_method", "vector", "lora",
    "--mode", "apply", "loss", "both", "--device", "cpu", "auto", "--multipliers", "1", "-1", "1e3", "-2.5e-1", "nan", "inf", "sweep",
    "1e400", "0x1",
    "--base_dir", ".", "", " ", "--limit", "3", "0", "-5", "1.5", "9" * 30, "\u0663", "--seed", "--concepts", "1", "--split", "train",
    "--set", "lr=1", "=", "lr=",
    "a.b=c", "generation_params.top_p=.5", "generation_params={", "--force", "--quiet", "--dtype", "float32", "--checkpoint_seconds",
    "--", "-", "-h9", "--=",
    "--m", "--no", "\0", "\udc80", "🦀", "a" * 5000, "%s", "{}", "$(id)", "../../../etc/passwd", "-1e-2", "--batch_size", "--version",
    "--help",
    "report", "verify", "prepare",
]  # fmt: skip
# changes after which the request is surely wrong: flag -> a value (None: the flag goes)
WRONG: list[tuple[str, Any]] = [
    *((flag, None) for flag in ("--dataset", "--method", "--model_name", "--intervention_method")),
    *(("--dataset", value) for value in ("mime", "", "../mine", "mine/..", "/", "\0", "a" * 5000)),
    *(("--method", value) for value in ("sptl", "", "SFTT", "sft,caa", "../sft")),
    *(("--model_name", value) for value in ("..", "../tiny", "tiny/", "/etc", "", "ti\0ny", "tiny2", "a" * 5000, ".tiny")),
    *(("--intervention_method", value) for value in ("vectr", "", "vector lora", "-")),
    *(("--mode", value) for value in ("fit", "", "generate apply")),
    *(("--multipliers", value) for value in ("nan", "inf", "-inf", "1,2", "one", "", "1e400", "--", "1e7")),
    *(("--limit", value) for value in ("0", "-1", "1.5", "x", "", "1e3")),
    *(("--batch_size", value) for value in ("0", "-1", "x")),
    *(("--seed", value) for value in ("x", "1.5", "", "9" * 30, "-1", "9" * 5000)),
    *(("--concepts", value) for value in ("1", "x", "-1", "9" * 30)),
    *(("--split", value) for value in ("dev", "")),
    *(("--dtype", value) for value in ("float7", "", "int8")),
    *(("--base_dir", value) for value in ("/nowhere", "", "\0", "a" * 5000)),
    *(
        ("--set", value)
        for value in ("lr", "=1", "lerning=1", "lr=[1", "lr=.nan", "lr=-1", "layers=[]", "method=caa", "lr.x=1", "generation_params.x=1")
    ),
    ("--checkpoint_seconds", "soon"),
    ("--unheard", "1"),
    ("stray", "word"),
]


class Reached(Exception):
    """The request was taken; the model would be loaded now."""


def run_line(words: list[str]) -> None:
    """cli.main as a process would run it; exit 2 as UserError, success as nothing."""
    out, err = io.BytesIO(), io.BytesIO()
    before = sys.stdout, sys.stderr
    wrapped = io.TextIOWrapper(out, "utf-8"), io.TextIOWrapper(err, "utf-8", errors="backslashreplace")
    sys.stdout, sys.stderr = wrapped
    try:
        try:
            code = cli.main(words)
        except Reached:
            code = 0
        except SystemExit as stop:  # as a process: the exit code
            code = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before
    if b"Traceback" in err.getvalue():
        raise AssertionError(err.getvalue().decode()[-500:])
    if code == 2:
        raise UserError(err.getvalue().decode().strip())
    if code != 0:
        raise AssertionError(f"exit {code}: {err.getvalue().decode()[-300:]}")


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import families

    caplog.set_level(logging.CRITICAL)
    base = families.make_base(tmp_path / "base", train=4, test=2)
    monkeypatch.chdir(tmp_path)

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr(cli, "run_plan", reached)
    sound = {
        "--dataset": base.one, "--method": "sft", "--model_name": base.model, "--intervention_method": "vector", "--mode": "loss",
        "--device": "cpu", "--base_dir": str(base.path), "--multipliers": "1", "--limit": "3", "--seed": "4",
        "--set": "output_length=300",
    }  # fmt: skip
    findings = Findings()
    had = families.listing(tmp_path)
    for seed in range(COUNT):
        rng = random.Random(f"line {seed}")
        flags, name = dict(sound), "free"
        flags["--mode"] = rng.choice(["generate", "apply", "both", "loss"])
        hurt = rng.random() < 0.4
        if hurt:
            flag, value = rng.choice(WRONG)
            if value is None:
                del flags[flag]
            else:
                flags[flag] = value
            name = f"{flag} {str(value)[:40]!r}"
            # a model folder that is not there is said in the plan's list of inputs: its hparam folder is missing all the same
        dry = rng.random() < 0.5
        words = [word for item in rng.sample(list(flags.items()), len(flags)) for word in item] + ["--dry_run"] * dry
        if not hurt:
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(words))
                kind = rng.randrange(5)
                if kind == 0:
                    words[at] = rng.choice(WORDS)
                elif kind == 1:
                    words.insert(at, rng.choice(WORDS))
                elif kind == 2 and len(words) > 1:
                    del words[at]
                elif kind == 3:
                    words[at] = mutated(words[at].encode("utf-8", "surrogateescape"), rng, 2).decode("utf-8", "surrogateescape")
                else:
                    other = rng.randrange(len(words))
                    words[at], words[other] = words[other], words[at]
        findings.run(f"{name} seed={seed} {' '.join(words)[:400]!r}", hurt, partial(run_line, words))
    findings.check("command lines")
    assert families.listing(tmp_path) == had, "a dry run or a refused request wrote something"
