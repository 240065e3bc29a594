"""The released settings as one table, and the YAML files that it makes.

`python tools/hparams_table.py --write` writes every shipped file under hparams/Steer/experiment_hparams/spilt_experiment/;
`--check` exits 1 and names the files that differ. To change a released setting, change it here and write.
Source: the released YAML files of arXiv 2602.02343 (EasyEdit run_SPILT); RePS defaults of arXiv 2505.20809.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = Path("hparams/Steer/experiment_hparams/spilt_experiment")
MARK = "emitted by tools/hparams_table.py, change it there"

LAYERS = {"gemma-2-9b-it": 20, "qwen2.5-7b-it": 14}  # 0-based decoder block
DATASETS = ("axbench", "psychopathy", "powerseeking")
FORMS = {"caa": ("vector",)} | dict.fromkeys(("reps", "sft", "spilt"), ("vector", "lora", "local_weight"))

ADD, BOTH = ("orig_add",), ("orig_add", "orig_sub")
GLOBALS = {"torch_dtype": "bfloat16", "seed": 42, "use_chat_template": True, "system_prompt": ""}
GENERATION = {
    "generation_data_size": None,
    "num_responses": 1,
    "generate_orig_output": False,
    "generation_params": {"max_new_tokens": 128, "do_sample": True, "temperature": 1.0},
}
FACTORS = {
    "vector": [float(s) for s in range(2, 21, 2)],
    "lora": [s / 10 for s in range(2, 21, 2)],
    "local_weight": [s / 10 for s in range(2, 21, 2)],
}


class Loop(NamedTuple):
    """Sequence pairs per minibatch, minibatch groups per optimiser step, passes over the data, AdamW's learning rate."""

    batch_size: int
    gradient_accumulation_steps: int
    n_epochs: int
    lr: float


class Loss(NamedTuple):
    """Weights lambda_n and gamma, threshold theta (nats per token) of spilt's loss, and the pairs it is summed over; lambda_p = 1."""

    neg_loss_weight: float
    margin_penalty_weight: float
    margin_threshold: float
    preference_pairs: tuple[str, ...]


G, Q = LAYERS

SPILT = {
    ("psychopathy", G, "local_weight"): (Loop(4, 2, 2, 0.01), Loss(0.5, 5.0, 0.4, ADD)),
    ("psychopathy", G, "lora"): (Loop(4, 2, 2, 0.01), Loss(0.5, 5.0, 0.4, BOTH)),
    ("psychopathy", G, "vector"): (Loop(4, 1, 2, 0.08), Loss(0.5, 8.0, 0.3, BOTH)),
    ("psychopathy", Q, "local_weight"): (Loop(4, 2, 1, 0.01), Loss(0.5, 6.0, 0.4, ADD)),
    ("psychopathy", Q, "lora"): (Loop(4, 2, 1, 0.01), Loss(0.5, 6.0, 0.4, BOTH)),
    ("psychopathy", Q, "vector"): (Loop(4, 1, 2, 0.08), Loss(0.6, 4.0, 0.5, BOTH)),
    ("powerseeking", G, "local_weight"): (Loop(2, 2, 2, 0.01), Loss(0.5, 5.0, 0.4, ADD)),
    ("powerseeking", G, "lora"): (Loop(2, 2, 2, 0.01), Loss(0.5, 5.0, 0.4, ADD)),
    ("powerseeking", G, "vector"): (Loop(4, 1, 2, 0.08), Loss(0.5, 5.0, 0.5, ADD)),
    ("powerseeking", Q, "local_weight"): (Loop(2, 2, 2, 0.01), Loss(0.6, 5.0, 0.5, ADD)),
    ("powerseeking", Q, "lora"): (Loop(2, 2, 2, 0.01), Loss(0.5, 4.0, 0.5, BOTH)),
    ("powerseeking", Q, "vector"): (Loop(4, 1, 2, 0.08), Loss(0.6, 5.0, 0.5, BOTH)),
    ("axbench", G, "local_weight"): (Loop(2, 2, 12, 0.04), Loss(0.3, 3.5, 0.6, ADD)),
    ("axbench", Q, "local_weight"): (Loop(2, 2, 12, 0.04), Loss(0.3, 3.5, 0.6, ADD)),
    ("axbench", G, "lora"): (Loop(2, 2, 12, 0.04), Loss(0.5, 5.0, 0.45, ADD)),
    ("axbench", Q, "lora"): (Loop(2, 2, 12, 0.04), Loss(0.5, 5.0, 0.45, ADD)),
    ("axbench", G, "vector"): (Loop(4, 1, 18, 0.08), Loss(0.6, 4.0, 0.5, ADD)),
    ("axbench", Q, "vector"): (Loop(2, 2, 18, 0.08), Loss(0.6, 6.0, 0.5, ADD)),
}

