"""The settings layer: the shipped tree is the table, the layers lie in order, and a wrong file is one clear message."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    load_yaml,
    parse_overrides,
    resolve_fit,
    resolve_generate,
    resolve_measure,
    verbs_of,
)
from spilt.settings.keys import IGNORED_PARAMS, KNOWN, PARAMS, SECTIONS

REPOSITORY = Path(__file__).resolve().parent.parent
GEMMA, QWEN = "gemma-2-9b-it", "qwen2.5-7b-it"


def table():  # tools/ is no package: loaded from its file
    spec = importlib.util.spec_from_file_location("hparams_table", REPOSITORY / "tools/hparams_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = table()
CELLS = [(d, m, method, form) for d in TABLE.DATASETS for m in TABLE.LAYERS for method, forms in TABLE.FORMS.items() for form in forms]


class Tree:
    """A base_dir with the files of one cell: model `m`, dataset `d`, method spilt, form lora."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / ROOT
        self.cell = "d/m/spilt/generate_spilt_lora.yaml"

    def put(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def fit(self, text: str | None = None, **overrides: object) -> FitSettings:
        if text is not None:
            self.put(self.cell, text)
        return resolve_fit(self.base, "m", "d", "spilt", "lora", overrides).settings


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


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


# --- values


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("lr: abc", 'lr = "abc" is not a number'),
        ("lr: 0", "lr = 0 is too small; wanted more than 0"),
        ("lr: true", "lr = True is not a number"),
        ("lr: [1]", r"lr = \[1\] is not a number"),
        ("lr: .inf", "line 2: .inf is not a finite number"),
        ("lr: 1e999", 'lr = "1e999" is not a finite number'),
        ("seed: 1.5", "seed = 1.5 is not a whole number"),
        ("seed: 10000000000000000", "line 2: the number 10000000000000000 is beyond"),
        ("batch_size: yes", "batch_size = True is not a whole number"),
        ("batch_size: 0", "batch_size = 0 is too small; wanted at least 1"),
        ("rank: 0", "rank = 0 is too small"),
        ("dropout: 1", "dropout = 1 is too large; wanted less than 1"),
        ("dropout: -0.1", "dropout = -0.1 is too small; wanted at least 0"),
        ("layers: [-1]", r"layers = \[-1\] is too small; wanted at least 0"),
        ("layers: [1, 1]", "names an entry twice"),
        ("layers: []", "layers = .* is empty"),
        ("steering_factors: []", "steering_factors = .* is empty"),
        ("preference_pairs: [orig_ad]", "unknown preference pair 'orig_ad'; did you mean 'orig_add'.* have: orig_add, orig_sub"),
        ("torch_dtype: bfloat17", "unknown dtype 'bfloat17'; did you mean 'bfloat16'"),
        ("intervention_components: mlp_out", "have: attn, block, mlp, mlp_mid"),
        ("intervention_positions: f0", "wanted all, all_prompt, all_generation"),
        ("use_chat_template: 1", "is neither true nor false"),
        ("system_prompt: 3", "is not text"),
        ("substraction_type: null_it_out", "needs a vector to remove"),
        ("concept_id: {a: 1}", "is not a whole number"),
        ("alg_name: 3", "method = 3 is not text"),
    ],
)
def test_wrong_values(tree: Tree, line: str, wanted: str) -> None:
    text = line if line.startswith("layers") else f"layers: [3]\n{line}"
    with pytest.raises(UserError, match=wanted) as error:
        tree.fit(text)
    assert str(tree.root / tree.cell) in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-2", 0.01), ("1E-2", 0.01), ("'0.01'", 0.01), ("+1e-2", 0.01), (".01", 0.01), ("1", 1.0), ("1.e-2", 0.01)]
)
def test_numbers_that_yaml_takes_for_text(tree: Tree, text: str, value: float) -> None:
    s = tree.fit(f"layers: [3]\nlr: {text}\nsteering_factors: [{text}, 2e0]")
    assert (s.lr, s.steering_factors) == (value, (value, 2.0)) and isinstance(s.lr, float)


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(UserError, match="rank = 0"):
        FitSettings("spilt", "lora", (3,), rank=0)
    with pytest.raises(UserError, match="layers"):
        FitSettings("spilt", "lora", ())
    made = FitSettings("spilt", "vector", (3,), steering_factors=[1, 2])
    assert made.steering_factors == (1.0, 2.0) and hash(made) == hash(FitSettings(**made.as_dict() | {"layers": 3}))


