"""Several layers fitted by one loss, and the plain engine, through the command line: fit, apply, loss, verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import spilt
from spilt import cli, report, verify
from spilt.model import host
from spilt.settings import resolve_fit
from spilt.tasks import control

JOINT = ("--set", "layers=1,3", "--set", "joint=true")
LAYERS = ("--set", "layers=1,3")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> families.Base:
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))
    return families.make_base(tmp_path / "base", train=8)


def run(base: families.Base, form: str, mode: str, *words: str, method: str = "sft") -> int:
    return cli.main([*base.argv(method, form, "--mode", mode, *words), "--quiet"])


def vector(base: families.Base, form: str, layer: int) -> Path:
    return base.path / "vectors" / base.model / "sft" / base.one / f"sft_{form}" / f"layer_{layer}.pt"


def tables(base: families.Base) -> dict[str, pd.DataFrame]:
    return {str(path.relative_to(base.path)): pd.read_csv(path) for path in sorted((base.path / "vectors").rglob("*losses*.csv"))}


def texts(base: families.Base) -> dict[str, Any]:
    return {
        str(path.relative_to(base.path)): json.loads(path.read_text())
        for path in sorted((base.path / "generation").rglob("*_results.json"))
    }


@pytest.mark.parametrize("form", ["vector", "lora", "local_weight"])
@pytest.mark.few(1)
def test_a_joint_fit_from_settings_to_texts_and_losses(base: families.Base, form: str) -> None:
    """The files are those of spilt.fit(joint=True), other than two fits alone give; everything after the fit uses both layers."""
    assert run(base, form, "generate", *JOINT) == 0
    paths = [vector(base, form, layer) for layer in (1, 3)]
    loaded = host.load(base.path / "models" / base.model, "float32", "cpu")
    found = resolve_fit(base.path, base.model, base.one, "sft", form, {"layers": (1, 3), "joint": True})
    given = {k: v for k, v in found.settings.as_dict().items() if k not in ("method", "intervention_method", "layers", "joint")}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    pairs = [{"question": r["question"], "matching": r["matching"], "not_matching": r["not_matching"]} for r in families.pairs(8)]
    wanted = spilt.fit(loaded.model, loaded.tokenizer, pairs, layer=[1, 3], method="sft", intervention=form, joint=True, **given)
    assert spilt.Steering.load(paths[0].parent) == wanted
    kept = [path.read_bytes() for path in paths]
    assert run(base, form, "generate", *LAYERS, "--force") == 0
    assert [path.read_bytes() for path in paths] != kept

    assert run(base, form, "both", *JOINT, "--multipliers", "1") == 0 and [path.read_bytes() for path in paths] == kept
    assert run(base, form, "loss", *JOINT, "--multipliers", "0", "1") == 0
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    ((_, made),) = texts(base).items()
    prompts = [row["input"] for row in made]
    by_hand = spilt.generate(loaded.model, loaded.tokenizer, wanted, prompts, 1.0, max_new_tokens=5, do_sample=False)
    assert [row["pred"][0] for row in made] == by_hand["text"].tolist()


def test_halves_of_two_fits_are_refused(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "vector", "generate", *JOINT) == 0
    assert run(base, "vector", "generate", "--set", "layers=3") == 0  # layer 3 alone takes the place of its half
    for mode in ("apply", "loss"):
        assert run(base, "vector", mode, *JOINT, "--multipliers", "1") != 0
        assert "layer_1.pt: was fitted jointly with layer 3, whose file is of another fit now" in capsys.readouterr().err
    assert not texts(base) and not tables(base)


def test_a_joint_fit_is_whole_or_is_made_again(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "vector", "generate", *JOINT) == 0
    kept = {layer: vector(base, "vector", layer).read_bytes() for layer in (1, 3)}
    vector(base, "vector", 3).unlink()
    capsys.readouterr()
    assert run(base, "vector", "generate", *JOINT) == 0 and "already done" not in capsys.readouterr().out
    assert {layer: vector(base, "vector", layer).read_bytes() for layer in (1, 3)} == kept
    assert run(base, "vector", "generate", *JOINT) == 0 and "already done" in capsys.readouterr().out


def test_one_layer_of_a_joint_fit_used_alone_is_told(base: families.Base, caplog: pytest.LogCaptureFixture) -> None:
    assert run(base, "vector", "generate", *JOINT) == 0
    caplog.clear()
    assert run(base, "vector", "apply", *JOINT) == 0 and "jointly" not in caplog.text
    assert run(base, "vector", "apply", "--set", "layers=3") == 0
    assert "was fitted jointly with layer 1" in caplog.text


@pytest.mark.long
def test_a_stopped_joint_fit_goes_on_to_the_same_bytes(base: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        pass

    other = base._replace(path=tmp_path / "other")
    shutil.copytree(base.path, other.path)
    words = (*JOINT, "--checkpoint_seconds", "0", "--set", "n_epochs=3")
    assert run(base, "lora", "generate", *words) == 0
    real, count = torch.optim.AdamW.step, 0

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise Stopped
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Stopped):
            run(other, "lora", "generate", *words)
    assert list(other.path.rglob("layer_1.unfinished.pt"))
    assert run(other, "lora", "generate", *words) == 0 and not list(other.path.rglob("*unfinished*"))
    for layer in (1, 3):
        assert vector(other, "lora", layer).read_bytes() == vector(base, "lora", layer).read_bytes()


@pytest.mark.parametrize(
    ("method", "words", "said"), [("sft", ("--set", "joint=true"), "two layers or more"), ("caa", JOINT, "each layer has its own mean")]
)
def test_joint_fits_that_do_not_exist(
    base: families.Base, method: str, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, "vector", "generate", *words, method=method) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["vector", "lora", "local_weight"])
@pytest.mark.long
def test_the_plain_engine_gives_what_the_fast_one_gives(
    base: families.Base, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fits, greedy and sampled texts, losses, a sweep with its random directions: equal up to rounding."""
    monkeypatch.setattr(control, "DRAWS", 5)
    plain = base._replace(path=tmp_path / "plain")
    sampled = "generation_params={do_sample: true, temperature: 0.8, max_new_tokens: 8}"
    shutil.copytree(base.path, plain.path)
    for here, engine in ((base, "fast"), (plain, "plain")):
        assert run(here, form, "generate", "--engine", engine) == 0
        assert run(here, form, "apply", "--engine", engine, "--multipliers", "0", "1") == 0
        assert run(here, form, "apply", "--engine", engine, "--multipliers", "-1", "--set", sampled) == 0
        few = ("--control_pairs", "2", "--limit", "4", "--released_files")
        assert run(here, form, "loss", "--engine", engine, "--multipliers", "sweep", *few) == 0
    states = [spilt.Steering.load(vector(here, form, base.layer)) for here in (base, plain)]
    for a, b in zip(*(steering.parameters() for steering in states), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert texts(base) and texts(plain) == texts(base)
    fast, slow = tables(base), tables(plain)
    assert fast and fast.keys() == slow.keys()
    for name, table in fast.items():
        np.testing.assert_allclose(slow[name]["loss_sum"], table["loss_sum"], atol=2e-3, err_msg=name)
        np.testing.assert_allclose(slow[name]["answer_loss_sum"], table["answer_loss_sum"], atol=2e-3, err_msg=name)


def test_the_inside_of_block_0_runs_by_the_plain_engine(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--set", "layers=0", "--set", "site=down_proj")
    assert run(base, "lora", "generate", "--dry_run", *words) == 0
    assert "plain: the inside of block 0 is steered" in capsys.readouterr().out
    for mode in ("generate", "apply", "loss"):
        assert run(base, "lora", mode, *words) == 0
    assert run(base, "lora", "loss", "--dry_run") == 0 and "engine   fast" in capsys.readouterr().out


def test_joint_stands_in_yaml_too(base: families.Base) -> None:
    path = base.hparams(base.one, "sft", "generate_sft_vector.yaml")
    values = yaml.safe_load(path.read_text()) | {"layers": [1, 3], "joint": True}
    families.write_yaml(path, values)
    families.write_yaml(base.hparams(base.one, "sft", "apply_sft.yaml"), {"alg_name": "sft"})  # the layers are those of the fit
    assert run(base, "vector", "both") == run(base, "vector", "loss", "--multipliers", "1") == 0
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
