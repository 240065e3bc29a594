"""spilt settings: settings files like those of another dataset and model, with other layers. Files that are there stay as they are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spilt.errors import UserError, checked_name, unknown
from spilt.settings.fields import read_field
from spilt.settings.files import load_yaml
from spilt.settings.keys import KEY_ALIASES, KNOWN, SECTIONS
from spilt.settings.resolve import ROOT, known, parse_overrides
from spilt.settings.values import Bad, many, whole
from spilt.terminal import program, say


def main(argv: Sequence[str] | None = None) -> int:
    """0: written, or all there. 2: the words are wrong."""
    parser = argparse.ArgumentParser(prog="spilt settings", description=__doc__)
    parser.add_argument(
        "--like", required=True, metavar="DATASET/MODEL", help="whose files; of --base_dir, or of those that come with spilt"
    )
    parser.add_argument("--for", required=True, metavar="DATASET/MODEL", dest="target")
    parser.add_argument("--layers", required=True, nargs="+", metavar="N", help="blocks from 0; several act together")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="another value, where a file has one; repeatable"
    )
    parser.add_argument("--base_dir", type=Path, default=Path("."), help="hparams/ is written below it (default: .)")
    return program(parser, argv, _copy)


def _copy(args: argparse.Namespace) -> int:
    like, target = _pair("--like", args.like), _pair("--for", args.target)
    try:
        layers = list(many(whole(0), distinct=True)(args.layers))
    except Bad as error:
        raise UserError(f"--layers {' '.join(args.layers)} {error}") from None
    here, have = args.base_dir / ROOT, known(args.base_dir)
    if like not in have:
        raise unknown("settings", "/".join(like), map("/".join, have))
    given = parse_overrides(args.overrides)
    if "layers" in given:
        raise UserError("--set layers=...: --layers says them")
    for key, value in given.items():
        if key != "generation_params" or not isinstance(value, dict):  # checked entry by entry where it was parsed
            read_field(KNOWN[key], value, "--set")
    files = {path: load_yaml(path) for path in sorted(have[like].rglob("*.yaml"))}
    for key in given:
        if not any(key in _names(content) for content in files.values()):
            raise UserError(f"--set {key}: no file of {args.like} has it; --set of a run says it for all of its cells")
    given["layers"] = layers
    written, kept = 0, 0
    for path, content in files.items():
        to = here.joinpath(*target) / path.relative_to(have[like])
        if to.exists():
            kept += 1
            continue
        text = f"# {'/'.join(target)}: as those of {'/'.join(like)}\n"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text + yaml.safe_dump(_with(content, given), sort_keys=False, default_flow_style=None, width=1000), "utf-8")
        written += 1
    say(f"{here.joinpath(*target)}: {written} files written" + (f", {kept} that were there kept" if kept else ""))
    return 0


def _pair(flag: str, text: str) -> tuple[str, str]:
    names = text.split("/")
    if len(names) != 2:
        raise UserError(f"{flag} {text}: wanted DATASET/MODEL, such as psychopathy/gemma-2-9b-it")
    return checked_name("dataset", names[0]), checked_name("model name", names[1])


def _names(content: dict[str, Any]) -> set[str]:
    """The settings that a file has, in the sections of verbs too, under their own names."""
    within = [_names(value) for key, value in content.items() if key in SECTIONS and isinstance(value, dict)]
    return {KEY_ALIASES.get(key, key) for key in content}.union(*within)


def _with(content: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's content with other values of what it has, in the sections of verbs too."""

    def new(key: str, value: Any) -> Any:
        ours = given.get(KEY_ALIASES.get(key, key), value)
        return {**value, **ours} if isinstance(value, dict) and isinstance(ours, dict) else ours  # generation_params: entry by entry

    changed = {key: new(key, value) for key, value in content.items()}
    return {key: _with(value, given) if key in SECTIONS and isinstance(value, dict) else value for key, value in changed.items()}