def test_overrides() -> None:
    got = parse_overrides(
        [
            "lr=1e-3",
            "layers=1, 2",
            "steering_factors=[1]",
            "system_prompt=You: a = b",
            "max_num_of_examples=null",
            "preference_pairs=orig_add",
        ]
    )
    assert got == {
        "lr": "1e-3", "layers": [1, 2], "steering_factors": [1], "system_prompt": "You: a = b",
        "max_num_of_examples": None, "preference_pairs": ["orig_add"],
    }  # fmt: skip
    assert parse_overrides(["concepts_id=1", "seed=1", "seed=2"]) == {"concept_id": 1, "seed": 2}
    for item, wanted in {
        "lrr=1": "unknown key 'lrr'; did you mean 'lr'",
        "lr": "wanted key=value",
        "=1": "wanted key=value",
        "wandb=1": "wandb has no effect",
        "lr.x=1": "lr has no entries",
        "generation_params.topp=1": "did you mean 'top_p'",
        "method=sft": "is chosen with --method",
        "layers=[1": "broken YAML",
        "seed=&a [*a]": "contains itself",
    }.items():
        with pytest.raises(UserError, match=wanted):
            parse_overrides([item])
    with pytest.raises(UserError, match="command line: unknown hparam key 'lrr'"):
        resolve_fit(REPOSITORY, QWEN, "axbench", "sft", "lora", {"lrr": 1})
    with pytest.raises(UserError, match="command line: lr = "):
        resolve_fit(REPOSITORY, QWEN, "axbench", "sft", "lora", {"lr": "x"})


# --- files


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1", "holds a list"),
        ("3", "holds a whole number"),
        ("a: [", "broken YAML"),
        ("a: 1\n\tb: 2", "line 2: broken YAML"),
        ("a: 1\n---\nb: 2", "broken YAML"),
        ("a: \x00", "broken YAML"),
        ("a: &x [*x]", "contains itself"),
        ("a: &a [1]\nb: [" + "*a," * 9 + "1]", "line 2: more than 8 aliases"),
        ("[" * 100_000, "nested deeper"),
        ("a: " + "{a: " * 100_000, "nested deeper"),
        ("1: 2", "the key '1' is not a word"),
        ("no: 2", "the key 'no' is not a word"),
        ("<<: {1: 2}", "is not a word"),
        ("? [1]\n: 2", "is not a word"),
        ("a: !!python/object/apply:os.system [x]", "tag .* is not allowed"),
        ("a: !!set {b}", "tag !!set is not allowed"),
        ("a: !!bool perhaps", "cannot be read"),
        ("a: 0x_", "cannot be read"),
        ("a: " + "9" * 5000, "is beyond"),
        ("a: -.inf", "not a finite number"),
        ("a: " + "x" * 1_000_000, "more than 1,000,000 bytes"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=wanted) as error:
        load_yaml(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < len(str(path)) + 200


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    for path, wanted in ((tmp_path / "b.yaml", "no such file"), (tmp_path, "is a folder"), (tmp_path / "a.yaml", "byte 3 is not UTF-8")):
        with pytest.raises(UserError, match=wanted):
            load_yaml(path)


def test_load_yaml_gives_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {x: 1, y: [1.5, true, null]}\nb: {<<: *a, x: 2}\nwhen: 2024-13-45\nlr: 1e-2\n")
    wanted = {"a": {"x": 1, "y": [1.5, True, None]}, "b": {"x": 2, "y": [1.5, True, None]}, "when": "2024-13-45", "lr": "1e-2"}
    got = load_yaml(path)
    assert got == wanted
    got["a"]["y"].append("changed")  # the next reader has its own copy
    assert load_yaml(path) == wanted


def test_a_key_given_twice_takes_its_last_value_and_is_told(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "spilt.settings"):
        assert tree.fit("layers: [3]\nlr: 1\nseed: 1\nlr: 2\n").lr == 2
        tree.fit()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tree.root / tree.cell}, line 4: the key 'lr' is given twice; the last value is used"
    ]


