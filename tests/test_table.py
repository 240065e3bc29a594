"""spilt table: what stands in each table against numbers worked out here, the formats, and the strengths of equal KL."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest

import spilt
from spilt import cli, report, verify
from spilt.analysis import equal
from spilt.analysis.claims import Case
from spilt.analysis.paper import MAIN, TABLES
from spilt.analysis.questions import Questions
from spilt.artifacts import manifest
from spilt.artifacts.losses import KL_COLUMNS, TRIED
from spilt.artifacts.scores import TABLE
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.data import entries, readers
from spilt.report import comparison

M = np.arange(-4.0, 5.0)


def questions(slope: float, cost: float, seed: int, n: int = 24) -> Questions:
    """Preference slope m, utility -cost m^2, and noise that is each question's own at all multipliers."""
    noise = np.random.default_rng(seed).normal(size=(2, n)) * 0.3
    rows = [
        {"example": i, "multiplier": m, "preference": slope * m + noise[0, i] * (1 + 0.1 * m), "utility": -cost * m * m + noise[1, i]}
        for i in range(n)
        for m in M
    ]
    return Questions.of(pd.DataFrame(rows).assign(loss=0.0))


def compared(**cells: equal.Cell) -> pd.DataFrame:
    return equal.pairs({name.replace("_", " "): cell for name, cell in cells.items()}, 1.0).set_index(["at equal", "of"])


def test_what_is_compared_at_equal_kl_preference_and_utility() -> None:
    """spilt: 1.0 m at 0.1 m^2; sft: 0.5 m at 0.2 m^2, on the same questions. At m = 2 and 3; at 1.0 nat, m = sqrt(10) and sqrt(5)."""
    one, other = questions(1.0, 0.1, 1), questions(0.5, 0.2, 1)
    found = compared(
        spilt_vector=equal.Cell(Case("spilt", "vector", (one,)), (2.0,)), sft_vector=equal.Cell(Case("sft", "vector", (other,)), (3.0,))
    )
    own, theirs = (q.mean("preference")[0] for q in (one, other))
    gain = (own[M == 2] - own[M == 0]) - (theirs[M == 3] - theirs[M == 0])
    row = found.loc[equal.KL, "preference"]
    assert row["difference"] == pytest.approx(gain[0], abs=1e-12) and row["low"] < row["difference"] < row["high"] and row["p"] < 0.05
    kept = found.loc[equal.KL, "utility"]
    assert kept["difference"] == pytest.approx(-0.1 * 4 + 0.2 * 9, abs=1e-9)
    within = found.loc[equal.UTILITY, "preference"]  # the curve is read between measured points: 3 and 4, 2 and 3
    assert within["own"] == pytest.approx(np.interp(1.0, [0.9, 1.6], own[[7, 8]] - own[4]), abs=1e-6)
    assert within["other"] == pytest.approx(np.interp(1.0, [0.8, 1.8], theirs[[6, 7]] - theirs[4]), abs=1e-6)
    assert found.loc[equal.PREFERENCE, "utility"]["difference"] > 0
    assert set(found["cell"]) == {"spilt vector"} and set(found["than"]) == {"sft vector"}


def test_the_comparison_is_antisymmetric_and_knows_no_difference_where_there_is_none() -> None:
    """Another method's name for the same losses: 0, not significant; without a strength of equal KL that row is left out."""
    same = questions(0.7, 0.1, 3)
    found = compared(
        spilt_vector=equal.Cell(Case("spilt", "vector", (same,)), (None,)), sft_vector=equal.Cell(Case("sft", "vector", (same,)), (2.0,))
    )
    assert equal.KL not in found.index.get_level_values(0)
    assert found.loc[equal.UTILITY, "preference"]["difference"] == 0 and found.loc[equal.UTILITY, "preference"]["p"] == 1
    a, b = questions(1.0, 0.1, 1), questions(0.5, 0.2, 1)
    there, back = (
        compared(spilt_vector=equal.Cell(Case("spilt", "vector", (x,)), (2.0,)), sft_vector=equal.Cell(Case("sft", "vector", (y,)), (2.0,)))
        for x, y in ((a, b), (b, a))
    )
    np.testing.assert_allclose(there["difference"], -back["difference"], atol=1e-9)


