"""The released settings tree loads unchanged: every combination of its files, and what cannot be is told with what to write."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import families
import pytest
import yaml

from spilt import cli
from spilt.settings import resolve
from spilt.settings.fields import FitSettings

SETTINGS = Path(__file__).parent / "released_settings.json"  # file -> values; facts, read from the released tree
SHARED = Path(__file__).parents[2] / "shared" / "data" / "released_settings.json"
SHIPPED = Path(__file__).parents[1] / "hparams" / "Steer"
TREE = "experiment_hparams/spilt_experiment"
MODELS = {"gemma-2-9b-it": ("gemma2", 42), "qwen2.5-7b-it": ("qwen2", 28)}
DATASETS = ("psychopathy", "powerseeking", "axbench")
CELLS = families.PAIRS
MODES = ("generate", "apply", "both", "loss")
RELEASED: dict[str, dict[str, Any]] = json.loads(SETTINGS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base dir of the released settings, and of the two models what a dry run reads: config.json."""
    base = tmp_path_factory.mktemp("released")
    for name, values in RELEASED.items():
        write(base, name, values)
    for model, (kind, blocks) in MODELS.items():
        config = {"model_type": kind, "num_hidden_layers": blocks, "hidden_size": 3584, "intermediate_size": 14336}
        folder = base / "models" / model
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 16, "vocab_size": 256000}))
    return base


def write(base: Path, name: str, values: Any) -> None:
    path = base / "hparams" / "Steer" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def dry(base: Path, dataset: str, method: str, form: str, mode: str, model: str = "gemma-2-9b-it", *more: str) -> int:
    words = ["--dataset", dataset, "--method", method, "--model_name", model, "--intervention_method", form, "--mode", mode]
    return cli.main([*words, "--base_dir", str(base), "--dry_run", *more])


def misnamed(dataset: str, model: str, method: str, form: str, mode: str) -> bool:
    """Two files of the released tree have a name that nothing looks for."""
    there = f"{TREE}/{dataset}/{model}/{method}/generate_{method}_{form}_XXXXX.yaml"
    return there in RELEASED and mode in ("generate", "both")


