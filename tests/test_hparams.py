"""The settings layer: the shipped tree is the table, and the layers lie in order."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hparams_tree import QWEN, REPOSITORY, Tree

from spilt.errors import UserError
from spilt.settings import (
    IGNORED_KEYS,
    KEY_ALIASES,
    ROOT,
    FitSettings,
    GenerateSettings,
    GenerationParams,
    MeasureSettings,
    expected_hparam_files,
    hparam_file,
    parse_overrides,
    resolve_fit,
    resolve_generate,
    resolve_measure,
    verbs_of,
)
from spilt.settings.keys import IGNORED_PARAMS, KNOWN, PARAMS, SECTIONS

GEMMA = "gemma-2-9b-it"


def table():  # tools/ is no package: loaded from its file
    spec = importlib.util.spec_from_file_location("hparams_table", REPOSITORY / "tools/hparams_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = table()
CELLS = [(d, m, method, form) for d in TABLE.DATASETS for m in TABLE.LAYERS for method, forms in TABLE.FORMS.items() for form in forms]


# --- the shipped tree


def test_shipped_files_are_those_of_the_table(tmp_path: Path) -> None:
    assert TABLE.drift(REPOSITORY) == []
    models = len(TABLE.DATASETS) * len(TABLE.LAYERS)
    wanted = 3 + models * (sum(map(len, TABLE.FORMS.values())) + len(TABLE.FORMS) + 1)
    assert TABLE.write(tmp_path) == len(list((tmp_path / ROOT).rglob("*.yaml"))) == len(list(TABLE.files())) == wanted > 0


def test_drift_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TABLE.write(tmp_path)
    assert TABLE.main(["--check", "--base_dir", str(tmp_path)]) == 0
    root = tmp_path / ROOT
    (root / "config.yaml").write_text("seed: 1\n")
    (root / "apply_config.yaml").rename(root / "old.yaml")
    assert TABLE.main(["--check", "--base_dir", str(tmp_path)]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["differs", "missing", "not in the table"]


@pytest.mark.parametrize(("dataset", "model", "method", "form"), CELLS)
def test_every_cell_resolves(dataset: str, model: str, method: str, form: str) -> None:
    fit = resolve_fit(REPOSITORY, model, dataset, method, form)
    generate = resolve_generate(REPOSITORY, model, dataset, method, form)
    measure = resolve_measure(REPOSITORY, model, dataset, method, form)
    for got in (fit, generate, measure):
        assert got.settings.layers == (TABLE.LAYERS[model],)
        assert (got.settings.method, got.settings.intervention_method) == (method, form)
        assert (got.settings.dtype, got.settings.seed, got.settings.use_chat_template, got.unused) == ("bfloat16", 42, True, ())
        json.dumps(got.settings.as_dict())
        name = "config.yaml" if got is not generate else "apply_config.yaml"
        assert got.files[0] == REPOSITORY / ROOT / name and all(path.is_file() for path in got.files)
        assert (len(got.files) > 1 and got.files[1].name == "axbench_config.yaml") == (dataset == "axbench")
    assert fit.settings.steering_factors == tuple(TABLE.FACTORS[form])
    assert (generate.settings.multipliers, generate.settings.num_responses) == ((1.0,), 1)
    params = generate.settings.generation_params
    assert (params.max_new_tokens, params.do_sample, params.temperature) == (128, True, 1.0)
    assert (measure.settings.batch_size, measure.settings.preference_pairs) == (1, ("orig_add", "orig_sub"))
    assert measure.settings.substraction_type == "normal"


A, B = "orig_add", "orig_add orig_sub"
# methods.md section 5, by hand: batch, accumulation, epochs, lr, lambda_n, gamma, theta, pairs
SPILT_ROWS = [
    ("psychopathy", GEMMA, "local_weight", 4, 2, 2, 0.01, 0.5, 5, 0.4, A),
    ("psychopathy", GEMMA, "lora", 4, 2, 2, 0.01, 0.5, 5, 0.4, B),
    ("psychopathy", GEMMA, "vector", 4, 1, 2, 0.08, 0.5, 8, 0.3, B),
    ("psychopathy", QWEN, "lora", 4, 2, 1, 0.01, 0.5, 6, 0.4, B),
    ("psychopathy", QWEN, "vector", 4, 1, 2, 0.08, 0.6, 4, 0.5, B),
    ("powerseeking", GEMMA, "lora", 2, 2, 2, 0.01, 0.5, 5, 0.4, A),
    ("powerseeking", GEMMA, "vector", 4, 1, 2, 0.08, 0.5, 5, 0.5, A),
    ("powerseeking", QWEN, "local_weight", 2, 2, 2, 0.01, 0.6, 5, 0.5, A),
    ("powerseeking", QWEN, "lora", 2, 2, 2, 0.01, 0.5, 4, 0.5, B),
    ("axbench", QWEN, "local_weight", 2, 2, 12, 0.04, 0.3, 3.5, 0.6, A),
    ("axbench", GEMMA, "lora", 2, 2, 12, 0.04, 0.5, 5, 0.45, A),
    ("axbench", GEMMA, "vector", 4, 1, 18, 0.08, 0.6, 4, 0.5, A),
    ("axbench", QWEN, "vector", 2, 2, 18, 0.08, 0.6, 6, 0.5, A),
]


@pytest.mark.parametrize("row", SPILT_ROWS, ids=lambda row: "-".join(row[:3]))
def test_released_spilt_settings(row: tuple) -> None:
    dataset, model, form, batch, accumulation, epochs, lr, neg, gamma, theta, pairs = row
    s = resolve_fit(REPOSITORY, model, dataset, "spilt", form).settings
    assert (s.batch_size, s.gradient_accumulation_steps, s.n_epochs, s.lr) == (batch, accumulation, epochs, lr)
    assert (s.pos_loss_weight, s.neg_loss_weight, s.margin_penalty_weight, s.margin_threshold) == (1, neg, gamma, theta)
    assert " ".join(s.preference_pairs) == pairs
    assert (s.rank, s.dropout, s.weight_decay, s.output_length, s.ref_loss_weight, s.hinge) == (4, 0.1, 0, 512, 0, "batch")


@pytest.mark.parametrize(
    ("dataset", "model", "method", "form", "loop"),
    [
        ("psychopathy", GEMMA, "sft", "local_weight", (4, 2, 2, 0.01)),
        ("psychopathy", QWEN, "sft", "lora", (2, 6, 2, 0.01)),
        ("psychopathy", QWEN, "sft", "local_weight", (2, 2, 2, 0.01)),
        ("psychopathy", QWEN, "reps", "lora", (4, 2, 2, 0.01)),
        ("psychopathy", QWEN, "reps", "local_weight", (2, 2, 2, 0.01)),
        ("powerseeking", QWEN, "sft", "lora", (4, 2, 1, 0.01)),
        ("powerseeking", QWEN, "reps", "vector", (4, 1, 2, 0.08)),
        ("powerseeking", QWEN, "reps", "local_weight", (2, 2, 2, 0.01)),
        ("axbench", GEMMA, "reps", "lora", (2, 6, 12, 0.08)),
        ("axbench", QWEN, "reps", "lora", (4, 1, 18, 0.08)),
        ("axbench", QWEN, "sft", "lora", (2, 6, 12, 0.08)),
        ("axbench", GEMMA, "sft", "vector", (4, 1, 18, 0.08)),
    ],
)
def test_released_sft_and_reps_settings(dataset: str, model: str, method: str, form: str, loop: tuple) -> None:
    s = resolve_fit(REPOSITORY, model, dataset, method, form).settings
    assert (s.batch_size, s.gradient_accumulation_steps, s.n_epochs, s.lr) == loop
    assert s.preference_pairs == ("orig_add", "orig_sub")
    if method == "sft":
        weights = (s.pos_loss_weight, s.neg_loss_weight, s.margin_penalty_weight, s.ref_loss_weight, s.substraction_type)
        assert weights == (1, 0, 0, 0, "normal")
    else:
        assert (s.loss_type, s.beta, s.gemma, s.simpo_scaler) == ("scaled_simpo", 1, 0, 1)
        assert s.substraction_type == ("null_it_out" if form == "vector" else "normal")


# --- defaults and layers


def test_missing_keys_take_the_released_defaults(tree: Tree) -> None:
    s = tree.fit("layers: [3]")
    assert (s.method, s.intervention_method, s.layers, s.rank, s.intervention_components) == ("spilt", "lora", (3,), 4, "mlp_mid")
    assert (s.margin_threshold, s.dropout, s.output_length, s.seed, s.site, s.lr) == (0.5, 0.1, 512, 42, "block", 0.01)
    assert s.steering_factors == (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    assert FitSettings("reps", "vector", (3,)).steering_factors == tuple(range(2, 21, 2))


def test_a_later_layer_goes_before_an_earlier_one(tree: Tree) -> None:
    assert tree.fit("layers: [3]").seed == 42
    tree.put("config.yaml", "seed: 1\nsystem_prompt: be brief\ntorch_dtype: float16")
    assert (tree.fit().seed, tree.fit().system_prompt, tree.fit().dtype) == (1, "be brief", "float16")
    tree.put("apply_config.yaml", "seed: 9")
    assert tree.fit("layers: [3]\nseed: 2").seed == 2
    assert tree.fit(seed=3).seed == 3
    assert tree.fit(seed="3", layers="4,5", dtype="fp32", system_prompt="1").as_dict().items() >= {
        "seed": 3, "layers": [4, 5], "dtype": "float32", "system_prompt": "1",
    }.items()  # fmt: skip


def test_axbench_has_its_own_global_file(tree: Tree) -> None:
    tree.put("config.yaml", "seed: 1\nn_epochs: 7")
    tree.put("axbench/axbench_config.yaml", "seed: 2\nnum_responses: 3")
    for dataset, seed in (("axbench", 2), ("d", 1)):
        tree.put(f"{dataset}/m/sft/generate_sft_lora.yaml", "layers: [3]")
        s = resolve_fit(tree.base, "m", dataset, "sft", "lora", {}).settings
        assert (s.seed, s.n_epochs) == (seed, 7)
    tree.put("axbench/m/sft/apply.yaml", "layers: [3]")
    assert resolve_generate(tree.base, "m", "axbench", "sft", "lora").settings.num_responses == 3


def test_an_empty_value_is_not_given_unless_nothing_is_a_meaning(tree: Tree) -> None:
    tree.put("config.yaml", "lr: .5\nmax_num_of_examples: 5\nsystem_prompt: x")
    s = tree.fit("layers: [3]\nlr:\nmax_num_of_examples:\nsystem_prompt:\nsteering_factors: null")
    assert (s.lr, s.max_num_of_examples, s.system_prompt, len(s.steering_factors)) == (0.5, None, "x", 10)
    assert tree.fit("layers: [3]\nmax_num_of_examples: -1").max_num_of_examples is None


@pytest.mark.parametrize("resolve", [resolve_fit, resolve_measure])
def test_overrides_of_another_verb_are_read_and_have_no_effect(tree: Tree, resolve: Any) -> None:
    """`--mode both --set generation_params.max_new_tokens=6`: the fit beside the apply is resolved with it too."""
    tree.put("d/m/spilt/generate_spilt_lora.yaml", "layers: [3]")
    tree.put("d/m/sft/generate_sft_loss.yaml", "layers: [3]")

    def resolved(*words: str) -> Any:
        return resolve(tree.base, "m", "d", "spilt", "lora", parse_overrides(list(words))).settings

    assert resolved("generation_params.max_new_tokens=6", "num_responses=2") == resolved()
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        resolved("generation_params.max_new_tokens=0")


def test_generation_params_are_laid_entry_by_entry(tree: Tree) -> None:
    tree.put("apply_config.yaml", "generation_params:\n  max_new_tokens: 7\n  temperature: 5e-1\n  pad_token_id: 3")
    tree.put("d/m/spilt/apply_spilt.yaml", "layers: [3]\ngeneration_params: {top_p: .9, top_k: null}")
    overrides = parse_overrides(["generation_params.min_p=.1", "generation_params.temperature=.7"])
    got = resolve_generate(tree.base, "m", "d", "spilt", "lora", overrides)
    assert got.settings.generation_params == GenerationParams(max_new_tokens=7, temperature=0.7, top_p=0.9, min_p=0.1)
    assert len(got.unused) == 1 and "generation_params.pad_token_id" in str(got.unused[0])


def test_generation_kwargs() -> None:
    drawn = GenerationParams(top_k=5).as_kwargs()
    assert drawn == {"max_new_tokens": 128, "do_sample": True, "temperature": 1.0, "num_beams": 1, "top_k": 5}
    assert GenerationParams(do_sample=False, temperature=0, top_k=5).as_kwargs() == {
        "max_new_tokens": 128,
        "do_sample": False,
        "num_beams": 1,
    }
    for wrong in ({"num_beams": 2}, {"temperature": 0}, {"top_p": 0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError):
            GenerationParams(**wrong)


def test_layers_of_apply_and_loss_come_from_the_fit_file(tree: Tree) -> None:
    tree.put("d/m/spilt/apply.yaml", "multipliers: [1, 2e0]")
    with pytest.raises(UserError, match="layers is missing"):
        resolve_generate(tree.base, "m", "d", "spilt", "lora")
    tree.put("d/m/sft/generate_sft_loss.yaml", "layers: [1]\nalg_name: sft\nlr: 1")
    assert resolve_measure(tree.base, "m", "d", "spilt", "lora").settings.layers == (1,)
    tree.put(tree.cell, "layers: [5]\noutput_length: 9")
    got = resolve_generate(tree.base, "m", "d", "spilt", "lora").settings
    assert (got.layers, got.multipliers) == ((5,), (1.0, 2.0))
    got = resolve_measure(tree.base, "m", "d", "spilt", "lora").settings
    assert isinstance(got, MeasureSettings) and (got.layers, got.output_length) == ((5,), 512)
    assert resolve_measure(tree.base, "m", "d", "spilt", "lora", {"layers": [7]}).settings.layers == (7,)


# --- names of files and keys


@pytest.mark.parametrize(
    ("method", "form", "verb", "names"),
    [
        ("spilt", "lora", "fit", ["spilt/generate_spilt_lora.yaml"]),
        ("split", "weight", "fit", ["spilt/generate_spilt_local_weight.yaml", "spilt/generate_spilt_weight.yaml"]),
        ("caa", "vector", "fit", ["caa/generate_caa_vector.yaml", "caa/generate_caa.yaml"]),
        ("reps", "lora", "generate", ["reps/apply_reps.yaml", "reps/apply.yaml"]),
        ("reps", "lora", "measure", ["sft/generate_sft_loss.yaml"]),
    ],
)
def test_accepted_file_names(tree: Tree, method: str, form: str, verb: str, names: list[str]) -> None:
    cell = (tree.base, "d", "m", method, form, verb)
    wanted = [tree.root / "d/m" / name for name in names]
    assert expected_hparam_files(*cell) == wanted and hparam_file(*cell) is None
    resolve = {"fit": resolve_fit, "generate": resolve_generate, "measure": resolve_measure}[verb]
    with pytest.raises(UserError) as error:
        resolve(tree.base, "m", "d", method, form)
    assert all(path.name in str(error.value) for path in wanted)
    for path in reversed(wanted):  # the better name wins
        tree.put(f"d/m/{path.parent.name}/{path.name}", "layers: [2]")
        assert hparam_file(*cell) == path
        assert resolve(tree.base, "m", "d", method, form).files[-1] == path


def test_a_missing_file_names_what_exists() -> None:
    with pytest.raises(UserError, match=f"generate_caa_vector.yaml or generate_caa.yaml; .*{GEMMA}, {QWEN}"):
        resolve_fit(REPOSITORY, "gemma", "psychopathy", "caa", "vector")
    with pytest.raises(UserError, match="datasets: axbench, powerseeking, psychopathy"):
        resolve_fit(REPOSITORY, QWEN, "psycho", "caa", "vector")
    with pytest.raises(UserError, match="the folder has: apply_caa.yaml, generate_caa_vector.yaml"):
        resolve_fit(REPOSITORY, QWEN, "axbench", "caa", "lora")
    with pytest.raises(UserError, match="--base_dir"):
        resolve_fit(REPOSITORY / "nowhere", QWEN, "axbench", "caa", "vector")


def test_nothing_is_written(tree: Tree) -> None:
    with pytest.raises(UserError):
        tree.fit()
    assert list(tree.base.iterdir()) == []


def test_sections_override_the_shared_keys(tree: Tree) -> None:
    text = "layers: [3]\nseed: 1\nbatch_size: 2\ngenerate:\n  seed: 2\n  lr: 1e-3\napply:\n  seed: 3\n  num_responses: 4\nloss: {seed: 5}\n"
    for name in (tree.cell, "d/m/spilt/apply_spilt.yaml", "d/m/sft/generate_sft_loss.yaml"):
        tree.put(name, text)
    fit = tree.fit()
    assert (fit.seed, fit.lr, fit.batch_size, fit.layers) == (2, 0.001, 2, (3,))
    generate = resolve_generate(tree.base, "m", "d", "spilt", "lora").settings
    assert isinstance(generate, GenerateSettings) and (generate.seed, generate.num_responses) == (3, 4)
    assert resolve_measure(tree.base, "m", "d", "spilt", "lora").settings.seed == 5
    with pytest.raises(UserError, match="generation_params.yaml|section apply.*unknown hparam key 'num_response'.*'num_responses'"):
        tree.fit(text.replace("num_responses", "num_response"))
    with pytest.raises(UserError, match="the section apply holds a list"):
        tree.fit("layers: [3]\napply: [1]")


def test_other_spellings(tree: Tree) -> None:
    text = "alg_name: split\nlayers: 3\nintervention_method: weight\nconcepts_id: 2\ntorch_dtype: bf16\nlow_rank_dimension: 6\n"
    tree.put("d/m/spilt/generate_spilt_weight.yaml", text)
    s = resolve_fit(tree.base, "m", "d", "spilt", "local_weight").settings
    assert (s.method, s.intervention_method, s.concept_id, s.dtype, s.rank) == ("spilt", "local_weight", 2, "bfloat16", 6)
    with pytest.raises(UserError, match="rank = 4 and low_rank_dimension = 5 are the same setting"):
        tree.fit("layers: [3]\nrank: 4\nlow_rank_dimension: 5")
    assert tree.fit("layers: [3]\nrank: 4\nlow_rank_dimension: 4").rank == 4


def test_the_tables_of_names_do_not_overlap() -> None:
    assert KNOWN and IGNORED_KEYS and not set(KNOWN) & set(IGNORED_KEYS)
    assert set(KEY_ALIASES.values()) <= set(KNOWN) and not set(KEY_ALIASES) & (set(KNOWN) | set(IGNORED_KEYS))
    assert not set(SECTIONS) & (set(KNOWN) | set(IGNORED_KEYS)) and not set(PARAMS) & set(IGNORED_PARAMS)
    assert verbs_of("lr") == ("fit",) and verbs_of("seed") == ("fit", "generate", "measure")
    assert all("read" in key.metadata for cls in (FitSettings, GenerateSettings, MeasureSettings) for key in fields(cls))


def test_an_unknown_key_names_the_file_and_the_nearest(tree: Tree) -> None:
    with pytest.raises(
        UserError, match=r"generate_spilt_lora.yaml: unknown hparam key 'margin_treshold'; did you mean 'margin_threshold'\?"
    ):
        tree.fit("layers: [3]\nmargin_treshold: 1")
    tree.put("config.yaml", "sed: 1")
    with pytest.raises(UserError, match=r"config.yaml: unknown hparam key 'sed'; did you mean 'seed'\?"):
        tree.fit("layers: [3]")


def test_known_keys_without_effect_are_told(tree: Tree) -> None:
    tree.put(tree.cell, "layers: [3]\nwandb_project: x\ntopk: 8\nmax_concepts: 10")
    unused = resolve_fit(tree.base, "m", "d", "spilt", "lora").unused
    assert [note.key for note in unused] == ["wandb_project", "topk", "max_concepts"]


def test_a_file_for_another_method_is_refused_for_fit_and_told_for_apply(tree: Tree) -> None:
    with pytest.raises(UserError, match="is for method 'reps', but its place is that of 'spilt'"):
        tree.fit("layers: [3]\nalg_name: reps")
    with pytest.raises(UserError, match="intervention_method 'vector'"):
        tree.fit("layers: [3]\nintervention_method: vector")
    tree.put("d/m/spilt/apply_spilt.yaml", "layers: [3]\nalg_name: reps\nintervention_method: vector")  # a shipped file did
    got = resolve_generate(tree.base, "m", "d", "spilt", "lora")
    assert (got.settings.method, got.settings.intervention_method) == ("spilt", "lora")
    assert len(got.unused) == 1 and "alg_name = reps" in str(got.unused[0])
