"""spilt tasks: what is learned on a task, and how many of its answers are right; adapters after every block, and baselines beside them.

train: post-block adapters (h + alpha U act(D h), arXiv 2603.00425), vectors, LoRA, LoReFT or all weights on prompts with completions.
evaluate: greedy answers of what was trained, or of the base model. table: everything that was evaluated, with paired differences.
Several variants, ranks or seeds are done one after the other. Flags of the public code keep their names.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt import __version__
from spilt.cell import NONLINEARITIES
from spilt.downstream.answers import EXTRACTORS
from spilt.downstream.rows import ALIASES, SPLITS, TASKS
from spilt.downstream.words import KINDS, LINEAR, OVERLONG, PARTS, PROJECTIONS, SCHEDULERS, SUBMODULES, TrainSettings, Variant, acting
from spilt.engine.choice import ENGINES, FAST
from spilt.errors import NotFinite, UserError
from spilt.settings.fields import DTYPES, WRITE_POINTS
from spilt.settings.values import SCOPES
from spilt.terminal import complain, program, say

if TYPE_CHECKING:
    from spilt.downstream.work import Request

FORMATS = ("markdown", "csv", "latex", "html")


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where the numbers were not finite; 2 for wrong words."""
    return program(parser(), argv, lambda args: {"train": _train, "evaluate": _evaluate, "table": _table}[args.work](args))


def parser() -> argparse.ArgumentParser:
    """The three works, each with its flags."""
    made = argparse.ArgumentParser(prog="spilt tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = made.add_subparsers(dest="work", required=True, metavar="train|evaluate|table")
    train = works.add_parser("train", help="learn a task")
    evaluate = works.add_parser("evaluate", help="answer a split of it")
    table = works.add_parser("table", help="compare everything that was evaluated")
    for one in (train, evaluate):
        _shared(one)
    train.add_argument("--do-eval", action="store_true", help="then evaluate on validation and test")
    train.add_argument("--test-only", action="store_true", help="with --do-eval: on test alone")
    train.add_argument("--checkpoint-seconds", type=float, default=60.0, metavar="S", help="the state is kept after this long (default 60)")
    evaluate.add_argument("--split", nargs="+", choices=SPLITS, default=["test"], help="default: test")
    evaluate.add_argument("--part", nargs="+", choices=PARTS, default=PARTS[:1], help="of joint: which of the two acts (default all)")
    evaluate.add_argument("--multiplier", type=float, default=1.0, metavar="M", help="strength of a Steering (default 1, as trained)")
    table.add_argument("--base_dir", "--base-dir", default=".", type=Path)
    table.add_argument("--dataset-name", nargs="+", default=[], metavar="NAME", help="default: all tasks")
    table.add_argument("--model-name", nargs="+", default=[], metavar="NAME", help="default: all models")
    table.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    table.add_argument("--reference", default="base", metavar="VARIANT", help="whose difference is shown (default base)")
    table.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"default {FORMATS[0]}")
    table.add_argument("--output", type=Path, metavar="FOLDER", help="write tasks.md, .tex, .html and a csv of each table there")
    return made


