"""Every kind of adapter through all of `spilt weights`; adapters that PEFT itself made and saved, as --pos and --neg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pandas as pd
import peft
import pytest
import torch
import weights_base as small
from torch import nn
from transformers import AutoModelForCausalLM

from spilt import cli
from spilt.settings.fields import ADAPTERS
from spilt.steering.steering import Steering


@pytest.mark.long
def test_every_kind_from_personas_to_the_table(tmp_path: Path) -> None:
    """One row each way for each, at the budget, beside the prompt, which needs nothing trained."""
    base = small.make(tmp_path)
    words = small.words(base, "run", "--block-size", "4")
    at = words.index("--adapter")
    words[at + 1 : at + 2] = ADAPTERS
    words[words.index("--modules") + 1 : words.index("--modules") + 3] = ["v_proj", "down_proj"]  # ia3 scales no queries
    words[words.index("--methods") + 1 : words.index("--methods") + 3] = ["prompt"]
    assert cli.main(words) == 0
    found = pd.read_csv(small.folder(base) / "kl" / "summary.csv").set_index("method")
    assert set(found.index) == {*(f"dW:{kind}" for kind in ADAPTERS), "prompt"}
    dW = found.drop("prompt")
    assert (dW[["alpha_pos", "alpha_neg"]] > 0).all(axis=None) and (dW[["p95_at_pos", "p95_at_neg"]] > 0).all(axis=None)
    table = (small.folder(base) / "tables" / "tables.md").read_text()
    assert all(f"| dW:{kind} {sign} |" in table for kind in ADAPTERS for sign in "+−")


def own(base: families.Base, to: Path, seed: int, **config: Any) -> Path:
    """An adapter as a PEFT user makes it: other names, nothing of ours, every learned number moved, saved by PEFT."""
    torch.manual_seed(seed)
    kind = config.pop("kind", "LoraConfig")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.path / "models" / base.model), getattr(peft, kind)(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(to)
    return to


OWN: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "all linear, rank stabilised": {"r": 2, "use_rslora": True, "target_modules": "all-linear"},
    "ranks": {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}, "target_modules": ["q_proj", "v_proj"]},
    "by pattern": {"r": 2, "target_modules": r".*layers\.[13]\.mlp\.(up|down)_proj", "bias": "lora_only"},
    "dora": {"r": 2, "use_dora": True, "target_modules": ["o_proj"]},
    "pissa": {"r": 2, "init_lora_weights": "pissa", "target_modules": ["o_proj"]},
    "ia3": {"kind": "IA3Config", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "oft": {"kind": "OFTConfig", "oft_block_size": 4, "target_modules": ["q_proj"]},
    "loha": {"kind": "LoHaConfig", "r": 2, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    base = small.make(tmp_path_factory.mktemp("own") / "base")
    assert small.run(base, "data") == 0
    return base


@pytest.mark.parametrize("name", OWN)
@pytest.mark.few(1)
def test_adapters_that_peft_saved(name: str, answered: families.Base, tmp_path: Path) -> None:
    """dW is the difference of the two models that PEFT's own loader merges, weight by weight; what is not in it does not differ."""
    folders = [own(answered, tmp_path / side, seed, **OWN[name]) for seed, side in enumerate(("pos", "neg"))]
    arm = "own_" + "".join(filter(str.isalpha, name))
    words = ["--methods", "--pos", str(folders[0]), "--neg", str(folders[1]), "--name", arm]
    assert small.run(answered, "dw", *words) == 0
    dW = {}
    for site, made in Steering.load(small.folder(answered) / "arms" / f"{arm}.safetensors"):
        weight = made.lora_A @ made.lora_B if made.form == "lora" else made.weight  # type: ignore[union-attr]
        path = "mlp.down_proj" if site.read_point == "mlp_mid" else site.write_point
        dW[f"model.layers.{site.layer}.{path}.weight"] = weight.detach().T
    merged = []
    for folder in folders:
        plain = AutoModelForCausalLM.from_pretrained(answered.path / "models" / answered.model)
        merged.append(peft.PeftModel.from_pretrained(plain, folder).merge_and_unload())
    pos, neg = (dict(nn.Module.named_parameters(model)) for model in merged)
    moved = {key for key in pos if key.endswith("weight") and not torch.allclose(pos[key], neg[key], atol=2e-6)}
    assert moved and moved <= dW.keys()
    for key, update in dW.items():
        torch.testing.assert_close(update, (pos[key] - neg[key]).detach(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "whole modules or tokens of its own"),
        ({"r": 2, "target_modules": ["lm_head"]}, "lm_head"),
        (
            {"kind": "PromptTuningConfig", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
            "an adapter of kind prompt_tuning changes no linear map",
        ),
    ],
    ids=["head", "unembedding", "prompt"],
)
def test_what_is_no_update_of_blocks_is_one_refusal(
    config: dict[str, Any], said: str, answered: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    folder = own(answered, tmp_path / "pos", 0, **config)
    assert small.run(answered, "dw", "--methods", "--pos", str(folder), "--neg", str(folder), "--name", "refused") == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and "Traceback" not in err
    assert not (small.folder(answered) / "arms" / "refused.safetensors").exists()
