"""What docs/reliability.md promises about bytes and about texts.

Fits and losses: the bytes do not depend on what else a request asks for, nor on what was done before. Texts: every token is the one
that its own random number (or the largest score) picks from probabilities that are equal up to rounding.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from counts import count
from torch import Tensor, nn

from spilt import cli, report
from spilt.engine import decode as generation
from spilt.tasks import generate as stage

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16")
ROUNDING = {"float32": 1e-5, "bfloat16": 0.01}  # of a probability, as docs/reliability.md says


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))  # the page is not what is promised here


def wide(folder: Path) -> families.Base:
    """A base dir with a model so wide that the number of rows of a matrix product shows in its rounding."""
    base = families.make_base(folder, train=count(12, 6), test=6)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    families.build("qwen2", **sizes).save_pretrained(base.path / "models" / base.model)
    return base


@pytest.fixture(scope="module", params=DTYPES)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[families.Base, str]]:
    """A base dir with all fits, made in one request; and its dtype."""
    torch.set_num_threads(1)
    base = wide(tmp_path_factory.mktemp("promise") / "all")
    run(base, request.param, "all", "all", "--mode", "generate")
    yield base, request.param


def run(base: families.Base, dtype: str, method: str, form: str, *words: str) -> None:
    assert cli.main([*base.argv(method, form, *words), "--dtype", dtype, "--quiet"]) == 0


def copy(base: families.Base, folder: Path) -> families.Base:
    shutil.copytree(base.path, folder)
    return base._replace(path=folder)


def files(base: families.Base, top: str, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(base.path)): path.read_bytes() for path in sorted((base.path / top).rglob(pattern))}


def tables(base: families.Base) -> dict[str, bytes]:
    return files(base, "vectors", "*_losses.csv") | files(base, "generation", "*_losses.csv")


# ---------------------------------------------------------------- fits and losses: bytes


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["vector", "lora", "local_weight"])
@pytest.mark.long
def test_losses_do_not_depend_on_the_other_multipliers(fitted: tuple[families.Base, str], form: str, tmp_path: Path) -> None:
    """One request, or one multiplier first and the rest later: the same tables."""
    base, dtype = fitted
    at_once, parts = copy(base, tmp_path / "at_once"), copy(base, tmp_path / "parts")
    loss = ("--mode", "loss", "--multipliers")
    run(at_once, dtype, "sft", form, *loss, "-1", "0", "0.5", "1", "2")
    for multipliers in (["2"], ["-1", "0"], ["-1", "0", "0.5", "1", "2"]):
        run(parts, dtype, "sft", form, *loss, *multipliers)
    assert tables(at_once) and tables(parts) == tables(at_once)


@pytest.mark.long
def test_losses_of_the_demo_do_not_depend_on_the_other_multipliers(tmp_path: Path) -> None:
    """The model and data where 12 of 60 tables once differed: rows of several multipliers shared a batch."""
    cell = ["--dataset", "psychopathy", "--method", "spilt", "--model_name", "demo-qwen2", "--intervention_method", "local_weight"]
    bases = [families.Base(tmp_path / name) for name in ("at_once", "parts")]
    shutil.copytree(ROOT / "examples" / "demo", bases[0].path)
    words = [*cell, "--device", "cpu", "--quiet", "--base_dir"]
    assert cli.main([*words, str(bases[0].path), "--mode", "generate", "--set", "n_epochs=1"]) == 0
    shutil.copytree(bases[0].path, bases[1].path)
    for base, parts in zip(bases, ([["-1", "0", "0.5", "1", "2"]], [["2"], ["-1", "0"], ["-1", "0", "0.5", "1", "2"]]), strict=True):
        for multipliers in parts:
            assert cli.main([*words, str(base.path), "--mode", "loss", "--multipliers", *multipliers]) == 0
    assert tables(bases[0]) and tables(bases[1]) == tables(bases[0])


@pytest.mark.long
def test_losses_of_a_cell_do_not_depend_on_the_other_cells(fitted: tuple[families.Base, str], tmp_path: Path) -> None:
    base, dtype = fitted
    every, alone = copy(base, tmp_path / "every"), copy(base, tmp_path / "alone")
    loss = ("--mode", "loss", "--multipliers", "-1", "0", "1")
    run(every, dtype, "all", "all", *loss)
    run(alone, dtype, "reps", "vector", *loss)
    found, wanted = tables(alone), tables(every)
    assert found and found == {name: wanted[name] for name in found}


@pytest.mark.few(1)
@pytest.mark.parametrize("cell", [("caa", "vector"), ("sft", "lora"), ("spilt", "vector"), ("reps", "local_weight")], ids=" ".join)
@pytest.mark.long
def test_a_fit_does_not_depend_on_the_other_fits(fitted: tuple[families.Base, str], cell: tuple[str, str], tmp_path: Path) -> None:
    base, dtype = fitted
    alone = wide(tmp_path / "alone")
    run(alone, dtype, *cell, "--mode", "generate")
    found, wanted = files(alone, "vectors", "*.pt"), files(base, "vectors", "*.pt")
    assert found and found == {name: wanted[name] for name in found}


# ---------------------------------------------------------------- texts: each token is what its number picks


@cache
def library_model(path: Path, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def probabilities(base: families.Base, dtype: str, prompt: list[int], new: list[int], multiplier: float) -> Tensor:
    """[n, V] of each new token, by transformers and a hook alone: the whole text in one forward of one row."""
    model = library_model(base.path / "models" / base.model, dtype)
    path = base.path / "vectors" / base.model / "sft" / base.one / "sft_vector" / f"layer_{base.layer}.pt"
    vector = torch.load(path, weights_only=True).to(model.dtype).reshape(-1)

    def steered(_: Any, __: Any, out: Any) -> Any:
        return out + multiplier * vector if isinstance(out, Tensor) else (out[0] + multiplier * vector, *out[1:])

    hook = model.model.layers[base.layer].register_forward_hook(steered)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *new]])).logits[0, len(prompt) - 1 : -1]
    hook.remove()
    return logits.double()


def misfit(scores: Tensor, new: list[int], numbers: random.Random | None, temperature: float) -> float:
    """By how much a probability must be changed for these tokens to be the ones that are picked; 0 where nothing must."""
    worst = 0.0
    for row, token in zip((scores / temperature).softmax(-1), new, strict=True):
        if numbers is None:
            worst = max(worst, float(row.max() - row[token]))
        else:
            u, edge = numbers.random(), row.cumsum(-1)
            worst = max(worst, float(edge[token] - row[token]) - u, u - float(edge[token]))
    return worst


def misfits(base: families.Base, dtype: str, made: dict[tuple[int, int, float], list[int]], temperature: float) -> list[float]:
    """Of sampled texts of sft vector, (prompt, response, multiplier) -> new tokens: for loops of real kills (test_kill.py, by hand)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path / "models" / base.model)
    questions = [json.loads(line)["question"] for line in base.data(base.one, "valid").read_text().splitlines()]
    found = []
    for (i, k, multiplier), new in made.items():
        text = tokenizer.apply_chat_template([{"role": "user", "content": questions[i]}], add_generation_prompt=True, tokenize=False)
        scores = probabilities(base, dtype, tokenizer(text, add_special_tokens=False).input_ids, new, multiplier)
        found.append(misfit(scores, new, random.Random(f"42/{i}/{k}"), temperature))
    return found


