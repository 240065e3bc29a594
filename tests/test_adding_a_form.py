"""Adding: a form is a class with its equation and a row; fit, apply, loss, verify, report and Steering take it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import spilt
from spilt import cli, verify
from spilt.cell import FORMS, Form
from spilt.steering.interventions import INTERVENTIONS, Intervention, Multiplier, State
from spilt.tasks import control

ROW = Form("gate", "gate", {"scale": "F", "shift": "D"})


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> type[Intervention]:
    monkeypatch.setitem(FORMS, ROW.name, ROW)

    class Gate(Intervention):
        """delta = m ((scale . x) 1 + shift), scale [F], shift [D]: a toy form."""

        form = "gate"
        linear = ("scale", "shift")

        def __init__(
            self, hidden: int, read: int, *, read_point: str = "block", write_point: str = "block", dropout: float = 0.0, **_: Any
        ) -> None:
            super().__init__(read_point, write_point, dropout)
            self.scale, self.shift = nn.Parameter(torch.full((read,), 0.01)), nn.Parameter(torch.zeros(hidden))

        def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
            assert x is not None
            return self.dropout(multiplier * ((x.float() @ self.scale)[..., None] + self.shift))

        def norm(self) -> float:
            return float((self.scale.detach().norm() ** 2 * len(self.shift) + self.shift.detach().norm() ** 2).sqrt())

        def state(self) -> State:
            kept = {name: value.detach().float().cpu().clone() for name, value in self.named_parameters()}
            return {**kept, "intervention_components": self.read_point}

        @classmethod
        def from_state(cls, state: State, **kwargs: Any) -> Gate:
            assert isinstance(state, dict)
            made = cls(len(state["shift"]), len(state["scale"]), **kwargs)
            made.scale, made.shift = nn.Parameter(state["scale"].clone()), nn.Parameter(state["shift"].clone())
            return made

    monkeypatch.setitem(INTERVENTIONS, "gate", Gate)
    return Gate


@pytest.mark.long
def test_a_toy_form_runs_through_everything(gate: type[Intervention], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "DRAWS", 4)
    base = families.make_base(tmp_path / "base", train=8)
    cell = {"alg_name": "sft", "layers": [base.layer], "intervention_method": "gate", "batch_size": 4, "n_epochs": 1, "lr": 0.01}
    families.write_yaml(base.hparams(base.one, "sft", "generate_sft_gate.yaml"), cell)
    for words in (["--mode", "both"], ["--mode", "loss", "--multipliers", "sweep"]):
        assert cli.main([*base.argv("sft", "gate", *words, "--dry_run")]) == 0
        assert cli.main([*base.argv("sft", "gate", *words), "--quiet"]) == 0
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    (page,) = base.path.glob("vectors/*/get_sft_loss/report/*/report.html")
    assert "gate" in page.read_text()
    path = base.path / "vectors" / base.model / "sft" / base.one / "sft_gate" / f"layer_{base.layer}.pt"
    loaded = spilt.Steering.load(path)
    assert loaded.forms == ("gate",)
    saved = loaded.save(tmp_path / "gate.safetensors")
    assert spilt.Steering.load(saved) == loaded and spilt.Steering.load(saved) * 2.0 != loaded


def test_a_toy_form_is_fast_as_it_is_plain(gate: type[Intervention]) -> None:
    pairs = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(6)]
    model, tokenizer = families.model("llama"), families.tokenizer()
    how: dict[str, Any] = {"layer": 2, "method": "sft", "intervention": "gate", "n_epochs": 1, "dropout": 0.0, "batch_size": 3}
    fast, plain = (spilt.fit(model, tokenizer, pairs, **how, engine=engine) for engine in ("fast", "plain"))
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    measured = [spilt.measure(model, tokenizer, fast, pairs, [-1.0, 1.0], engine=engine) for engine in ("fast", "plain")]
    assert abs(measured[0]["preference"] - measured[1]["preference"]).max() < 1e-4
