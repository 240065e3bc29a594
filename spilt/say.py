"""spilt say: what a stored vector makes of a sentence at each multiplier, with the settings of --mode apply: the same texts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from spilt import __version__, plan, verbs
from spilt.artifacts.store import Store
from spilt.cell import FORMS, Cell
from spilt.data import entries, readers
from spilt.errors import NotFinite, UserError, half_pair, printable, unknown
from spilt.methods import METHODS
from spilt.model.locate import locate
from spilt.settings import parse_overrides
from spilt.settings.fields import STRONGEST, GenerateSettings, GenerationParams, intervention_name, method_name
from spilt.steering.layer_file import beside
from spilt.terminal import complain, program, say
from spilt.verbs.base import layer_groups, with_own

ABOUT = ("dtype", "seed", "use_chat_template", "system_prompt")  # settings that a stored Steering knows of its fit


def main(argv: Sequence[str] | None = None) -> int:
    """Print the texts; 0, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt say", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="what is said to the model; left out: each line of the standard input")
    parser.add_argument("--multipliers", nargs="+", type=float, metavar="M", help="default: 0 and the settings'")
    which_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    return program(parser, argv, _say)


def which_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model and a stored vector, as `ready` reads them."""
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset", default="", help="with --method and --intervention_method: the cell")
    offered: tuple[tuple[str, Any], ...] = (("--method", METHODS), ("--intervention_method", FORMS))
    for flag, table in offered:
        added: Any = parser.add_argument(flag, default="", help=", ".join(table))
        added.completer = lambda table=table, **_: tuple(table)
    parser.add_argument("--concept", type=int, metavar="ID", help="of a dataset with concepts")
    parser.add_argument("--steering", type=Path, metavar="FILE", help="a file instead of the cell's: a Steering, layer_{id}.pt, GGUF, ...")
    known = "default: the settings', or the file's; 10+14: those that were fitted together"
    parser.add_argument("--layers", nargs="+", metavar="N", help=known)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="a setting of apply; repeatable")
    parser.add_argument("--device", help="default: cuda:0 where there is one, else cpu")


def _say(args: argparse.Namespace) -> int:
    from spilt import api
    from spilt.engine import choice
    from spilt.memory import OutOfMemory

    if args.prompt is not None:
        _refuse_unsayable(args.prompt)
    strengths = args.multipliers
    if strengths and not all(abs(m) <= STRONGEST for m in strengths):  # nan is not
        raise UserError(f"--multipliers: wanted finite numbers within +-{STRONGEST:g}")
    host, steering, s, cell = ready(args, args.max_new_tokens)
    choice.refuse_positions(s.steer_positions, steering.scope)
    strengths = [m + 0.0 for m in dict.fromkeys(strengths or (0.0, *s.multipliers))]
    params: GenerationParams = s.generation_params
    about = {name: getattr(s, name) for name in ("layers", *ABOUT)} | {"generation_params": params.as_kwargs()}
    texts: list[dict[str, Any]] = []
    try:
        for prompt in [args.prompt] if args.prompt is not None else _lines():
            how = {name: getattr(s, name) for name in ("seed", "batch_size", "use_chat_template", "system_prompt")}
            how |= dataclasses.asdict(params) | {"first": _number(args.base_dir, cell, prompt)}
            table = api.generate(host.model, host.tokenizer, steering, prompt, strengths, **how)
            texts += table[["prompt", "multiplier", "text"]].to_dict("records")
            if not args.json:
                _show(prompt, zip(table["multiplier"], table["text"], strict=True))
    except (NotFinite, OutOfMemory) as error:
        complain(f"error: {error}")
        return 1
    if args.json:
        names = {"model": args.model_name, "dataset": args.dataset or None, "method": s.method, "intervention": s.intervention_method}
        print(json.dumps({"spilt": __version__, "schema": 1, **names, "concept": args.concept, **about, "texts": texts}, indent=1))
    return 0


class Named(NamedTuple):
    """What the words name, checked, before anything is loaded."""

    args: argparse.Namespace
    folder: Path  # of the model
    request: Any
    cell: Cell | None
    settings: Any  # None: those of the file of --steering
    overrides: dict[str, Any]
    layers: tuple[int, ...] | None  # of --layers


def ready(args: argparse.Namespace, max_new_tokens: int | None = None, dtype: str = "") -> tuple[Any, Any, Any, Cell | None]:
    """The model, the Steering, the settings, and the cell where one is named; wrong words are told before anything is loaded.

    dtype: of the model, over the settings'.
    """
    return loaded(named(args, max_new_tokens), dtype)


def named(args: argparse.Namespace, max_new_tokens: int | None = None) -> Named:
    """Raises UserError for words that name nothing that is there."""
    store = Store(args.base_dir)
    name, folder = locate(args.base_dir, args.model_name)
    if name == args.model_name:
        plan.check_model(store, name)
    args.model_name = name
    more = [] if max_new_tokens is None else [f"generation_params.max_new_tokens={max_new_tokens}"]
    overrides = parse_overrides([*args.overrides, *more])
    groups = layer_groups(args.layers)
    if args.steering is not None and args.layers is not None and (len(args.layers) > 1 or not args.layers[0].isdigit()):
        raise UserError("--layers: of the file of --steering one layer can be taken; give one, or leave --layers out")
    if groups is not None and len(groups) != 1:
        raise UserError(
            f"--layers {' '.join(args.layers)}: one vector at a time: give one layer, or 10+14 for those that were fitted together"
        )
    layers = None if groups is None else groups[0]
    given = [flag for flag in ("dataset", "method", "intervention_method") if getattr(args, flag)]
    if len(given) < 3 and (given or args.steering is None):
        raise UserError("which vector? give --dataset, --method and --intervention_method of a stored cell, or --steering FILE")
    cell, settings, request = None, None, None
    if given:
        method, form = method_name(args.method), intervention_name(args.intervention_method)
        if plan.ALL in (method, form):
            raise UserError("one vector at a time: give one --method and one --intervention_method")
        plan.pairs_of(method, form)
        request = verbs.Request(args.dataset, method, args.model_name, form, "apply", base_dir=args.base_dir, overrides=overrides)
        apart = plan.apart(request, method, form, layers)
        request = replace(request, overrides=with_own(overrides, method, None, layers))
        settings = verbs.VERBS["generate"].settings(request, method, form).settings
        cell = Cell(args.model_name, args.dataset, method, form, tuple(settings.layers), args.concept, None, apart)
        for path in [store.vector(cell, layer) for layer in cell.layers] if args.steering is None else []:
            if not path.is_file():
                way_out = "make it with spilt fit; --layers, and --concept for a dataset with concepts, say which"
                raise UserError(f"no vector file {path}{beside(path)}; {way_out}")
    return Named(args, folder, request, cell, settings, overrides, layers)


def loaded(what: Named, dtype: str = "", known: Any = None) -> tuple[Any, Any, Any, Cell | None]:
    """As `ready`. known: the model, where it is loaded already."""
    args, cell, settings, steering = what.args, what.cell, what.settings, None
    import torch

    from spilt.model import host, identity
    from spilt.run import quiet_libraries
    from spilt.steering.steering import Steering
    from spilt.tasks.recordings import Run, stored

    if args.steering is not None:
        steering = Steering.load(args.steering, *(what.layers or ()))
        settings = settings or _of_steering(steering, what.overrides)
    quiet_libraries()
    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    made = known or host.load(what.folder, dtype or settings.dtype, device, settings.anatomy)
    if steering is None and cell is not None:
        run = Run.alone(what.request, made, device, identity.Seen(), complain)
        steering = stored(cell, settings, run)
    return made, steering, settings, cell


def _of_steering(steering: Any, overrides: dict[str, Any]) -> GenerateSettings:
    """What its fit said of template, system prompt and seed; then the command line."""
    known = steering.about.get("settings") or {}
    fields = {field.name for field in dataclasses.fields(GenerateSettings)}
    for name in overrides:
        if name not in fields:
            raise unknown("setting of apply", name, fields)
    values = {"dtype": "float32", **{name: known[name] for name in ABOUT if name in known}, **overrides}
    values["generation_params"] = GenerationParams(**values.get("generation_params", {}))
    of = {"method": steering.about.get("method") or "spilt", "intervention_method": steering.forms[0], "layers": steering.layers}
    return GenerateSettings(**{**of, **values})


def _refuse_unsayable(prompt: str) -> None:
    if not prompt.strip() or half_pair(prompt):
        raise UserError("the prompt is empty" if not prompt.strip() else "the prompt is not valid text (half of a surrogate pair)")


def _lines() -> Iterator[str]:
    """Each line of the standard input, asked for where somebody types it."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            _refuse_unsayable(line)
            yield line.rstrip("\n")


def _number(base_dir: Path, cell: Cell | None, prompt: str) -> int:
    """Which prompt of the dataset it is, since that decides its random numbers; 0 for one that is not in there."""
    try:
        if cell is not None:
            fmt = entries.dataset_format(base_dir, cell.dataset, "generation")
            return [row.input for row in readers.read_prompts(fmt, cell.concept, None)].index(prompt)
    except (UserError, OSError, ValueError):  # no such file, or another sentence
        pass
    return 0


def _show(prompt: str, texts: Iterator[tuple[float, str]]) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    say()
    for head, text in [("prompt", prompt), *((f"m={m:g}", text) for m, text in texts)]:
        flat = printable(re.sub(r"\s+", " ", text).strip()) or "(nothing)"
        for line in textwrap.wrap(flat, max(20, width), initial_indent=f"{head:9} ", subsequent_indent=" " * 10):
            say(line)


if __name__ == "__main__":
    sys.exit(main())
