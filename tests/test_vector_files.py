"""What lies where layer_{id}.pt should: each foreign file gets one sentence on what it is and what to do, never advice to load unsafely."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import forked
import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from spilt import cli
from spilt.errors import UserError
from spilt.steering import layer_file

ROOT = Path(__file__).resolve().parents[1]

HIDDEN = 32
UNSAFE = ("weights_only", "torch.load", "allowlist", "allow-list", "safe_globals", "arbitrary code", "trust_remote", "Traceback")


def saved(content: Any, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def numpy_bytes(write: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer, np.ones(HIDDEN, dtype=np.float32))
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "hello")
    return buffer.getvalue()


V = torch.ones(HIDDEN)
PEFT = {f"base_model.model.model.layers.2.mlp.down_proj.lora_{side}.weight": torch.ones(4, 8) for side in "AB"}

# what lies there -> its bytes, and words that the one sentence must have
FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "pickle": (lambda: pickle.dumps({"v": [1.0] * HIDDEN}), ("pickle", "torch.save")),
    "pickle of protocol 2": (lambda: pickle.dumps([1.0] * HIDDEN, protocol=2), ("pickle", "torch.save")),
    "npz": (lambda: numpy_bytes(np.savez), (".npz", "torch.save")),
    "npy": (lambda: numpy_bytes(np.save), (".npy", "torch.save")),
    "gguf": (lambda: b"GGUF" + bytes(60), ("GGUF", "torch.save")),
    "safetensors": (lambda: save_safetensors({"v": V}), ("safetensors", "torch.save")),
    "git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ("git lfs pull",)),
    "zip": (zipped, ("zip archive",)),
    "torchscript": (scripted, ("TorchScript",)),
    "text": (lambda: b"hello", ("cannot be read as a vector file", "torch.save")),
    "empty": (lambda: b"", ("cannot be read as a vector file", "torch.save")),
    "module": (lambda: saved(nn.Linear(HIDDEN, HIDDEN)), ("refused", "whole model", "Linear")),
    "module, old format": (lambda: saved(nn.Linear(HIDDEN, HIDDEN), new=False), ("refused", "whole model", "Linear")),
    "layers": (lambda: saved({14: V, 20: V}), ("by layer (14, 20)", "torch.save(found[2], path)")),
    "layers by name": (lambda: saved({"layer_2": V, "layer_3": V}), ("by layer (layer_2", "torch.save(found[2], path)")),
    "list": (lambda: saved([V, V, V]), ("a list of 3", "torch.save(found[2], path)")),
    "peft": (lambda: saved(PEFT), ("PEFT", "--intervention_method lora")),
    "state dict": (lambda: saved(nn.Sequential(nn.Linear(2, 2)).state_dict()), ("whole model", "state dict of 2 tensors")),
    "lora": (lambda: saved({"lora_A": torch.ones(8, 4), "lora_B": torch.ones(4, HIDDEN), "r": 4}), ("--intervention_method lora",)),
    "local_weight": (lambda: saved({"weight": torch.ones(8, HIDDEN), "bias": V}), ("--intervention_method local_weight",)),
    "number": (lambda: saved(3.0), ("holds a float",)),
}


def one_sentence(said: str, *words: str) -> None:
    assert "\n" not in said.strip() and not [word for word in UNSAFE if word.lower() in said.lower()], said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("what", FILES)
def test_a_foreign_file_is_named(tmp_path: Path, what: str) -> None:
    make, words = FILES[what]
    path = tmp_path / "layer_2.pt"
    path.write_bytes(make())
    with pytest.raises(UserError) as caught:
        layer_file.load(path, "vector", None, HIDDEN, {"mlp_mid": 8}, "mlp_mid", "block")
    one_sentence(str(caught.value), str(path), *words)


@pytest.mark.parametrize("form", ["lora", "local_weight"])
@pytest.mark.parametrize(
    "content, words",
    [
        (V, ("--intervention_method vector",)),
        (PEFT, ("PEFT",)),
        ({14: V}, ("by layer",)),
        (nn.Sequential(nn.Linear(2, 2)).state_dict(), ("state dict",)),
        ([V], ("a list of 1",)),
        ({}, ("an empty dict",)),
    ],
)
def test_a_foreign_content_in_place_of_a_dict(tmp_path: Path, form: str, content: Any, words: tuple[str, ...]) -> None:
    path = tmp_path / "layer_2.pt"
    path.write_bytes(saved(content))
    with pytest.raises(UserError) as caught:
        layer_file.load(path, form, None, HIDDEN, {"mlp_mid": 8}, "mlp_mid", "block")
    one_sentence(str(caught.value), str(path), *words)


def test_what_torch_save_wrote_before_zip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "layer_2.pt"
    path.write_bytes(saved(V, new=False))
    assert torch.equal(layer_file.load(path, "vector", None, HIDDEN, {}, "mlp_mid", "block").state(), V)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "layer_2.pt"
    os.mkfifo(path)
    with pytest.raises(UserError, match="no plain file"):
        layer_file.load(path, "vector", None, HIDDEN, {}, "mlp_mid", "block")


@pytest.mark.parametrize("end", [b"", b"\nx\n."])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_name_without_end_is_refused_at_once(tmp_path: Path, zipped: bool, end: bytes) -> None:
    """torch's own message about a name of a megabyte would take hours."""
    path, name = tmp_path / "layer_2.pt", b"\x80\x02c" + b"x" * 2**20 + end
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", name)
            archive.writestr("archive/version", "3")
    else:
        path.write_bytes(saved(V, new=False)[:15] + name)
    with pytest.raises(UserError, match="runs on for 10485.. characters"):
        layer_file.read(path)


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.long
def test_a_run_does_not_wait_for_a_vector_that_is_no_file(tmp_path: Path, kind: str) -> None:
    """Its hash decides whether anything is to be done, so it is asked for before anything reads it."""
    base = families.make_base(tmp_path / "base", train=4)
    path = base.path / "vectors/tiny/sft/mine/sft_vector/layer_2.pt"
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    for mode in ("apply", "loss"):
        ended = forked.run(["run_spilt.py", *base.argv("sft", "vector", "--mode", mode, "--multipliers", "1"), "--quiet"], timeout=120)
        assert ended.returncode in (1, 2) and "layer_2.pt: is no plain file" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["layer_2.safetensors", "control_vector.gguf", "adapter_model.safetensors", "layer_2.npy", "layer_3.pt"])