@pytest.mark.few(2)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_combination(tree: Path, dataset: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = refused = 0
    for (method, form), mode in itertools.product(CELLS, MODES):
        code = dry(tree, dataset, method, form, mode, model)
        told = capsys.readouterr()
        if misnamed(dataset, model, method, form, mode):
            assert code == 2 and f"generate_{method}_{form}_XXXXX.yaml" in told.err and "rename" in told.err, told.err
            refused += 1
        elif dataset == "powerseeking" and mode in ("apply", "both"):
            assert code == 2 and "has no 'generation' entry" in told.err and "generation:" in told.err, told.err
            assert "powerseeking: {file_path:" in told.err  # what to write
            refused += 1
        else:
            assert code == 0, f"{method} {form} {mode}: {told.err}"
            loaded += 1
    wanted = {"psychopathy": 40, "powerseeking": 20, "axbench": 40 if model == "gemma-2-9b-it" else 36}[dataset]
    assert (loaded, refused) == (wanted, 40 - wanted)


def test_196_of_240() -> None:
    """The counts of the test above, as contract.md has them."""
    assert 2 * 40 + 2 * 20 + 40 + 36 == 196 and len(RELEASED) == 95  # dataset_format.yaml and a global one besides


def test_the_fixture_is_the_released_tree() -> None:
    if not SHARED.is_file():
        pytest.skip("../shared/data/released_settings.json is not here")
    assert json.loads(SHARED.read_text(encoding="utf-8")) == RELEASED


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_shipped_settings_decide_the_same(tree: Path, dataset: str, model: str) -> None:
    """Every fit of the shipped tree and of the released one resolves to the same settings."""
    compared = 0
    for method, form in CELLS:
        if misnamed(dataset, model, method, form, "generate"):
            continue
        ours = resolve.resolve_fit(SHIPPED.parents[1], model, dataset, method, form).settings
        theirs = resolve.resolve_fit(tree, model, dataset, method, form).settings
        for key in fields(FitSettings):
            # caa's file leaves out what only trained methods use; what no method of the cell reads may differ
            if key.name in used(method, form):
                assert getattr(ours, key.name) == getattr(theirs, key.name), (dataset, model, method, form, key.name)
                compared += 1
    assert compared > 100


def used(method: str, form: str) -> set[str]:
    """The settings that decide the fit of a cell."""
    always = {"layers", "seed", "dtype", "use_chat_template", "system_prompt", "site"}
    if method == "caa":
        return always | {"multiple_choice"}
    loop = {"batch_size", "preference_pairs", "substraction_type", "output_length", "intervention_positions", "dropout", "n_epochs", "lr"}
    loop |= {"gradient_accumulation_steps", "weight_decay", "steering_factors", "max_num_of_examples"}
    own = {"reps": {"loss_type", "beta", "gemma", "simpo_scaler", "label_smoothing"}, "sft": {"pos_loss_weight"}}
    own["spilt"] = {"pos_loss_weight", "neg_loss_weight", "margin_penalty_weight", "margin_threshold", "ref_loss_weight"}
    of_form = {"vector": set(), "lora": {"rank", "intervention_components"}, "local_weight": {"intervention_components"}}[form]
    return always | loop | own[method] | of_form


IGNORED = ("loss_output_dir", "sft_preference_type", "vector_name", "all_labels", "init_vector_path", "ablation_vector_path")


def test_keys_of_the_released_classes_are_known(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, values in RELEASED.items():
        more = dict.fromkeys(IGNORED) if name.endswith("gemma-2-9b-it/sft/generate_sft_vector.yaml") else {}
        write(tmp_path, name, {**values, **more} if isinstance(values, dict) else values)
    assert dry(tmp_path, "psychopathy", "sft", "vector", "generate") == 0
    out = capsys.readouterr().out
    for key in IGNORED:
        assert key in out
    notes = [line for line in out.splitlines() if line.startswith("no effect")]
    assert 3 <= len(notes) <= 20 and len(set(notes)) == len(notes)  # by reason, each once


def test_notes_are_one_line_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    base = families.make_base(tmp_path / "base", train=4, test=2)
    for path in base.path.rglob("generate_*.yaml"):
        path.write_text(path.read_text() + "use_cache: false\nexclude_bos: true\nmax_concepts: 1\n")
    assert cli.main(base.argv("all", "vector", "--mode", "both", "--quiet")) == 0
    told = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(told) == 1 and "3 keys of the settings files have no effect here" in told[0] and "--dry_run" in told[0]


# ---------------------------------------------------------------- mistakes are told at once


def test_all_mistakes_of_a_settings_file_at_once(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=4, test=2)
    path = base.hparams(base.one, "sft", "generate_sft_vector.yaml")
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "learning_rate": 1, "lr": -1, "n_epochs": "two", "dropot": 0.1}))
    assert cli.main(base.argv("sft", "vector", "--mode", "generate")) == 2
    err = capsys.readouterr().err
    for fact in ("'learning_rate'", "'dropot'; did you mean 'dropout'", "lr = -1 is too small", 'n_epochs = "two" is not a whole number'):
        assert fact in err, err
    assert err.count("generate_sft_vector.yaml") == 4
    apply = base.experiment / "apply_config.yaml"
    apply.write_text("generation_params: {max_new_tokns: 5, top_p: 7}\nnum_responses: 0\n")
    assert cli.main(base.argv("sft", "vector", "--mode", "apply")) == 2
    err = capsys.readouterr().err
    for fact in ("'max_new_tokns'; did you mean 'max_new_tokens'", "top_p = 7 is too large", "num_responses = 0 is too small"):
        assert fact in err, err


def test_all_mistakes_of_dataset_format_at_once_and_of_no_other_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=4, test=2)
    path = base.path / "hparams" / "Steer" / "dataset_format.yaml"
    formats = yaml.safe_load(path.read_text())
    formats["train"]["other"] = {"file_path": 3, "what": 1}
    path.write_text(yaml.safe_dump(formats))
    assert cli.main(base.argv("sft", "vector", "--mode", "both", "--dry_run")) == 0
    capsys.readouterr()
    formats["train"]["mine"] = {"file_path": None, "field_names": {"question": "question", "positive": "x"}, "hf_path": None}
    formats["generation"]["mine"] = {"file_path": "data/mine/valid.jsonl", "field_names": {"inpt": "question"}, "n_shots": 2}
    path.write_text(yaml.safe_dump(formats))
    assert cli.main(base.argv("sft", "vector", "--mode", "both")) == 2
    err = capsys.readouterr().err
    for fact in ("train: mine: file_path is None", "unknown field name 'positive'", "generation: mine: unknown field name 'inpt'; did"):
        assert fact in err, err
    assert "other" not in err


def test_all_mistakes_of_the_command_line_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=4, test=2)
    assert cli.main(base.argv("sft", "vector", "--set", "lrr=1", "--set", "n_epoch=2", "--set", "seed")) == 2
    err = capsys.readouterr().err
    assert "lrr" in err and "'n_epoch'; did you mean 'n_epochs'" in err and "wanted key=value" in err
