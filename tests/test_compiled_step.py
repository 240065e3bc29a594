"""The decoding step by torch.compile: one graph, compiled once for a stream, the texts of the plain step; and what is refused, and how."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from command_line import process, results_path
from families import FAMILY_NAMES, intervention, model
from test_static_step import how, rows, steering_of, texts
from torch import Tensor

import spilt
from spilt import cli
from spilt.engine import choice, static
from spilt.errors import UserError
from spilt.steering.interventions import Vector
from spilt.steering.steering import Steering


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled, and run as they were traced: fullgraph refuses what Python would have to do in between."""
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    monkeypatch.setitem(static.RUN, choice.COMPILED, partial(static.compiled, backend=backend))
    return seen


FAMILIES_OF_FORMS = list(zip(FAMILY_NAMES[1::2], cycle(families.FORMS), strict=False))  # each takes seconds


@pytest.mark.long
@pytest.mark.parametrize(("family", "form"), FAMILIES_OF_FORMS)
def test_it_is_one_graph(graphs: list[Any], family: str, form: str) -> None:
    tiny, steering = model(family), steering_of(form, family)
    assert texts(tiny, steering, rows(), how(), 3, "compiled") == texts(tiny, steering, rows(), how(), 3, "plain")
    assert len(graphs) == 1, "compiled again for another step"


@pytest.mark.long
def test_another_steering_has_a_graph_of_its_own(graphs: list[Any]) -> None:
    """What is traced of one is not run for the other, although hooks are not looked at again."""
    tiny, asked = families.build("llama", num_hidden_layers=2), rows()
    for number in (1, 2):
        steering = Steering.of({1: intervention("vector", scale=0.5, seed=number)})
        plain = texts(tiny, steering, asked, how(), 3, "plain")
        assert texts(tiny, steering, asked, how(), 3, "compiled") == plain
        assert len(graphs) == number


# ---------------------------------------------------------------- what is refused


class Asks(Vector):
    """Python that looks at the numbers."""

    form = "vector"

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Any) -> Tensor:
        return super().delta(h, x, multiplier) if h.sum().item() > -1e9 else h


@pytest.mark.long
def test_what_cannot_be_compiled_is_said(graphs: list[Any]) -> None:
    tiny = families.build("llama", num_hidden_layers=2)
    steering = Steering.of({1: Asks(families.HIDDEN).requires_grad_(False)})
    with pytest.raises(UserError, match=r"cannot be compiled here: .*; leave --decode_step out"):
        texts(tiny, steering, rows(), how(), 3, "compiled")
    assert texts(tiny, steering, rows(), how(), 3, "static") == texts(tiny, steering, rows(), how(), 3, "plain")


def test_an_error_of_the_step_itself_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scores: static.Scores, device: torch.device) -> static.Scores:
        def step() -> Tensor:
            raise RuntimeError("shapes")

        return step

    monkeypatch.setitem(static.RUN, choice.STATIC, broken)
    with pytest.raises(RuntimeError, match="shapes"):
        texts(model("qwen2"), steering_of("vector", "qwen2"), rows(), how(), 3, "static")


def test_a_graph_wants_a_card() -> None:
    with pytest.raises(UserError, match="CUDA device, and the model is on cpu; --decode_step compiled, or leave it out"):
        texts(model("qwen2"), steering_of("vector", "qwen2"), rows(), how(), 3, "captured")


def test_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny: Any = families.build("qwen2")
    monkeypatch.setattr(tiny, "_tp_size", 2)
    with pytest.raises(UserError, match="whole on one device"):
        texts(tiny, steering_of("vector", "qwen2"), rows(), how(), 3, "static")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "apply", "--decode_step", "captured"], "--decode_step captured --device cpu: a CUDA graph runs on a CUDA device"),
        (["--mode", "loss", "--decode_step", "static"], "it is about texts, and none are made here"),
        (["--mode", "apply", "--decode_step", "compiled", "--engine", "plain"], "not done by the fast engine, which alone has it"),
        (["--mode", "both", "--decode_step", "static", "--set", "steer_positions=prompt"], "(steer_positions = prompt"),
    ],
)
def test_the_command_line_refuses(base: families.Base, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    before = families.listing(base.path)
    for more in ([], ["--dry_run"]):
        assert cli.main(base.argv("sft", "vector", *words, *more)) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
    assert families.listing(base.path) == before


def test_linear_attention_is_refused(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    path = base.path / "models" / base.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3_next"}))
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--decode_step", "static", "--dry_run")) == 2
    assert "linear attention or state-space blocks" in capsys.readouterr().err


# ---------------------------------------------------------------- where it is asked for


def test_the_plan_says_it(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = base.argv("sft", "vector", "--mode", "both", "--dry_run")
    assert cli.main([*words, "--decode_step", "compiled"]) == 0
    assert capsys.readouterr().out.count("decode   compiled step") == 1
    assert cli.main([*words, "--decode_step", "compiled", "--json"]) == 0
    assert [step["decode_step"] for step in json.loads(capsys.readouterr().out)["steps"]] == [None, "compiled"]
    assert cli.main(words) == 0 and "decode   " not in capsys.readouterr().out


def test_the_command_line_makes_the_same_texts_and_nothing_again(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real stores, settings and manifests; a step of another kind is no reason to make texts anew."""
    made: list[str] = []
    own = static.StaticStep.__init__
    monkeypatch.setattr(static.StaticStep, "__init__", lambda self, *given: (made.append(given[-1]), own(self, *given))[1])
    words = base.argv("sft", "lora", "--quiet", "--multipliers", "-2", "0", "2")
    assert cli.main([*words, "--mode", "both"]) == 0 and not made
    before = {name: value for name, value in families.listing(base.path).items() if name.endswith("_results.json")}
    assert len(before) == 3 and cli.main([*words, "--mode", "apply", "--decode_step", "static"]) == 0 and not made
    assert cli.main([*words, "--mode", "apply", "--decode_step", "static", "--force"]) == 0 and made == ["static"]
    assert before.items() <= families.listing(base.path).items()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler is here")
def test_a_real_run_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the default backend, a family with a soft cap and windows; the same bytes."""
    for name in ("CC", "CXX"):  # peft leaves its own there, where a test has asked it for boft
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    base = families.make_base(tmp_path / "base", "gemma2")
    assert cli.main(base.argv("sft", "vector", "--mode", "both", "--quiet", "--multipliers", "5")) == 0
    path = results_path(base, "sft", "vector", "m5.0")
    plain = path.read_bytes()
    path.unlink()
    done = process(base.argv("sft", "vector", "--mode", "apply", "--quiet", "--multipliers", "5", "--decode_step", "compiled"))
    assert done.returncode == 0 and "  done  " in done.stdout, done.stderr
    assert path.read_bytes() == plain


def test_in_python() -> None:
    tiny, words = model("qwen2"), families.tokenizer()
    asked: dict[str, Any] = {"multipliers": [0, 2], "max_new_tokens": 5, "do_sample": False}
    steering = steering_of("vector", "qwen2")
    plain = spilt.generate(tiny, words, steering, ["is 3 odd?", "why"], **asked)
    assert spilt.generate(tiny, words, steering, ["is 3 odd?", "why"], decode_step="static", **asked).equals(plain)
    with pytest.raises(UserError, match="asked for with --engine plain"):
        spilt.generate(tiny, words, steering, "why", engine="plain", decode_step="static", **asked)
    with pytest.raises(UserError, match="unknown decoding step 'fast'"):
        spilt.generate(tiny, words, steering, "why", decode_step="fast", **asked)
