"""Quantised checkpoints: the library that made one loads it; every form steers it as the plain engine says, close to the original."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from test_engines import PAD, PREFIX, STRENGTHS, fast_losses, steering
from test_suffix import answer_pairs

from spilt.engine import whole
from spilt.model import host


def test_torchao_int8(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    made = AutoModelForCausalLM.from_pretrained(families.checkpoint("llama"), quantization_config=how, dtype=torch.float32)
    made.save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    tiny = host.load(tmp_path, "float32", "cpu").model
    assert type(tiny.get_submodule("model.layers.0.mlp.down_proj").weight) is not torch.nn.Parameter
    for form, read_point in (("vector", None), ("lora", "mlp_mid"), ("local_weight", "attn")):
        value = steering(form, read_point, scale=0.2)
        found = whole.losses(tiny, value, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX)
        torch.testing.assert_close(fast_losses(tiny, value), found, atol=1e-4, rtol=1e-5)
        exact = whole.losses(families.model("llama"), value, STRENGTHS, answer_pairs(), PAD, "skip_prefix", PREFIX)
        ours, theirs = (losses[1:] - losses[0] for losses in (found, exact))  # what steering changes
        assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()
