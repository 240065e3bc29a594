"""Families on the command line: told from config.json before anything is loaded, shown by `spilt anatomy`, overridden by --anatomy."""

from __future__ import annotations

import json
from typing import Any

import families
import pytest
import torch
from command_line import clean  # noqa: F401
from families import Base, make_base, write_yaml

from spilt import cli
from spilt.model import host
from spilt.steering.steering import Steering


@pytest.fixture
def base(tmp_path: Any) -> Base:
    return make_base(tmp_path / "base", "qwen3_moe", train=4)


def run(base: Base, capsys: pytest.CaptureFixture[str], *words: str, form: str = "vector") -> tuple[int, str]:
    code = cli.main(base.argv("sft", form, *words))
    said = capsys.readouterr()
    return code, said.out + said.err


def anatomy(base: Base, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["anatomy", base.model, "--base_dir", str(base.path), *words])
    said = capsys.readouterr()
    return code, said.out + said.err


def change(base: Base, **values: Any) -> None:
    path = base.path / "models" / base.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["qwen2_mo", "llama-5", "nobody-knows"])
def test_a_family_that_transformers_does_not_have(base: Base, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Its name is said, and no other architecture is named."""
    change(base, model_type=name)
    for code, said in (run(base, capsys), anatomy(base, capsys)):
        assert code == 2 and f"no model family '{name}'" in said and "did you mean" not in said.lower()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.long
def test_a_family_that_makes_no_text(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    (base.path / "models" / base.model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    code, said = run(base, capsys)
    assert code == 2 and "'vit'" in said and "makes no language model" in said


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("words", [["--dry_run"], []])
def test_experts_have_no_mlp_mid_and_the_plan_says_so(base: Base, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, said = run(base, capsys, *words, form="lora")
    assert code == 2 and "mixture of 4 experts; set intervention_components to mlp, attn or block" in said


def test_experts_in_every_mode(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    """A vector, and a lora at attention: fitted, applied, measured, in one run each; a text at m = 0 is the unsteered one."""
    write_yaml(
        base.hparams(base.one, "sft", "generate_sft_lora.yaml"),
        {"alg_name": "sft", "layers": [base.layer], "intervention_method": "lora", "intervention_components": "attn", "n_epochs": 1},
    )
    for form in ("vector", "lora"):
        for mode in ("both", "loss"):
            code, said = run(base, capsys, "--mode", mode, "--multipliers", "0", "2", "--no_report", form=form)
            assert code == 0, said
    read = Steering.load(base.path / "vectors" / base.model / "sft" / base.one / "sft_lora")
    assert read.entries[0][0].read_point == "attn"


@pytest.mark.long
def test_a_hybrid_in_every_mode(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By the plain engine, which the plan says with the reason; the closed form too."""
    base = make_base(tmp_path / "base", "bamba", train=4)
    code, said = run(base, capsys, "--dry_run")
    assert code == 0 and "plain" in said and "state-space" in said
    for mode in ("both", "loss"):
        code = cli.main([*base.argv("all", "vector", "--mode", mode, "--multipliers", "0", "2", "--no_report")])
        assert code == 0, capsys.readouterr()


@pytest.mark.usefixtures("no_weights")
def test_the_program_shows_what_is_found(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    (base.path / "models" / base.model / "model.safetensors").unlink()
    code, said = anatomy(base, capsys)
    assert code == 0 and "qwen3_moe: tested" in said and "model.layers: 5 blocks" in said and "mlp_mid  none: its MLP is a mixture" in said
    families.config("llama").save_pretrained(base.path / "models" / base.model)
    code, said = anatomy(base, capsys, "--anatomy", "attn=self_attn.o_proj")
    assert code == 0 and "attn     self_attn.o_proj" in said and "mlp_mid  mlp.down_proj, reads 48 numbers" in said
    code, said = anatomy(base, capsys, "--anatomy", "mlp=nowhere")
    assert code == 2 and "no block of model.layers has 'nowhere'" in said


def test_an_override_is_a_setting_and_decides_the_result(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", "llama", train=4)
    words = ("--mode", "generate", "--set", "intervention_components=attn")
    assert run(base, capsys, *words, form="lora")[0] == 0
    path = base.path / "vectors" / base.model / "sft" / base.one / "sft_lora" / "layer_2.pt"
    first = torch.load(path, weights_only=True)["lora_B"]
    assert run(base, capsys, *words, "--anatomy", "attn=mlp.up_proj", form="lora")[0] == 0
    assert 'made with anatomy null (now "attn=mlp.up_proj")' in caplog.text
    assert not torch.equal(first, torch.load(path, weights_only=True)["lora_B"])
    code, said = run(base, capsys, *words, "--anatomy", "attn=mlp.up_proj", "--dry_run", form="lora")
    assert "already done" in said and "--anatomy attn=mlp.up_proj" in said
    for wrong in ("atn=mlp", "attn", "attn=nowhere"):
        code, said = run(base, capsys, *words, "--anatomy", wrong, form="lora")
        assert code == 2 and "--anatomy" in said or "did you mean 'attn'" in said, said


def test_what_no_row_names_runs_by_the_plain_engine(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """OLMo: transformers has it, the table does not."""
    base = make_base(tmp_path / "base", "llama", train=4)
    folder = base.path / "models" / base.model
    families.build("olmo").save_pretrained(folder)
    code, said = run(base, capsys, "--dry_run")
    assert code == 0 and "'olmo' is not one of those" in said
    assert run(base, capsys, "--mode", "both")[0] == 0
    assert host.load(folder, "float32", "cpu").model.config.model_type == "olmo"