def _shared(one: argparse.ArgumentParser) -> None:
    s, add = TrainSettings(), one.add_argument
    add("--model-name", "--model_name", required=True, metavar="NAME", help="a folder below models/, a path, or a hub id")
    add("--dataset-name", required=True, metavar="NAME", help=f"{', '.join((*TASKS, *ALIASES))}; or, with --data, a task of your own")
    columns = "rows of the published columns, or of your own: prompt, completion, label"
    add("--data", default="", metavar="FILE|FOLDER", help=f"{columns}; of a single file 80%% are train, 10%% validation, 10%% test")
    add("--extractor", default="", choices=("", *EXTRACTORS), help="of a task of your own: how an answer is read (default text)")
    add("--listops", default="", metavar="KEY=VALUE,...", help="operators=MIN+MAX,depth=,fewest=,most=,train=,test=,seed=")
    add("--base_dir", "--base-dir", default=".", type=Path)
    add("--variant", nargs="+", choices=KINDS, help="; ".join(f"{name}: {kind.says}" for name, kind in KINDS.items()).replace("%", "%%"))
    add("--lora-rank", type=int, default=Variant.lora_rank, metavar="R", help=f"of joint (default {Variant.lora_rank})")
    add("--projection", choices=PROJECTIONS, help=f"of joint: what of an adapter is off the LoRA's subspace (default {Variant.projection})")
    add("--no-adapter", action="store_true", help="--variant vector")
    add("--adapter-rank", nargs="+", type=int, default=[Variant.rank], metavar="R", help=f"default {Variant.rank}; several: a sweep")
    add("--linear", action="store_true", help="--nonlinearity linear")
    add("--nonlinearity", choices=NONLINEARITIES, help=f"default {Variant.nonlinearity}")
    add("--submodules", action="store_true", help=f"--site {' '.join(SUBMODULES)}: one at the MLP's output, one at the attention's")
    add("--site", nargs="+", choices=WRITE_POINTS, help="where it acts (default block: after every block)")
    add("--intervene-last", action="store_true", help="--scope last: only the token whose next one is predicted")
    add("--scope", choices=SCOPES, help="which tokens it acts on (default all)")
    add("--alpha", type=float, default=Variant.alpha, help="of post_block (default 1)")
    add("--layers", nargs="+", type=int, metavar="N", help="blocks (default all)")
    add("--lr", type=float, default=s.lr, help=f"default {s.lr:g}")
    add("--warmup-ratio", type=float, default=s.warmup_ratio, help=f"default {s.warmup_ratio:g}")
    add("--weight-decay", type=float, default=s.weight_decay, help=f"default {s.weight_decay:g}")
    add("--epochs", type=int, help="default: the task's")
    add("--bs", type=int, default=s.bs, help=f"rows of a batch (default {s.bs})")
    add("--grad-accum", type=int, default=s.grad_accum, metavar="N", help=f"batches of a step (default {s.grad_accum})")
    add("--scheduler", choices=SCHEDULERS, default=s.scheduler, help=f"default {s.scheduler}")
    add("--seed", nargs="+", type=int, default=[s.seed], metavar="N", help=f"default {s.seed}; several: a run each")
    add("--dtype", choices=DTYPES, default="float32", help="of the model; what is learned is float32 (default float32)")
    add("--device", default="", help="default: cuda:0 where there is one, else cpu")
    add("--max-length", type=int, metavar="N", help="tokens of prompt and completion (default: the task's)")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the task's)")
    add("--overlong", choices=OVERLONG, default=OVERLONG[0], help="a prompt that is too long is cut on the left, or left out")
    add("--limit", type=int, metavar="N", help="training rows, from the first")
    add("--limit-eval", type=int, metavar="N", help="rows of each split that is evaluated, from the first")
    add("--no-chat-template", action="store_true", help="raw text, also where the model has a template")
    add("--system-prompt", default="", metavar="TEXT")
    add("--batch-size", type=int, metavar="N", help="answers made side by side (default: by free memory)")
    add("--engine", choices=ENGINES, default=FAST, help="plain: hooks and the library's own forward")
    add("--download", action="store_true", help="fetch data or model from the hub where the local cache has them not")
    add("--force", action="store_true", help="do again what is already done")
    add("--json", action="store_true", help="print one JSON document instead")
    add("--quiet", action="store_true", help="nothing about progress")


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """One for each variant and rank that is asked for. Raises UserError for words that contradict each other."""
    for flag, given, other in (
        ("--no-adapter", args.no_adapter, args.variant and args.variant != ["vector"]),
        ("--linear", args.linear, args.nonlinearity not in (None, LINEAR)),
        ("--submodules", args.submodules, args.site and tuple(args.site) != SUBMODULES),
        ("--intervene-last", args.intervene_last, args.scope not in (None, "last")),
    ):
        if given and other:
            raise UserError(f"{flag} contradicts what else is said of it; give one of them")
    kinds = ["vector"] if args.no_adapter else args.variant or [Variant.kind]
    said: dict[str, Any] = {
        "nonlinearity": LINEAR if args.linear else args.nonlinearity,
        "sites": SUBMODULES if args.submodules else tuple(args.site) if args.site else None,
        "scope": "last" if args.intervene_last else args.scope,
        "layers": tuple(sorted(args.layers)) if args.layers else None,
        "alpha": args.alpha,
        "lora_rank": args.lora_rank,
        "projection": args.projection,
    }
    words = {name: value for name, value in said.items() if value is not None}
    found = []
    for kind, rank in product(kinds, args.adapter_rank):
        own = {name: value for name, value in {**words, "rank": rank}.items() if name in KINDS[kind].words}
        if len(kinds) == 1 and (lost := [name for name in words if name not in own and words[name] != getattr(Variant, name)]):
            raise UserError(f"--variant {kind}: {', '.join(lost)} mean nothing to it; leave them out")
        found.append(Variant(kind, **own))
    return list(dict.fromkeys(found))


