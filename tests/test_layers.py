"""`--layers`: blocks as cells of their own, each alone or together, in folders of their own, through every stage and on the page."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import families
import pandas as pd
import pytest
import torch
from faults import fresh

from spilt import cli, verify
from spilt.artifacts.store import Store
from spilt.cell import Cell, Variant, spans, variant_of
from spilt.report import cells, drawing, figures, places, tables
from spilt.report.places import find

SWEEP = ("--mode", "loss", "--multipliers", "sweep", "--set", "sweep_points=5", "--control_pairs", "0", "--split", "train")


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=6)


def run(base: families.Base, *words: str, method: str = "sft", form: str = "vector") -> int:
    fresh()
    return cli.main([*base.argv(method, form, *words), "--quiet"])


def vector(base: families.Base, leaf: str, layer: int, method: str = "sft") -> Path:
    return base.path / f"vectors/{base.model}/{method}/{base.one}/{leaf}/layer_{layer}.pt"


def loaded(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)


def test_the_name_of_a_folder_is_read_back() -> None:
    for layers, seed in ((None, None), ((3,), None), ((10, 14), 2), (None, 7)):
        cell = Cell("m", "d", "sft", "vector", layers or (9,), None, seed, layers is not None)
        assert variant_of(cell.variant) == Variant("vector", layers, seed)
    assert cell.leaf == "sft_vector@seed7" and variant_of("odd@layer1,2") == Variant("odd@layer1,2")
    assert str(Variant("vector", (10, 14), 2)) == ", layer 10+14, seed 2"
    assert spans((5, 9, 10, 11, 14, 15)) == "5+9–11+14+15"
    assert str(Cell("m", "d", "sft", "vector", (9, 10, 11, 12), apart=True)) == "d sft vector layer 9–12"


def test_each_layer_alone_beside_the_settings_own(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """The fits are those of the layer, what lay there stays as it was, the settings' own layer keeps its place."""
    assert run(base, "--mode", "both", "--multipliers", "1") == 0
    before = {name: value for name, value in families.listing(base.path).items() if value != "folder"}
    assert run(base, "--mode", "both", "--multipliers", "1", "--layers", "3", "2", "1") == 0
    assert "2 already done" in capsys.readouterr().out, "layer 2 is that of the settings"
    assert before.items() <= families.listing(base.path).items()
    store = Store(base.path)
    for layer in (1, 3):
        cell = Cell(base.model, base.one, "sft", "vector", (layer,), None, None, True)
        assert store.vector(cell, layer) == vector(base, f"sft_vector@layer{layer}", layer) and store.results(cell, 1.0).is_file()
    assert run(base, "--mode", "generate", "--set", "layers=1") == 0
    assert torch.equal(loaded(vector(base, "sft_vector@layer1", 1)), loaded(vector(base, "sft_vector", 1)))
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    assert run(base, "--mode", "both", "--multipliers", "1", "--layers", "1", "3") == 0
    assert "4 already done" in capsys.readouterr().out


@pytest.mark.long
def test_layers_that_act_together_are_one_fit(base: families.Base, tmp_path: Path) -> None:
    assert run(base, "--mode", "both", "--multipliers", "1", "--layers", "3+1") == 0
    assert run(base, "--mode", "generate", "--set", "layers=1,3", "--set", "joint=true") == 0
    for layer in (1, 3):
        assert torch.equal(loaded(vector(base, "sft_vector@layer1+3", layer)), loaded(vector(base, "sft_vector", layer)))
    assert run(base, "--mode", "loss", "--multipliers", "1", "--layers", "1+3", "--no_report", "--split", "train") == 0
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    assert run(base, "--layers", "1+3", "--mode", "both", "--multipliers", "1", method="caa") == 0, "of means each layer has its own"
    assert vector(base, "caa_vector@layer1+3", 3, "caa").is_file()
    assert run(base, "--layers", "1+3", *SWEEP, "--no_report", method="all") == 0, "reps and spilt are not fitted: skipped"
    assert len(find(base.path, base.model, base.one)) == 2


