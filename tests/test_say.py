"""spilt say: the text of a sentence at a multiplier is the one that --mode apply stores for it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import families
import forked
import pytest
import torch

import spilt
from spilt import api, cli
from spilt import say as program
from spilt.errors import NotFinite
from spilt.settings.values import SCOPES
from spilt.steering import post_block

ROOT = Path(__file__).resolve().parents[1]
MULTIPLIERS = ("-2", "0", "3")
SAMPLED = ["--set", "generation_params.do_sample=true", "--set", "generation_params.temperature=1.5", "--set", "seed=7"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Fitted and applied with random numbers: a vector, a lora, and a dataset with concepts."""
    made = families.make_base(tmp_path_factory.mktemp("say") / "base", train=6)
    for form, dataset in (("vector", made.one), ("lora", made.one), ("vector", made.many)):
        words = made.argv("sft", form, "--mode", "both", "--multipliers", *MULTIPLIERS, *SAMPLED, dataset=dataset)
        assert cli.main([*words, "--quiet"]) == 0
    return made


def words(base: families.Base, form: str = "vector", dataset: str = "") -> list[str]:
    """Without --device: it is found."""
    given = base.argv("sft", form, dataset=dataset)
    at = given.index("--device")
    return [*given[:at], *given[at + 2 :]]


