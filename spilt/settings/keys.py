"""The names that YAML files may use: settings, other spellings of them, and keys of the released trees that have no effect here."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from spilt.settings.fields import Checked, FitSettings, GenerateSettings, GenerationParams, MeasureSettings

# verb -> its settings, and the section of a YAML file that overrides the file's shared keys for it (command-line words, see glossary)
SETTINGS: dict[str, type[Checked]] = {"fit": FitSettings, "generate": GenerateSettings, "measure": MeasureSettings}
SECTIONS = {"generate": "fit", "apply": "generate", "loss": "measure"}

# Another spelling -> our name. Both in one file is an error unless they agree.
KEY_ALIASES = {
    "alg_name": "method",
    "concepts_id": "concept_id",  # shipped files say it; the released code did not read it
    "low_rank_dimension": "rank",
    "multiplier": "multipliers",
    "torch_dtype": "dtype",
}

_IGNORED = {
    "given on the command line (--model_name, --device, --dataset)": (
        "model_name_or_path model_name model device dataset dataset_name datasets data_dir dataset_path model_parallel"
    ),
    "paths follow from the cell; see the README's list of files": (
        "steer_train_dataset steer_train_hparam_paths steer_vector_output_dirs steer_vector_output_dir steer_vector_load_dir "
        "steer_vector_load_dirs apply_steer_hparam_paths hparam_paths hparam_path hparams_path generation_data generation_output_dir "
        "loss_output_dir results_dir output_dir output_file save_path save_dir dump_dir load_dir log_dir log_path "
        "train_data_path eval_data_path "
        "metadata_path vector_path init_vector_path ablation_vector_path vector_name train_data eval_data"
    ),
    "loss mode measures winning_only and losing_only, both": "sft_preference_type",
    "output_length decides": "max_length max_seq_length",
    "interventions are always stored": "save_vectors overwrite",
    "transformers generates the text": "vllm_enable use_vllm gpu_memory_utilization",
    "the cache of keys and values is always used for generation and never for fitting": "use_cache lm_use_cache",
    "steer_positions says which tokens are steered": "steer_from_end_position steer_at",
    "--dtype / torch_dtype decides": "use_bf16 bf16 fp16",
    "positions start after the template prefix, which holds BOS": "exclude_bos",
    "every intervention adds to the residual stream": "intervention_type steering_intervention_type component steering_component",
    "all answers come from the data set as pairs": (
        "train_on_negative binarize_dataset negative_only use_synergy steering_prompt_type "
        "num_of_examples category ref ref_model reference_model keep_orig_axbench_format"
    ),
    "positions are never dropped at random; see `dropout`": "intervention_positions_dropout",
    "the reference terms follow from loss_type and ref_loss_weight": "reference_free average_log_prob sft_alpha",
    "the data set says how many concepts it has; choose with --concepts": (
        "all_labels max_concepts concept_ids concepts num_concepts concept_path concept_genre concept_name multi_concept"
    ),
    "of SAE features and of other methods of the original, which are not here": (
        "topk latent latent_batch_size latent_model_names latent_eval_datasets sae_path sae_paths sae_id release hook_name trim trims mode "
        "epsilon steer_values adaptor_class adapted_component optimizer "
        "hypernet hypernet_name_or_path num_hidden_layers prompt generate_prompt_params "
        "intervene_on_prompt latent_num_of_examples l1_coeff l2_coeff"
    ),
    "of the optimiser and schedule, which are fixed: AdamW, linear decay without warm-up": (
        "lr_scheduler lr_scheduler_type scheduler warmup_ratio warmup_steps"
    ),
    "of the judge and of AxBench's own evaluation": (
        "lm_model_name lm_model judge_model temperature eval_model evaluators steering_evaluators evaluate rule_path master_data_dir "
        "steering_model_names steering_datasets steering_layers steering_batch_size steering_output_length steering_num_of_examples "
        "run_winrate winrate_split_ratio "
        "winrate_baseline models inference train evaluation run_name"
    ),
    "nothing is sent anywhere; curves and losses lie beside the artifact": (
        "wandb use_wandb wandb_project wandb_name wandb_entity wandb_run_name report_to"
    ),
    "progress is shown unless --quiet": "verbose debug print_loss log_steps logging_steps show_progress",
    "of hosting, which is decided by --device": "num_workers local_rank world_size num_gpus dist",
}
IGNORED_KEYS = {key: reason for reason, keys in _IGNORED.items() for key in keys.split() if key not in SECTIONS}

# The same for the keys inside generation_params.
PARAM_ALIASES = {"max_tokens": "max_new_tokens"}
IGNORED_PARAMS = {
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), "comes with the checkpoint"),
    **dict.fromkeys(("use_cache", "return_dict_in_generate", "output_scores", "output_hidden_states"), "decided by the runner"),
    **dict.fromkeys(("num_return_sequences", "n"), "set num_responses instead"),
    "seed": "set seed outside of generation_params",
}

PARAMS: dict[str, Field[Any]] = {key.name: key for key in fields(GenerationParams)}
FIELDS: dict[str, dict[str, Field[Any]]] = {
    verb: {key.name: key for key in fields(settings)}  # type: ignore[arg-type]
    for verb, settings in SETTINGS.items()
}
KNOWN: dict[str, Field[Any]] = {name: key for verb in FIELDS.values() for name, key in verb.items()}


def verbs_of(key: str) -> tuple[str, ...]:
    """The verbs that use a setting."""
    return tuple(verb for verb, keys in FIELDS.items() if key in keys)