def requests(args: argparse.Namespace) -> Iterator[Request]:
    """One for each variant, rank and seed."""
    from spilt.downstream import load
    from spilt.downstream.work import Request
    from spilt.model.locate import locate

    for name in ("limit", "limit_eval", "batch_size", "max_length", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted 1 or more")
    how = {"extract": args.extractor, "max_new_tokens": args.max_new_tokens, "max_length": args.max_length, "download": args.download}
    source = load.source(args.dataset_name, args.data, made=args.listops, **how)
    model, _ = locate(args.base_dir, args.model_name, args.download)
    done = set()
    for variant, seed, part in product(variants_of(args), args.seed, getattr(args, "part", PARTS[:1])):
        if part != PARTS[0] and variant.kind != "joint":
            raise UserError(f"--part {part} is of --variant joint, which has two; {variant.kind} is one")
        settings = TrainSettings(
            args.lr, args.warmup_ratio, args.weight_decay, source.task.epochs if args.epochs is None else args.epochs,
            args.bs, args.grad_accum, args.scheduler, seed=seed,
        )  # fmt: skip
        made = Request(
            source, model, variant, settings, args.base_dir, args.dtype, not args.no_chat_template, args.system_prompt, args.overlong,
            args.limit, args.limit_eval, args.engine, args.batch_size, getattr(args, "checkpoint_seconds", 60.0), args.force,
            part,
        )  # fmt: skip
        if (made.place, part) not in done:
            done.add((made.place, part))
            yield made


def _host(args: argparse.Namespace) -> Any:
    import torch

    from spilt import plan
    from spilt.artifacts.store import Store
    from spilt.model import host
    from spilt.model.locate import locate
    from spilt.run import quiet_libraries

    name, folder = locate(args.base_dir, args.model_name, args.download)
    if name == args.model_name:
        plan.check_model(Store(args.base_dir), name)
    quiet_libraries()
    return host.load(folder, args.dtype, args.device or ("cuda:0" if torch.cuda.is_available() else "cpu"), "")


def _train(args: argparse.Namespace) -> int:
    if args.test_only and not args.do_eval:
        raise UserError("--test-only says which splits --do-eval evaluates; give --do-eval too")
    if not args.checkpoint_seconds >= 0:
        raise UserError(f"--checkpoint-seconds {args.checkpoint_seconds:g}: wanted seconds, 0 or more")
    return _each(args, True, ([] if not args.do_eval else ["test"] if args.test_only else ["validation", "test"]))


def _evaluate(args: argparse.Namespace) -> int:
    if not math.isfinite(args.multiplier):
        raise UserError(f"--multiplier {args.multiplier:g}: wanted a finite number")
    return _each(args, False, list(dict.fromkeys(args.split)))


def _each(args: argparse.Namespace, training: bool, splits: Sequence[str]) -> int:
    """Every run that the words name; a run whose numbers are not finite is told, and the others go on."""
    from spilt.downstream import answering, work

    asked = list(requests(args))
    if training and any(request.variant.kind == "base" for request in asked):
        raise UserError("--variant base learns nothing: spilt tasks evaluate --variant base measures it")
    if training:  # all data before the model, which takes long
        asked[0].source.split("train")
    elif asked[0].source.train() is None:
        complain(f"note: {args.data} has no training rows, so nobody tells whether a row of {', '.join(splits)} is one of them")
    for split in splits:
        asked[0].source.split(split)
    told, failed, loaded = list[dict[str, Any]](), 0, _host(args)
    tell = complain if args.json else say
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        for request in asked:
            try:
                found: dict[str, Any] = {"run": str(request.place.folder)}
                if training:
                    found["train"] = work.train(request, loaded, tell, quiet=args.quiet)
                    tell(f"{found['train']}: {work.artifact(request)}")
                for split in splits:
                    summary = answering.evaluate(request, loaded, split, multiplier=getattr(args, "multiplier", 1.0))
                    found[split] = summary
                    tell(line(summary))
            except NotFinite as error:
                failed += 1
                found["error"] = str(error)
                complain(f"error: {request.place.folder}: {error}")
            told.append(found)
    if args.json:
        print(json.dumps({"spilt": __version__, "schema": 1, "runs": told}, indent=1))
    return int(failed > 0)


# of a summary: what is said where there is any of it
TOLD = ("no_answer", "cut_off", "prompts_truncated", "prompts_left_out", "rows_without_answer", "seen_in_train")


def line(summary: dict[str, Any]) -> str:
    """One evaluation in a line."""
    more = ", ".join(
        [
            *(f"{summary[name]} {name.replace('_', ' ')}" for name in TOLD if summary.get(name)),
            *(["every label is the same"] if summary.get("commonest") == 1 else []),
            *filter(None, [summary.get("part_of_file")]),
        ]
    )
    accuracy, low, high = (f"{summary[name]:.3f}" for name in ("accuracy", "low", "high"))
    return (
        f"{summary['task']} {summary['split']} {summary['variant']}{acting(summary['multiplier'], summary.get('part', PARTS[0]))}: "
        f"{accuracy} [{low}, {high}] of {summary['n']}{more and '; '}{more}; "
        f"{summary['parameters']} learned ({summary['share']:.4%}); decoder {summary['decoder']}"
    )


def _table(args: argparse.Namespace) -> int:
    from spilt.artifacts.atomic import atomic_write
    from spilt.downstream import table

    made = table.collect(args.base_dir, args.dataset_name, args.model_name, args.split, args.reference)
    written = {"markdown": table.markdown, "latex": table.latex, "html": table.html, "csv": lambda some: table.csv(some, some[0].name)}
    assert set(written) == set(FORMATS)
    if args.output is None:
        for one in written[args.format](made).splitlines():
            say(one)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    files = {"tasks.md": table.markdown(made), "tasks.tex": table.latex(made), "tasks.html": table.html(made)}
    files |= {f"tasks_{name}.csv": table.csv(made, name) for name in dict.fromkeys(one.name for one in made)}
    for name, text in files.items():
        atomic_write(args.output / name, text)
    say(f"{args.output}: {', '.join(files)}")
    return 0
