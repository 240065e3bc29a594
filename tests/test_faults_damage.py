"""Damaged files are seen, named and made again to the same bytes; verify lists every one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from faults import APPLY, FIT, LINES, LOSS, ROOT, Here, fresh

from spilt import cli, verify
from spilt.artifacts import manifest, store

# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.few(2)
def test_a_truncated_vector(here: Here, part: float) -> None:
    """apply and loss: that cell fails with the file's name, others go on, exit 1. generate: fitted again to the same bytes."""
    before, path = here.listing(), here.vector("lora")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert here.states()["vectors/tiny/sft/mine/sft_lora/layer_2.pt"] == "damaged"
    assert verify.main(["--base_dir", str(here.base.path)]) == 1
    for words in (APPLY, LOSS):
        exit_code, said = here.run(*words, form="all")
        assert exit_code == 1 and str(path) in said and "Traceback" not in said
        assert "already done" in said  # the two other forms
    exit_code, said = here.run(*FIT, form="all")
    assert exit_code == 0 and here.listing() == before


def test_a_vector_with_one_bit_changed(here: Here) -> None:
    """It still loads: only its manifest tells. It must not be used in silence."""
    path, size = here.vector("lora"), here.vector("lora").stat().st_size
    data = bytearray(path.read_bytes())
    values = torch.load(path, weights_only=True)["lora_A"].numpy().tobytes()
    data[data.index(values[:16]) + 2] ^= 1
    path.write_bytes(data)
    assert len(data) == size and here.states()["vectors/tiny/sft/mine/sft_lora/layer_2.pt"] == "damaged"
    for words in (APPLY, LOSS):
        exit_code, said = here.run(*words, form="all")
        assert exit_code == 1 and str(path) in said and "Traceback" not in said, said


@pytest.mark.few(1)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_truncated_losses_and_texts(here: Here, part: float) -> None:
    """Seen by the hash, made again to the same bytes; files beside them are not touched."""
    before = here.listing()
    for path, words in ((here.losses(1.0), LOSS), (here.texts(-1.0), APPLY)):
        stamps = {name: here.path(name).stat().st_mtime_ns for name in before}
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        assert here.states()[str(path.relative_to(here.base.path))] == "damaged"
        assert "1 damaged" in here.run(*words, "--dry_run")[1]
        assert here.run(*words)[0] == 0
        after = here.listing()  # train.log says what was written last in its folder: here the train split, before the test split
        assert {name: after[name] for name in after if not name.endswith(".log")} == {
            name: before[name] for name in before if not name.endswith(".log")
        }
        touched = {name for name in before if here.path(name).stat().st_mtime_ns != stamps[name]}
        assert len(touched) <= 6, touched  # its folder's files, not the other multipliers'


