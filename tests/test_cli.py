"""The command line on a tiny base: real runs, plans, flags, and files exactly as the contract."""

from __future__ import annotations

import gc
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import REPO, change, process, put, read_json, released_state, results_path, vector_path
from families import FORMS, HIDDEN, MIDDLE, PAIRS, Base, listing, make_base, pairs, write_yaml

from spilt import cli
from spilt.artifacts.losses import PREFERENCE_TYPES
from spilt.methods import METHODS
from spilt.settings.fields import METHOD_ALIASES as ALIASES

TRAINED = [(method, form) for method, form in PAIRS if METHODS[method].loss]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, subprocess.CompletedProcess[str]]:
    """Every combination fitted and applied by one real run."""
    base = make_base(tmp_path_factory.mktemp("full"))
    return base, process(base.argv("all", "all", "--mode", "both", "--multipliers", "1", "0.2", "-2"))


# ---------------------------------------------------------------- every combination, by a real run


@pytest.mark.slow
@pytest.mark.long
def test_all_combinations_are_fitted_and_applied(full: tuple[Base, subprocess.CompletedProcess[str]]) -> None:
    base, run = full
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert len(PAIRS) == 10
    for method, form in PAIRS:
        assert vector_path(base, method, form).is_file()
        for m in ("m1.0", "m0.2", "m-2.0"):
            rows = read_json(results_path(base, method, form, m))
            assert [row["input"] for row in rows] == [pair["question"] for pair in pairs(3)]
        # one line each in the table at the end, for fit and for apply
        for mode in ("generate", "apply"):
            assert re.search(rf"^{mode} {base.one} {method} {form} +done ", run.stdout, re.M), (mode, method, form)
    left_out = [(method, form) for method in dict(PAIRS) for form in FORMS if form not in METHODS[method].forms]
    assert left_out
    for method, form in left_out:
        assert f"left out: {method} {form}: {METHODS[method].why}" in run.stdout
    assert f"{2 * len(PAIRS)} done" in run.stdout


@pytest.mark.slow
@pytest.mark.long
def test_files_are_those_of_the_contract_and_no_others(full: tuple[Base, subprocess.CompletedProcess[str]]) -> None:
    base, _ = full
    made = {name for name, kind in listing(base.path).items() if kind != "folder" and name.split("/")[0] in ("vectors", "generation")}
    wanted = set()
    for method, form in PAIRS:
        leaf = "caa_vector" if method == "caa" else f"{method}_{form}"
        fitted = f"vectors/{base.model}/{method}/{base.one}/{leaf}"
        wanted |= {f"{fitted}/{name}" for name in ("layer_2.pt", "layer_2.manifest.json", "metadata_layer_2.jsonl", "train.log")}
        told = f"generation/{base.model}/{method}/{base.one}/{method}_{form}"
        for m in ("1.0", "0.2", "-2.0"):
            wanted |= {f"{told}/m{m}/{base.one}_results.json", f"{told}/m{m}/{base.one}_results.manifest.json"}
            wanted.add(f"{told}/logs/{method}_{form}_m{m}.log")
    assert made == wanted
    tops = {path.name for path in base.path.iterdir()}
    assert tops == {"models", "data", "hparams", "vectors", "generation"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "form"), PAIRS)
