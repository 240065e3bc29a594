"""Texts by vLLM (`--engine vllm`) against a stand-in with its documented signatures that computes with PEFT: our texts, one start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import put, read_json, released_state, results_path, vector_path
from families import Base, make_base

from spilt import cli
from spilt.engine import choice

STAND_IN = """
import dataclasses, torch
from typing import Optional
from vllm.lora.request import LoRARequest

STARTED, CALLS = [], []

@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: Optional[int] = None
    stop_token_ids: Optional[list] = None
    ignore_eos: bool = False
    max_tokens: Optional[int] = 16
    detokenize: bool = True

@dataclasses.dataclass
class CompletionOutput:
    index: int
    token_ids: list

@dataclasses.dataclass
class RequestOutput:
    outputs: list

class LLM:
    def __init__(
        self, model, *, tensor_parallel_size=1, dtype="auto", max_model_len=None, enable_lora=False, max_lora_rank=16, max_loras=1
    ):
        from transformers import AutoModelForCausalLM
        assert enable_lora and dtype in ("bfloat16", "float16") and max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        STARTED.append((model, dtype, max_model_len, max_lora_rank, tensor_parallel_size))
        self.path, self.most = model, max_lora_rank
        self.load = lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        from peft import PeftModel
        assert len(prompts) == len(sampling_params) and (lora_request is None or len(lora_request) == len(prompts))
        CALLS.append([(p, s, lora_request and lora_request[i]) for i, (p, s) in enumerate(zip(prompts, sampling_params))])
        made = []
        for prompt, params, lora in CALLS[-1]:
            model = self.load()
            if lora is not None:
                assert isinstance(lora, LoRARequest)
                model = PeftModel.from_pretrained(model, lora.lora_path).eval()
                assert model.peft_config["default"].r <= self.most and not model.peft_config["default"].lora_bias
            assert params.ignore_eos and not params.detokenize and params.temperature == 0, "greedy alone is computed here"
            ids = torch.tensor([prompt["prompt_token_ids"]])
            new = []
            with torch.no_grad():
                while len(new) < params.max_tokens and not (new and new[-1] in params.stop_token_ids):
                    new.append(int(model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax()))
            made.append(RequestOutput([CompletionOutput(0, new)]))
        return made
"""
REQUEST = """
import dataclasses

@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
"""
APPLY = ("--mode", "apply", "--multipliers", "-2", "0", "3", "--quiet")


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The package, as if installed; called: the module that was imported."""
    files = {"__init__.py": STAND_IN, "lora/__init__.py": "", "lora/request.py": REQUEST}
    for name, text in files.items():
        (tmp_path / "installed/vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "installed/vllm" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    from spilt.export import serving

    monkeypatch.setattr(serving, "_engines", {})
    return lambda: sys.modules["vllm"]


def words(base: Base, form: str, *more: str, dataset: str = "") -> list[str]:
    """Of vLLM; the device is the card's."""
    return [*base.argv("sft", form, *more, dataset=dataset), "--engine", "vllm", "--device", "cuda:0", "--dtype", "bfloat16"]


def texts(base: Base) -> list[list[str]]:
    return [[row["pred"][0] for row in read_json(results_path(base, "sft", "lora", m))] for m in ("m-2.0", "m0.0", "m3.0")]


@pytest.mark.long
def test_the_same_files_by_one_start(tmp_path: Path, vllm: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base")
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    assert cli.main([*base.argv("sft", "lora", *APPLY), "--dtype", "float32"]) == 0
    ours = texts(base)
    assert ours[0] != ours[1] != ours[2]
    assert cli.main(words(base, "lora", *APPLY)) == 0
    assert texts(base) == ours
    assert [(start[1], start[4]) for start in vllm().STARTED] == [("bfloat16", 1)]
    asked = [row for call in vllm().CALLS for row in call]
    assert len({lora.lora_int_id for *_, lora in asked if lora}) == 2 and sum(lora is None for *_, lora in asked) == 3
    assert all(params.stop_token_ids and params.max_tokens == 5 for _, params, _ in asked)
    calls = len(vllm().CALLS)
    assert cli.main(words(base, "lora", *APPLY)) == 0 and len(vllm().CALLS) == calls  # there already ...
    assert cli.main([*base.argv("sft", "lora", *APPLY), "--dtype", "bfloat16"]) == 0  # ... and not the results of another engine
    assert 'made with engine "vllm" (now null)' in caplog.text


@pytest.mark.long
def test_one_start_for_all_concepts(tmp_path: Path, vllm: Callable[[], Any]) -> None:
    base = make_base(tmp_path / "base")
    assert cli.main(base.argv("sft", "lora", "--mode", "generate", "--quiet", dataset=base.many)) == 0
    assert cli.main(words(base, "lora", *APPLY, dataset=base.many)) == 0
    assert len(vllm().STARTED) == 1
    assert len({lora.lora_int_id for call in vllm().CALLS for *_, lora in call if lora}) == 6


def test_sampling_in_its_words(tmp_path: Path, vllm: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for; the stand-in itself does not draw."""
    base = make_base(tmp_path / "base")
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    how = ["do_sample=true", "temperature=0.7", "top_k=9", "top_p=0.8", "repetition_penalty=1.3"]
    given = [word for one in how for word in ("--set", f"generation_params.{one}")]
    assert cli.main(words(base, "lora", *APPLY, *given)) == 1
    _, params, _ = vllm().CALLS[0][0]
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.7, 9, 0.8, 1.3)
    assert len({params.seed for _, params, _ in vllm().CALLS[0]}) == 3
    capsys.readouterr()
    assert cli.main(words(base, "lora", *APPLY, "--set", "generation_params.no_repeat_ngram_size=2")) == 2
    assert "has no NoRepeatNGramLogitsProcessor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "more", "said"),
    [
        ("lora", ["--mode", "both"], "only produces text"),
        ("lora", [*APPLY, "--device", "cpu"], "CUDA_VISIBLE_DEVICES"),
        ("lora", [*APPLY, "--dtype", "float32"], "does not compute in float32"),
        ("lora", [*APPLY, "--set", "steer_positions=f5"], "acts on every token"),
        ("vector", [*APPLY], "has no biases"),
        ("local_weight", [*APPLY], "has no biases"),
    ],
)
def test_what_is_not_exact_there_is_refused(
    form: str, more: list[str], said: str, tmp_path: Path, vllm: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    put(vector_path(base, "sft", form), released_state(form))
    assert cli.main([*words(base, form), *more]) == 2
    assert said in capsys.readouterr().err and not (base.path / "generation").exists()
    assert not getattr(sys.modules.get("vllm"), "STARTED", [])


def test_where_it_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert cli.main(words(base, "lora", *APPLY)) == 2
    assert "vllm is not installed here: pip install vllm" in capsys.readouterr().err
    assert cli.main([*words(base, "lora", *APPLY), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "engine   vllm" in said and "--engine vllm" in said
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*words(base, "lora", *APPLY), "--dry_run"]) == 2
    assert "starts its own processes" in capsys.readouterr().err
