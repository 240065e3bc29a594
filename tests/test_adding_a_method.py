"""Adding: a trained method and a closed-form one are a function and a row each; everything else takes them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import spilt
from spilt import cli, verify
from spilt.methods import METHODS, Method, Scored


def margin(scored: Scored, s: Any) -> Tensor:
    """relu(1 - (L_n - L_p)): a toy objective."""
    assert scored.losing is not None
    return (1 - (scored.losing.mean_loss() - scored.winning.mean_loss())).relu()


def first_pair(matching: Tensor, not_matching: Tensor) -> Tensor:
    """v = h(matching) - h(not_matching) of the first pair alone: a toy estimate."""
    return matching[0] - not_matching[0]


ROWS = (
    Method("margin", "a toy objective", loss=margin),
    Method("first", "a toy estimate", estimate=first_pair, forms=("vector",), why="one difference is a vector"),
)


@pytest.mark.parametrize(("number", "form"), [(0, "vector"), (0, "lora"), (1, "vector")])
@pytest.mark.few(1)
@pytest.mark.long
def test_a_toy_method_runs_through_everything(number: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[number]
    monkeypatch.setitem(METHODS, row.name, row)
    base = families.make_base(tmp_path / "base", train=8)
    cell = {"alg_name": row.name, "layers": [base.layer], "intervention_method": form, "batch_size": 4, "n_epochs": 1}
    families.write_yaml(base.hparams(base.one, row.name, f"generate_{row.name}_{form}.yaml"), cell)
    families.write_yaml(base.hparams(base.one, row.name, f"apply_{row.name}.yaml"), {"alg_name": row.name, "layers": [base.layer]})
    for words in (["--mode", "both"], ["--mode", "loss", "--multipliers", "-1", "0", "1"]):
        assert cli.main([*base.argv(row.name, form, *words), "--quiet"]) == 0
        assert cli.main([*base.argv(row.name, form, *words), "--quiet"]) == 0  # already done
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    (page,) = base.path.glob("vectors/*/get_sft_loss/report/*/report.html")
    assert row.name in page.read_text()
    folder = base.path / "vectors" / base.model / row.name / base.one / f"{row.name}_{form}"
    steering = spilt.Steering.load(folder / f"layer_{base.layer}.pt")
    assert steering.forms == (form,) and all(torch.isfinite(p).all() for p in steering.parameters())


def test_a_toy_method_is_in_the_python_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "first", ROWS[1])
    pairs = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(4)]
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    all_pairs = spilt.fit(model, tokenizer, pairs, layer=2, method="first")
    alone = spilt.fit(model, tokenizer, pairs[:1], layer=2, method="caa")
    torch.testing.assert_close(next(all_pairs.parameters()), next(alone.parameters()))


def test_an_unknown_method_is_still_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base")
    assert cli.main(base.argv("margin", "vector")) == 2 and "unknown method 'margin'" in capsys.readouterr().err