def test_no_heavy_import() -> None:
    code = "import sys, spilt.settings; print([m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert out.stdout.strip() == "[]"


# --- files as the original has them, written from its format

RELEASED_CONFIG = """\
# Model related
model_name_or_path: ./models/gemma-2-9b-it
torch_dtype: bfloat16
device: cuda:0
use_chat_template: true
system_prompt: ''
use_cache: true
seed: 42
# Data
steer_train_dataset:
  - psychopathy
steer_train_hparam_paths:
  - hparams/Steer/experiment_hparams/spilt_experiment/psychopathy/gemma-2-9b-it/spilt/generate_spilt_vector.yaml
steer_vector_output_dirs:
  - vectors/gemma-2-9b-it/spilt/
save_vectors: true
"""
RELEASED_APPLY_CONFIG = """\
model_name_or_path: ./models/gemma-2-9b-it
torch_dtype: bfloat16
device: cuda:0
use_chat_template: true
system_prompt: ''
seed: 42
apply_steer_hparam_paths: [hparams/Steer/experiment_hparams/spilt_experiment/psychopathy/gemma-2-9b-it/spilt/apply_spilt.yaml]
steer_vector_load_dir: [vectors/gemma-2-9b-it/spilt/psychopathy/spilt_vector]
generation_data: [psychopathy]
generation_data_size: -1
generation_output_dir: generation/
num_responses: 1
steer_from_end_position: false
generate_orig_output: false
vllm_enable: false
generation_params:
  max_new_tokens: 128
  temperature: 1.0
  do_sample: true
"""
RELEASED_FIT = """\
alg_name: spilt
layers: [20]
batch_size: 4
gradient_accumulation_steps: 1
n_epochs: 2
lr: 8e-2
weight_decay: 0.00
low_rank_dimension: 1
intervention_method: vector
intervention_positions: "all"
intervention_positions_dropout: 0.0
intervention_components: mlp_mid
intervention_type: "addition"
concepts_id: 0
topk: 8
max_concepts: 500
max_num_of_examples: null
exclude_bos: true
binarize_dataset: false
train_on_negative: true
preference_pairs: ["orig_add", "orig_sub"]
steering_prompt_type: "blend_in"
substraction_type: "normal"
steering_factors: [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0]
dropout: 0.1
output_length: 512
reference_free: false
label_smoothing: 0.0
pos_loss_weight: 1.0
neg_loss_weight: 0.5
margin_penalty_weight: 8
margin_threshold: 0.3
ref_loss_weight: 0
dropout: 0.1
"""
RELEASED_REPS = """\
alg_name: reps
layers: [20]
multiple_choice: false
batch_size: 2
gradient_accumulation_steps: 6
n_epochs: 12
lr: 0.08
lora_alpha: 32
rank: 4
intervention_method: weight
loss_type: "scaled_simpo"
beta: 1.0
gemma: 0.0
simpo_scaler: 1.0
save_vectors: True
lm_model_name: gpt-4o-mini
temperature: 1.0
wandb_project: x
"""
RELEASED_APPLY = (
    "alg_name: reps\nlayers: [20]\nmultipliers: [1.0]\nconcept_id: 0\nintervention_method: lora\nintervention_components: mlp_mid\n"
)


def test_a_released_tree_loads_unchanged(tree: Tree) -> None:
    tree.put("config.yaml", RELEASED_CONFIG)
    tree.put("apply_config.yaml", RELEASED_APPLY_CONFIG)
    tree.put("d/m/spilt/generate_spilt_vector.yaml", RELEASED_FIT)
    tree.put("d/m/reps/generate_reps_weight.yaml", RELEASED_REPS)
    tree.put("d/m/caa/generate_caa.yaml", "alg_name: caa\nlayers: [20]\nmultiple_choice: false\nsave_vectors: True\n")
    for method in ("spilt", "reps", "caa"):
        tree.put(f"d/m/{method}/apply.yaml", RELEASED_APPLY)
    tree.put("d/m/sft/generate_sft_loss.yaml", RELEASED_FIT.replace("spilt", "sft").replace("batch_size: 4", "batch_size: 1"))
    s = resolve_fit(tree.base, "m", "d", "spilt", "vector").settings
    assert (s.lr, s.margin_penalty_weight, s.margin_threshold, s.concept_id, s.rank) == (0.08, 8.0, 0.3, 0, 1)
    s = resolve_fit(tree.base, "m", "d", "reps", "local_weight").settings
    assert (s.intervention_method, s.lr, s.n_epochs, s.lora_alpha, s.substraction_type) == ("local_weight", 0.08, 12, 32.0, "normal")
    assert resolve_fit(tree.base, "m", "d", "caa", "vector").settings.multiple_choice is False
    for method, form in (("spilt", "vector"), ("reps", "local_weight"), ("caa", "vector")):
        g = resolve_generate(tree.base, "m", "d", method, form).settings
        assert (g.multipliers, g.generation_data_size, g.intervention_method) == ((1.0,), None, form)
        m = resolve_measure(tree.base, "m", "d", method, form).settings
        assert (m.method, m.batch_size, m.layers) == (method, 1, (20,))


