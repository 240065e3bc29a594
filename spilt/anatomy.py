"""spilt anatomy MODEL: where its blocks, attention, MLP and down projection are found, from config.json alone: no weights are loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spilt import plan
from spilt.artifacts.store import Store
from spilt.model import checkpoint
from spilt.model.locate import locate
from spilt.steering import anatomy
from spilt.terminal import program, say


def main(argv: Sequence[str] | None = None) -> int:
    """Print the anatomy; 0, or 2 where none is found, or for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt anatomy", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="as for --model_name")
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--anatomy", default="", metavar="PART=PATH,...", help="blocks=, attn=, mlp=, mlp_mid=: not to be looked for")
    return program(parser, argv, _show)


def _show(args: argparse.Namespace) -> int:
    name, folder = locate(args.base_dir, args.model)
    if name == args.model:
        plan.check_model(Store(args.base_dir), name)
    checkpoint.check(folder)
    anatomy.parse(args.anatomy)
    from spilt.model import host
    from spilt.run import quiet_libraries

    quiet_libraries()
    model = host.skeleton(host.configuration(folder))
    found, row = anatomy.declare(model, args.anatomy), anatomy.family(model)
    known = "tested" if row.model_type in anatomy.FAMILIES else "no row names it, so it is found by structure alone"
    say(f"family   {row.model_type}: {known}")
    say(f"engine   {f'plain: {row.plain}' if row.plain else 'fast'}")
    say(f"blocks   {found.blocks}: {len(found.parts)} blocks, stream of width {anatomy.hidden_size(model)}")
    for parts in dict.fromkeys(found.parts):
        numbers = [n for n, own in enumerate(found.parts) if own == parts]
        say(f"in each block{'' if len(numbers) == len(found.parts) else ' of ' + ', '.join(map(str, numbers))}")
        widths = anatomy.read_widths(model, numbers[0])
        for name in anatomy.ANATOMY[1:]:
            none = f"none: {parts.why}" if name == "mlp_mid" else "none"
            say(f"  {name:9}{f'{getattr(parts, name)}, reads {widths[name]} numbers a token' if name in widths else none}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
