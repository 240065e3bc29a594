"""spilt weights: steer in the weights (arXiv 2511.05408), from personas to a table beside other methods at equal disturbance.

data -> adapters -> dw -> calibrate -> evaluate -> table, each alone or all by `run`. A killed stage goes on from there; a stored result is
used again where model, inputs and flags are the same, and refused where they are not. Several processes give the files of one.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from spilt.errors import NotFinite
from spilt.team import Team, place
from spilt.terminal import complain, program, say, spoken
from spilt.weight_steering import flags

# stage -> the module whose `make` does it
WORK = {"data": "data", "adapters": "train", "dw": "make_arms", "calibrate": "strengths", "evaluate": "measured", "table": "tables"}
assert tuple(WORK) == tuple(flags.STAGES)


def main(argv: Sequence[str] | None = None) -> int:
    """Do a stage, or all; 0, 1 where the model's numbers break down, or 2 for what is wrong with words or files."""
    parser = argparse.ArgumentParser(
        prog="spilt weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_to(parser)
    return program(parser, argv, lambda args: _stages(args, Team()) if place()[1] == 1 else _of_several(args), shared=True)


def _of_several(args: argparse.Namespace) -> NoReturn:
    """One of a launcher's processes, to its end. Process 0 says what all know."""
    import torch

    team = Team(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        code = spoken(lambda: _stages(args, team), lambda: team.speaks)
    except Exception:  # noqa: BLE001 - not foreseen: where it was raised
        traceback.print_exc()
        code = 1
    team.leave(code)


def _stages(args: argparse.Namespace, team: Team) -> int:
    words = team.each(lambda: flags.settings(args))
    from spilt.memory import OutOfMemory
    from spilt.weight_steering.stage import Context

    run = team.each(lambda: Context(words, team))
    try:
        for name in flags.STAGES if args.stage == flags.RUN else [args.stage]:
            _stage(name)(run)
    except (NotFinite, OutOfMemory) as error:
        if team.speaks:
            complain(f"error: {error}")
        return 1
    if team.main:
        say(f"{args.stage}: done; {run.folder.root}")
    return 0


def _stage(name: str) -> Callable[[Any], None]:
    made: Callable[[Any], None] = import_module(f"spilt.weight_steering.{WORK[name]}").make
    return made
