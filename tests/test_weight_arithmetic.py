"""--method weight_arithmetic: two adapters trained on the two answers of the pairs, and their difference, beside the other methods."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import spilt
from spilt import cli, plan, verify
from spilt.data.chat import Chat, Encoded
from spilt.engine import choice
from spilt.errors import UserError
from spilt.settings import FitSettings, resolve_generate, resolve_measure
from spilt.settings.fields import ADAPTERS, CONTRASTS
from spilt.tasks import control
from spilt.verbs.base import adapted_layers
from spilt.weights import arithmetic, training

NAME, LAYERS = "weight_arithmetic", (1, 3)
FAST = {"lr": 0.03, "gradient_accumulation_steps": 1, "batch_size": 4, "rank": 2, "n_epochs": 2}
PAIRS = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(6)]


def settings(form: str = "lora", **given: Any) -> FitSettings:
    return FitSettings(method=NAME, intervention_method=form, layers=LAYERS, dtype="float32", **{**FAST, **given})


def sequences(count: int = 6) -> list[Encoded]:
    chat = Chat.of(families.tokenizer(), True, "")
    return [chat.encode(question, answer, 64, 0) for question, *both in PAIRS[:count] for answer in both]


def train(form: str = "lora", **given: Any) -> training.Trained:
    return training.train(families.model("llama"), sequences(), settings(form, **given), families.PAD)


def test_it_moves_what_it_was_trained_on_both_ways() -> None:
    """Up at +1 and down at -1, on questions that were not trained on; the adapters are opposite to each other in what they change."""
    model, tokenizer = families.model("llama"), families.tokenizer()
    letters = [(f"is {i} odd?", "A", "B") for i in range(14)]
    few = {**FAST, "n_epochs": 3, "modules": ["down_proj", "q_proj"]}
    dW = spilt.fit(model, tokenizer, letters[:8], layer=LAYERS, method=NAME, intervention="lora", **few)
    assert len(dW) == 2 * len(LAYERS) and dW.about["method"] == NAME and all(made.norm() > 0 for _, made in dW)
    table = spilt.measure(model, tokenizer, dW, letters[8:], [-1.0, 0.0, 1.0]).set_index("multiplier")["preference"]
    assert table[-1.0] + 0.3 < table[0.0] < table[1.0] - 0.3


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.few(2)
def test_every_kind_trains_and_leaves_the_model_alone(adapter: str) -> None:
    """Loss falls on both sides; dW is their difference; the model, its modules and its modes are as before."""
    model = families.model("llama")
    before, modules = {n: p.clone() for n, p in model.state_dict().items()}, [type(module) for module in model.modules()]
    found = train("local_weight", adapter=adapter, n_epochs=3, block_size=8)
    for side in training.SIDES:
        rows = [row for row in found.log if row["answers"] == side]
        assert len(rows) == 6 and rows[-1]["loss"] < rows[0]["loss"]
    assert set(found.made.forms) == {"local_weight"} and arithmetic.norm(found.made) > 0
    assert arithmetic.norm(found.made - arithmetic.difference(found.pos, found.neg)) == pytest.approx(0, abs=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()) and [type(m) for m in model.modules()] == modules
    assert not any(module.training for module in model.modules()) and not any(p.requires_grad for p in model.parameters())


def test_what_is_made_of_the_two() -> None:
    """`contrast`: the difference, the bisector, or one side alone, where the other's has its sign turned."""
    first, second = train(n_epochs=1), train(n_epochs=1, contrast="not_matching")
    pos, neg = first.pos, first.neg
    assert second.pos == pos and second.neg == neg and second.made == neg * -1.0  # the same seed, the same adapters
    wanted = [arithmetic.difference(pos, neg), arithmetic.bisector(pos, neg), pos, neg * -1.0]
    assert [training.MADE[name](pos, neg) for name in CONTRASTS] == wanted and first.made == wanted[0]
    assert first.geometry["norm_dW"] == pytest.approx(arithmetic.norm(first.made), rel=1e-5)


@pytest.mark.parametrize("side", range(2))
@pytest.mark.few(1)
def test_a_killed_fit_goes_on_to_the_same(side: int) -> None:
    """From within the first adapter, and within the second one."""
    states: list[dict[str, Any]] = []
    how = (families.model("llama"), sequences(), settings(dropout=0.2), families.PAD)
    whole = training.train(*how, checkpoint=lambda state: states.append(copy.deepcopy(state())))
    left = [state for state in states if len(state["finished"]) == side]
    assert len(left) == 3
    again = training.train(*how, resume=copy.deepcopy(left[1]))
    assert again.made == whole.made and again.log == whole.log


def test_the_learning_rate_rises_first() -> None:
    """warmup of it, at most half of all; then down to 0 as without."""
    rates = [row["lr"] / 0.03 for row in train(n_epochs=4, warmup=2).log][:8]
    assert rates == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [row["lr"] / 0.03 for row in train(n_epochs=1).log][:2] == pytest.approx([1, 1])


