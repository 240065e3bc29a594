"""Nothing is called done that is not: steps are judged after what they depend on, what is hashed is what was read,
a vector is used as what it is, and nothing is replaced without a word."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Base, build, make_base, pairs, write_jsonl, write_yaml

from spilt import cli, report, verify
from spilt.artifacts import manifest
from spilt.model import host
from spilt.tasks import recordings

M = ("--multipliers", "2", "--quiet")


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base", train=6, test=2)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))  # it is not what is told apart here


def run(base: Base, *words: str, method: str = "sft", form: str = "vector", dataset: str = "") -> int:
    return cli.main(base.argv(method, form, *words, dataset=dataset))


def vector(base: Base, method: str = "sft", form: str = "vector", layer: int = 2) -> Path:
    leaf = "caa_vector" if method == "caa" else f"{method}_{form}"
    return base.path / "vectors" / base.model / method / base.one / leaf / f"layer_{layer}.pt"


def texts(base: Base, method: str = "sft", form: str = "vector", m: str = "2.0") -> Path:
    return base.path / "generation" / base.model / method / base.one / f"{method}_{form}" / f"m{m}" / f"{base.one}_results.json"


def losses(base: Base, m: str = "2.0", method: str = "sft", form: str = "vector") -> Path:
    folder = base.path / "vectors" / base.model / "get_sft_loss" / method / base.one / f"{method}_{form}"
    return folder / f"{form}_{method}_m{m}_winning_only" / "train_losses.csv"


def edit(base: Base, method: str = "sft", form: str = "vector", **settings: Any) -> None:
    import yaml

    path = base.hparams(base.one, method, f"generate_{method}_{form}.yaml")
    write_yaml(path, {**yaml.safe_load(path.read_text()), **settings})


def parts(path: Path) -> dict[str, Any]:
    record = manifest.read(path)
    assert record is not None
    return dict(record["parts"])


# ---------------------------------------------------------------- judged after what it depends on


def test_texts_are_made_again_when_the_fit_is(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, *M) == 0
    before = vector(base).read_bytes(), texts(base).read_bytes()
    edit(base, lr=0.3)
    capsys.readouterr()
    assert run(base, *M, "--dry_run") == 0
    assert "to do: 1 to be made again" in capsys.readouterr().out
    assert run(base, *M) == 0
    assert "already done" not in capsys.readouterr().out
    assert before[0] != vector(base).read_bytes()
    assert parts(texts(base))["vectors"] == [manifest.digest(vector(base).read_bytes())]


def test_texts_are_made_again_when_the_data_changed(base: Base) -> None:
    assert run(base, *M) == 0
    write_jsonl(base.data(base.one, "train"), pairs(6, "now "))
    assert run(base, *M) == 0
    assert parts(texts(base))["vectors"] == [manifest.digest(vector(base).read_bytes())]
    assert parts(vector(base))["data"] == manifest.digest(base.data(base.one, "train").read_bytes())


def test_nothing_is_made_from_an_older_vector_when_its_fit_failed(
    base: Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(base, *M) == 0
    before = texts(base).read_bytes()
    edit(base, lr=0.3)
    monkeypatch.setattr("spilt.tasks.fit.dump", _no_space)
    assert run(base, "--multipliers", "2", "3", "--quiet") == 1
    out = capsys.readouterr().out
    assert "skipped" in out and "its fit failed" in out
    assert texts(base).read_bytes() == before and not texts(base, m="3.0").exists()


def _no_space(*_: Any) -> bytes:
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- what is hashed is what was read


def exchange_data(base: Base) -> None:
    write_jsonl(base.data(base.one, "train"), pairs(6, "now "))


def exchange_model(base: Base) -> None:
    folder = base.path / "models" / base.model
    build("qwen2", seed=5).save_pretrained(folder)


def exchange_vector(base: Base) -> None:
    path = vector(base)
    torch.save(torch.load(path, weights_only=True) * 3, path)
    manifest.manifest_path(path).unlink()


def at_call(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, deed: Callable[[], None]) -> None:
    """`deed` right after the number-th call of a function returns."""
    real, calls = getattr(where, name), [0]

    def then(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls[0] += 1
        if calls[0] == number:
            deed()
        return result

    monkeypatch.setattr(where, name, then)


@pytest.mark.parametrize("exchange", [exchange_data, exchange_model], ids=["data", "model"])
@pytest.mark.long
def test_a_fit_of_later_cells_never_lies(
    base: Base, exchange: Callable[[Base], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second cell's activations are those of the first: they were recorded before the exchange."""
    with monkeypatch.context() as patch:
        at_call(patch, recordings.activations, "record", 1, lambda: exchange(base))
        assert run(base, "--mode", "generate", "--quiet", method="spilt", form="all") == 1
    told = capsys.readouterr()
    assert told.err.count("was exchanged while the run was using it") == 3, told.err
    assert not vector(base, "spilt").exists()
    assert run(base, "--mode", "generate", "--quiet", method="spilt", form="all") == 0
    again = vector(base, "spilt").read_bytes()
    fresh = make_base(base.path.parent / "fresh", train=6, test=2)
    exchange(fresh)
    assert run(fresh, "--mode", "generate", "--quiet", method="spilt") == 0
    assert vector(fresh, "spilt").read_bytes() == again