# --- whatever is in a file, it resolves or says what is wrong

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["1e-2", "orig_add", "all", "f5+l5", "-1", "vector", "weight", "split", "0x_", "~", "*a", "&a", "!!int", "<<", "="]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6)
NAMES = st.sampled_from([*KNOWN, *KEY_ALIASES, *SECTIONS, *list(IGNORED_KEYS)[:5], "typo"])


def resolve_all(base: Path, overrides: dict[str, object]) -> int:
    done = 0
    for resolve in (resolve_fit, resolve_generate, resolve_measure):
        try:
            json.dumps(resolve(base, "m", "d", "spilt", "lora", overrides).settings.as_dict(), allow_nan=False)
            done += 1
        except UserError as error:
            assert str(error)
    return done


def put_everywhere(tree: Tree, text: str) -> None:
    for name in ("config.yaml", "apply_config.yaml", tree.cell, "d/m/spilt/apply_spilt.yaml", "d/m/sft/generate_sft_loss.yaml"):
        path = tree.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(changes=st.dictionaries(NAMES, VALUES, max_size=3), overrides=st.dictionaries(NAMES, VALUES, max_size=2))
def test_any_values_resolve_or_are_refused(tree: Tree, changes: dict[str, object], overrides: dict[str, object]) -> None:
    put_everywhere(tree, yaml.safe_dump({"layers": [3], **changes}))
    done = resolve_all(tree.base, overrides)
    assert done == 3 or changes or overrides


@FUZZ
@given(
    at=st.integers(0, len(RELEASED_FIT)), length=st.integers(0, 30), piece=st.text(alphabet=st.characters(), max_size=6) | SCALARS.map(str)
)
def test_any_text_resolves_or_is_refused(tree: Tree, at: int, length: int, piece: str) -> None:
    text = RELEASED_FIT.replace("vector", "lora")
    put_everywhere(tree, text[:at] + piece + text[at + length :])
    resolve_all(tree.base, {})


@FUZZ
@given(st.lists(st.tuples(NAMES, st.text(max_size=12) | SCALARS.map(str)), max_size=3))
def test_any_override_is_read_or_refused(tree: Tree, items: list[tuple[str, str]]) -> None:
    put_everywhere(tree, "layers: [3]")
    try:
        overrides = parse_overrides([f"{key}={value}" for key, value in items])
    except UserError:
        return
    resolve_all(tree.base, overrides)


def test_multipliers_may_be_given_by_form(tmp_path: Path) -> None:
    """A vector and a weight update live on different scales: `multipliers: {vector: [...], lora: [...]}`."""
    folder = tmp_path / ROOT / "psychopathy" / "some-model" / "sft"
    folder.mkdir(parents=True)
    (folder / "apply_sft.yaml").write_text("layers: [1]\nmultipliers: {vector: [-8, 8], lora: [1]}\n", encoding="utf-8")

    def found(form: str) -> tuple[float, ...]:
        return resolve_generate(tmp_path, "some-model", "psychopathy", "sft", form).settings.multipliers

    assert found("vector") == (-8.0, 8.0)
    assert found("lora") == (1.0,)
    assert found("local_weight") == (1.0,), "not named there: the default"
    (folder / "apply_sft.yaml").write_text("layers: [1]\nmultipliers: {vektor: [8]}\n", encoding="utf-8")
    with pytest.raises(UserError, match="did you mean 'vector'"):
        found("vector")
