"""Datasets with concepts as the released dataset_format.yaml names them: `axbench_train`, `axbench_test`; one layout for all modes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import CONCEPTS, Base, make_base, write_jsonl, write_yaml
from test_identity import run

ROOT = Path(__file__).parents[1]
KEYS = ["input", "output_concept", "concept_id", "concept", "concept_genre", "category"]  # as in the released results


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """The entries of the released file: `axbench` is of another experiment, whose data are not here."""
    base = make_base(tmp_path / "base", train=4, test=2)
    path = base.path / "hparams" / "Steer" / "dataset_format.yaml"
    formats = yaml.safe_load(path.read_text())
    concept = {name: name for name in ("output_concept", "concept_id", "concept_genre")} | {"concept": "output_concept"}
    for section, entry in (("train", "axbench_train"), ("generation", "axbench_test")):
        own = formats[section].pop("axbench")
        formats[section][entry] = {**own, "field_names": {**own["field_names"], **concept, "category": "category"}}
    formats["train"]["axbench"] = {"file_path": "data/elsewhere/dpo_train_data.parquet", "multi_concept": True, "field_names": {}}
    formats["generation"]["axbench"] = {"file_path": "data/axbench/alpaca.jsonl", "field_names": {"input": "instruction"}}
    write_yaml(path, formats)
    write_jsonl(base.path / "data" / "axbench" / "alpaca.jsonl", [{"instruction": f"Say {n}."} for n in range(2)])
    return base


def told(base: Base, m: str = "1.0") -> Any:
    folder = base.path / "generation" / base.model / "sft" / "axbench" / "sft_vector"
    return json.loads((folder / f"all_generation_results_m{m}.json").read_text())


@pytest.mark.long
def test_apply_alone_and_both_have_one_layout(base: Base, tmp_path: Path) -> None:
    assert run(base, "--mode", "generate", "--quiet", dataset="axbench") == 0
    for concept in CONCEPTS:
        assert (base.path / "vectors" / base.model / "sft" / f"axbench_concept_{concept}" / "sft_vector" / "layer_2.pt").is_file()
    assert run(base, "--mode", "apply", "--quiet", dataset="axbench") == 0
    alone = told(base)
    assert run(base, "--mode", "both", "--quiet", "--force", dataset="axbench") == 0
    assert told(base) == alone
    assert [part["concept_id"] for part in alone] == list(CONCEPTS)


def test_eval_data_hold_the_released_rows(base: Base) -> None:
    assert run(base, "--mode", "both", "--quiet", dataset="axbench") == 0
    for part in told(base):
        assert len(part["eval_data"]) == len(part["generated_results"]) == 2
        for row, result in zip(part["eval_data"], part["generated_results"], strict=True):
            assert list(row)[: len(KEYS)] == KEYS
            assert row["input"] == result["input"] and row["concept_id"] == part["concept_id"]
            assert row["concept"] == row["output_concept"] == part["concept_name"] == CONCEPTS[part["concept_id"]]
            assert row["category"] == "positive" and row["concept_genre"] is None  # the file has no such column


@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_losses_of_the_training_pairs(base: Base) -> None:
    assert run(base, "--mode", "generate", "--quiet", dataset="axbench") == 0
    assert run(base, "--mode", "loss", "--multipliers", "1", "--split", "train", "--concepts", "1", "--quiet", dataset="axbench") == 0
    folder = base.path / "vectors" / base.model / "get_sft_loss" / "sft" / "axbench_concept_1" / "sft_vector"
    rows = [line.split(",") for line in (folder / "vector_sft_m1.0_winning_only" / "train_losses.csv").read_text().splitlines()]
    step, pair = rows[0].index("step"), rows[0].index("pair")
    # as released: the add and sub rows of an example share their step
    assert [(row[step], row[pair]) for row in rows[1:]] == [(str(n), kind) for n in range(4) for kind in ("orig_add", "orig_sub")]


def test_prompts_without_concepts_are_those_of_every_concept(base: Base) -> None:
    path = base.path / "hparams" / "Steer" / "dataset_format.yaml"
    formats = yaml.safe_load(path.read_text())
    del formats["generation"]["axbench_test"]
    write_yaml(path, formats)
    assert run(base, "--mode", "generate", "--quiet", dataset="axbench") == 0
    for mode in ("apply", "both"):
        assert run(base, "--mode", mode, "--quiet", "--concepts", "0", "3", dataset="axbench") == 0
        assert [part["concept_id"] for part in told(base)] == [0, 3]
        assert all([row["input"] for row in part["generated_results"]] == ["Say 0.", "Say 1."] for part in told(base))


# ---------------------------------------------------------------- words of the command line


def test_names_in_any_case(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--mode", "generate", "--dry_run", method="SPLIT", form="Weight") == 0
    out = capsys.readouterr().out
    assert "spilt/mine/spilt_local_weight/layer_2.pt" in out and "--method spilt" in out
    assert run(base, "--mode", "generate", "--dry_run", method="All", form="VECTOR") == 0


def test_a_missing_hparams_tree_asks_for_the_base_dir(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Base(base.path / "models")
    assert run(wrong, "--dry_run") == 2
    err = capsys.readouterr().err
    assert "hparams/Steer: no such folder" in err and f"is --base_dir {wrong.path} right?" in err


def test_the_released_runners_name(tmp_path: Path) -> None:
    """From any folder it finds the checkout's settings; --base_dir goes before."""
    words = ["--dataset", "psychopathy", "--method", "SPLIT", "--model_name", "gemma-2-9b-it"]
    words += ["--intervention_method", "vector", "--dry_run"]
    command = [sys.executable, str(ROOT / "examples" / "run_SPLIT.py"), *words]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert str(ROOT / "hparams") in found.stdout
    elsewhere = subprocess.run([*command, "--base_dir", "."], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert elsewhere.returncode == 2 and "is --base_dir . right?" in elsewhere.stderr
    assert list(tmp_path.iterdir()) == []