def test_a_model_that_changes_while_it_loads(base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    at_call(monkeypatch, host, "load", 1, lambda: exchange_model(base))
    assert run(base, "--mode", "generate", "--quiet") != 0
    assert "was exchanged while the run was using it" in capsys.readouterr().err
    assert not vector(base).exists()


@pytest.mark.parametrize("mode", ["apply", "loss"])
def test_a_vector_exchanged_in_a_sweep(base: Base, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    at_call(monkeypatch, recordings.layer_file, "load", 1, lambda: exchange_vector(base))
    assert run(base, "--mode", mode, "--multipliers", "1", "2", "--quiet") == 1
    assert "was exchanged while the run was using it" in capsys.readouterr().err
    assert not texts(base).exists() and not losses(base).exists()


def test_an_exchange_after_loading_and_before_storing(
    base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    from spilt.engine import sampling

    at_call(monkeypatch, sampling, "decoding", 1, lambda: exchange_vector(base))
    assert run(base, "--mode", "apply", "--multipliers", "1", "2", "--quiet") == 1
    assert "was exchanged while the run was using it" in capsys.readouterr().err
    assert not texts(base).exists()
    assert not list(base.path.rglob("unfinished_*")), "texts of nobody knows which vector"


def test_a_file_written_twice_at_once_is_hashed_twice(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        os.utime(path, (1, 1))
        assert manifest.file_hash(path) == manifest.digest(content)
    other = tmp_path / "other"
    other.write_bytes(b"ten")
    shutil.copystat(path, other)
    os.replace(other, path)
    assert manifest.file_hash(path) == manifest.digest(b"ten")


# ---------------------------------------------------------------- a vector is used as what it is


def move(source: Path, target: Path) -> None:
    """Vector and manifest, as a person copies them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, at in ((source, target), (manifest.manifest_path(source), manifest.manifest_path(target))):
        shutil.copy(path, at)


@pytest.mark.parametrize("mode", ["apply", "loss"])
def test_another_methods_vector_in_its_place(base: Base, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    move(vector(base), vector(base, "spilt"))
    assert run(base, "--mode", mode, *M, method="spilt") == 2
    err = capsys.readouterr().err
    assert 'method "sft" (wanted "spilt")' in err and "remove layer_2.manifest.json" in err
    manifest.manifest_path(vector(base, "spilt")).unlink()  # the way out
    assert run(base, "--mode", mode, *M, method="spilt") == 0


def test_another_layers_vector_in_its_place(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--set", "layers=1", "--quiet") == 0
    move(vector(base, layer=1), vector(base, layer=2))
    assert run(base, "--mode", "apply", *M) == 2
    assert "layers [1] (wanted [2])" in capsys.readouterr().err


def test_another_write_point(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "apply", *M, "--set", "site=down_proj") == 2
    assert 'site "block" (wanted "down_proj")' in capsys.readouterr().err
    assert run(base, "--mode", "apply", *M, "--set", "site=down_proj", "--dry_run") == 0
    assert "will be refused" in capsys.readouterr().out


def test_another_concepts_vector_in_its_place(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--concepts", "0", "--quiet", dataset=base.many) == 0
    folder = base.path / "vectors" / base.model / "sft"
    move(folder / "axbench_concept_0" / "sft_vector" / "layer_2.pt", folder / "axbench_concept_3" / "sft_vector" / "layer_2.pt")
    assert run(base, "--mode", "apply", "--concepts", "3", *M, dataset=base.many) == 2
    assert "concept 0 (wanted 3)" in capsys.readouterr().err


def test_what_changed_since_the_fit_is_named(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    assert run(base, "--mode", "apply", *M) == 0
    assert "fitted" not in caplog.text
    edit(base, lr=0.3)
    exchange_data(base)
    exchange_model(base)
    assert run(base, "--mode", "apply", *M) == 0
    assert "was fitted with other settings: lr 0.01 (now 0.3)" in caplog.text
    assert "was fitted on another model than models/tiny holds now" in caplog.text
    assert "was fitted on other data than data/mine/train.jsonl holds now" in caplog.text


@pytest.mark.parametrize("form", ["vector", "lora"])
def test_several_concepts_and_none_asked_for(base: Base, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    from families import intervention

    several = [intervention(form, seed=i).state() for i in range(3)]
    path = vector(base, form=form)
    path.parent.mkdir(parents=True)
    torch.save(torch.stack(several) if form == "vector" else dict(enumerate(several)), path)
    assert run(base, "--mode", "apply", *M, form=form) == 2
    err = capsys.readouterr().err
    assert "3 concepts" in err and "concept_id" in err
    assert run(base, "--mode", "apply", *M, "--set", "concept_id=1", form=form) == 0


# ---------------------------------------------------------------- nothing is replaced without a word


@pytest.mark.long
def test_what_is_replaced_is_named(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    assert run(base, *M, dataset=base.many) == 0 and "replaces" not in caplog.text
    assert run(base, *M, "--concepts", "3", dataset=base.many) == 0
    assert "all_generation_results_m2.0.json, made with concepts [0, 1, 3] (now [3])" in caplog.text
    caplog.clear()
    assert run(base, *M) == 0 and "replaces" not in caplog.text
    assert run(base, *M, "--limit", "1") == 0
    assert "layer_2.pt, made with limit null (now 1)" in caplog.text
    assert "mine_results.json, made with limit null (now 1), another vector" in caplog.text
    caplog.clear()
    assert run(base, "--mode", "loss", *M) == 0 and "replaces" not in caplog.text
    assert run(base, "--mode", "generate", "--set", "layers=1", "--quiet") == 0 and "replaces" not in caplog.text
    assert vector(base, layer=2).exists()
    assert run(base, "--mode", "loss", *M, "--set", "layers=1") == 0
    assert "and 3 more, made with " in caplog.text and "layers [2] (now [1])" in caplog.text


def test_the_released_codes_texts_are_replaced_with_a_word(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    assert run(base, "--mode", "generate", "--quiet") == 0
    texts(base).parent.mkdir(parents=True)
    texts(base).write_text(json.dumps([]))
    assert run(base, "--mode", "apply", *M) == 0
    assert "mine_results.json, made elsewhere: no manifest" in caplog.text


# ---------------------------------------------------------------- a kill between the last result and the end


@pytest.mark.long
@pytest.mark.parametrize("mode", ["generate", "apply", "loss"])
def test_what_was_kept_goes_when_everything_is_done(base: Base, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(base, "--mode", "generate", "--quiet", "--limit", "1") == 0
    own = ("--set", "n_epochs=3") if mode == "generate" else ("--multipliers", "2")
    words = ("--mode", mode, "--checkpoint_seconds", "0", "--quiet", *own)
    with monkeypatch.context() as patch:  # the files stay, as when a kill falls between the last rename and their removal
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        assert run(base, *words) == 0
    (left,) = base.path.rglob("*unfinished*")
    before = left.read_bytes()
    if mode != "generate":
        left.write_bytes(before + b'["of another request", 1]\n')
        assert run(base, *words) == 0 and left.exists()
        left.write_bytes(before)
    assert run(base, *words) == 0
    assert not left.exists()


@pytest.mark.parametrize("mode", ["generate", "both"])
def test_a_released_vector_that_cannot_be_used_is_not_called_done(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a manifest a fit keeps the file, as somebody's own work; one that no run could read is told, and not replaced unasked."""
    base = make_base(tmp_path / "base")
    path = base.path / "vectors" / base.model / "sft" / base.one / "sft_vector" / f"layer_{base.layer}.pt"
    path.parent.mkdir(parents=True)
    torch.save(torch.ones(32), path)
    path.write_bytes(whole := path.read_bytes()[:-700])
    assert [found.state for found in verify.check(base.path)] == [verify.DAMAGED]
    assert cli.main([*base.argv("sft", "vector", "--mode", mode, "--dry_run")]) == 0
    assert "will fail" in capsys.readouterr().out
    assert cli.main([*base.argv("sft", "vector", "--mode", mode), "--quiet"]) == 2
    said = capsys.readouterr()
    assert str(path.name) in said.out + said.err and "--force" in said.out + said.err and path.read_bytes() == whole
    assert cli.main([*base.argv("sft", "vector", "--mode", mode, "--force"), "--quiet"]) == 0
    assert [found.state for found in verify.check(base.path)][0] == verify.OK


def test_a_changed_manifest_speaks_for_nothing(base: Base) -> None:
    """Each digit and letter of it but the time of day and the checksum's own line: the result is made again."""
    assert run(base, "--mode", "generate", *M) == 0
    about, before = manifest.manifest_path(vector(base)), vector(base).read_bytes()
    text = about.read_text()
    for place in range(0, len(text), 37):
        line = text[text.rfind("\n", 0, place) : text.find("\n", place)]
        if not text[place].isalnum() or '"created"' in line or '"record_sha256"' in line:
            continue
        about.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
        assert [found.state for found in verify.check(base.path)] == [verify.DAMAGED], text[place - 20 : place + 20]
    assert run(base, "--mode", "generate", *M) == 0 and vector(base).read_bytes() == before
    assert [found.state for found in verify.check(base.path)] == [verify.OK]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["apply", "loss"])
def test_what_was_made_from_a_vector_whose_manifest_is_damaged_is_not_called_done(base: Base, mode: str) -> None:
    assert run(base, "--mode", "both", *M) == run(base, "--mode", "loss", *M) == 0
    about = manifest.manifest_path(vector(base))
    about.write_text(about.read_text()[:-20])
    assert run(base, "--mode", mode, *M) == 2
    assert run(base, "--mode", "generate", *M) == 0 and run(base, "--mode", mode, *M) == 0