def test_several_fits_are_their_mean_and_widen_the_interval() -> None:
    fits = tuple(questions(slope, 0.1, 1) for slope in (0.8, 1.0, 1.2))
    other = equal.Cell(Case("sft", "vector", (questions(0.5, 0.1, 1),)), (2.0,))
    several = compared(spilt_vector=equal.Cell(Case("spilt", "vector", fits), (2.0,) * 3), sft_vector=other).loc[equal.KL, "preference"]
    alone = compared(spilt_vector=equal.Cell(Case("spilt", "vector", fits[1:2]), (2.0,)), sft_vector=other).loc[equal.KL, "preference"]
    assert several["difference"] == pytest.approx(alone["difference"], abs=1e-9)
    assert several["high"] - several["low"] > 2 * (alone["high"] - alone["low"])


# ---------------------------------------------------------------- stored results


def write_losses(base: families.Base, method: str, form: str, slope: float) -> None:
    """losses_{split}.csv of a cell without manifests, as copied from elsewhere."""
    rng = np.random.default_rng(7)
    for split in ("train", "test"):
        rows = []
        for i in range(20):
            level, shift, own = rng.normal(2.0, 0.2), rng.normal(0, 0.3), slope * rng.normal(1, 0.2)
            for m in M:
                for sign, target in ((-0.5, "matching"), (0.5, "not_matching")):
                    loss = level + sign * (own * np.tanh(m / 3) + shift) + 0.1 * m * m
                    rows.append((m, abs(m) / 10, "all", i, target, 9, 5 * loss, 4, 4 * loss))
        names = ["multiplier", "dose", "positions", "example", "target", "n_tokens", "loss_sum", "answer_tokens", "answer_loss_sum"]
        path = base.path / "vectors" / base.model / "get_sft_loss" / method / base.one / f"{method}_{form}" / f"losses_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows, columns=names).to_csv(path, index=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    base = families.Base(tmp_path_factory.mktemp("table"), model="gemma-2-9b-it", one="psychopathy")
    for method, form, slope in (("spilt", "vector", 3.0), ("sft", "vector", 2.0), ("pca", "vector", 1.0), ("spilt", "lora", 2.5)):
        write_losses(base, method, form, slope)
    return base


def told(base: families.Base, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["table", "--base_dir", str(base.path), *words]) == 0
    return capsys.readouterr().out