def said(capsys: pytest.CaptureFixture[str], *given: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["say", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("form", ["vector", "lora"])
@pytest.mark.few(1)
def test_the_texts_are_those_that_apply_stores(base: families.Base, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For each prompt of the data, at each multiplier, sampled; and the prompts' texts differ."""
    every = set()
    for row in range(3):
        stored = {}
        for m in MULTIPLIERS:
            path = base.path / f"generation/tiny/sft/mine/sft_{form}/m{float(m)}/mine_results.json"
            entry = json.loads(path.read_text(encoding="utf-8"))[row]
            stored[float(m)] = entry["pred"][0]
        found = said(capsys, entry["input"], *words(base, form), "--multipliers", *MULTIPLIERS, *SAMPLED)
        assert {text["multiplier"]: text["text"] for text in found["texts"]} == stored
        assert all(text["prompt"] == entry["input"] for text in found["texts"])
        every |= set(stored.values())
    assert len(every) > 6


def test_of_a_concept_too(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    path = base.path / "generation/tiny/sft/axbench/sft_vector/all_generation_results_m3.0.json"
    for entry in json.loads(path.read_text(encoding="utf-8")):
        for row in entry["generated_results"]:
            chosen = ["--concept", str(entry["concept_id"]), "--multipliers", "3", *SAMPLED]
            assert said(capsys, row["input"], *words(base, dataset=base.many), *chosen)["texts"][0]["text"] == row["pred"][0]


def test_a_steering_file(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Instead of the cell's vector, with or without a cell; what its fit said of the template is kept."""
    stored = base.path / "vectors/tiny/sft/mine/sft_vector/layer_2.pt"
    path = spilt.Steering.load(stored).save(tmp_path / "mine.safetensors")
    of_cell = said(capsys, "is 0 odd?", *words(base), "--multipliers", "3", *SAMPLED)
    model = ["--base_dir", str(base.path), "--model_name", base.model, "--multipliers", "3", *SAMPLED]
    alone = said(capsys, "is 0 odd?", "--steering", str(path), *model, "--max_new_tokens", "5")
    assert alone["texts"] == of_cell["texts"] == said(capsys, "is 0 odd?", *words(base, "lora"), "--steering", str(stored), *model)["texts"]
    assert alone["dataset"] is None and alone["layers"] == [2] and alone["generation_params"]["max_new_tokens"] == 5
    spilt.Steering(spilt.Steering.load(stored), {"settings": {"use_chat_template": False}}).save(path)
    raw = said(capsys, "is 0 odd?", "--steering", str(path), *model)
    assert raw["use_chat_template"] is False and raw["texts"] != alone["texts"]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_steering_acts_in_its_own_scope(base: families.Base, scope: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of its file: the texts of the Python face; settings that say another are refused."""
    model, tokenizer = spilt.load(base.path / "models" / base.model)
    made = post_block.build(model, rank=2, scope=scope)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3)
    made.save(tmp_path / "own.safetensors")
    asked = ["hello", "--base_dir", str(base.path), "--model_name", base.model, "--device", "cpu", "--max_new_tokens", "4", "--json"]
    asked += ["--multipliers", "0", "2", "--set", "generation_params.do_sample=false"]
    capsys.readouterr()
    assert cli.main(["say", *asked, "--steering", str(tmp_path / "own.safetensors")]) == 0
    found = [row["text"] for row in json.loads(capsys.readouterr().out)["texts"]]
    assert found == spilt.generate(model, tokenizer, made, "hello", [0, 2], max_new_tokens=4, do_sample=False)["text"].tolist()
    other = "f5" if scope == "all" else "all"
    assert cli.main(["say", *asked, "--steering", str(tmp_path / "own.safetensors"), "--set", f"steer_positions={other}"]) == 2


def test_settings_of_the_command_line(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and the settings' multipliers where none are given."""
    found = said(capsys, "so what?", *words(base), "--max_new_tokens", "2", "--layers", "2", "--set", "dtype=float32")
    assert [text["multiplier"] for text in found["texts"]] == [0.0, 1.0] and found["generation_params"]["max_new_tokens"] == 2
    assert all(len(text["text"]) <= 2 for text in found["texts"])


@pytest.mark.long
def test_the_table_by_a_real_process(base: families.Base) -> None:
    """A line for each multiplier; stdin instead of a sentence."""
    command = ["-m", "spilt", "say", *words(base), "--multipliers", *MULTIPLIERS, *SAMPLED]
    done = forked.run(command, said="is 0 odd?\n\n is 5 odd? \n")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    heads = [line.split()[0] for line in done.stdout.splitlines() if line.strip() and line[0] != " "]
    assert heads == ["prompt", "m=-2", "m=0", "m=3"] * 2


def test_no_text_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[31mred\x1b]0;title\x07 \u202eabc\r\nnext" + " word" * 60
    program._show(hostile, iter([(2.0, hostile), (-0.5, "")]))
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out) and "\\x1b[31mred" in out and "m=-0.5    (nothing)" in out
    assert all(len(line) <= 120 and line.startswith(("prompt", "m=", " " * 10)) for line in out.splitlines()[1:])


def test_mistakes_are_told(
    base: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = ["--base_dir", str(base.path), "--model_name", base.model], str(base.path / "vectors/tiny/sft/mine/sft_vector")
    given = words(base)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ud83d\n"))
    for asked, message in (
        ([" ", *given], "the prompt is empty"),
        (["\ud83d", *given], "half of a surrogate pair"),
        (given, "half of a surrogate pair"),
        (["x", *given, "--multipliers", "nan"], "--multipliers: wanted finite numbers"),
        (["x", *model], "which vector? give --dataset, --method and --intervention_method"),
        (["x", *model, "--dataset", "mine", "--steering", str(tmp_path)], "which vector?"),
        (["x", *given, "--method", "all"], "one vector at a time"),
        (["x", *given, "--method", "sfd"], "unknown method 'sfd'; did you mean 'sft'?"),
        (["x", *given, "--method", "reps"], "no vector file"),
        (["x", *given, "--layers", "1"], "layer_1.pt"),
        (["x", *given, "--dataset", base.many], "--concept for a dataset with concepts"),
        (["x", *given, "--dataset", "../x"], "../x"),
        (["x", *given, "--model_name", "tinny"], "unknown model 'tinny'"),
        (["x", *given, "--set", "max_tokens=3"], "unknown"),
        (["x", *given, "--max_new_tokens", "0"], "max_new_tokens"),
        (["x", *given, "--set", "steer_positions=f5"], "steer_positions = f5: here every token is steered"),
        (["x", *model, "--steering", str(tmp_path / "no.safetensors")], "no such file"),
        (["x", *given, "--steering", "a.safetensors", "--layers", "1", "2"], "leave --layers out"),
        (["x", *model, "--steering", folder, "--set", "lr=1"], "unknown setting of apply 'lr'"),
    ):
        assert cli.main(["say", *asked]) == 2, asked
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_numbers_that_are_none_are_told(base: families.Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NotFinite("NaN at multiplier 3")

    monkeypatch.setattr(api, "generate", broken)
    assert cli.main(["say", "x", *words(base), "--multipliers", "3", *SAMPLED]) == 1
    assert capsys.readouterr().err == "error: NaN at multiplier 3\n"
