"""The command line on a tiny base: real runs, plans, exit codes, files exactly as the contract, and every bad input."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from families import CONCEPTS, FORMS, HIDDEN, MIDDLE, PAIRS, Base, intervention, listing, make_base, pairs, write_jsonl, write_yaml

from spilt import cli, verbs
from spilt.artifacts import manifest
from spilt.artifacts.losses import PREFERENCE_TYPES
from spilt.methods import METHODS
from spilt.settings.fields import METHOD_ALIASES as ALIASES

REPO = Path(__file__).parents[1]
TRAINED = [(method, form) for method, form in PAIRS if METHODS[method].loss]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base that nothing may be written to."""
    return make_base(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, subprocess.CompletedProcess[str]]:
    """Every combination fitted and applied by one real run."""
    base = make_base(tmp_path_factory.mktemp("full"))
    return base, process(base.argv("all", "all", "--mode", "both", "--multipliers", "1", "0.2", "-2"))


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return make_base(tmp_path / "base")


def process(argv: list[str], *options: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """run_spilt.py as a user starts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, *options, str(REPO / "run_spilt.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=env)


def vector_path(base: Base, method: str, form: str, dataset: str = "", layer: int = 2) -> Path:
    leaf = "caa_vector" if method == "caa" else f"{method}_{form}"
    return base.path / "vectors" / base.model / method / (dataset or base.one) / leaf / f"layer_{layer}.pt"


def results_path(base: Base, method: str, form: str, m: str) -> Path:
    return base.path / "generation" / base.model / method / base.one / f"{method}_{form}" / m / f"{base.one}_results.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def released_state(form: str, seed: int = 0, **more: Any) -> Any:
    """A stored intervention as the released code writes it."""
    state = intervention(form, seed=seed, **more).state()
    if isinstance(state, dict):
        state["concept_id"] = 0
    return state


def put(path: Path, state: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


# ---------------------------------------------------------------- every combination, by a real run


@pytest.mark.slow
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
    left_out = [(method, form) for method in METHODS for form in FORMS if form not in METHODS[method].forms]
    assert left_out
    for method, form in left_out:
        assert f"left out: {method} {form}: {METHODS[method].why}" in run.stdout
    assert f"{2 * len(PAIRS)} done" in run.stdout


@pytest.mark.slow
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
        run = process(words)
        assert run.returncode == 0, run.stderr
    assert {p.name for p in results_path(base, "spilt", "lora", "m2.0").parents[1].glob("m*")} == {"m-0.1", "m2.0"}
    before = listing(base.path)
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


# ---------------------------------------------------------------- bad requests and bad files: exit 2, one message, nothing written

Spoil = Callable[[Base], list[str]]
BAD: dict[str, tuple[Spoil, list[str]]] = {}


def bad(*needles: str) -> Callable[[Spoil], Spoil]:
    """A case: spoils a base and returns the command line; the message has every one of `needles`."""

    def add(spoil: Spoil) -> Spoil:
        BAD[spoil.__name__] = (spoil, list(needles))
        return spoil

    return add


@bad("dataset", "'mien'", "did you mean 'mine'", "axbench")
def unknown_dataset(base: Base) -> list[str]:
    return base.argv(dataset="mien")


@bad("method", "'sptl'", "did you mean 'spilt'", *METHODS)
def unknown_method(base: Base) -> list[str]:
    return base.argv("sptl")


@bad("model", "'tinny'", "did you mean 'tiny'", "models")
def unknown_model(base: Base) -> list[str]:
    return base.argv(model="tinny")


@bad("intervention_method", "'vectr'", "did you mean 'vector'", *FORMS)
def unknown_intervention(base: Base) -> list[str]:
    return base.argv("sft", "vectr")


@bad("mode", "'aply'", "did you mean 'apply'", *verbs.MODES)
def unknown_mode(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--mode", "aply")


@bad("split", "'tran'", "train", "test", "both")
def unknown_split(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--mode", "loss", "--split", "tran")


@bad("caa + lora", "does not exist", METHODS["caa"].why, "vector")
def impossible_pair(base: Base) -> list[str]:
    return base.argv("caa", "lora")


@bad("generate_sft_vector.yaml", "no hparam file", "copy one and adapt it")
def missing_hparam_file(base: Base) -> list[str]:
    base.hparams(base.one, "sft", "generate_sft_vector.yaml").unlink()
    return base.argv()


@bad("no hparam file", "generate_sft_vector.yaml", "generate_sft_vector.yaml")
def no_hparams_for_the_model(base: Base) -> list[str]:
    (base.path / "models" / base.model).rename(base.path / "models" / "other")
    return base.argv(model="other")


def change(base: Base, **values: Any) -> None:
    path = base.hparams(base.one, "sft", "generate_sft_vector.yaml")
    import yaml

    write_yaml(path, {**yaml.safe_load(path.read_text()), **values})


@bad("generate_sft_vector.yaml", "'n_epoch'", "did you mean 'n_epochs'")
def unknown_yaml_key(base: Base) -> list[str]:
    change(base, n_epoch=3)
    return base.argv()


@bad("generate_sft_vector.yaml", "lr", "fast", "not a number")
def wrong_type(base: Base) -> list[str]:
    change(base, lr="fast")
    return base.argv()


@bad("layer 9", "5 blocks", "layers")
def layer_beyond_the_model(base: Base) -> list[str]:
    change(base, layers=[9])
    return base.argv("sft", "vector", "--mode", "generate")


@bad("--set", "'lrr'", "did you mean 'lr'")
def unknown_setting(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--set", "lrr=1")


@bad("train.jsonl", "does not exist", "file_path")
def missing_data_file(base: Base) -> list[str]:
    base.data(base.one, "train").unlink()
    return base.argv()


@bad("train.jsonl", "line 1", "'matching'", "question", "answer")
def missing_column(base: Base) -> list[str]:
    write_jsonl(base.data(base.one, "train"), [{"question": "a", "answer": "b", "not_matching": "c"}])
    return base.argv()


@bad("train.jsonl", "no rows")
def empty_file(base: Base) -> list[str]:
    base.data(base.one, "train").write_text("")
    return base.argv()


@bad("train.jsonl", "line 17", "question, matching, not_matching")
def broken_line_17(base: Base) -> list[str]:
    lines = base.data(base.one, "train").read_text().splitlines()
    lines[16] = lines[16][:-3]
    base.data(base.one, "train").write_text("\n".join(lines) + "\n")
    return base.argv()


@bad("valid.jsonl", "line 2", "question")
def broken_prompts_before_anything_is_fitted(base: Base) -> list[str]:
    path = base.data(base.one, "valid")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    return base.argv()


@bad("line 3", "empty answer", "not_matching")
def empty_answer(base: Base) -> list[str]:
    rows = pairs(4)
    rows[2]["not_matching"] = " "
    write_jsonl(base.data(base.one, "train"), rows)
    return base.argv()


@bad("'../tiny'", "..")
def model_name_that_climbs(base: Base) -> list[str]:
    return base.argv(model="../tiny")


@bad("'../models/tiny'", "..")
def model_name_that_climbs_to_a_model(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--mode", "apply", model="../models/tiny")


@bad("--multipliers", "'much'", "not a number")
def multiplier_that_is_no_number(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--multipliers", "much")


@bad("--multipliers", "nan")
def multiplier_nan(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--multipliers", "nan")


@bad("--multipliers", "inf")
def multiplier_minus_infinity(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--multipliers", "-inf")


@bad("--base_dir", "nowhere", "no such folder")
def base_dir_that_is_not_there(base: Base) -> list[str]:
    return [*base.argv(), "--base_dir", str(base.path / "nowhere")]


@bad("--device", "cuda:77", "cpu")
def device_that_is_not_there(base: Base) -> list[str]:
    return [*base.argv(), "--device", "cuda:77"]


@bad("models", "cannot be loaded")
def broken_checkpoint(base: Base) -> list[str]:
    (base.path / "models" / base.model / "config.json").write_text("{")
    return base.argv()


@bad("--concepts", "mine", "no concepts")
def concepts_of_a_dataset_without(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--concepts", "1")


@bad("concept", "'7'", "0, 1, 3")
def unknown_concept(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--concepts", "7", dataset=base.many)


def stored(base: Base, form: str, state: Any) -> list[str]:
    put(vector_path(base, "sft", form), state)
    return base.argv("sft", form, "--mode", "apply")


@bad("layer_2.pt", "[31]", "[32]")
def vector_of_a_wrong_shape(base: Base) -> list[str]:
    return stored(base, "vector", torch.ones(31))


@bad("layer_2.pt", "lora_B", "[4, 31]", "[4, 32]")
def lora_of_a_wrong_shape(base: Base) -> list[str]:
    return stored(base, "lora", {**released_state("lora"), "lora_B": torch.ones(4, 31)})


@bad("layer_2.pt", "r = 8", "[48, 4]")
def lora_of_a_wrong_rank(base: Base) -> list[str]:
    return stored(base, "lora", {**released_state("lora"), "r": 8})


@bad("layer_2.pt", "weight", "[32, 32]", "[48, 32]", "mlp_mid")
def local_weight_of_another_read_point(base: Base) -> list[str]:
    return stored(base, "local_weight", {**released_state("local_weight"), "weight": torch.ones(32, 32)})


@bad("layer_2.pt", "bias", "missing")
def local_weight_without_bias(base: Base) -> list[str]:
    return stored(base, "local_weight", {k: v for k, v in released_state("local_weight").items() if k != "bias"})


@bad("layer_2.pt", "lora", "tensor of shape [32]", "--intervention_method vector")
def vector_where_a_lora_is_wanted(base: Base) -> list[str]:
    return stored(base, "lora", torch.ones(32))


@bad("layer_2.pt", "NaN")
def vector_with_nan(base: Base) -> list[str]:
    return stored(base, "vector", torch.tensor([float("nan"), *[1.0] * 31]))


@bad("layer_2.pt", "infinite")
def local_weight_with_infinity(base: Base) -> list[str]:
    return stored(base, "local_weight", {**released_state("local_weight"), "bias": torch.full((32,), float("inf"))})


@bad("layer_2.pt", "dtype", "int64")
def vector_of_whole_numbers(base: Base) -> list[str]:
    return stored(base, "vector", torch.ones(32, dtype=torch.long))


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@bad("layer_2.pt", "refused", "not a plain tensor file", "posix.system")
def vector_that_is_a_malicious_pickle(base: Base) -> list[str]:
    path = vector_path(base, "sft", "vector")
    path.parent.mkdir(parents=True)
    torch.save({"weight": Malicious()}, path)
    return base.argv("sft", "vector", "--mode", "apply")


@bad("layer_2.pt")
def vector_that_is_a_bare_malicious_pickle(base: Base) -> list[str]:
    path = vector_path(base, "sft", "vector")
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Malicious()))
    return base.argv("sft", "vector", "--mode", "apply")


@bad("layer_2.pt", "cannot be read")
def vector_cut_short(base: Base) -> list[str]:
    argv = stored(base, "local_weight", released_state("local_weight"))
    path = vector_path(base, "sft", "local_weight")
    path.write_bytes(path.read_bytes()[:-2000])
    return argv


@bad("layer_2.pt", "cannot be read")
def vector_of_no_bytes(base: Base) -> list[str]:
    argv = stored(base, "vector", torch.ones(32))
    vector_path(base, "sft", "vector").write_bytes(b"")
    return argv


@pytest.mark.parametrize("case", BAD)
def test_bad_input(base: Base, case: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 2; the message names fact, value and way out; no traceback; the tree is as it was."""
    spoil, needles = BAD[case]
    argv = spoil(base)
    monkeypatch.chdir(base.path)  # where a malicious file would leave its mark
    before = listing(base.path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    assert [needle for needle in needles if needle not in error] == [], error
    assert listing(base.path) == before


@pytest.mark.parametrize("argv", [[], ["--dataset", "mine"], ["--nonsense"], ["--limit", "0"], ["--limit", "x"]])
def test_bad_flags_are_2(clean: Base, argv: list[str], capsys: Any) -> None:
    assert cli.main([*clean.argv(), *argv] if argv and argv[0] in ("--limit", "--nonsense") else argv) == 2
    error = capsys.readouterr().err
    assert "usage" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_real_process_exits_with_the_code(clean: Base) -> None:
    before = listing(clean.path)
    for argv, code in ((clean.argv("sptl"), 2), (clean.argv("sft", "vector", "--mode", "apply"), 1), (["--version"], 0)):
        run = process(argv)
        assert run.returncode == code, run.stderr
        assert "Traceback" not in run.stderr
    assert listing(clean.path) == before


# ---------------------------------------------------------------- missing, changed, forced


def test_apply_without_vectors_is_skipped_and_1(base: Base, capsys: Any, caplog: Any) -> None:
    before = listing(base.path)
    with caplog.at_level(logging.WARNING):
        assert cli.main(base.argv("all", "all", "--mode", "apply")) == 1
    assert f"{len(PAIRS)} skipped" in capsys.readouterr().out
    assert all(any(str(vector_path(base, m, f)) in r.getMessage() for r in caplog.records) for m, f in PAIRS)
    assert listing(base.path) == before


def test_apply_skips_beside_what_can_run(base: Base, capsys: Any, caplog: Any) -> None:
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    assert cli.main(base.argv("sft", "all", "--mode", "apply")) == 0
    out = capsys.readouterr().out
    assert "1 done" in out and "2 skipped" in out
    assert results_path(base, "sft", "lora", "m1.0").is_file() and not results_path(base, "sft", "vector", "m1.0").exists()


def test_a_failing_cell_does_not_stop_the_others(base: Base, capsys: Any) -> None:
    put(vector_path(base, "sft", "vector"), torch.ones(31))
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    assert cli.main(base.argv("sft", "all", "--mode", "apply")) == 1
    captured = capsys.readouterr()
    assert "1 failed" in captured.out and "1 done" in captured.out and "[31]" in captured.err
    assert results_path(base, "sft", "lora", "m1.0").is_file()


def test_changed_settings_and_data_are_done_again(base: Base, capsys: Any) -> None:
    argv = base.argv("sft", "vector", "--mode", "generate")
    path = vector_path(base, "sft", "vector")

    def run(*more: str) -> tuple[str, bytes]:
        assert cli.main([*argv, *more]) == 0
        return ("already done" if "1 already done" in capsys.readouterr().out else "done"), path.read_bytes()

    first = run()
    assert first[0] == "done" and run() == ("already done", first[1])
    assert run("--force") == ("done", first[1])  # the same bytes again
    changed = run("--set", "lr=0.5")
    assert changed[0] == "done" and changed[1] != first[1]
    seeded = run("--seed", "9")
    assert seeded[0] == "done" and seeded[1] != changed[1]
    assert run("--seed", "9")[0] == "already done"
    assert run("--seed", "9", "--batch_size", "3")[0] == "already done"  # no part of the result
    limited = run("--seed", "9", "--limit", "5")
    assert limited[0] == "done" and limited[1] != seeded[1]
    write_jsonl(base.data(base.one, "train"), pairs(19))
    assert run("--seed", "9", "--limit", "5")[0] == "done"
    path.write_bytes(path.read_bytes()[:-1])  # damaged
    assert run("--seed", "9", "--limit", "5") == ("done", limited[1])


def test_texts_follow_their_vector(base: Base, capsys: Any) -> None:
    """A new vector makes the texts of the old one stale."""
    path, argv = vector_path(base, "sft", "vector"), base.argv("sft", "vector", "--mode", "apply", "--multipliers", "8")
    texts = []
    for seed in (1, 2):
        put(path, released_state("vector", seed))
        assert cli.main(argv) == 0
        texts.append(results_path(base, "sft", "vector", "m8.0").read_bytes())
    assert texts[0] != texts[1]
    assert "1 done" in capsys.readouterr().out


# ---------------------------------------------------------------- vectors of the released code


@pytest.mark.parametrize("form", FORMS)
def test_released_vectors_are_applied_and_kept(base: Base, form: str, capsys: Any, caplog: Any) -> None:
    """No manifest beside them: used by --mode apply, and not fitted over by --mode both."""
    path = vector_path(base, "sft", form)
    put(path, released_state(form, scale=1.0))
    stored_bytes = path.read_bytes()
    argv = base.argv("sft", form, "--multipliers", "0", "3", "-3")
    assert cli.main([*argv, "--mode", "apply"]) == 0
    texts = {m: [row["pred"] for row in read_json(results_path(base, "sft", form, m))] for m in ("m0.0", "m3.0", "m-3.0")}
    assert len({json.dumps(text) for text in texts.values()}) == 3
    assert cli.main([*argv, "--mode", "both"]) == 0
    assert path.read_bytes() == stored_bytes and not manifest.manifest_path(path).exists()
    assert cli.main([*argv, "--mode", "both", "--force"]) == 0
    assert path.read_bytes() != stored_bytes and manifest.manifest_path(path).exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_several_concepts_is_read_by_concept_id(base: Base, form: str) -> None:
    """[n, D], or a dict of dicts: the concept named in the YAML is taken, and equals a file of that concept alone."""
    states = [released_state(form, seed, scale=1.0) for seed in (1, 2, 3)]
    several = torch.stack(states) if form == "vector" else {i: {**state, "concept_id": i} for i, state in enumerate(states)}
    argv = base.argv("sft", form, "--mode", "apply", "--multipliers", "3")
    texts = []
    for state, more in ((several, ["--set", "concept_id=2"]), (states[2], []), (several, ["--set", "concept_id=0"])):
        put(vector_path(base, "sft", form), state)
        assert cli.main([*argv, *more]) == 0
        texts.append([row["pred"] for row in read_json(results_path(base, "sft", form, "m3.0"))])
    assert texts[0] == texts[1] != texts[2]


def test_a_concept_that_a_file_lacks_is_named(base: Base, capsys: Any) -> None:
    put(vector_path(base, "sft", "vector"), torch.ones(3, HIDDEN))
    before = listing(base.path)
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--set", "concept_id=5")) == 2
    assert "3 concepts" in (error := capsys.readouterr().err) and "concept_id 5" in error
    assert listing(base.path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vector", "lora_attn", "local_weight_mlp_mid"])
def test_released_texts_through_the_command_line(tmp_path: Path, name: str) -> None:
    """The released code's own files in, its greedy texts out."""
    want = golden.numbers("generations.json")
    form = next(form for form in FORMS if name.startswith(form))
    shutil.copytree(golden.GOLDEN / "tiny-gemma2", tmp_path / "models" / "tiny")
    base = Base(tmp_path, layer=golden.LAYER)
    write_jsonl(base.data(base.one, "valid"), [{"input": entry["input"]} for entry in want[f"psychopathy/{name}/m0.0"]])
    write_yaml(
        tmp_path / "hparams" / "Steer" / "dataset_format.yaml", {"generation": {base.one: {"file_path": f"data/{base.one}/valid.jsonl"}}}
    )
    params = {"max_new_tokens": 24, "do_sample": False}
    apply = {"layers": [3], "torch_dtype": "float32", "generation_params": params}
    write_yaml(base.hparams(base.one, "spilt", "apply_spilt.yaml"), apply)
    path = vector_path(base, "spilt", form, layer=3)
    path.parent.mkdir(parents=True)
    shutil.copy(golden.NUMBERS / "states" / name / "layer_3.pt", path)
    assert cli.main(base.argv("spilt", form, "--mode", "apply", "--multipliers", "0", "1", "4")) == 0
    for m in ("m0.0", "m1.0", "m4.0"):
        found = read_json(results_path(base, "spilt", form, m))
        assert [row["pred"] for row in found] == [[entry["text"]] for entry in want[f"psychopathy/{name}/{m}"]]
        assert [row["complete_output"] for row in found] == [[entry["complete"]] for entry in want[f"psychopathy/{name}/{m}"]]


# ---------------------------------------------------------------- concepts (axbench)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_concepts(base: Base, form: str, capsys: Any) -> None:
    """One folder of vectors per concept, one file of texts for all; negative examples (id < 0) left out."""
    argv = base.argv("sft", form, "--multipliers", "1", dataset=base.many)
    assert cli.main(argv) == 0
    for concept, text in CONCEPTS.items():
        path = vector_path(base, "sft", form, f"{base.many}_concept_{concept}")
        state = torch.load(path, weights_only=True)
        assert form == "vector" or state["concept_id"] == concept
        metadata = json.loads(path.with_name("metadata_layer_2.jsonl").read_text())
        assert (metadata["concept_id"], metadata["concept"]) == (concept, text)
    folder = base.path / "vectors" / base.model / "sft"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{base.many}_concept_{c}" for c in CONCEPTS)
    told = base.path / "generation" / base.model / "sft" / base.many / f"sft_{form}"
    found = read_json(told / "all_generation_results_m1.0.json")
    assert [list(part) for part in found] == [["concept_id", "concept_name", "generated_results", "eval_data", "multiplier"]] * 3
    assert [(part["concept_id"], part["concept_name"], part["multiplier"]) for part in found] == [(c, t, 1.0) for c, t in CONCEPTS.items()]
    for part, text in zip(found, CONCEPTS.values(), strict=True):
        assert [row["input"] for row in part["generated_results"]] == [row["question"] for row in pairs(2, f"{text} ")]
        assert len(part["eval_data"]) == 2 and all(extra["category"] == "positive" for extra in part["eval_data"])
    capsys.readouterr()
    before = listing(base.path)
    assert cli.main([*argv, "--concepts", "1", "3"]) == 0  # fitted before; the file holds the concepts of the request
    out = capsys.readouterr().out
    assert "2 already done" in out and "1 done" in out
    assert [part["concept_id"] for part in read_json(told / "all_generation_results_m1.0.json")] == [1, 3]
    vectors = {name: value for name, value in listing(base.path).items() if name.startswith("vectors")}
    assert vectors == {name: value for name, value in before.items() if name.startswith("vectors")}


def test_released_files_of_several_concepts_serve_each_concept(base: Base) -> None:
    """Per-concept folders that hold the released all-concepts file: each concept takes its own row."""
    states = torch.stack([released_state("vector", seed, scale=1.0) for seed in range(4)])
    for concept in CONCEPTS:
        put(vector_path(base, "sft", "vector", f"{base.many}_concept_{concept}"), states)
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--multipliers", "3", dataset=base.many)) == 0
    told = base.path / "generation" / base.model / "sft" / base.many / "sft_vector" / "all_generation_results_m3.0.json"
    together = [[row["pred"] for row in part["generated_results"]] for part in read_json(told)]
    for concept in CONCEPTS:
        put(vector_path(base, "sft", "vector", f"{base.many}_concept_{concept}"), states[concept])
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--multipliers", "3", dataset=base.many)) == 0
    assert together == [[row["pred"] for row in part["generated_results"]] for part in read_json(told)]


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
