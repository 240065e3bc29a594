"""Mutated and hostile vector files: the stored values or one message, and no code of the file is run."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import COUNT, Findings, mutated

from spilt.steering import layer_file

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