@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_all_layers_are_found_and_compared(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """A scan, its page with the heat map, the recommendation by layer; texts at what is recommended for each."""
    for method in ("sft", "caa"):
        assert run(base, "--layers", "all", "--mode", "generate", method=method) == 0
        assert run(base, "--layers", "all", *SWEEP, "--no_report", method=method) == 0
    places = find(base.path, base.model, base.one)
    assert [place.layers for place in places] == 2 * [(layer,) for layer in range(families.LAYERS)]
    assert [place.intervention for place in places[:3]] == ["vector@layer0", "vector@layer1", "vector"]
    assert cli.main(["report", "--base_dir", str(base.path)]) == 0
    folder = base.path / f"vectors/{base.model}/get_sft_loss/report/{base.one}"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "sft vector, layer 4" in page and (folder / "layers.svg").is_file()
    table = pd.read_csv(folder / "layers.csv")
    assert sorted(table["layer"]) == sorted([*range(families.LAYERS)] * 2)
    measured = [cells.judged(place, "mean", 0.5, 0) for place in places]
    some = tables.foremost(measured)
    assert [cell.place.method for cell in some] == ["caa", "sft"]
    best = table[table["method"] == "sft"].sort_values(["recommended", "gain"], ascending=False).iloc[0]
    assert some[1].name == best["cell"] and f"({len(some)} of 10 cells)" in " ".join(page.split())
    assert figures.layers_figure(measured[:1], "train") is None
    for joint in ("+".join(map(str, range(9, 24))), "+".join(map(str, range(0, 30, 2)))):
        at = [replace(place, intervention=f"vector@layer{name}") for place, name in zip(places, (joint, "5+15+25"), strict=False)]
        several = [replace(cell, place=place) for cell, place in zip(measured, [*at, *places[2:7]], strict=False)]
        for narrow in (False, True):
            figure = figures.layers_figure(several, "train", narrow=narrow)
            assert figure is not None
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a layout that finds no room says so
                drawing.svg_of(figure)
            labels = [text.get_text().replace("\n", "") for text in figure.axes[0].get_yticklabels() + figure.axes[0].get_xticklabels()]
            assert {"5+15+25", spans([*map(int, joint.split("+"))])} <= {*labels}
    capsys.readouterr()
    assert cli.main(["recommend", "--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one]) == 0
    assert "sft vector, layer 4" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.long
def test_files_of_given_multipliers_say_their_layer(base: families.Base) -> None:
    """A sweep writes tables, given multipliers the released files: the layer of the settings is known by both."""
    given = ("--layers", "all", "--split", "train")
    assert run(base, *given, "--mode", "generate", method="caa") == 0
    assert run(base, *given, "--mode", "loss", "--multipliers", "1", "2", method="caa") == 0
    assert not list(base.path.glob("vectors/**/losses_*.csv"))
    assert [place.layers for place in places.find(base.path, base.model, base.one)] == [(layer,) for layer in range(families.LAYERS)]
    table = pd.read_csv(base.path / f"vectors/{base.model}/get_sft_loss/report/{base.one}/layers.csv")
    assert [*table["layer"]] == [*range(families.LAYERS)]


def test_layers_and_seeds_and_concepts_go_together(base: families.Base) -> None:
    assert run(base, "--layers", "1", "--seeds", "1", "2", "--mode", "both", "--multipliers", "1") == 0
    assert vector(base, "sft_vector@layer1@seed2", 1).is_file()
    argv = base.argv("sft", "vector", "--layers", "1", "--mode", "both", "--multipliers", "1", "--concepts", "1", "3", "--quiet")
    assert cli.main([base.many if word == base.one else word for word in argv]) == 0
    assert len(list(base.path.glob("vectors/*/sft/*_concept_*/sft_vector@layer1/layer_1.pt"))) == 2
    assert {found.state for found in verify.check(base.path)} == {verify.OK}


def test_the_command_of_a_step_names_its_layer(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--layers", "1", "0+3", "--mode", "loss", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "--layers 1\n" in said and "--layers 0+3\n" in said and "loss mine sft vector layer 0+3" in said
    assert run(base, "--layers", "5", "--dry_run") == 2
    assert "layer" in capsys.readouterr().err
