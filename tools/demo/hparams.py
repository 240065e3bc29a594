"""The demo's hyperparameters: one table, written out as the YAML tree that the tool reads.

Kept in the style of the released files (methods.md); only the numbers are the demo's own. Change them here, then run build.py.
"""

from __future__ import annotations

from pathlib import Path

import yaml

MODEL = "demo-qwen2"
LAYER = 2  # the block whose output is steered, and pushed in training (train.py)
DATASETS = ("psychopathy", "powerseeking", "axbench")
METHODS, FORMS = ("sft", "reps", "spilt"), ("vector", "lora", "local_weight")
FACTORS = {
    "vector": [float(s) for s in range(2, 21, 2)],
    "lora": [round(0.2 * s, 1) for s in range(1, 11)],
    "local_weight": [round(0.2 * s, 1) for s in range(1, 11)],
}

# Strengths at which text is shown: against the trait, none, with it, and so far that the text breaks down.
SHOWN = {"vector": [-10.0, 0.0, 10.0, 40.0], "lora": [-1.0, 0.0, 1.0, 4.0], "local_weight": [-1.0, 0.0, 1.0, 4.0]}
# caa is not trained to any strength: its vector is as long as the difference of means happens to be.
SHOWN_CAA = {"psychopathy": [-100.0, 0.0, 100.0], "powerseeking": [-6.0, 0.0, 6.0, 20.0], "axbench": [0.0, 2.0, 6.0]}

# (dataset, form) -> batch_size, gradient_accumulation_steps, n_epochs, lr
STEPS = {
    ("psychopathy", "vector"): (8, 1, 2, 0.03),
    ("psychopathy", "lora"): (8, 1, 2, 0.015),
    ("psychopathy", "local_weight"): (8, 1, 2, 0.015),
    ("powerseeking", "vector"): (8, 1, 2, 0.03),
    ("powerseeking", "lora"): (8, 1, 2, 0.015),
    ("powerseeking", "local_weight"): (8, 1, 2, 0.015),
    ("axbench", "vector"): (8, 1, 2, 0.03),
    ("axbench", "lora"): (8, 1, 2, 0.03),
    ("axbench", "local_weight"): (8, 1, 2, 0.015),
}


def weights(pos: float, neg: float, penalty: float, threshold: float) -> dict[str, float]:
    return {
        "pos_loss_weight": pos,
        "neg_loss_weight": neg,
        "margin_penalty_weight": penalty,
        "margin_threshold": threshold,
        "ref_loss_weight": 0.0,
    }


LOSS = {
    "sft": weights(1.0, 0.0, 0.0, 0.0),
    "spilt": weights(1.0, 0.5, 5.0, 0.4),
    "reps": {"loss_type": "scaled_simpo", "beta": 1.0, "gemma": 0.0, "simpo_scaler": 1.0, "label_smoothing": 0.0},
}


def fit_file(dataset: str, method: str, form: str) -> dict:
    batch, accumulation, epochs, lr = STEPS[dataset, form]
    return {
        "alg_name": method,
        "layers": [LAYER],
        "intervention_method": form,
        "intervention_components": "mlp_mid",
        "intervention_positions": "all",
        "batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "n_epochs": epochs,
        "lr": lr,
        "weight_decay": 0.0,
        "dropout": 0.1,
        "preference_pairs": ["orig_add", "orig_sub"],
        "steering_factors": FACTORS[form],
        "substraction_type": "null_it_out" if (method, form) == ("reps", "vector") else "normal",
        **LOSS[method],
        **({"rank": 4, "lora_alpha": 32} if form == "lora" else {}),
        "output_length": 512,
        "concept_id": 0,
    }


def tree() -> dict[str, dict]:
    """Every file's content, by its path under hparams/Steer."""
    top = "experiment_hparams/spilt_experiment"
    general = {"torch_dtype": "float32", "seed": 42, "use_chat_template": True, "system_prompt": ""}
    generation = {
        "generation_data_size": None,
        "num_responses": 1,
        "generate_orig_output": False,
        "generation_params": {"max_new_tokens": 24, "do_sample": False},
    }
    files = {
        "dataset_format.yaml": dataset_format(),
        f"{top}/config.yaml": general,
        f"{top}/apply_config.yaml": general | generation,
        f"{top}/axbench/axbench_config.yaml": general | generation,
    }
    for dataset in DATASETS:
        folder = f"{top}/{dataset}/{MODEL}"
        for method in METHODS:
            for form in FORMS:
                files[f"{folder}/{method}/generate_{method}_{form}.yaml"] = fit_file(dataset, method, form)
        files[f"{folder}/caa/generate_caa_vector.yaml"] = {
            "alg_name": "caa",
            "layers": [LAYER],
            "intervention_method": "vector",
            "multiple_choice": False,
        }
        for method in (*METHODS, "caa"):
            shown = SHOWN_CAA[dataset] if method == "caa" else SHOWN
            files[f"{folder}/{method}/apply_{method}.yaml"] = {"alg_name": method, "layers": [LAYER], "multipliers": shown}
        files[f"{folder}/sft/generate_sft_loss.yaml"] = {
            "alg_name": "sft",
            "layers": [LAYER],
            "intervention_positions": "all",
            "batch_size": 1,
            "preference_pairs": ["orig_add", "orig_sub"],
            "substraction_type": "normal",
            "output_length": 512,
        }
    return files


def dataset_format() -> dict:
    suffix = {"psychopathy": "jsonl", "powerseeking": "csv", "axbench": "parquet"}
    names = {
        "psychopathy": ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        "powerseeking": ("question", "matching", "not_matching"),
        "axbench": ("input", "winning_output", "losing_output"),
    }
    concept = {name: name for name in ("output_concept", "concept_id", "concept_genre", "category")}
    out: dict[str, dict] = {"train": {}, "valid": {}, "generation": {}}
    for dataset, (question, matching, not_matching) in names.items():
        pairs = {"question": question, "matching": matching, "not_matching": not_matching}
        prompts = {"input": question, "reference_response": matching}
        for section, fields in (("train", pairs), ("valid", pairs), ("generation", prompts)):
            split = "train" if section == "train" else "test"
            out[section][dataset] = {
                "file_path": f"data/{dataset}/{split}.{suffix[dataset]}",
                "field_names": fields | (concept if dataset == "axbench" else {}),
            } | ({"multi_concept": True} if dataset == "axbench" else {})
    out["neutral"] = {dataset: {"file_path": "data/neutral.jsonl"} for dataset in names}
    return out


def write(folder: Path) -> None:
    for name, content in tree().items():
        path = folder / "Steer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
        path.write_text(f"# emitted by tools/demo/hparams.py; change it there\n{text}", encoding="utf-8")
