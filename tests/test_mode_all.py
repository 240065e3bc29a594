"""`--mode all`: fit, measure and apply in one process, what the losses recommend among the texts; and cells named one by one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
from command_line import REPO

from spilt import cli, plan, run
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.errors import UserError
from spilt.model import host

CELLS = (("caa", "vector"), ("sft", "vector"), ("spilt", "lora"))
NAMED = ("--method", "caa", "sft", "spilt_lora", "--intervention_method", "vector")
FEW = ("--limit", "12", "--control_pairs", "0", "--quiet", "--set", "sweep_points=9")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with what `--mode all` makes of three cells in one process."""
    base = tmp_path_factory.mktemp("all") / "demo"
    shutil.copytree(REPO / "examples/demo", base)
    with pytest.MonkeyPatch.context() as patch:
        loads, drawn = [], []
        patch.setattr(host, "load", lambda *given, load=host.load, **how: (loads.append(given[1]), load(*given, **how))[1])
        patch.setattr("spilt.report.update", lambda *given, **_: drawn.append(given))
        assert called(base, *NAMED, "--mode", "all") == 0
        assert loads == ["float32"] and len(drawn) == 1
    return base


def called(base: Path, *words: str) -> int:
    about = ("--dataset", "psychopathy", "--model_name", "demo-qwen2", "--base_dir", str(base), "--device", "cpu")
    return cli.main([*about, *words, *FEW])


def results(base: Path) -> dict[str, bytes]:
    """What was made, without manifests and logs: they say when."""
    kinds = (".pt", ".csv", "_results.json")
    found = [path for top in ("vectors", "generation") for path in (base / top).rglob("*") if path.name.endswith(kinds)]
    return {str(path.relative_to(base)): path.read_bytes() for path in found if "report" not in path.parts}