@pytest.mark.long
def test_stored_formats(full: tuple[Base, subprocess.CompletedProcess[str]], method: str, form: str) -> None:
    """layer_{id}.pt, metadata and results: keys, order, shapes and dtypes of the contract."""
    base, _ = full
    path = vector_path(base, method, form)
    state = torch.load(path, weights_only=True)
    if form == "vector":
        assert state.shape == (HIDDEN,) and state.dtype == torch.float32 and state.isfinite().all() and state.any()
    else:
        own = {"lora": ["lora_A", "lora_B", "r", "alpha"], "local_weight": ["weight", "bias"]}[form]
        assert sorted(state) == sorted([*own, "intervention_components", "concept_id"])
        shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)}
        lora = {"lora_A": (MIDDLE, 4), "lora_B": (4, HIDDEN)}
        assert shapes == (lora if form == "lora" else {"weight": (MIDDLE, HIDDEN), "bias": (HIDDEN,)})
        assert all(state[key].dtype == torch.float32 and state[key].any() for key in shapes)
        assert state["intervention_components"] == "mlp_mid" and (form != "lora" or state["r"] == 4)
    (line,) = path.with_name("metadata_layer_2.jsonl").read_text().splitlines()
    metadata = json.loads(line)
    assert list(metadata) == ["concept_id", "concept", "intervention_components", "rank", "alpha", "ref"]
    assert metadata["rank"] == (4 if form == "lora" else None) and metadata["concept_id"] == 0
    for row in read_json(results_path(base, method, form, "m1.0")):
        assert list(row) == ["input", "orig_pred", "pred", "reference_response", "complete_output"]
        assert row["orig_pred"] == [] and len(row["pred"]) == len(row["complete_output"]) == 1
        assert row["complete_output"][0].startswith(f"<bos><turn>user\n{row['input']}<end>\n<turn>model\n")
    assert [row["reference_response"] for row in read_json(results_path(base, method, form, "m1.0"))] == [p["matching"] for p in pairs(3)]
    record = read_json(path.with_name("layer_2.manifest.json"))
    assert record["parts"]["settings"]["seed"] == 42 and record["parts"]["data"] and record["parts"]["model"]
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.long
def test_a_rerun_says_already_done_and_rewrites_nothing(full: tuple[Base, subprocess.CompletedProcess[str]], capsys: Any) -> None:
    base, _ = full
    before = listing(base.path)
    times = {path: path.stat().st_mtime_ns for path in base.path.rglob("*")}
    assert cli.main(base.argv("all", "all", "--multipliers", "1", "0.2", "-2")) == 0
    out = capsys.readouterr().out
    assert out.count("already done") >= 2 * len(PAIRS) and not re.search(r"  done ", out)
    assert listing(base.path) == before and {path: path.stat().st_mtime_ns for path in base.path.rglob("*")} == times
    # one more multiplier: only that one is made
    assert cli.main(base.argv("caa", "vector", "--mode", "apply", "--multipliers", "1", "3")) == 0
    assert gc.isenabled()  # again: not while libraries are imported
    after = listing(base.path)
    assert {name: after[name] for name in before} == before
    assert sorted(Path(name).name for name in after.keys() - before.keys()) == sorted(
        ["m3.0", f"{base.one}_results.json", f"{base.one}_results.manifest.json", "caa_vector_m3.0.log"]
    )


# ---------------------------------------------------------------- dry run


def test_dry_run_loads_no_torch_and_leaves_the_tree(clean: Base) -> None:
    """Asked of the running process: no torch, transformers, pandas or pyarrow among its modules; so too for --help."""
    before = listing(clean.path)
    heavy = ("torch", "transformers", "pandas", "pyarrow", "scipy", "matplotlib", "accelerate", "peft")
    program = (
        "import sys; from spilt.cli import main; code = main(sys.argv[1:]); "
        f"print('LOADED', [m for m in {heavy!r} if m in sys.modules]); raise SystemExit(code)"
    )
    for argv in (clean.argv("all", "all", "--dry_run"), clean.argv("all", "all", "--mode", "loss", "--dry_run"), ["--help"]):
        run = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=REPO, timeout=60)
        assert run.returncode == 0, run.stderr
        assert "LOADED []" in run.stdout
        if "--mode" not in argv and argv != ["--help"]:
            for method, form in PAIRS:
                assert f"generate {clean.one} {method} {form} " in run.stdout and f"apply {clean.one} {method} {form} " in run.stdout
            assert "left out: caa lora" in run.stdout and f"{2 * len(PAIRS)} steps" in run.stdout
    assert listing(clean.path) == before


@pytest.mark.slow
def test_printed_commands_run_as_they_are(base: Base, capsys: Any) -> None:
    """The steps of a request, pasted one by one into a shell, do what the request does."""
    argv = base.argv("spilt", "lora", "--multipliers", "-1e-1", "2", "--limit", "6", "--seed", "7", "--set", "lr=0.02")
    assert cli.main([*argv, "--dry_run"]) == 0
    plan_text = capsys.readouterr().out
    assert f"hparams  {base.hparams(base.one, 'spilt', 'generate_spilt_lora.yaml')}" in plan_text
    assert f"output   {vector_path(base, 'spilt', 'lora')}" in plan_text and "made by an earlier step" in plan_text
    commands = [line.strip() for line in plan_text.splitlines() if line.strip().startswith("python run_spilt.py")]
    assert len(commands) == 2
    for command in commands:
        program, script, *words = shlex.split(command)
        assert (program, script) == ("python", "run_spilt.py")
        assert cli.main(words) == 0
    assert {p.name for p in results_path(base, "spilt", "lora", "m2.0").parents[1].glob("m*")} == {"m-0.1", "m2.0"}
    before = listing(base.path)
    capsys.readouterr()
    assert cli.main(argv) == 0  # the whole request finds its work done
    assert capsys.readouterr().out.count("already done") >= 2 and listing(base.path) == before
    assert cli.main([*argv, "--dry_run"]) == 0
    assert capsys.readouterr().out.count("[already done]") == 2


