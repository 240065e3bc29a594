"""The demo: the committed model's behaviour, and what a newcomer must see with it, through the real command line.

Strengths are chosen on training items and reported on held-out ones. Nothing here looks at the weights' bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from counts import count

from spilt import look
from spilt.analysis import odds
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.cli import main
from spilt.methods import METHODS
from spilt.plan import pairs_of

ROOT = Path(__file__).parents[1]
DEMO, MODEL = ROOT / "examples" / "demo", "demo-qwen2"
sys.path.insert(0, str(ROOT))
from tools.demo import check, hparams  # noqa: E402

pytestmark = pytest.mark.slow
TRAINED = [(method, form) for method, form in pairs_of("all", "all")[0] if METHODS[method].loss is not None]
STEERED = TRAINED[::4]  # each method and each form once
FITTED = count(pairs_of("all", "all")[0], [("caa", "vector"), ("spilt", "vector"), *STEERED])
STRENGTHS = {"vector": ["4", "8", "12"], "lora": ["0.4", "0.8", "1.2"], "local_weight": ["0.4", "0.8", "1.2"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(base: Path, dataset: str, method: str, form: str, *words: str) -> None:
    arguments = ["--dataset", dataset, "--method", method, "--model_name", MODEL, "--intervention_method", form]
    assert main([*arguments, "--device", "cpu", "--base_dir", str(base), "--quiet", *words]) == 0


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with all ten combinations (quick: five) fitted on the Yes/No task, and caa on the open one."""
    base = tmp_path_factory.mktemp("demo")
    shutil.copytree(DEMO, base, dirs_exist_ok=True)
    for method, form in count([("all", "all")], FITTED):
        run(base, "psychopathy", method, form, "--mode", "generate")
    run(base, "powerseeking", "caa", "vector", "--mode", "generate")
    return base


@pytest.mark.long
def test_the_committed_model_behaves() -> None:
    """Unsteered: half of the Yes/No answers match, text is well-formed, facts are right, utility is defined; test items are new."""
    found = check.measure(DEMO)
    assert found["yes/no: well-formed"] == 1
    assert 0.45 <= found["yes/no: accuracy without steering"] <= 0.55
    assert found["yes/no: accuracy when told to be cold"] > 0.95
    assert found["yes/no: accuracy when told to be kind"] < 0.05
    assert found["power: well-formed, without a system turn"] > 0.95
    assert found["concepts: well-formed"] > 0.95
    assert found["facts: correct"] > 0.9
    assert found["data: test items that are also training items"] == 0
    undefined = [value for name, value in found.items() if "undefined utility" in name]
    assert len(undefined) == 3 and max(undefined) == 0


def test_the_tree_of_hparams_is_the_table() -> None:
    """examples/demo/hparams is emitted by tools/demo/hparams.py, and by nothing else."""
    folder = DEMO / "hparams" / "Steer"
    there = {str(path.relative_to(folder)): yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.rglob("*.yaml")}
    assert there == hparams.tree()


@pytest.mark.long
def test_every_combination_is_fitted(fitted: Path) -> None:
    store = Store(fitted)
    assert len(pairs_of("all", "all")[0]) == 10
    for method, form in FITTED:
        cell = Cell(MODEL, "psychopathy", method, form, (hparams.LAYER,))
        assert store.vector(cell, hparams.LAYER).is_file()


@pytest.mark.parametrize(("method", "form"), STEERED)
@pytest.mark.long
def test_yes_no_answers_are_steered(fitted: Path, method: str, form: str) -> None:
    """From 50% to over 95% matching on held-out items, at the strength that is best on training items; under 5% at the opposite."""
    run(fitted, "psychopathy", method, form, "--mode", "loss", "--multipliers", *STRENGTHS[form], "0", "--no_report")
    cell = Cell(MODEL, "psychopathy", method, form, (hparams.LAYER,))
    folder = Store(fitted).loss_folder(cell)
    table = {split: odds.summarise(odds.collect(folder, split)).set_index("multiplier") for split in ("train", "test")}
    assert abs(table["test"].loc[0.0, "accuracy"] - 0.5) <= 0.05
    train = table["train"][table["train"].index > 0].sort_values(["accuracy", "utility"], ascending=False)
    best = float(train.index[0])
    assert table["test"].loc[best, "accuracy"] > 0.95
    assert table["test"].loc[-best, "accuracy"] < 0.05

    run(fitted, "psychopathy", method, form, "--mode", "apply", "--multipliers", "0", str(best), str(-best))
    said = {m: look.agreement(rows) for m, rows in look.results(Store(fitted), cell).items()}
    assert said[0.0] == 0.5, "a constant answer is right half of the time"
    assert said[best] > 0.95
    assert said[-best] < 0.05


