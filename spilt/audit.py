"""spilt audit BASE CHANGED: which stored Steerings explain what a fine-tune did to the weights (arXiv 2511.05408: a fine-tune is watched
by its cosine with known directions).

min over m of |(theta_changed - theta_base) - sum_i m_i dW_i|, over the linear maps of the blocks, a map at a time: neither model is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spilt import __version__
from spilt.errors import UserError
from spilt.model import checkpoint
from spilt.model.locate import locate
from spilt.terminal import program, say


def main(argv: Sequence[str] | None = None) -> int:
    """Print the strengths, and what is left; 0, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt audit", description=__doc__)
    parser.add_argument("base", metavar="BASE", help="as for --model_name")
    parser.add_argument("changed", metavar="CHANGED", help="a checkpoint of the same shapes")
    files = "Steering, folder of layer_{id}.pt, PEFT LoRA"
    parser.add_argument("--steering", nargs="+", required=True, type=Path, metavar="FILE", help=files)
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    return program(parser, argv, _audit)


def _audit(args: argparse.Namespace) -> int:
    folders = [locate(args.base_dir, said)[1] for said in (args.base, args.changed)]
    for folder in folders:
        checkpoint.check(folder)
    from spilt.model import host
    from spilt.run import quiet_libraries
    from spilt.steering.steering import Steering
    from spilt.weights.arithmetic import at_maps
    from spilt.weights.diagnostics import explained

    quiet_libraries()
    model = host.skeleton(host.configuration(folders[0]))
    steerings = [at_maps(model, Steering.load(path)) for path in args.steering]
    parts = Parts(model, *folders)
    found = explained(parts, steerings)
    if not found.norm:
        raise UserError(f"{args.changed}: its linear maps are those of {args.base}: there is nothing to explain")
    rows = [
        {"steering": str(path), "multiplier": m, "cosine": cosine}
        for path, m, cosine in zip(args.steering, found.strengths, found.cosines, strict=True)
    ]
    outside = {"tensors": parts.outside, "norm": math.sqrt(parts.energy)}
    if args.json:
        told = {"norm": found.norm, "left": found.left, "steerings": rows, "outside": outside}
        print(json.dumps({"spilt": __version__, "schema": 1, "base": args.base, "changed": args.changed, **told}, indent=1))
        return 0
    width = max(len("steering"), *(len(str(path)) for path in args.steering))
    say(f"{'steering':{width}}  {'m':>9}  cosine")
    for row in rows:
        say(f"{row['steering']:{width}}  {row['multiplier']:9.4g}  {row['cosine']:6.3f}")
    say(f"{found.left:.1%} of the change of the linear maps (norm {found.norm:.4g}) is left unexplained")
    if parts.outside:
        say(f"outside the linear maps of blocks {parts.outside} tensors have changed too (norm {outside['norm']:.4g})")
    return 0


class Parts:
    """theta_changed - theta_base, one tensor at a time as a Steering; what lies outside the linear maps is counted."""

    def __init__(self, model: Any, base: Path, changed: Path) -> None:
        self.model, self.folders = model, (base, changed)
        self.outside, self.energy = 0, 0.0

    def __iter__(self) -> Iterator[Any]:
        from spilt.steering import anatomy
        from spilt.weights.arithmetic import of_tensor

        before, after = (_tensors(folder) for folder in self.folders)
        if lacking := sorted({*before} ^ {*after}):
            some = ", ".join(lacking[:3])
            raise UserError(f"{self.folders[1]}: has other tensors than {self.folders[0]} ({some}); wanted a fine-tune of it")
        blocks = anatomy.of(self.model).blocks
        if not any(name.startswith(f"{blocks}.") for name in before):  # stored without its head
            blocks = blocks.partition(".")[2]
        for name, file in before.items():
            old, new = _read(file, name), _read(after[name], name)
            if old.shape != new.shape:
                raise UserError(f"{name} has shape {list(old.shape)} in {self.folders[0]} and {list(new.shape)} in {self.folders[1]}")
            change = new.float() - old.float()
            if not change.any():
                continue
            part = of_tensor(self.model, name.removeprefix(f"{blocks}."), change) if name.startswith(f"{blocks}.") else None
            if part is None:
                self.outside, self.energy = self.outside + 1, self.energy + float(change.double().square().sum())
            else:
                yield part


def _tensors(folder: Path) -> dict[str, Path]:
    """name -> the file that has it."""
    files = checkpoint.weights(folder)
    if other := [path for path in files if path.suffix != ".safetensors"]:
        raise UserError(f"{other[0]}: only safetensors are read a tensor at a time; convert the checkpoint")
    return {name: path for path in files for name in checkpoint.tensors(path)}


def _read(path: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


if __name__ == "__main__":
    sys.exit(main())