class Stopped(BaseException):
    """The run is gone."""


def texts(
    base: families.Base, dtype: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> dict[tuple[str, Any], list[int]]:
    """(seed, multiplier) -> new tokens, of a request that is stopped after so many texts and begun again each time."""
    made: dict[tuple[str, Any], list[int]] = {}
    add, read = stage.Unfinished.add, stage.Unfinished.read
    for stop in (*stops, None):
        count = 0

        def told(self: Any, text: stage.Text, tokens: list[int], stop: int | None = stop) -> None:
            nonlocal count
            add(self, text, tokens)
            made[f"42/{text.prompt}/{text.response}", text.multiplier] = tokens
            count += 1
            if count == stop:
                raise Stopped

        monkeypatch.setattr(stage.Unfinished, "add", told)
        monkeypatch.setattr(stage.Unfinished, "read", read)
        try:
            run(base, dtype, "sft", "vector", *words)
        except Stopped:
            assert stop is not None
    monkeypatch.undo()
    return made


@pytest.mark.matrix
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.few(1)
@pytest.mark.long
def test_each_token_is_what_its_number_picks(
    fitted: tuple[families.Base, str], sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one go, and stopped twice: both are what was promised. Another multiplier, or another random number, is seen."""
    base, dtype = fitted
    decoding = "max_new_tokens: 12, temperature: 0.7, top_k: 0, do_sample: " + str(sampled).lower()
    words = ("--mode", "apply", "--multipliers", "-2", "4", "--batch_size", "4", "--set", f"generation_params={{{decoding}}}")
    words += ("--set", f"num_responses={2 if sampled else 1}")
    temperature = 0.7 if sampled else 1.0
    rows: list[generation.Row] = []
    real = generation.generate

    def told(model: Any, sites: Any, asked: list[generation.Row], *rest: Any, **more: Any) -> Any:
        rows.extend(asked)
        return real(model, sites, asked, *rest, **more)

    for name, stops in (("at_once", ()), ("stopped", (3, 2))):
        monkeypatch.setattr(generation, "generate", told)
        made = texts(copy(base, tmp_path / name), dtype, words, monkeypatch, stops)
        asked = {(row.seed, row.multiplier): list(row.prompt) for row in rows}
        assert set(made) == set(asked) and len(made) == (24 if sampled else 12)
        found, wrong_strength, wrong_number = [], [], []
        for (seed, multiplier), new in made.items():
            scores = probabilities(base, dtype, asked[seed, multiplier], new, multiplier)
            found.append(misfit(scores, new, random.Random(seed) if sampled else None, temperature))
            other = probabilities(base, dtype, asked[seed, multiplier], new, multiplier + 30)
            wrong_strength.append(misfit(other, new, random.Random(seed) if sampled else None, temperature))
            wrong_number.append(misfit(scores, new, random.Random("other"), temperature))
        if sampled:  # the same from prompts as transformers alone makes them
            texts_made = {(int(seed.split("/")[1]), int(seed.split("/")[2]), m): new for (seed, m), new in made.items()}
            assert max(misfits(base, dtype, texts_made, temperature)) == max(found)
        print(f"{dtype} {name}: largest change of a probability {max(found):.2g}")
        assert max(found) <= ROUNDING[dtype]
        assert max(wrong_strength) > 2 * ROUNDING[dtype] and (not sampled or max(wrong_number) > 2 * ROUNDING[dtype])