def test_the_main_table_has_every_cell_and_the_papers_numbers(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(base, capsys, "--tables", "main")
    rows = {
        line.split("|")[1].strip(): [text.strip() for text in line.split("|")[2:-1]] for line in said.splitlines() if line.startswith("| ")
    }
    assert list(rows) == ["method", "no steering", "sft vector", "spilt vector", "pca vector", "spilt LoRA"]
    assert rows["method"][-1] == "paper: accuracy (%)"
    assert [rows[name][-1] for name in ("no steering", "sft vector", "spilt vector", "pca vector")] == ["50", "97", "99", "–"]
    found = pd.read_csv(io.StringIO(told(base, capsys, "--tables", "main", "--format", "csv"))).set_index(
        ["method", "intervention", "measure"]
    )
    assert found.loc[("spilt", "vector", "paper: accuracy (%)"), "value"] == MAIN["gemma-2-9b-it"]["spilt", "vector"][0]
    gain = found.loc[("spilt", "vector", "preference gain, nats")]
    assert gain["low"] < gain["value"] < gain["high"] and 0 < found.loc[("sft", "vector", "preference gain, nats"), "value"] < gain["value"]
    assert found.loc[("spilt", "vector", "utility drop, nats"), "value"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.long
def test_cells_of_other_rows_or_another_model_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data file that was edited, or a model exchanged under its name, and one cell measured again: questions are paired by number."""
    base = families.Base(tmp_path, model="gemma-2-9b-it", one="psychopathy")
    for method, slope in (("spilt", 3.0), ("sft", 2.0), ("pca", 1.0)):
        write_losses(base, method, "vector", slope)
    root = base.path / "vectors" / base.model / "get_sft_loss"

    def measured(method: str, created: int, **parts: str) -> None:
        for split in ("train", "test"):
            path = root / method / base.one / f"{method}_vector" / f"losses_{split}.csv"
            known = {"verb": "measure", "model": "m", "data": f"{split} rows", "columns": {}, "settings": {}, "split": split}
            manifest.write(path, path.read_bytes(), known | (parts if split == "test" or "model" in parts else {}))
            about = manifest.manifest_path(path)
            record = json.loads(about.read_text())
            about.write_text(json.dumps(record | {"created": f"2026-01-0{created}T00:00:00+00:00"}))

    def cells() -> set[str]:
        (one,) = comparison.collect(base.path, [], [], ["main"], 0.5, 0)
        return {cell.name for group in one.groups for cell in group.cells}

    measured("spilt", 3), measured("sft", 1)  # pca: nobody can say
    assert cells() == {"spilt vector", "sft vector", "pca vector"}
    measured("spilt", 4, data="other rows")
    assert cells() == {"spilt vector", "pca vector"}
    assert cli.main(["table", "--base_dir", str(base.path), "--tables", "main"]) == 0
    said = capsys.readouterr()
    assert "sft vector left out: test: another data than the cells measured last; --mode loss measures it again" in said.err
    assert "sft vector" not in said.out
    table = report.recommend(base.path, base.model, base.one)
    assert set(table["method"]) == {"spilt", "sft", "pca"} and any("sft vector not comparable" in note for note in table.attrs["notes"])
    measured("sft", 5, model="exchanged")
    assert cells() == {"sft vector", "pca vector"}
    measured("spilt", 6, model="exchanged")
    assert cells() == {"spilt vector", "sft vector", "pca vector"}


def test_all_tables_in_all_formats(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not there is said; nothing of a folder's name is markup."""
    write_losses(base, "a|<b>_&", "vector", 1.5)
    told(base, capsys, "--output", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tables.md", "tables.tex", "tables.html", "main.csv", "equal.csv", "train_test.csv", "fits.csv", "averages.csv", "tradeoff.csv")
    }
    page, latex, plain = ((tmp_path / f"tables.{ending}").read_text() for ending in ("html", "tex", "md"))
    assert "<b>" not in page and "&lt;b&gt;" in page and "\\_\\&" in latex and "a\\|<b>" in plain
    assert "−" not in latex and latex.count("\\toprule") == page.count("<table>") == plain.count("\n|---")
    equal_ = pd.read_csv(tmp_path / "equal.csv")
    assert set(equal_["at equal"]) == {equal.UTILITY, equal.PREFERENCE} and set(equal_["cell"]) == {"spilt vector"}
    assert cli.main(["table", "--base_dir", str(base.path), "--tables", "strengths"]) == 1
    assert "--kl NATS finds them" in capsys.readouterr().err


@pytest.mark.long
def test_every_cell_at_equal_kl_preference_and_utility(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """From the stored losses themselves, worked out here; KL is (m / 2)^2 at the strengths that were tried, so its root is a line."""
    root = Store(base.path).loss_root(base.model)
    folders = {method: root / method / base.one / f"{method}_vector" for method in ("spilt", "sft")}
    tried = [("none", 0.0), *((side, sign * size) for side, sign in (("positive", 1), ("negative", -1)) for size in (4.0, 2.0, 3.0))]
    for method, status in (("spilt", "converged"), ("sft", "above budget")):
        ends = [("positive", 2.0, status), ("negative", -2.0, "converged"), *((*one, TRIED) for one in tried)]
        rows = [(side, m, how, 9, m * m / 8, m * m / 4, m * m, 1.0) for side, m, how in ends]
        pd.DataFrame(rows, columns=KL_COLUMNS).to_csv(folders[method] / Store.KL, index=False)
    try:
        said = told(base, capsys, "--tables", "tradeoff")
        found = pd.read_csv(io.StringIO(told(base, capsys, "--tables", "tradeoff", "--format", "csv")))
        strengths = told(base, capsys, "--tables", "strengths")
    finally:
        for folder in folders.values():
            (folder / Store.KL).unlink()
    assert TRIED not in strengths and "above budget" in said and strengths.count("\n|") == 4
    table = found.set_index(["at equal", "method", "intervention", "measure"]).sort_index()
    assert np.isnan(table.loc[(equal.KL, "sft", "vector", "m"), "value"])
    losses = pd.read_csv(folders["spilt"] / "losses_test.csv")
    losses["loss"] = losses["answer_loss_sum"] / losses["answer_tokens"]
    both = losses.pivot_table(index=["multiplier", "example"], columns="target", values="loss")
    mass = np.exp(-both).sum(axis=1)
    own = pd.DataFrame({"gain": both["not_matching"] - both["matching"], "drop": -np.log(mass / (1 - mass))}).groupby("multiplier").mean()
    own -= own.loc[0.0]

    def row(kind: str, measure: str) -> Any:
        return table.loc[(kind, "spilt", "vector", measure)]

    gain, drop = row(equal.KL, "preference gain, nats"), row(equal.KL, "utility drop, nats")
    assert gain["value"] == pytest.approx(own.loc[2.0, "gain"]) and drop["value"] == pytest.approx(own.loc[2.0, "drop"])
    assert gain["low"] < gain["value"] < gain["high"] and drop["low"] < drop["value"] < drop["high"]
    assert row(equal.KL, "KL p95, nats")["value"] == pytest.approx(1.0)
    for kind, measure, name in ((equal.UTILITY, "utility drop, nats", "drop"), (equal.PREFERENCE, "preference gain, nats", "gain")):
        m = row(kind, "m")["value"]
        assert row(kind, measure)["value"] == pytest.approx(np.interp(m, own.index, own[name]), abs=1e-9)
        assert row(kind, "KL p95, nats")["value"] == pytest.approx(m * m / 4)
    assert row(equal.UTILITY, "utility drop, nats")["value"] == pytest.approx(0.5, abs=1e-6)  # the budget
    level = row(equal.PREFERENCE, "m")["nats"]
    best = found[(found["at equal"] == equal.UTILITY) & (found["intervention"] == "vector")].query("measure == 'preference gain, nats'")
    assert level == pytest.approx(best["value"].max() / 2) and row(equal.PREFERENCE, "preference gain, nats")["value"] >= level
    assert row(equal.PREFERENCE, "m")["value"] < row(equal.UTILITY, "m")["value"]


def test_fits_beside_the_papers_and_their_averages(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """R^2 as `tables.fits` has it (curves are not fitted here); averages over the cells of a form, and over all."""
    rows = [
        {"method": method, "intervention": form, "range": "trained", "curve": curve, "r2": r2, "r2_held_out": r2 - 0.1, "r2_test": r2 - 0.2}
        for method, form, r2 in (("sft", "vector", 0.9), ("spilt", "vector", 0.98), ("pca", "vector", 0.97), ("spilt", "lora", 0.99))
        for curve in ("preference", "utility")
    ]
    fitted = pd.DataFrame(rows).assign(r2_paper=[0.93, 0.99] + [None] * 6, bound_hits="", warnings="")
    monkeypatch.setattr("spilt.report.tables.fits", lambda *_: fitted)
    (one,) = comparison.collect(base.path, [], [], ["main"], 0.5, 0)
    table = comparison.fits(one).shown.set_index("method")
    assert list(table.loc["sft vector", ["preference R²", "preference held out", "preference on test", "preference paper"]]) == [
        *("0.900", "0.800", "0.700", "0.93")
    ]
    assert table.loc["pca vector", "utility paper"] == "–"
    (averages,) = comparison.averages([one, one])
    shown = averages.shown.set_index("form")
    assert list(shown["preference R²"]) == ["0.950", "0.990", "0.960"] and shown.loc["vector", "preference R² from 0.95"] == "4 of 6"
    assert shown.loc["all", "utility paper"] == "0.990"


def test_wrong_words(base: families.Base, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, said in (
        (["--base_dir", str(tmp_path)], "no stored losses"),
        (["--dataset", "psychopaty"], "did you mean 'psychopathy'"),
        (["--model_name", "gemma"], "gemma-2-9b-it"),
        (["--format", "csv"], "--output FOLDER"),
        (["--kl", "-1"], "nats above 0"),
        (["--budget", "-1"], "0 or more"),
    ):
        assert cli.main(["table", "--base_dir", str(base.path), *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_broken_cell_is_named_and_others_are_compared(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where none is left: what is wrong with it, and no table."""
    copy = base._replace(path=tmp_path / "base")
    shutil.copytree(base.path, copy.path)
    words = ["table", "--base_dir", str(copy.path), "--tables", "main", "tradeoff", "equal", "train_test"]
    cells = sorted(copy.path.rglob("losses_train.csv"))
    for number, path in enumerate(cells, 1):
        path.write_text("multiplier,dose\n1,")
        assert cli.main(words) == (0 if number < len(cells) else 2)
        out, err = capsys.readouterr()
        assert err.count("warning: gemma-2-9b-it psychopathy") == number and str(path) in err
        assert out.count("main results") == (number < len(cells))
    assert "no cell could be read" in err


def test_a_strength_of_equal_kl_is_measured_where_a_table_rounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/main_table.py measures losses there with the ten digits of strengths.csv; beyond what was measured there is none."""
    from spilt.report.comparison import sets

    for m in (14.03835355123, -13.28540678012):
        monkeypatch.setattr(sets, "ended", lambda _, m=m: {"multiplier": m, "status": "converged"})
        for end, wanted in ((float(f"{m:.10g}"), float(f"{m:.10g}")), (0.99 * m, None)):
            cell: Any = SimpleNamespace(frame=pd.DataFrame({"multiplier": [0.0, end]}))
            assert sets.at_kl(cell) == wanted


@pytest.mark.long
def test_strengths_of_equal_kl_are_found_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides of every cell, within 5% of the budget or with a status; kept beside the losses; a new vector's are found anew."""
    base = families.make_base(tmp_path / "base", train=6)
    words = [*base.argv(), "--method", "sft", "spilt", "--quiet"]
    assert cli.main([*words, "--mode", "generate"]) == 0
    assert cli.main([*words, "--mode", "loss", "--multipliers", "-40", "-8", "8", "40", "--no-released_files", "--no_report"]) == 0
    how = ["table", "--base_dir", str(base.path), "--kl", "0.3", "--prompts", "2", "--max_new_tokens", "5", "--device", "cpu"]
    assert cli.main([*how, "--kl_of", "sfd"]) == 2 and "did you mean 'sft'?" in capsys.readouterr().err
    assert cli.main(["table", "--base_dir", str(base.path), "--kl_of", "sft"]) == 2 and "goes with --kl" in capsys.readouterr().err
    assert cli.main([*how, "--tables", "strengths", "--kl_of", "sft_vector"]) == 0
    said = capsys.readouterr()
    assert "[1/1] mine sft vector" in said.err and "| sft vector |" in said.out and "| spilt vector |" not in said.out
    assert cli.main([*how, "--tables", "strengths", "equal"]) == 0
    said = capsys.readouterr()
    assert "[1/1] mine spilt vector" in said.err and said.out.count("KL p95") >= 2
    path = Store(base.path).loss_root(base.model) / "spilt" / base.one / "spilt_vector" / Store.KL
    table: Any = pd.read_csv(path)
    assert list(table["side"][:2]) == ["positive", "negative"] and set(table["status"][2:]) == {TRIED}
    table = table[:2]
    assert all(abs(row.kl_p95 / 0.3 - 1) <= 0.05 or row.status != "converged" for row in table.itertuples())
    assert cli.main([*how, "--tables", "strengths"]) == 0 and "[" not in capsys.readouterr().err
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    about = json.loads(manifest.manifest_path(path).read_text())  # as a kill of --kl 0.2 leaves them: one of two
    manifest.write(path, path.read_bytes(), about["parts"] | {"kl": about["parts"]["kl"] | {"budget": 0.2}})
    newest = manifest.manifest_path(path)
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"created": "2999-01-01T00:00:00+00:00"}))
    assert cli.main([*how[:3], "--tables", "strengths", "equal"]) == 0
    told_now = capsys.readouterr()
    assert "sft vector: strengths of equal KL left out: found with budget 0.3 (now 0.2); --kl finds them again" in told_now.err
    assert "| sft vector |" not in told_now.out.split("equal KL, pref")[0] and "| KL |" not in told_now.out
    assert cli.main([*words, "--mode", "generate", "--set", "lr=0.02"]) == 0
    assert cli.main(["table", "--base_dir", str(base.path), "--tables", "strengths"]) == 2
    assert set(TABLES) >= {"strengths"}
    # texts that steer other tokens are another thing than what is measured here
    (applied,) = base.path.glob(f"hparams/**/{base.one}/**/sft/apply_sft.yaml")
    applied.write_text(applied.read_text() + "steer_positions: f5\n", encoding="utf-8")
    assert cli.main([*words, "--mode", "loss", "--multipliers", "-8", "8", "--no-released_files", "--no_report"]) == 0
    capsys.readouterr()
    assert cli.main([*how, "--tables", "strengths"]) == 0
    said = capsys.readouterr()
    assert "no strength of equal KL: steer_positions = f5: here every token is steered" in said.err
    assert "| spilt vector |" in said.out and "| sft vector |" not in said.out


@pytest.mark.long
def test_equal_kl_of_concepts_is_one_strength_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean over the concepts of what `spilt.divergence` says of each vector, on its own prompts."""
    base = families.make_base(tmp_path / "base", train=6, test=4)
    words = base.argv("caa", "vector", "--concepts", "0", "1", "--quiet", dataset=base.many)
    assert cli.main([*words, "--mode", "generate"]) == 0
    assert cli.main([*words, "--mode", "loss", "--multipliers", "-4", "4", "--no-released_files", "--no_report"]) == 0
    how = ["table", "--base_dir", str(base.path), "--kl", "0.3", "--prompts", "2", "--max_new_tokens", "4", "--device", "cpu"]
    assert cli.main([*how, "--tables", "strengths", "tradeoff"]) == 0 and "caa vector" in capsys.readouterr().out
    table: Any = pd.read_csv(Store(base.path).loss_root(base.model) / "caa" / base.many / "caa_vector" / Store.KL)
    row = table.iloc[0]
    model, tokenizer = spilt.load(base.path / "models" / base.model)
    parts = []
    for concept in (0, 1):
        cell = Cell(base.model, base.many, "caa", "vector", (base.layer,), concept)
        value = spilt.Steering.load(Store(base.path).vector(cell, base.layer))
        asked = [one.input for one in readers.read_prompts(entries.dataset_format(base.path, base.many, "generation"), concept, 2)]
        parts.append(spilt.divergence(model, tokenizer, value, asked, row["multiplier"], max_new_tokens=4).iloc[0])
    assert row["kl_p95"] == pytest.approx(np.mean([part["kl_p95"] for part in parts]), rel=1e-5)
    assert row["tokens"] == sum(part["tokens"] for part in parts)
    assert {found.state for found in verify.check(base.path)} == {verify.OK}


@pytest.mark.long
def test_the_main_table_has_stored_scores_at_its_strengths(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the cell's own m and of m = 0; a cell that was scored elsewhere has none."""
    (one,) = comparison.collect(base.path, [], [], ["main"], 0.5, 0)
    cells = {cell.name: cell for group in one.groups for cell in group.cells}
    at = {"spilt vector": cells["spilt vector"].best["solved"], "sft vector": 17.0}
    made = []
    for name, m in at.items():
        place = cells[name].place
        for strength, values in ((0.0, (0, 0, 1, 0)), (m, (1, 1, 0, 1))):
            path = Store(base.path).scores(Cell(place.model, place.dataset, place.method, place.intervention, ()), strength)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [(strength, 0, item, 0, "accuracy", value, "") for item, value in enumerate(values)]
            pd.DataFrame(rows, columns=TABLE).to_csv(path, index=False)
            made.append(path)
    try:
        found = pd.read_csv(io.StringIO(told(base, capsys, "--tables", "main", "--format", "csv")))
        score = found[found["measure"] == "score: accuracy"].fillna({"intervention": ""}).set_index(["method", "intervention"])
        assert score.loc[("no steering", ""), "value"] == 0.25 and score.loc[("spilt", "vector"), "value"] == 0.75
        assert 0 <= score.loc[("spilt", "vector"), "low"] < 0.75 < score.loc[("spilt", "vector"), "high"] <= 1
        assert np.isnan(score.loc[("sft", "vector"), "value"]) and np.isnan(score.loc[("spilt", "lora"), "value"])
        said = told(base, capsys, "--tables", "main")
        assert "score: accuracy" in said and "Score: of stored texts at that m" in said
    finally:
        for path in made:
            path.unlink()
