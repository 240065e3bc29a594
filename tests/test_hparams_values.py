"""Settings files as people write them: a wrong one is one clear message, a released one loads unchanged."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hparams_tree import QWEN, REPOSITORY, Tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spilt.errors import UserError
from spilt.settings import (
    IGNORED_KEYS,
    KEY_ALIASES,
    ROOT,
    FitSettings,
    load_yaml,
    parse_overrides,
    resolve_fit,
    resolve_generate,
    resolve_measure,
)
from spilt.settings.keys import KNOWN, SECTIONS

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
@pytest.mark.long
def test_any_values_resolve_or_are_refused(tree: Tree, changes: dict[str, object], overrides: dict[str, object]) -> None:
    put_everywhere(tree, yaml.safe_dump({"layers": [3], **changes}))
    done = resolve_all(tree.base, overrides)
    assert done == 3 or changes or overrides


@FUZZ
@given(
    at=st.integers(0, len(RELEASED_FIT)), length=st.integers(0, 30), piece=st.text(alphabet=st.characters(), max_size=6) | SCALARS.map(str)
)
@pytest.mark.long
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