def test_dry_run_says_what_is_missing(base: Base, capsys: Any) -> None:
    base.data(base.one, "train").unlink()
    shutil.rmtree(base.path / "models")
    before = listing(base.path)
    assert cli.main(base.argv("sft", "vector", "--dry_run")) == 0
    out = capsys.readouterr().out
    assert re.search(rf"input +{re.escape(str(base.data(base.one, 'train')))} +missing", out)
    assert re.search(rf"input +{re.escape(str(base.path / 'models' / base.model))} +missing", out)
    assert listing(base.path) == before


# ---------------------------------------------------------------- flags


def test_negative_multipliers_are_numbers(base: Base) -> None:
    put(vector_path(base, "sft", "vector"), released_state("vector"))
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--multipliers", "-1", "-1e-2", "0.5", "-.25", "1", "1.0", "-0")) == 0
    folder = results_path(base, "sft", "vector", "m0.5").parents[1]
    assert {p.name for p in folder.iterdir()} == {"m-1.0", "m-0.01", "m0.5", "m-0.25", "m1.0", "m0.0", "logs"}


def test_multipliers_default_to_the_yaml_then_to_one(base: Base) -> None:
    put(vector_path(base, "sft", "vector"), released_state("vector"))
    folder = results_path(base, "sft", "vector", "m1.0").parents[1]
    assert cli.main(base.argv("sft", "vector", "--mode", "apply")) == 0
    assert {p.name for p in folder.glob("m*")} == {"m1.0"}
    write_yaml(base.hparams(base.one, "sft", "apply_sft.yaml"), {"layers": [2], "multipliers": [2, "-5e-1"]})
    assert cli.main(base.argv("sft", "vector", "--mode", "apply")) == 0
    assert {p.name for p in folder.glob("m*")} == {"m1.0", "m2.0", "m-0.5"}


@pytest.mark.long
def test_responses_and_the_unsteered_answer(base: Base) -> None:
    """num_responses texts each, sampled apart; orig_pred is the text at m = 0 and the same in every file."""
    put(vector_path(base, "sft", "lora"), released_state("lora", scale=1.0))
    sampled = ["--set", "num_responses=3", "--set", "generate_orig_output=true", "--set", "generation_params.do_sample=true"]
    argv = base.argv("sft", "lora", "--mode", "apply", "--multipliers", "0", "4", *sampled, "--limit", "2")
    assert cli.main(argv) == 0
    none, strong = (read_json(results_path(base, "sft", "lora", m)) for m in ("m0.0", "m4.0"))
    assert len(none) == len(strong) == 2  # --limit
    for at_zero, at_four in zip(none, strong, strict=True):
        assert len(at_four["pred"]) == len(at_four["orig_pred"]) == len(at_four["complete_output"]) == 3
        assert at_zero["pred"] == at_zero["orig_pred"] == at_four["orig_pred"] != at_four["pred"]
        assert len(set(at_four["pred"])) > 1
    kept = results_path(base, "sft", "lora", "m4.0").read_bytes()
    assert cli.main([*argv, "--force", "--batch_size", "1"]) == 0
    assert results_path(base, "sft", "lora", "m4.0").read_bytes() == kept  # the batch decides nothing
    assert cli.main([*argv, "--seed", "43"]) == 0
    assert results_path(base, "sft", "lora", "m4.0").read_bytes() != kept


def test_spellings_of_the_original(base: Base) -> None:
    """--method split; generate_{method}_weight.yaml; apply.yaml; intervention_method: weight; concepts_id."""
    spelt, path = next(iter(ALIASES.items()))[0], base.hparams(base.one, "spilt", "generate_spilt_local_weight.yaml")
    assert ALIASES[spelt] == "spilt"
    path.rename(path.with_name("generate_spilt_weight.yaml"))
    path = path.with_name("generate_spilt_weight.yaml")
    path.write_text(path.read_text().replace("intervention_method: local_weight", "intervention_method: weight") + "concepts_id: 0\n")
    base.hparams(base.one, "spilt", "apply_spilt.yaml").rename(base.hparams(base.one, "spilt", "apply.yaml"))
    assert cli.main(base.argv(spelt, "local_weight")) == 0
    assert vector_path(base, "spilt", "local_weight").is_file() and results_path(base, "spilt", "local_weight", "m1.0").is_file()


