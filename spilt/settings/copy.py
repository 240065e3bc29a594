"""spilt settings: settings files like those of another dataset and model, with other layers. Files that are there stay as they are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spilt.errors import UserError, checked_name, unknown
from spilt.settings.files import load_yaml
from spilt.settings.keys import SECTIONS
from spilt.settings.resolve import ROOT, known
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
    written, kept = 0, 0
    for path in sorted(have[like].rglob("*.yaml")):
        to = here.joinpath(*target) / path.relative_to(have[like])
        if to.exists():
            kept += 1
            continue
        text = f"# {'/'.join(target)}: as those of {'/'.join(like)}\n"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text + yaml.safe_dump(_at(load_yaml(path), layers), sort_keys=False, default_flow_style=None, width=1000), "utf-8")
        written += 1
    say(f"{here.joinpath(*target)}: {written} files written" + (f", {kept} that were there kept" if kept else ""))
    return 0


def _pair(flag: str, text: str) -> tuple[str, str]:
    names = text.split("/")
    if len(names) != 2:
        raise UserError(f"{flag} {text}: wanted DATASET/MODEL, such as psychopathy/gemma-2-9b-it")
    return checked_name("dataset", names[0]), checked_name("model name", names[1])


def _at(content: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The file's content with other layers, in the sections of verbs too."""
    changed = {key: layers if key == "layers" else value for key, value in content.items()}
    return {key: _at(value, layers) if key in SECTIONS and isinstance(value, dict) else value for key, value in changed.items()}
