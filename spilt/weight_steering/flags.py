"""The flags of `spilt weights`, once: parser, README and what decides a stage's result are derived from this table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from spilt.baselines import BASELINES
from spilt.errors import UserError
from spilt.settings.fields import ADAPTERS, DTYPE_ALIASES, DTYPES
from spilt.settings.values import Bad, choice, many, number, optional, text, whole
from spilt.weight_steering import personas

STAGES = {
    "data": "both personas answer the questions",
    "adapters": "an adapter is trained on the answers of either side",
    "dw": "dW = theta_pos - theta_neg, and the vectors that are compared with it",
    "calibrate": "the strengths at which each of them disturbs the model equally (KL)",
    "evaluate": "held-out answers and vignettes at these strengths",
    "table": "tables and the picture",
}
RUN = "run"
MODES = ("dw", "bisector", "tau_pos", "tau_neg")
OURS = ("caa", "pca", "probe", "lda", "sft", "reps", "spilt")  # vectors of spilt.methods
PROMPT = "prompt"  # the personas themselves
OTHERS = tuple(name for name, row in BASELINES.items() if row.estimate is not None and not row.neutral and name not in OURS)
METHODS = (*OURS, *OTHERS, PROMPT)  # beside dW


class Flag(NamedTuple):
    """names: first ours, then other spellings; stage: that it is of ('' : of all); decides: a part of what its result is known by."""

    names: tuple[str, ...]
    stage: str
    read: Callable[[Any], Any]
    default: Any
    help: str
    nargs: str | None = None
    decides: bool = True

    @property
    def dest(self) -> str:
        return self.names[0].lstrip("-").replace("-", "_")


def _path(value: Any) -> Path:
    return Path(text(value))


def _yes(value: Any) -> bool:
    return bool(value)


_count, _share = whole(1), number(0, below=1)
_numbers, _words, _layers = many(number()), many(text, distinct=True), many(whole(0), distinct=True)
_mode, _kinds = choice("mode", MODES), many(choice("adapter", ADAPTERS), distinct=True)
_methods = many(choice("method", METHODS), distinct=True)
OFF = "store_true"

FLAGS: tuple[Flag, ...] = (
    Flag(("--behavior", "--behaviour"), "", text, None, f"{', '.join(personas.shipped())}, or the name of your own", decides=False),
    Flag(
        ("--model", "--model-id", "--model_name"),
        "",
        text,
        None,
        "a checkpoint: a folder under models/, a path, or a hub id",
        decides=False,
    ),
    Flag(("--base_dir", "--out"), "", _path, Path("."), "results go to {base_dir}/weights/{model}/{behavior}/", decides=False),
    Flag(("--device",), "", text, None, "default: cuda:0 where there is one, else cpu", decides=False),
    Flag(("--dtype",), "", choice("dtype", DTYPES, DTYPE_ALIASES), "float32", "of the model"),
    Flag(("--seed",), "", whole(0), 0, "of answers, first values, order, validation rows and resamples"),
    Flag(("--batch-size", "--batch_size"), "", optional(_count), None, "texts side by side; changes no result", decides=False),
    Flag(("--checkpoint_seconds",), "", number(0), 60.0, "an adapter under way is saved after this long", decides=False),
    Flag(("--force",), "", _yes, False, "make anew what is there", OFF, decides=False),
    # data
    Flag(("--personas",), "data", optional(_path), None, "a behaviour of your own (YAML: template, pairs, intent)"),
    Flag(("--questions",), "data", optional(_path), None, "questions of your own, JSON or YAML rows of cat, user_msg and perhaps split"),
    Flag(("--n-topics", "--n_topics"), "data", _count, 20, "training questions"),
    Flag(("--n-personas", "--n_personas"), "data", _count, 5, "pairs of personas, at most those that there are"),
    Flag(("--n-samples", "--n_samples"), "data", _count, 10, "answers to each training question and persona"),
    Flag(("--n-audit", "--n_audit"), "data", _count, 20, "held-out questions"),
    Flag(("--n-audit-samples", "--n_audit_samples"), "data", _count, 4, "answers to each held-out question and persona"),
    Flag(("--max-new-tokens", "--max_new_tokens"), "data", _count, 128, "of an answer"),
    Flag(("--temperature",), "data", number(0, 1000), 0.7, "0: the likeliest tokens"),
    Flag(("--top-p", "--top_p"), "data", number(high=1, above=0), 0.8, "tokens of this total probability"),
    Flag(("--top-k", "--top_k"), "data", whole(0), 20, "of the likeliest tokens; 0: all"),
    Flag(("--judge",), "data", optional(text), None, "endpoint or a local model: keeps the pairs whose answers show their persona"),
    Flag(("--judge-at-least", "--judge_at_least"), "data", _count, 2, "rating of the rubric `concept` (0 to 2) that an answer needs"),
    # adapters
    Flag(("--adapter", "--adapters"), "adapters", _kinds, ("lora",), f"{', '.join(ADAPTERS)}; several", "+", decides=False),
    Flag(("--layers",), "adapters", optional(_layers), None, "blocks; default from 30% to 80% of the depth", "+"),
    Flag(("--modules",), "adapters", optional(_words), None, "linear maps by name; default all of a block", "+"),
    Flag(("--rank",), "adapters", _count, 32, "of adapters with factors"),
    Flag(("--lora-alpha", "--lora_alpha"), "adapters", number(above=0), 64.0, "alpha / rank scales the factors while they are trained"),
    Flag(("--block-size", "--block_size"), "adapters", _count, 8, "of oft and boft"),
    Flag(("--dropout",), "adapters", _share, 0.0, "of the adapter"),
    Flag(("--lr",), "adapters", number(above=0), 2e-4, "AdamW, linear decay to 0"),
    Flag(("--epochs",), "adapters", _count, 1, "passes over the answers"),
    Flag(("--max-steps", "--max_steps"), "adapters", optional(_count), None, "of the optimiser, at most"),
    Flag(("--train-batch-size", "--train_batch_size"), "adapters", _count, 4, "answers in a minibatch"),
    Flag(("--grad-accum", "--grad_accum"), "adapters", _count, 4, "minibatches in a step"),
    Flag(("--weight-decay", "--weight_decay"), "adapters", number(0), 0.01, "of AdamW"),
    Flag(("--warmup",), "adapters", whole(0), 5, "steps in which lr rises; at most half of all"),
    Flag(("--max-length", "--max_length"), "adapters", _count, 512, "tokens of question and answer; longer ones are cut"),
    Flag(("--validation",), "adapters", _share, 0.1, "share of the answers that the loss is watched on; 0: none"),
    Flag(("--eval-steps", "--eval_steps"), "adapters", _count, 10, "steps between two looks"),
    Flag(("--patience",), "adapters", whole(0), 3, "looks without a smaller loss that end the training; 0: never"),
    # dw
    Flag(("--pos",), "dw", optional(_path), None, "a PEFT adapter in place of the trained one"),
    Flag(("--neg",), "dw", optional(_path), None, "the other one"),
    Flag(("--name",), "dw", optional(text), None, "of what is made; default that of the adapter, `own` for --pos and --neg", decides=False),
    Flag(("--mode",), "dw", _mode, "dw", "dw: tau+ - tau-; bisector: both sides count the same; tau_pos: tau+ alone; tau_neg: -tau-"),
    Flag(("--scale",), "dw", number(), 1.0, "times this; -1 turns it round"),
    Flag(("--keep-layers", "--keep_layers"), "dw", optional(_layers), None, "the part at these blocks", "+"),
    Flag(("--keep-modules", "--keep_modules"), "dw", optional(_words), None, "the part at these linear maps", "+"),
    Flag(("--bias-only", "--bias_only"), "dw", _yes, False, "the constants alone", OFF),
    Flag(("--add",), "dw", optional(many(_path)), None, "stored Steerings that are added", "+"),
    Flag(("--methods",), "dw", optional(_methods), ("caa", "sft", "prompt"), f"beside dW: {', '.join(METHODS)}", "*", decides=False),
    Flag(("--vector-layer", "--vector_layer"), "dw", optional(whole(0)), None, "of the vectors; default the middle one of --layers"),
    Flag(("--vector-epochs", "--vector_epochs"), "dw", _count, 2, "of the vectors that are trained"),
    # calibrate
    Flag(("--target-kl", "--target_kl"), "calibrate", number(above=0), 1.0, "nats at the 95th percentile of tokens"),
    Flag(("--n-tokens", "--n_tokens"), "calibrate", _count, 50, "of each greedy answer"),
    Flag(("--n-calibration", "--n_calibration"), "calibrate", _count, 20, "questions that strengths are found on"),
    Flag(("--n-kl-audit", "--n_kl_audit"), "calibrate", _count, 20, "others that they are checked on"),
    # evaluate
    Flag(("--coeffs",), "evaluate", optional(_numbers), None, "multipliers in place of the calibrated ones and 0", "+"),
    Flag(("--vignettes",), "evaluate", text, "own", "own, none, a folder, or a hub id with the published columns"),
    Flag(("--limit",), "evaluate", optional(_count), None, "vignettes, from the first"),
    Flag(("--bootstrap-samples", "--bootstrap_samples"), "table", _count, 1000, "resamples of the questions"),
    Flag(("--bootstrap-seed", "--bootstrap_seed"), "table", whole(0), 0, "of them"),
)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Every flag, below the stage that it is of. What is not given is None."""
    parser.add_argument(
        "stage", choices=[*STAGES, RUN], help="; ".join(f"{name}: {does}" for name, does in STAGES.items()) + "; run: all of them"
    )
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for flag in FLAGS:
        group = groups.setdefault(flag.stage, parser)
        if flag.stage and group is parser:
            group = groups[flag.stage] = parser.add_argument_group(flag.stage)
        if flag.nargs == OFF:
            group.add_argument(*flag.names, dest=flag.dest, action=OFF, default=None, help=flag.help)
        else:
            shown = "..." if flag.nargs else flag.dest.upper()
            group.add_argument(*flag.names, dest=flag.dest, nargs=flag.nargs, default=None, metavar=shown, help=_told(flag))