def test_it_runs_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit, losses, texts by the command line; again is already done; verify; the stored layers are one Steering; exported by name."""
    base = families.make_base(tmp_path / "base", train=8)
    given = [word for name, value in FAST.items() for word in ("--set", f"{name}={value}")]
    words = [*base.argv(NAME, "lora", *given), "--layers", "1+3", "--quiet", "--no_report"]
    modes = (["--mode", "generate"], ["--mode", "loss", "--multipliers", "-1", "0", "1"], ["--mode", "apply", "--multipliers", "0", "1"])
    assert cli.main([*words, *modes[1], "--dry_run"]) == 0
    assert "linear maps inside the blocks are changed" in capsys.readouterr().out
    for mode in modes:
        assert cli.main([*words, *mode]) == 0
    assert cli.main([*words, *modes[0]]) == 0 and "already done" in capsys.readouterr().out
    assert {(found.state, found.reason) for found in verify.check(base.path)} == {(verify.OK, ""), (verify.OK, "7 linear maps")}
    folder = base.path / "vectors" / base.model / NAME / base.one / f"{NAME}_lora@layer1+3"
    dW = spilt.Steering.load(folder)
    assert dW.layers == LAYERS and len(dW) == 14 and set(dW.forms) == {"lora"} and dW.about["method"] == NAME
    log = (folder / "train.log").read_text()
    assert re.search(r"^matching epoch 0 step 0 loss", log, re.M) and re.search(r"^not_matching epoch 1 step 3 loss", log, re.M)
    sayings = ["say", "hi", "--model_name", base.model, "--base_dir", str(base.path), "--dataset", base.one, "--method", NAME]
    assert cli.main([*sayings, "--intervention_method", "lora", "--layers", "1+3", "--multipliers", "0", "1", "--device", "cpu"]) == 0
    damaged = folder / "layer_3.pt"
    stored = torch.load(damaged, weights_only=True)
    stored["linears"]["mlp.up_proj"]["lora_B"][0, 0] = float("nan")
    torch.save(stored, damaged)
    assert cli.main([*words, *modes[1], "--force"]) == 2 and "damaged, or changed by hand" in capsys.readouterr().err
    (folder / "layer_3.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="NaN or infinite"):
        spilt.Steering.load(folder)


def test_it_is_chosen_by_name_with_layers_of_its_own(tmp_path: Path) -> None:
    """No released file is asked for; from 30% to 80% of the depth; losses and texts act where it was fitted, whatever others' files say."""
    base = families.make_base(tmp_path / "base", train=6)
    assert adapted_layers(30) == tuple(range(9, 24)) and adapted_layers(1) == (0,)
    for mode in ("generate", "loss", "apply"):
        request = cli.request_of(cli.parser().parse_args(base.argv(NAME, "lora", "--mode", mode)))
        (step,) = plan.make(request, dry=True).steps
        assert step.settings.layers == adapted_layers(5) == (2, 3) and step.cells[0].layers == (2, 3)
        assert plan.why_plain(step, choice.FAST) and not plan.why_plain(step._replace(engine="vllm"), choice.FAST)
    for resolve in (resolve_measure, resolve_generate):  # of the released methods they say layer 2
        assert resolve(base.path, base.model, base.one, "sft", "lora").settings.layers == (2,)
    assert plan.pairs_of([f"{NAME}_lora", "sft"], "vector")[0] == [(NAME, "lora"), ("sft", "vector")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "sft", "intervention": "lora", "adapter": "oft"}, "sft has no adapters"),
        ({"intervention": "lora", "adapter": "oft"}, "its change is dense: --intervention_method local_weight"),
        ({"intervention": "vector"}, "weight_arithmetic goes with: lora, local_weight"),
        ({"intervention": "lora", "modules": "q_poj"}, "unknown linear map 'q_poj'"),
        ({"intervention": "local_weight", "adapter": "lara"}, "unknown adapter 'lara'; did you mean 'lora'"),
        ({"intervention": "lora", "contrast": "both"}, "unknown contrast 'both'"),
    ],
)
def test_what_does_not_go_together_is_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        spilt.fit(families.model("llama"), families.tokenizer(), PAIRS, layer=LAYERS, **{"method": NAME, **given})


def test_the_same_answers_have_no_difference() -> None:
    """Not all pairs: those are refused before. An update of 0 is not stored."""
    model, tokenizer = families.model("llama"), families.tokenizer()
    with pytest.raises(UserError, match="both adapters are the same"):
        spilt.fit(model, tokenizer, PAIRS, layer=1, method=NAME, intervention="lora", **{**FAST, "lr": 1e-30})


@pytest.mark.long
def test_it_is_swept_beside_another_method(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep, random changes of the same maps, page and recommendation; equal disturbance; the cell as an adapter and as a checkpoint."""
    monkeypatch.setattr(control, "DRAWS", 2)
    base = families.make_base(tmp_path / "base", train=8)
    given = [["--set", f"{name}={value}"] for name, value in {**FAST, "sweep_points": 5, "modules": "down_proj,q_proj"}.items()]
    words = [*base.argv(f"{NAME}_lora", "vector"), *sum(given, []), "--quiet", "--control_pairs", "2"]
    words[words.index("--method") + 1 : words.index("--method") + 2] = [f"{NAME}_lora", "caa"]
    assert cli.main([*words, "--mode", "all"]) == 0
    (page,) = base.path.glob("vectors/*/get_sft_loss/report/*/report.html")
    assert NAME in page.read_text() and "caa" in page.read_text()
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    along = next(base.path.glob(f"vectors/*/get_sft_loss/{NAME}/*/*/control.csv"))
    assert len(along.read_text().splitlines()) == 1 + control.DRAWS * (2 * len(control.DOSES) + 1)
    cell = ["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one, "--method", NAME, "--device", "cpu"]
    cell += ["--intervention_method", "lora"]
    capsys.readouterr()
    assert cli.main(["strength", *cell, "--budget", "0.2", "--prompts", "2", "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "converged" in said and len(said.splitlines()) == 4
    for kind in ("peft", "merged", "safetensors"):
        assert cli.main(["export", *cell, "--format", kind, "--multiplier", "1", "--output", str(tmp_path / kind)]) == 0
