"""What a user reads in the terminal after a run: spilt look, spilt recommend, and the estimate of a dry run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import families
import pytest
from faults import draw_nothing

from spilt import cli, look, plan, verbs
from spilt.artifacts import texts
from spilt.verbs import estimate as costs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """One cell, fitted, applied and measured."""
    made = families.make_base(tmp_path_factory.mktemp("tables") / "base")
    assert cli.main([*made.argv("sft", "vector", "--multipliers", "-2", "0", "2"), "--quiet"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        assert cli.main([*made.argv("sft", "vector", "--mode", "loss", "--multipliers", "-2", "0", "2"), "--quiet"]) == 0
    return made


def words(base: families.Base, *more: str) -> list[str]:
    return ["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one, *more]


@pytest.mark.long
def test_look_shows_each_multiplier(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["look", *words(base)]) == 0
    shown = capsys.readouterr().out
    assert "sft, vector" in shown
    assert [f"m={m}" in shown for m in ("-2", "0", "2")] == [True] * 3


def test_look_without_texts_is_an_error(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["look", *words(base, "--method", "caa")]) == 2
    assert "--mode apply" in capsys.readouterr().err
    assert cli.main(["look", *words(base, "--method", "sfd")]) == 2
    assert "did you mean 'sft'" in capsys.readouterr().err


def test_text_cannot_write_to_the_terminal() -> None:
    """Escape sequences of a model's text stay text."""
    assert "\x1b" not in look._line("a\x1b[31mred\x07\n\tb", 80)
    assert look._line("word " * 50, 20)[-1] == "\N{HORIZONTAL ELLIPSIS}" and len(look._line("word " * 50, 20)) == 20


def test_agreement_needs_one_word_references() -> None:
    def answered(text: str, reference: str) -> texts.Row:
        return texts.Row(0, 0, "Would you?", [text], [], reference)

    assert look.agreement([answered(" Yes.", "Yes"), answered("No", "Yes")]) == 0.5
    assert look.agreement([answered("Yes, gladly", "Yes, I would")]) is None
    assert look.agreement([answered("", " Yes")]) == 0


def test_recommend_prints_a_row_per_cell(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["recommend", *words(base)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["cell", "m", "usable"] and table[2] == "" and all(len(line) <= 100 for line in table[:2])
    assert table[1].split()[:2] == ["sft", "vector"] and table[3].startswith("1: ")
    assert cli.main(["recommend", *words(base), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert cli.main(["recommend", *words(base), "--csv"]) == 0
    (again,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert again.keys() == row.keys() and float(again["solved"]) == row["solved"] and row["budget"] == 0.5
    assert cli.main(["recommend", "--base_dir", str(base.path), "--model_name", base.model, "--dataset", "none"]) == 2


def test_estimates_grow_with_the_work(base: families.Base) -> None:
    """Counts of a hand-worked shape, and more multipliers, rows or epochs cost more."""
    shape = costs.Shape(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocab=10, gated=True)
    assert shape.block == 4 * 2 * (4 + 2) + 3 * 4 * 8 == 144
    assert shape.run(10, 2, 6) == 10 * 2 * (2 * 144 + 4 * 2 * 2 * 3)

    def flops(verb_mode: str, **changes: object) -> float:
        request = verbs.Request(base.one, "sft", base.model, "lora", mode=verb_mode, base_dir=base.path, device="cpu", **changes)  # type: ignore[arg-type]
        (step,) = plan.make(request, dry=True).steps
        found = verbs.cost(step, request)
        assert found is not None and found.flops > 0 and found.peak > 0 and "FLOP" in str(found)
        return found.flops

    assert flops("loss", multipliers=(1.0, 2.0)) > 1.5 * flops("loss", multipliers=(1.0,))
    assert flops("generate", overrides={"n_epochs": 4}) > 1.5 * flops("generate", overrides={"n_epochs": 1})
    assert flops("generate", limit=2) < flops("generate")


def test_no_estimate_without_a_model(tmp_path: Path) -> None:
    assert costs.shape_of(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert costs.shape_of(tmp_path) is None
