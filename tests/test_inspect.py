"""`--inspect`: what is shown of a pair is what fit, texts and losses take; no weights are read and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch

from spilt import cli
from spilt.data.batches import position_mask
from spilt.model.host import load


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=4)


def shown(base: families.Base, capsys: pytest.CaptureFixture[str], *words: str, method: str = "sft") -> list[dict]:
    assert cli.main([*base.argv(method, "vector", "--inspect", "--json", *words), "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)["inspected"]


@pytest.mark.parametrize("positions", ["", "all", "all_prompt", "l2"])
def test_tokens_and_masks_are_those_of_the_engine(positions: str, base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", f"steer_positions={positions}"] if positions else []
    (fit,) = shown(base, capsys, "--mode", "generate", *words)
    host = load(base.path / "models" / base.model, "float32", "cpu")
    chat = host.chat(True, "")
    made = [chat.encode(row["question"], row[name]) for row in families.pairs(4) for name in ("matching", "not_matching")]
    masks = position_mask(made, positions or "skip_prefix", chat.prefix_length)
    assert fit["rows"] == 4 and fit["tokens"][2] == max(len(one.input_ids) for one in made) and fit["cut"] == 0
    assert len(fit["shown"]) == 4
    for one, sequence, mask in zip(fit["shown"], made, masks, strict=False):
        assert "".join(sum(one["parts"].values(), [])) == host.tokenizer.decode(sequence.input_ids)
        assert [mark == "x" for mark in one["marked"]] == mask[: len(sequence.input_ids)].tolist()
        assert one["roles"].index("A") == sequence.prompt_length and one["roles"].count("s") == sequence.suffix_length
        assert one["roles"].count("-") == chat.prefix_length and one["length"] == len(sequence.input_ids)


def test_each_way_of_reading_once(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """The means of caa take other tokens than a loss; texts begin with the prompt alone; a sweep steers all."""
    found = shown(base, capsys, method="all")
    assert [(one["purpose"], one["positions"]) for one in found] == [("train", "averaged"), ("train", "skip_prefix"), ("prompts", "all")]
    caa = found[0]["shown"][0]
    assert caa["marked"] == caa["roles"].replace("A", "x").replace("-", ".").replace("q", ".") and "s" not in caa["roles"]
    assert [one["text"] for one in found[2]["shown"]] == ["prompt", "prompt"] and found[2]["answer_tokens"] == [0, 0, 0]
    for more, where in (((), "skip_prefix"), (("--multipliers", "sweep"), "all")):
        assert [one["positions"] for one in shown(base, capsys, "--mode", "loss", *more)] == [where, where]
    (last,) = shown(base, capsys, "--mode", "generate", "--set", "multiple_choice=true", method="caa")
    assert [one["marked"].count("x") for one in last["shown"]] == [1] * 4 and last["shown"][0]["marked"][-2] == "x"


def test_it_reads_no_weights_and_writes_nothing(base: families.Base, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of a file of the user's own too."""
    for weights in (base.path / "models" / base.model).glob("*.safetensors"):
        weights.write_bytes(b"")
    families.write_jsonl(tmp_path / "own.jsonl", families.pairs(5))
    before = families.listing(base.path)
    given = [
        "--train",
        str(tmp_path / "own.jsonl"),
        "--test",
        "2",
        "--model_name",
        base.model,
        "--base_dir",
        str(base.path),
        "--device",
        "cpu",
    ]
    assert cli.main([*given, "--method", "sft", "--intervention_method", "vector", "--inspect"]) == 0
    said = capsys.readouterr().out
    assert "3 rows of" in said and "2 rows of" in said and "row 1, not_matching: " in said and "(skip_prefix)" in said
    assert families.listing(base.path) == before and not torch.cuda.is_initialized()