@pytest.mark.long
def test_the_same_bytes_as_one_stage_after_the_other(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "demo"
    shutil.copytree(REPO / "examples/demo", base)
    monkeypatch.setattr("spilt.report.update", lambda *_, **__: None)
    for stage in (("generate",), ("loss", "--multipliers", "sweep"), ("apply",)):  # how far caa's sweep goes depends on the other fits
        for method, form in CELLS:
            assert called(base, "--method", method, "--intervention_method", form, "--mode", *stage) == 0
    assert called(base, *NAMED, "--mode", "apply", "--multipliers", "recommended") == 0
    made = results(demo)
    assert made == results(base) and len(made) > 3 * (1 + 3 + 3)
    assert sum("/m" in name for name in made) > 3 * 3, "no text at a recommended multiplier"


@pytest.mark.long
def test_again_there_is_nothing_to_do(demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spilt.report.update", lambda *_, **__: None)
    before = results(demo)
    assert called(demo, *NAMED, "--mode", "all", "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert results(demo) == before and {step["status"] for step in steps[:-1]} == {"already done"}
    assert [step["verb"] for step in steps] == [*["fit"] * 3, *["measure"] * 3, *["generate"] * 3, "report"]
    text = steps[-2]  # spilt lora: the settings' strengths and the recommended one
    assert text["multipliers"][:4] == [-1, 0, 1, 4] and len(text["multipliers"]) == 5 == len(text["outputs"])
    assert all(Path(path).is_file() for path in text["outputs"])


def test_the_plan_says_what_is_not_known_yet(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = families.listing(demo)
    assert called(demo, *NAMED, "--mode", "all", "--dry_run") == 0
    said = capsys.readouterr().out
    assert said.count("(and those of the multiplier that the losses will recommend)") == 3 and "--mode loss" in said
    assert "--mode apply --device cpu" in said and "--multipliers -1.0 0.0 1.0 4.0 recommended" in said
    assert called(demo, *NAMED, "--mode", "all", "--dry_run", "--json", "--multipliers", "recommended") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["multipliers"] for step in steps if step["verb"] == "generate"] == [[0.0, "recommended"]] * 3
    assert {step["multipliers"] for step in steps if step["verb"] == "measure"} == {"sweep"}
    assert families.listing(demo) == before


@pytest.mark.parametrize(
    ("words", "sweeps", "texts"),
    [
        ([], True, [-1, 0, 1, 4, "recommended"]),
        (["sweep", "recommended"], True, [-1, 0, 1, 4, "recommended"]),
        (["sweep"], True, [-1, 0, 1, 4]),
        (["recommended"], True, [0, "recommended"]),
        (["2", "recommended"], True, [2, 0, "recommended"]),
        (["2", "3", "sweep"], True, [2, 3]),
        (["2", "3"], False, [2, 3]),
    ],
)
def test_what_multipliers_mean_in_all(
    demo: Path, capsys: pytest.CaptureFixture[str], words: list[str], sweeps: bool, texts: list[Any]
) -> None:
    given = ("--multipliers", *words) if words else ()
    lora = ("--method", "spilt", "--intervention_method", "lora")
    assert called(demo, *lora, "--mode", "all", "--dry_run", "--json", *given) == 0
    fit, losses, text = json.loads(capsys.readouterr().out)["steps"]
    assert (fit["verb"], losses["verb"], text["verb"]) == ("fit", "measure", "generate")
    assert losses["multipliers"] == ("sweep" if sweeps else [2, 3]) and text["multipliers"] == texts


def test_a_step_of_the_plan_alone(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers beside `recommended` in apply mode: the command line that the plan of `all` shows for its texts."""
    words = ("--method", "spilt", "caa", "--intervention_method", "lora", "vector", "--mode", "apply", "--dry_run", "--json")
    store = Store(demo)
    made = {at for at, _ in store.generated(Cell("demo-qwen2", "psychopathy", "spilt", "lora", (2,)))}
    assert called(demo, *words, "--multipliers", "-1.0", "4.0", "recommended") == 0
    found = json.loads(capsys.readouterr().out)
    steps = {(step["method"], step["intervention"]): step["multipliers"] for step in found["steps"]}
    assert set(steps["spilt", "lora"]) == made - {1.0} and steps["spilt", "vector"] == [-1, 4, 0]
    assert ["caa lora", "spilt vector"] == [item["name"] for item in found["left_out"]][:2]


@pytest.mark.long
def test_texts_at_the_recommended_strength_are_scored(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The unsteered texts and those at what the losses recommend, as `--mode apply --multipliers recommended` made them."""
    base = tmp_path / "demo"
    shutil.copytree(demo, base)
    words = ("--method", "spilt", "--intervention_method", "lora", "--multipliers", "recommended", "--json")
    found = []
    for mode in ("apply", "evaluate"):
        assert called(base, *words, "--mode", mode) == 0
        (step,) = (step for step in json.loads(capsys.readouterr().out)["steps"] if step["verb"] in ("generate", "evaluate"))
        found.append((step["multipliers"], step["status"], len(step["outputs"])))
    (made, _, _), (scored, status, files) = found
    assert scored == made and made[0] == 0 and len(made) == 2 and (status, files) == ("done", 2)
    assert len([*base.rglob("scores_*.csv")]) == 2


@pytest.mark.long
def test_what_is_not_recommended_is_not_applied(
    base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell without a recommended strength says why; the others that were asked for are applied."""
    monkeypatch.setattr(run, "with_recommended", lambda request: replace(request, recommended={("caa", "vector"): "no gain"}))
    few = ("--quiet", "--no_report", "--control_pairs", "0", "--set", "sweep_points=3", "--json")
    for words, status in ((("recommended",), "skipped"), (("2", "recommended"), "done")):
        assert cli.main(base.argv("caa", "vector", "--mode", "all", "--multipliers", *words, *few)) == 0
        step = json.loads(capsys.readouterr().out)["steps"][-1]
        assert step["verb"] == "generate" and step["status"] == status
        assert step["error"] == "no recommended multiplier: no gain" or step["multipliers"] == [2.0, 0.0]


def test_older_losses_recommend_nothing(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measurement that fails leaves the table of the run before; the texts are not made at what that one recommended."""
    base = tmp_path / "demo"
    shutil.copytree(demo, base)

    def fails(step: Any, run: Any) -> str:
        raise UserError("by hand")

    monkeypatch.setattr("spilt.tasks.measure.measure", fails)
    words = ("--method", "spilt", "--intervention_method", "lora", "--mode", "all", "--multipliers", "recommended", "--no_report")
    assert called(base, *words, "--json") == 1
    _, losses, text = json.loads(capsys.readouterr().out)["steps"]
    assert losses["status"] == "failed" and text["status"] == "skipped" and "could not be measured" in text["error"]


@pytest.mark.long
def test_killed_between_the_stages(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done by then is kept, and the same command goes on to the same results."""
    words = base.argv("sft", "all", "--mode", "all", "--multipliers", "2", "--quiet", "--no_report")
    assert cli.main(words) == 0
    whole = results(base.path)
    for top in ("vectors", "generation"):
        shutil.rmtree(base.path / top)
    with monkeypatch.context() as patch:
        patch.setattr("spilt.tasks.generate.generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(words) == 130
    kept = results(base.path)
    assert kept and kept.items() < whole.items()
    fitted = []
    monkeypatch.setattr("spilt.tasks.fit.fit", lambda *_: fitted.append(1))
    assert cli.main(words) == 0 and results(base.path) == whole and not fitted


@pytest.mark.long
def test_a_dataset_with_concepts(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Fits and losses of each concept, texts of all of them together; what is recorded of a concept is not kept for the next stage."""
    words = base.argv("sft", "vector", "--mode", "all", "--multipliers", "2", "--quiet", "--json", dataset=base.many)
    assert cli.main(words) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    count = len(families.CONCEPTS)
    assert [step["verb"] for step in steps] == [*["fit"] * count, *["measure"] * count, "generate", "report"]
    assert {step["status"] for step in steps} == {"done"} and steps[-2]["concepts"] == [*families.CONCEPTS]
    request = cli.request_of(cli.parser().parse_args(words))
    from spilt.tasks import Recordings

    made = plan.make(request)
    keys = [(step.verb, key) for step in made.steps for key in Recordings(made.steps, None).keys(step)]
    assert not {key for verb, key in keys if verb == "fit"} & {key for verb, key in keys if verb == "measure"}


def test_fit_and_losses_share_what_is_recorded(base: families.Base) -> None:
    from spilt.tasks import Recordings

    made = plan.make(cli.request_of(cli.parser().parse_args(base.argv("sft", "vector", "--mode", "all", "--multipliers", "2"))))
    recordings = Recordings(made.steps, None)
    fit, losses, _ = (set(recordings.keys(step)) for step in made.steps)
    assert fit < losses


# ---------------------------------------------------------------- names


def test_several_names() -> None:
    vectors = [("caa", "vector"), ("sft", "vector")]
    assert plan.pairs_of(("caa", "sft"), ("vector",)) == (vectors, [])
    valid, left_out = plan.pairs_of(("caa", "sft"), ("vector", "lora"))
    assert valid == [*vectors, ("sft", "lora")] and [item.name for item in left_out] == ["caa lora"] and left_out[0].why
    assert plan.pairs_of(("caa", "SFT", "split_weight", "spilt_local_weight"), ("vector",))[0] == [*vectors, ("spilt", "local_weight")]
    assert plan.pairs_of(("caa", "all"), ("all",)) == plan.pairs_of("all", "all")
    for wrong in (("sft", "sfd"), ("spilt_lorra",), ("lora_spilt",)):
        with pytest.raises(UserError, match="unknown method"):
            plan.pairs_of(wrong, ("vector",))
    with pytest.raises(UserError, match="unknown intervention_method"):
        plan.pairs_of(("sft",), ("vector", "loro"))
    with pytest.raises(UserError, match="caa goes with: vector"):
        plan.pairs_of(("caa_lora",), ("vector",))
    with pytest.raises(UserError, match="nothing to do"):
        plan.pairs_of(("caa",), ("lora", "local_weight"))
    with pytest.raises(UserError, match="unknown method"):  # one cell, by the names that the Python face takes
        plan.pairs_of("spilt_lora", "vector")


@pytest.mark.parametrize(
    ("mode", "words", "said"),
    [
        ("loss", ["sweep", "1"], "sweep goes with --mode loss or all, alone"),
        ("loss", ["recommended"], "recommended goes with --mode apply or evaluate or all"),
        ("apply", ["sweep"], "sweep goes with --mode loss or all"),
        ("both", ["1", "recommended"], "recommended goes with --mode apply or evaluate or all"),
        ("all", ["sweep", "swept"], "'swept' is not a number"),
    ],
)
def test_words_that_a_mode_does_not_take(
    clean: families.Base, capsys: pytest.CaptureFixture[str], mode: str, words: list[str], said: str
) -> None:
    assert cli.main(clean.argv("sft", "vector", "--mode", mode, "--multipliers", *words)) == 2
    assert said in capsys.readouterr().err


def test_the_run_ends_where_nothing_was_measured(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss could be read at all: every cell has its reason."""
    request = cli.request_of(cli.parser().parse_args(base.argv("sft", "vector", "--mode", "all")))
    made = plan.make(request)
    found = run._after_the_losses(request, made.steps, {str(step): run.Outcome(str(step), run.DONE, "", 0.0, "") for step in made.steps})
    assert "no stored losses" in str(found.recommended["sft", "vector"])
