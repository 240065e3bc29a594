"""The paper's own numbers (arXiv 2602.02343 v3), as reference columns. Nothing is computed from them."""

from __future__ import annotations

import re

DATASETS = ("psychopathy", "powerseeking", "axbench")
TABLES = ("main", "tradeoff", "equal", "prompts", "strengths", "train_test", "fits", "averages")  # that `spilt table` makes
MODELS = {"gemma-2-9b-it": "Gemma-2-9B-IT", "qwen2.5-7b-it": "Qwen-2.5-7B-IT"}

# R^2 of the main fits, preference then utility, each in the order of DATASETS; the paper fits no spilt cell
R2 = {
    "gemma-2-9b-it": {
        ("sft", "local_weight"): ((0.97, 0.98, 0.99), (0.98, 0.99, 0.98)),
        ("reps", "local_weight"): ((0.99, 0.99, 0.99), (0.96, 0.99, 0.99)),
        ("sft", "lora"): ((0.92, 0.99, 0.98), (0.98, 0.99, 0.99)),
        ("reps", "lora"): ((0.83, 0.99, 0.99), (0.99, 0.99, 0.99)),
        ("caa", "vector"): ((0.97, 0.99, 0.99), (0.97, 0.99, 0.98)),
        ("sft", "vector"): ((0.93, 0.97, 0.98), (0.99, 0.99, 0.99)),
        ("reps", "vector"): ((0.99, 0.98, 0.95), (0.99, 0.99, 0.99)),
    },
    "qwen2.5-7b-it": {
        ("sft", "local_weight"): ((0.99, 0.99, 0.99), (0.99, 0.99, 0.98)),
        ("reps", "local_weight"): ((0.99, 0.99, 0.99), (0.99, 0.99, 0.97)),
        ("sft", "lora"): ((0.97, 0.99, 0.99), (0.99, 0.99, 0.99)),
        ("reps", "lora"): ((0.94, 0.99, 0.99), (0.98, 0.96, 0.99)),
        ("caa", "vector"): ((0.98, 0.95, 0.98), (0.99, 0.99, 0.97)),
        ("sft", "vector"): ((0.93, 0.97, 0.98), (0.98, 0.99, 0.99)),
        ("reps", "vector"): ((0.97, 0.98, 0.93), (0.99, 0.98, 0.99)),
    },
}

# Main results on generated text: psychopathy accuracy (%), powerseeking score (0-4), axbench concept score and harmonic mean (0-2)
MEASURES = {
    "psychopathy": {"accuracy (%)": 0},
    "powerseeking": {"score (0-4)": 1},
    "axbench": {"concept score (0-2)": 2, "harmonic mean (0-2)": 3},
}
MAIN = {
    "gemma-2-9b-it": {
        ("no steering", ""): (50.00, 1.87, 0.4750, 0.4950),
        ("sft", "local_weight"): (100.00, 3.50, 1.6625, 1.4538),
        ("reps", "local_weight"): (100.00, 3.39, 1.7750, 1.6362),
        ("spilt", "local_weight"): (100.00, 3.59, 1.8500, 1.6225),
        ("sft", "lora"): (100.00, 3.41, 1.7625, 1.5188),
        ("reps", "lora"): (99.00, 3.44, 1.7375, 1.6525),
        ("spilt", "lora"): (100.00, 3.56, 1.7750, 1.6412),
        ("caa", "vector"): (53.00, 2.95, 1.1625, 1.0550),
        ("sft", "vector"): (97.00, 3.30, 1.7000, 1.4487),
        ("reps", "vector"): (98.00, 3.61, 1.7000, 1.5550),
        ("spilt", "vector"): (99.00, 3.62, 1.8500, 1.6475),
    },
    "qwen2.5-7b-it": {
        ("no steering", ""): (50.00, 2.24, 0.4500, 0.4713),
        ("sft", "local_weight"): (97.00, 3.53, 1.5375, 1.1287),
        ("reps", "local_weight"): (96.00, 3.24, 1.6875, 1.4163),
        ("spilt", "local_weight"): (98.00, 3.66, 1.7000, 1.4325),
        ("sft", "lora"): (99.00, 3.05, 1.4875, 1.3175),
        ("reps", "lora"): (100.00, 3.34, 1.4875, 1.4013),
        ("spilt", "lora"): (100.00, 3.59, 1.7375, 1.6362),
        ("caa", "vector"): (55.00, 3.17, 0.9500, 0.9950),
        ("sft", "vector"): (97.00, 3.58, 1.5750, 1.5800),
        ("reps", "vector"): (88.00, 3.63, 1.7375, 1.6412),
        ("spilt", "vector"): (98.00, 3.65, 1.8125, 1.6500),
    },
}


def model_key(model: str) -> str | None:
    """The paper's model that a folder name stands for, or None: qwen2.5-7b-it, Qwen2.5-7B-Instruct, gemma-2-9b-it ..."""
    plain = re.sub(r"[^a-z0-9]", "", model.lower())
    if re.fullmatch(r"(google)?gemma29bit", plain):
        return "gemma-2-9b-it"
    return "qwen2.5-7b-it" if re.fullmatch(r"(qwen)?qwen257b(it|instruct)", plain) else None


def r2(model: str, dataset: str, method: str, intervention: str) -> tuple[float, float] | None:
    """The paper's R^2 of (preference, utility) for this cell, or None where it prints none."""
    found = R2.get(model_key(model) or "", {}).get((method, intervention))
    if found is None or dataset not in DATASETS:
        return None
    at = DATASETS.index(dataset)
    return found[0][at], found[1][at]


def main_results(model: str, dataset: str) -> list[dict[str, object]]:
    """Rows of the paper's main table for this model and dataset; empty for any other model or dataset."""
    measures, key = MEASURES.get(dataset, {}), model_key(model) or ""
    rows = MAIN.get(key, {}) if measures else {}
    return [
        {"model": MODELS[key], "method": method, "intervention": form, **{name: values[at] for name, at in measures.items()}}
        for (method, form), values in rows.items()
    ]