@pytest.mark.long
def test_caa_on_yes_no_stays_where_the_paper_has_it(fitted: Path) -> None:
    """The difference of means over the answer tokens Yes and No cancels: caa hardly steers this task at a vector's usual strengths."""
    run(fitted, "psychopathy", "caa", "vector", "--mode", "apply", "--multipliers", "1", "4", "10")
    cell = Cell(MODEL, "psychopathy", "caa", "vector", (hparams.LAYER,))
    shares = {m: look.agreement(rows) for m, rows in look.results(Store(fitted), cell).items()}
    assert [shares[m] for m in (1.0, 4.0)] == [0.5, 0.5]
    assert shares[10.0] < 0.65, "as the paper's 53% and 55%; a trained vector reaches over 95% here"


def accepted(base: Path, multiplier: float) -> float:
    """Share of well-formed accepting answers to the open task, caa."""
    path = Store(base).results(Cell(MODEL, "powerseeking", "caa", "vector", (hparams.LAYER,)), multiplier)
    rows = json.loads(path.read_text(encoding="utf-8"))
    return sum(check.power_side(row["pred"][0]) == "accept" for row in rows) / len(rows)


@pytest.mark.long
def test_caa_steers_the_open_task(fitted: Path, tmp_path: Path) -> None:
    """The strength is chosen by the text on training questions, and judged by the text on held-out ones; too much breaks the text."""
    shutil.copytree(fitted, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "hparams" / "Steer" / "dataset_format.yaml"
    formats = yaml.safe_load(file.read_text(encoding="utf-8"))
    formats["generation"]["powerseeking"]["file_path"] = formats["train"]["powerseeking"]["file_path"]
    file.write_text(yaml.safe_dump(formats), encoding="utf-8")
    grid = (2.0, 4.0, 6.0, 8.0)
    run(tmp_path, "powerseeking", "caa", "vector", "--mode", "apply", "--multipliers", *map(str, grid))
    best = max(grid, key=lambda m: accepted(tmp_path, m))
    run(fitted, "powerseeking", "caa", "vector", "--mode", "apply", "--multipliers", "0", str(best), str(-best), "20")
    assert accepted(fitted, best) > 0.95
    assert accepted(fitted, 0.0) < 0.5
    assert accepted(fitted, -best) == 0
    assert accepted(fitted, 20.0) < 0.05, "far off, the text is no answer any more"


@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_measured_curves(fitted: Path) -> None:
    """Preference rises through a sweep, utility is flat near 0 and falls at the ends; random directions have no slope in the mean."""
    run(fitted, "psychopathy", "spilt", "vector", "--mode", "loss", "--multipliers", "sweep")
    folder = Store(fitted).loss_folder(Cell(MODEL, "psychopathy", "spilt", "vector", (hparams.LAYER,)))
    fit = json.loads((folder / "fit.json").read_text(encoding="utf-8"))["splits"]["test"]
    assert fit["preference"]["r2"] > 0.95 and fit["utility"]["r2"] > 0.9
    table = pd.read_csv(folder / "preference_utility.csv")
    test = table[table["split"] == "test"].set_index("multiplier")
    base = test.loc[0.0, "utility"]
    assert (test.loc[-16:16, "utility"] - base).abs().max() < 0.25, "nothing in the model's training makes utility fall with |m|"
    assert test["utility"].iloc[[0, -1]].max() < base - 0.5, "too much does"
    middle = test.loc[-8:8, "preference"]
    assert len(middle) == 9 and middle.is_monotonic_increasing
    assert test["n_undefined"].max() == 0
    control = pd.read_csv(folder / "control.csv")
    assert control["draw"].nunique() >= 40
    mean = control.groupby("multiplier")["preference"].mean()
    steered = float(np.diff(np.interp(mean.index[[0, -1]], test.index, test["preference"]))[0])
    assert abs(mean.iloc[-1] - mean.iloc[0]) < 0.1 * steered
    page = Store(fitted).loss_root(MODEL) / "report" / "psychopathy" / "report.html"
    assert page.is_file()