def _told(flag: Flag) -> str:
    told = None if flag.default is None or flag.default is False else flag.default
    shown = " ".join(map(str, told)) if isinstance(told, tuple) else told
    return flag.help.replace("%", "%%") + ("" if told is None else f" (default {shown})")


def rows() -> list[tuple[str, str, str]]:
    """(flag, stage, meaning) for the README."""
    return [(flag.names[0], flag.stage or "all", _told(flag).replace("%%", "%")) for flag in FLAGS]


# flags of a stage that later ones use too: what they were is in the manifests, so only the stage itself takes them
ALSO = {"adapter": ("dw",), "n_personas": (), "bootstrap_seed": (), "layers": ("dw",)}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag's value, checked. Raises UserError; also for a flag that means nothing to the stage."""
    found = {}
    for flag in FLAGS:
        given = getattr(args, flag.dest)
        of = {flag.stage, *ALSO.get(flag.dest, ())}
        if given is not None and args.stage not in (RUN, *of) and flag.stage:
            raise UserError(f"{flag.names[0]} is of the stage {' and '.join(sorted(of))}, and means nothing to {args.stage}; leave it out")
        if given is None or given == []:  # --methods alone: none of them
            found[flag.dest] = flag.default if given is None else ()
            continue
        try:
            found[flag.dest] = flag.read(given)
        except Bad as error:
            shown = " ".join(given) if isinstance(given, list) else given
            raise UserError(f"{flag.names[0]} {shown} {error}") from None
    for name in ("behavior", "model"):
        if found[name] is None:
            raise UserError(f"--{name}: which? it is wanted by every stage")
    if (found["pos"] is None) != (found["neg"] is None):
        raise UserError("--pos and --neg go together: one adapter of each side")
    return found


def deciding(found: dict[str, Any], stage: str) -> dict[str, Any]:
    """What of the flags decides a stage's result, as JSON has it."""
    kept = {flag.dest: found[flag.dest] for flag in FLAGS if flag.decides and flag.stage in ("", stage)}
    return {
        name: [str(v) if isinstance(v, Path) else v for v in value] if isinstance(value, tuple) else value for name, value in kept.items()
    }