@pytest.mark.long
def test_several_layers_act_together(base: Base) -> None:
    """Each layer gets a file, all are told in train.log, and both steer."""
    change(base, layers=[1, 3])
    write_yaml(base.hparams(base.one, "sft", "apply_sft.yaml"), {"layers": [1, 3]})
    argv = base.argv("sft", "vector", "--multipliers", "1")
    assert cli.main(argv) == 0
    folder = vector_path(base, "sft", "vector").parent
    assert sorted(p.name for p in folder.glob("*.pt")) == ["layer_1.pt", "layer_3.pt"]
    log = (folder / "train.log").read_text()
    assert "layer 1" in log and "layer 3" in log
    for path in folder.glob("*.manifest.json"):  # other files are put in their place, which a manifest would not let pass
        path.unlink()
    texts = []
    for layers in ([1, 3], [1], [3]):
        for layer in layers:
            put(vector_path(base, "sft", "vector", layer=layer), released_state("vector", layer, scale=0.7))
        write_yaml(base.hparams(base.one, "sft", "apply_sft.yaml"), {"layers": layers})
        assert cli.main([*argv, "--mode", "apply"]) == 0
        texts.append(results_path(base, "sft", "vector", "m1.0").read_bytes())
    assert len(set(texts)) == 3


def test_a_relative_base_dir(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolved once, from where the user is."""
    monkeypatch.chdir(base.path.parent)
    argv = [*base.argv("caa", "vector")[:-1], base.path.name]
    assert cli.main(argv) == 0
    assert results_path(base, "caa", "vector", "m1.0").is_file()
    assert [p.name for p in base.path.parent.iterdir()] == [base.path.name]


# ---------------------------------------------------------------- loss mode


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_loss_mode_writes_the_files_of_the_contract(base: Base) -> None:
    """Rows in dataset order; winning_only scores matching at +m and not_matching at -m; at m = 0 the base model."""
    import csv

    put(vector_path(base, "sft", "vector"), released_state("vector"))
    assert cli.main(base.argv("sft", "vector", "--mode", "loss", "--multipliers", "1.5", "0", "--split", "train", "--limit", "4")) == 0
    folder = base.path / "vectors" / base.model / "get_sft_loss" / "sft" / base.one / "sft_vector"
    tables: dict[tuple[str, str], list[dict[str, str]]] = {}
    for m in ("1.5", "0.0"):
        for kind in PREFERENCE_TYPES:
            with open(folder / f"vector_sft_m{m}_{kind}" / "train_losses.csv", encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                tables[m, kind] = list(reader)
                assert list(reader.fieldnames or []) == [
                    "epoch", "step", "pos_steer_loss", "pos_steering_factors", "neg_steering_factors",
                    "example", "pair", "target", "n_tokens", "loss_sum", "answer_tokens", "answer_loss_sum",
                ]  # fmt: skip
    for kind, target_of in (("winning_only", ("matching", "not_matching")), ("losing_only", ("not_matching", "matching"))):
        rows = tables["1.5", kind]
        assert [(row["example"], row["pair"]) for row in rows] == [(str(i), pair) for i in range(4) for pair in ("orig_add", "orig_sub")]
        assert [row["target"] for row in rows] == list(target_of) * 4
        assert [float(row["pos_steering_factors"]) for row in rows] == [1.5, -1.5] * 4
        for row in rows:
            assert float(row["pos_steer_loss"]) == pytest.approx(float(row["loss_sum"]) / int(row["n_tokens"]))
            assert 0 < int(row["answer_tokens"]) < int(row["n_tokens"]) and float(row["answer_loss_sum"]) < float(row["loss_sum"])
    zero = {(row["example"], row["target"]): row["loss_sum"] for row in tables["0.0", "winning_only"]}
    assert len(zero) == 8 and {(row["example"], row["target"]): row["loss_sum"] for row in tables["0.0", "losing_only"]} == zero
    moved = [row["loss_sum"] for row in tables["1.5", "winning_only"]] != [row["loss_sum"] for row in tables["0.0", "winning_only"]]
    assert moved