# sft and reps: the rule, then what differs from it.
PLAIN = {
    ("persona", "vector"): Loop(4, 1, 2, 0.08),
    ("persona", "lora"): Loop(4, 2, 2, 0.01),
    ("persona", "local_weight"): Loop(4, 2, 2, 0.01),
    ("axbench", "vector"): Loop(4, 1, 18, 0.08),
    ("axbench", "lora"): Loop(2, 6, 12, 0.08),
    ("axbench", "local_weight"): Loop(2, 6, 12, 0.08),
}
PLAIN_EXCEPT = {
    ("psychopathy", Q, "sft", "local_weight"): Loop(2, 2, 2, 0.01),
    ("psychopathy", Q, "sft", "lora"): Loop(2, 6, 2, 0.01),
    ("psychopathy", Q, "reps", "local_weight"): Loop(2, 2, 2, 0.01),
    ("powerseeking", Q, "sft", "local_weight"): Loop(2, 2, 2, 0.01),
    ("powerseeking", Q, "sft", "lora"): Loop(4, 2, 1, 0.01),
    ("powerseeking", Q, "reps", "local_weight"): Loop(2, 2, 2, 0.01),
    ("axbench", Q, "reps", "lora"): Loop(4, 1, 18, 0.08),
}


def fit_values(dataset: str, model: str, method: str, form: str) -> dict[str, Any]:
    """The keys of generate_{method}_{form}.yaml."""
    values: dict[str, Any] = {"alg_name": method, "layers": [LAYERS[model]], "intervention_method": form}
    if method == "caa":
        return values | {"multiple_choice": False}
    if form == "vector":
        values["intervention_positions"] = "all"
    else:
        values["intervention_components"] = "mlp_mid"
    if form == "lora":
        values["rank"] = 4
    loss: dict[str, Any]
    if method == "spilt":
        loop, weights = SPILT[dataset, model, form]
        loss = {"pos_loss_weight": 1.0, **weights._asdict(), "ref_loss_weight": 0.0, "substraction_type": "normal"}
    else:
        kind = "axbench" if dataset == "axbench" else "persona"
        loop = PLAIN_EXCEPT.get((dataset, model, method, form)) or PLAIN[kind, form]
        if method == "sft":
            loss = {"pos_loss_weight": 1.0, "neg_loss_weight": 0.0, "margin_penalty_weight": 0.0, "ref_loss_weight": 0.0}
            loss |= {"preference_pairs": BOTH, "substraction_type": "normal"}
        else:
            loss = {"loss_type": "scaled_simpo", "beta": 1.0, "gemma": 0.0, "simpo_scaler": 1.0, "preference_pairs": BOTH}
            loss["substraction_type"] = "null_it_out" if form == "vector" else "normal"
    common = {"weight_decay": 0.0, "dropout": 0.1, "output_length": 512, "steering_factors": FACTORS[form]}
    return values | loop._asdict() | common | loss


def files() -> Iterator[tuple[Path, str]]:
    """Every shipped file: path below ROOT, text."""
    yield Path("config.yaml"), emit("global settings of fit (--mode generate) and measure (--mode loss)", GLOBALS)
    yield Path("apply_config.yaml"), emit("global settings of generate (--mode apply)", GLOBALS | GENERATION)
    yield Path("axbench/axbench_config.yaml"), emit("global settings of axbench, all modes", GLOBALS | GENERATION)
    for dataset in DATASETS:
        for model, layer in LAYERS.items():
            here = f"{dataset}, {model}"
            for method, forms in FORMS.items():
                folder = Path(dataset, model, method)
                for form in forms:
                    title = f"{here}: how {method} fits {'a vector' if form == 'vector' else form}"
                    yield folder / f"generate_{method}_{form}.yaml", emit(title, fit_values(dataset, model, method, form))
                title = f"{here}: how text is produced with what {method} fitted"
                yield folder / f"apply_{method}.yaml", emit(title, {"alg_name": method, "layers": [layer], "multipliers": [1.0]})
            loss = {"alg_name": "sft", "layers": [layer], "intervention_positions": "all", "batch_size": 1, "output_length": 512}
            loss |= {"preference_pairs": BOTH, "substraction_type": "normal"}
            yield Path(dataset, model, "sft/generate_sft_loss.yaml"), emit(f"{here}: how losses are measured, for every method", loss)


def emit(title: str, values: dict[str, Any]) -> str:
    """A short YAML file: a comment line, then one line per key."""
    lines = [f"# {title}; {MARK}"]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {inner}: {scalar(item)}" for inner, item in value.items())]
        else:
            lines.append(f"{key}: {scalar(value)}")
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(scalar, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


def drift(base_dir: Path) -> list[str]:
    """One line per file that is missing, differs, or was emitted once and is no longer in the table."""
    root, wanted = base_dir / ROOT, dict(files())
    out = []
    for path, text in wanted.items():
        file = root / path
        if not file.is_file():
            out.append(f"missing: {file}")
        elif file.read_text(encoding="utf-8") != text:
            out.append(f"differs: {file}")
    for file in sorted(root.rglob("*.yaml")):
        if file.relative_to(root) not in wanted and MARK in file.read_text(encoding="utf-8").partition("\n")[0]:
            out.append(f"not in the table: {file}")
    return out


def write(base_dir: Path) -> int:
    """Write every file; the number written."""
    count = 0
    for path, text in files():
        file = base_dir / ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The released settings as YAML files.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write every shipped file")
    what.add_argument("--check", action="store_true", help="exit 1 if a shipped file differs from the table")
    parser.add_argument("--base_dir", type=Path, default=REPOSITORY, help="folder that holds hparams/ (default: this repository)")
    args = parser.parse_args(argv)
    if args.write:
        print(f"{write(args.base_dir)} files under {args.base_dir / ROOT}")
        return 0
    found = drift(args.base_dir)
    print("\n".join(found) if found else "the shipped files are those of the table")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
