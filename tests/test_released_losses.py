"""A loss run on the released settings tree, through the command line: the released numbers where they lie beside the checkout,
a tiny model of our own everywhere."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import families
import golden
import pytest
import torch
import yaml

from spilt import cli

SETTINGS = Path(__file__).parent / "released_settings.json"  # file -> values
MODEL = "gemma-2-9b-it"
FORMS = {"vector": "vector", "lora": "lora_mlp_mid", "local_weight": "local_weight_mlp_mid"}
SIDES = {("winning_only", "orig_add"): "matching", ("winning_only", "orig_sub"): "not_matching"}
SIDES |= {("losing_only", "orig_add"): "not_matching", ("losing_only", "orig_sub"): "matching"}


def tree(base: Path, model: Path, rows: list[dict[str, Any]]) -> None:
    """The released settings unchanged, a small model under a released model's name, and rows as the training file."""
    for name, values in json.loads(SETTINGS.read_text(encoding="utf-8")).items():
        path = base / "hparams" / "Steer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    shutil.copytree(model, base / "models" / MODEL)
    families.write_jsonl(base / "data" / "psychopathy" / "train.jsonl", rows)


def measure(base: Path, form: str, layer: int, *multipliers: str) -> dict[tuple[str, str, str], list[float]]:
    """(multiplier, kind, pair) -> pos_steer_loss of each example."""
    words = ["--dataset", "psychopathy", "--method", "spilt", "--model_name", MODEL, "--intervention_method", form, "--mode", "loss"]
    more = ["--device", "cpu", "--base_dir", str(base), "--set", f"layers={layer}", "--dtype", "float32", "--multipliers", *multipliers]
    assert cli.main([*words, *more, "--quiet"]) == 0
    found: dict[tuple[str, str, str], list[float]] = {}
    for m in multipliers:
        for kind in ("winning_only", "losing_only"):
            folder = base / "vectors" / MODEL / "get_sft_loss" / "spilt" / "psychopathy" / f"spilt_{form}" / f"{form}_spilt_m{m}_{kind}"
            with open(folder / "train_losses.csv", encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    found.setdefault((m, kind, row["pair"]), []).append(float(row["pos_steer_loss"]))
    return found


def put(base: Path, form: str, layer: int, state: Path | Any) -> None:
    folder = base / "vectors" / MODEL / "spilt" / "psychopathy" / f"spilt_{form}"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(state, Path):
        shutil.copy(state, folder / f"layer_{layer}.pt")
    else:
        torch.save(state, folder / f"layer_{layer}.pt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.few(1)
@pytest.mark.long
def test_the_released_losses(tmp_path: Path, form: str) -> None:
    """Vectors of the released code, its settings, its data: its losses, at both signs of every multiplier."""
    base = tmp_path / "base"
    lines = (golden.GOLDEN / "data-psychopathy" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    tree(base, golden.GOLDEN / "tiny-gemma2", [json.loads(line) for line in lines])
    put(base, form, golden.LAYER, golden.NUMBERS / "states" / FORMS[form] / f"layer_{golden.LAYER}.pt")
    told = golden.numbers("losses.json")[f"psychopathy/{FORMS[form]}/trainer"]
    found = measure(base, form, golden.LAYER, "0.5", "1.0", "2.0")
    assert len(found) == 3 * 4
    for (m, kind, pair), losses in found.items():
        at = {float(key): values for key, values in told[SIDES[kind, pair]].items()}[float(m) * (1 if pair == "orig_add" else -1)]
        assert losses == pytest.approx(at, abs=4e-6), (m, kind, pair)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.few(1)
def test_a_loss_run_on_the_released_tree(tmp_path: Path, form: str) -> None:
    """The same with a tiny model of our own: every row is there, and the stored intervention is what is measured."""
    base, layer = tmp_path / "base", 2
    rows = [{"question": f"Is {n} odd?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"} for n in range(5)]
    tree(base, families.checkpoint("gemma2"), rows)
    put(base, form, layer, families.intervention(form).state())
    found = measure(base, form, layer, "0.0", "1.0")
    assert {len(losses) for losses in found.values()} == {5}
    unsteered, steered = (found[m, "winning_only", "orig_add"] for m in ("0.0", "1.0"))
    assert max(abs(a - b) for a, b in zip(unsteered, steered, strict=True)) > 0.01