GARBLED: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "zeros": lambda path: path.write_bytes(b"\0" * 300),
    "list": lambda path: path.write_text("[]"),
    "object": lambda path: path.write_text("{}"),
    "number": lambda path: path.write_text("3"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "digits": lambda path: path.write_text('{"bytes": ' + "9" * 5000 + "}"),
    "wrong types": lambda path: path.write_text('{"sha256": [], "bytes": "x", "identity": {}, "parts": 3}'),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", GARBLED)
@pytest.mark.few(2)
def test_a_garbled_manifest(here: Here, how: str) -> None:
    """Not believed: the artifact is made again to the same bytes, without a traceback. A folder in its place fails that cell."""
    before, path = here.listing(), manifest.manifest_path(here.vector("lora"))
    GARBLED[how](path)
    assert here.states()[str(here.vector("lora").relative_to(here.base.path))] == "damaged"
    assert here.run(*FIT, "--dry_run", form="all")[0] == 0
    exit_code, said = here.run(*FIT, form="all")
    assert "Traceback" not in said and said.count("already done") >= 2
    if how == "folder":
        assert exit_code == 1
    else:
        assert exit_code == 0 and here.listing() == before


def test_without_its_manifest_a_vector_is_the_released_codes(here: Here) -> None:
    manifest.manifest_path(here.vector()).unlink()
    before = here.vector().read_bytes()
    assert here.states()[str(here.vector().relative_to(here.base.path))] == "foreign"
    exit_code, said = here.run(*FIT, form="all")
    assert exit_code == 0 and here.vector().read_bytes() == before
    assert here.run(*FIT, "--force")[0] == 0 and manifest.manifest_path(here.vector()).exists()


@pytest.mark.parametrize("line", LINES, ids=[line[:12].decode("latin1") for line in LINES])
@pytest.mark.few(2)
def test_garbage_among_unfinished_texts(here: Here, line: bytes) -> None:
    """Lines that no run of ours wrote count for nothing."""
    before = here.listing()
    shutil.rmtree(here.path("generation/tiny/sft/mine/sft_vector"))
    lines = here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl")
    lines.parent.mkdir()
    lines.write_bytes(line + b"\n" + line)
    exit_code, said = here.run(*APPLY)
    assert exit_code == 0 and "Traceback" not in said, said
    assert here.listing() == before


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 100], ids=["empty", "text", "zip"])
def test_a_damaged_checkpoint_begins_again(bare: Here, prepared: families.Base, content: bytes) -> None:
    path = bare.vector().with_name("layer_2.unfinished.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert bare.run(*FIT)[0] == 0 and not path.exists()
    assert bare.vector().read_bytes() == (prepared.path / bare.vector().relative_to(bare.base.path)).read_bytes()


# ---------------------------------------------------------------- verify


def test_verify_lists_what_is_there(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    (here.vector().parent / ".layer_2.pt.tmp-1-abcd").write_bytes(b"half")
    (here.vector().parent / "layer_2.unfinished.pt").write_bytes(b"")
    here.path("generation/tiny/sft/mine/sft_vector/unfinished_0.jsonl").write_bytes(b"")
    lost = here.texts(1.0, "lora")
    lost.unlink()
    manifest.manifest_path(here.texts(-1.0)).unlink()
    before = families.listing(here.base.path)
    fresh()
    assert verify.main(["--base_dir", str(here.base.path)]) == 0
    said = capsys.readouterr().out
    assert said.count("\nleftover ") == 5 and said.count("\nforeign ") == 2 and "damaged       0" in said  # each with its line in the table
    assert families.listing(here.base.path) == before
    here.vector("lora").write_bytes(b"")
    fresh()
    assert verify.main(["--base_dir", str(here.base.path)]) == 1
    assert verify.main(["--base_dir", str(here.base.path / "models")]) == 2
    assert verify.main(["--base_dir", "/nowhere"]) == 2
    assert verify.main(["--what"]) == 2


def _rewrite(path: Path, data: bytes) -> None:
    """Other content with a manifest that speaks of it: only the content can tell."""
    record = json.loads(manifest.manifest_path(path).read_text())
    del record["record_sha256"]  # as an older version wrote it
    path.write_bytes(data)
    record |= {"sha256": manifest.digest(data), "bytes": len(data)}
    manifest.manifest_path(path).write_text(json.dumps(record))


def _saved(content: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CONTENTS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "vector not finite": ("vector", lambda _: _saved(torch.full((families.HIDDEN,), float("nan"))), "NaN"),
    "vector of another size": ("vector", lambda _: _saved(torch.zeros(7)), "[7]"),
    "vector of no rows": ("vector", lambda _: _saved(torch.zeros(0, families.HIDDEN)), "[0, 32]"),
    "vector of whole numbers": ("vector", lambda _: _saved(torch.zeros(families.HIDDEN, dtype=torch.long)), "int64"),
    "vector with code": ("vector", lambda _: b"cos\nsystem\n(S'true'\ntR.", "refused"),
    "losses without a row": ("losses", lambda data: data.rsplit(b"\n", 2)[0] + b"\n", "rows"),
    "losses without a column": ("losses", lambda data: b"\n".join(line.rsplit(b",", 1)[0] for line in data.split(b"\n")), "columns"),
    "losses not finite": ("losses", lambda data: data[:-3] + b"nan\n", "n"),
    "losses cut": ("losses", lambda data: data[:-40], ""),
    "texts without a row": ("texts", lambda data: json.dumps(json.loads(data)[:-1]).encode(), "rows; wanted"),
    "texts without a key": ("texts", lambda data: data.replace(b'"pred"', b'"prod"'), "'pred'"),
    "texts of numbers": ("texts", lambda _: b"[1, 2, 3]", "int"),
    "texts deep": ("texts", lambda _: b"[" * 100_000, "JSON"),
    "no texts": ("texts", lambda _: b"[]", "empty"),
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.few(6)
def test_verify_looks_into_the_files(here: Here, what: str) -> None:
    kind, change, wanted = CONTENTS[what]
    path = {"vector": here.vector(), "losses": here.losses(1.0), "texts": here.texts(1.0)}[kind]
    _rewrite(path, change(path.read_bytes()))
    fresh()
    (found,) = [found for found in verify.check(here.base.path) if found.path == path]
    assert found.state == "damaged" and wanted in found.reason, found


def test_verify_knows_concepts_and_the_released_files(here: Here, tmp_path: Path) -> None:
    base = families.make_base(tmp_path / "concepts", train=4)
    for words in (FIT, APPLY):
        assert cli.main([*base.argv("sft", "lora", *words, dataset=base.many), "--quiet"]) == 0
    states = {found.state for found in verify.check(base.path)}
    assert states == {"ok"}
    stored = store.Store(base.path)
    folder = base.path / "vectors/tiny/reps/axbench/reps_vector"
    folder.mkdir(parents=True)
    torch.save(torch.randn(3, families.HIDDEN), folder / "layer_2.pt")
    loss = stored.base_dir / "vectors/tiny/get_sft_loss/reps/mine/reps_vector/vector_reps_m1.0_winning_only/train_losses.csv"
    loss.parent.mkdir(parents=True)
    loss.write_text("epoch,step,pos_steer_loss,pos_steering_factors,neg_steering_factors\n0,0,1.5,1.0,1.0\n")
    found = {str(one.path.relative_to(base.path)): one.state for one in verify.check(base.path)}
    assert [found[str(path.relative_to(base.path))] for path in (folder / "layer_2.pt", loss)] == ["foreign", "foreign"]


def test_verify_imports_no_torch_without_vectors(here: Here) -> None:
    for path in here.base.path.rglob("*.pt"):
        path.unlink()
        manifest.manifest_path(path).unlink(missing_ok=True)
    code = f"import sys; from spilt import verify; verify.main(['--base_dir', {str(here.base.path)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_foreign_vector_is_used_as_it_is(here: Here) -> None:
    manifest.manifest_path(here.vector()).unlink()
    assert here.run(*APPLY, "--force")[0] == 0
