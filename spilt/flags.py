"""The words of the command line: every flag, and what may come first."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spilt import __version__, judges, plan, reading, verbs
from spilt.artifacts.losses import SPLITS
from spilt.cell import FORMS
from spilt.data import prompt_baseline
from spilt.engine.choice import ENGINES, PLAIN_STEP, STEPS, VLLM
from spilt.methods import METHODS
from spilt.settings.fields import DTYPES, INTERVENTION_ALIASES, METHOD_ALIASES

# of verbs.MODES, in their order
MODES_SAY = "fit / produce text / measure / score the texts / fit and produce text / fit, measure and produce text"
# `spilt WORD ...`: besides the verbs, another program of the package (spilt/WORD), and its line in --help
PROGRAMS = {
    "anatomy": "show where a model's blocks, attention and MLP are found",
    "audit": "tell which stored vectors explain the difference of two checkpoints",
    "oracle": "tell what a fine-tuned model is made of, as steering of its base",
    "look": "show the stored texts side by side",
    "recommend": "print the strength of each measured cell by a utility budget",
    "report": "draw curves and report.html anew from stored losses",
    "lm_eval": "score a stored vector on tasks of lm-evaluation-harness",
    "say": "try a sentence on a stored vector, at any strength",
    "strength": "find the strength at which a stored vector shows a behaviour most, or disturbs the model equally",
    "receipt": "write down what a stored vector does, what it costs, and in which range",
    "tasks": "learn tasks with right and wrong answers, by adapters after every block and by baselines",
    "table": "make the paper's tables from stored results: main, equal KL, fits, training to test",
    "export": "write a stored vector for PEFT, llama.cpp, vLLM and others, checked",
    "settings": "make settings files like those of another dataset and model",
    "prepare": "make data/ from the public source files",
    "verify": "check everything that is stored",
    "weights": "steer in the weights: personas, adapters, dW, equal KL, tables beside other methods",
}
ELSEWHERE = {"tasks": "downstream", "weights": "weight_steering"}  # programs whose word is also that of a lower room


def parser(base_dir: Path = Path("."), program: str = verbs.Request.program, verb: str = "") -> argparse.ArgumentParser:
    """All flags, or those of a verb; choices are derived from the tables. base_dir: where none is given. program: what was called."""
    made = argparse.ArgumentParser(
        prog=f"spilt {verb}" if verb else program.split()[-1],
        description=f"{verbs.VERBS[verb].does.capitalize()}." if verb else _overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=not verb,  # --mode is no short way to say --model_name
    )
    group: argparse._ActionsContainer = made
    others = {flag for row in verbs.VERBS.values() for flag in row.flags} - {*verbs.VERBS[verb].flags} if verb else set()

    def add(flag: str, offered: Iterable[str] = (), **given: Any) -> None:
        """A flag that means something here. offered: words for a shell that completes."""
        name = flag.removeprefix("--")
        if name in others:
            made.set_defaults(**{name: given.get("default", False if given.get("action") == "store_true" else None)})
        else:
            words = tuple(offered)
            group.add_argument(flag, **given).completer = lambda **_: words  # type: ignore[attr-defined]

    known = "a name in hparams/Steer/dataset_format.yaml, such as psychopathy; with --train its new name (default: the file's)"
    add("--dataset", help=known)
    known = f"{', '.join(METHODS)} or all (those released; {_spellings(METHOD_ALIASES)}); several, or with a form of its own: spilt_lora"
    add("--method", (*METHODS, plan.ALL), required=True, nargs="+", metavar="NAME", help=known)
    add("--model_name", required=True, help="a checkpoint: a folder under models/, a path, or a hub id")
    add("--download", action="store_true", help="fetch a hub id, of the model or of data, that is not in the local cache")
    known = f"{', '.join(FORMS)} or all (those released; {_spellings(INTERVENTION_ALIASES)}); several"
    add("--intervention_method", (*FORMS, plan.ALL), required=True, nargs="+", metavar="NAME", help=known)
    if verb:
        made.set_defaults(mode=verbs.VERBS[verb].mode)
    else:
        add("--mode", verbs.MODES, default="both", help=f"{', '.join(verbs.MODES)}: {MODES_SAY} (default both)")
    add("--device", default="cuda:0", help="a torch device, cpu, or auto (accelerate's device map); default cuda:0")
    recommended = "; also 'recommended': 0 and what `recommend` says"
    words = {"generate": recommended, "evaluate": recommended, "measure": ", or 'sweep': over the range that was trained"}
    more = words.get(verb, "; loss mode also takes 'sweep', apply and evaluate 'recommended', all mode (default) 'sweep recommended'")
    add("--multipliers", nargs="+", metavar="M", help=f"strengths m, signed{more}; default: the YAML's, else 1.0")
    add("--base_dir", default=base_dir, type=Path, help="every relative path is below it; default: this folder")
    add("--dry_run", action="store_true", help="print the plan; write nothing, load no model")
    group = made.add_argument_group("ours")
    add(
        "--train",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="pairs of your own: csv, tsv, json, jsonl, parquet, or hf:NAME[:CONFIG][:SPLIT]; kept in data/{dataset}/",
    )
    add("--test", nargs="+", metavar="FILE|0.2", help="with --train: held-out pairs, or the share (or number) of questions to hold out")
    add(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="with --train: question=...,matching=...,not_matching=... where they are called otherwise",
    )
    add("--complete_losing", action="store_true", help="with --train: not_matching answers that are missing are written by the model")
    add("--layers", nargs="+", metavar="N", help="blocks: 10 14 (each alone, in folders of their own), 10+14 (together), or all (each)")
    add("--inspect", action="store_true", help="show the first pairs as the model will see them: tokens, masks, lengths; write nothing")
    add("--dtype", DTYPES, help="of the model: float32, bfloat16, float16 (over the YAML's)")
    add("--batch_size", type=_positive, help="texts made side by side (changes no result beyond rounding); default: by free memory")
    add("--limit", type=_positive, help="rows of each data file, from the first")
    add("--anatomy", metavar="PART=PATH,...", help="where the model's blocks, attn, mlp, mlp_mid are; default: found by structure")
    add("--seed", type=int, help="over the YAML's")
    add("--seeds", nargs="+", type=_count, metavar="N", help="a fit with each of these seeds, in folders of their own; closed forms once")
    add("--concepts", nargs="+", type=int, metavar="ID", help=f"ids of a dataset with concepts; default: first {reading.FIRST_CONCEPTS}")
    splits = ", ".join(SPLITS)
    add("--split", help=f"{'' if verb else 'loss mode: '}{splits} or both; default: what dataset_format.yaml has")
    add(
        "--released_files",
        action=argparse.BooleanOptionalAction,
        help="loss mode: train_losses.csv for each multiplier, measured as released (default where multipliers are numbers), or one "
        "table of losses per cell, measured as text is made (always of a sweep)",
    )
    add("--control_pairs", type=_count, default=32, metavar="N", help="questions for random interventions after a sweep; 0: none")
    where = "" if verb else "evaluate mode: "
    add(
        "--judge",
        metavar="endpoint|MODEL",
        help=f"{where}who rates the texts: an OpenAI-compatible endpoint, or a local model; default: nobody",
    )
    known = f"{', '.join(judges.BUILT_IN)}, or YAML files; default: the dataset's"
    add("--rubric", nargs="+", metavar="NAME|FILE", help=f"{where}what the judge is asked: {known}")
    add(
        "--prompt_baseline",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help=f"{'' if verb else 'apply and evaluate mode: '}beside the methods the unsteered model behind a prompt: {prompt_baseline.HELP}",
    )
    add("--judge_limit", type=_positive, metavar="N", help=f"{where}only texts to the first N prompts are rated")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="any YAML setting, over the file's; repeatable")
    add(
        "--checkpoint_seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="a fit or measurement under way is saved after this long (default 60)",
    )
    add("--force", action="store_true", help="do again what is already done")
    add(
        "--engine",
        choices=(*ENGINES, VLLM),
        default=ENGINES[0],
        help="plain: hooks and the library's own forward (slower, the same results); vllm: texts of a lora by vLLM, on a GPU",
    )
    add(
        "--decode_step",
        choices=STEPS,
        default=PLAIN_STEP,
        help="how text gets its next token: plain; static: in fixed shapes; compiled: those by torch.compile; captured: as a CUDA graph "
        "(equal up to rounding)",
    )
    add(
        "--tensor_parallel",
        action="store_true",
        help="started by torchrun: each process holds a part of one model, by the library's own plan, for one that fits on no card",
    )
    add("--deterministic", action="store_true", help="only algorithms that give the same bits every time (slower on a GPU)")
    if not verb:
        add("--verify", action="store_true", help="check every stored artifact under --base_dir instead, and say what is stale or damaged")
    add("--no_report", action="store_true", help=f"{'' if verb else 'loss mode: '}draw no page (else: where its content has changed)")
    add("--log", type=Path, metavar="FILE", help="append everything that is said to this file, with times and tracebacks")
    add("--json", action="store_true", help="print one JSON document instead of the table, or of the plan")
    add("--quiet", action="store_true", help="nothing about progress")
    if not verb:
        add("--version", action="version", version=f"spilt {__version__}")
    # argparse takes -1e-2 for a flag
    made._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-inf$|-nan$")  # type: ignore[attr-defined]
    return made


def first_words() -> dict[str, str]:
    """What may come first on the command line, with a line for each."""
    return {name: row.does for name, row in verbs.VERBS.items()} | PROGRAMS


def _overview() -> str:
    """What this is, with one line for each word that may come first."""
    rows = first_words()
    width = max(map(len, rows))
    return "\n".join(
        [
            "Fit, apply and measure small interventions on transformer language models.",
            "",
            *(f"  spilt {name:{width}}  {line}" for name, line in rows.items()),
            "",
            "Each has a --help of its own; `python -m spilt` is the same as `spilt`. The released command line,",
            "`run_spilt.py --dataset ... --mode ...`, works as before, under each of these names:",
        ]
    )


def _spellings(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{other} = {name}" for other, name in aliases.items())


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