def test_what_lies_beside_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    base = families.make_base(tmp_path / "base", train=4)
    folder = base.path / "vectors/tiny/sft/mine/sft_vector"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"x")
    assert cli.main([*base.argv("sft", "vector", "--mode", "apply", "--multipliers", "1"), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "skipped" in out and name in out and "only a layer_2.pt that torch.save wrote is read" in out
    assert not (base.path / "generation").exists()


@pytest.mark.parametrize("what", ["module", "pickle", "layers", "peft", "safetensors"])
def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """All the way through a run: the cell fails, nothing is stored, the words of PyTorch stay out."""
    base = families.make_base(tmp_path / "base", train=4)
    folder = base.path / "vectors/tiny/sft/mine/sft_vector"
    folder.mkdir(parents=True)
    (folder / "layer_2.pt").write_bytes(FILES[what][0]())
    for words in (("--mode", "apply", "--multipliers", "1"), ("--mode", "loss", "--multipliers", "1")):
        assert cli.main([*base.argv("sft", "vector", *words), "--quiet"]) in (1, 2)
        out, err = capsys.readouterr()
        assert "1 failed" in out and all(word in out for word in FILES[what][1])
        assert not [word for word in UNSAFE if word.lower() in (out + err).lower()], out + err
    assert not list(base.path.rglob("*_results.json")) and not list(base.path.rglob("train_losses.csv"))
    assert cli.main(["--verify", "--base_dir", str(base.path)]) == 1
    out, _ = capsys.readouterr()
    assert "damaged" in out and all(word in out for word in FILES[what][1]) and not [word for word in UNSAFE if word.lower() in out.lower()]
