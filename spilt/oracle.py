"""spilt oracle BASE TUNED: what would have to be added behind every block of a base model to make it its fine-tuned version, and what
that is made of (arXiv 2603.00425): the rank that holds 90% and 99% of it, KL(base with one block put right || fine-tuned), and the share
of the MLP in the change of each block's output.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spilt import __version__
from spilt.artifacts.atomic import atomic_write
from spilt.behaviour import files
from spilt.errors import UserError
from spilt.model.locate import locate
from spilt.terminal import program, say

HELD = (0.9, 0.99)  # parts of the squares that a rank is told for
NOTHING = 1e-5  # of the stream's largest number: what float32 rounds
SHOWN = 256  # tokens of a text that are read


class Block(NamedTuple):
    """Of one block: ranks of HELD, shares of its leading directions (None: nothing is added), KL in nats per token, share of the MLP."""

    ranks: tuple[int, ...] | None
    shares: list[float]
    kl: float
    mlp: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each block; 0, or 2 for wrong words."""
    parser = argparse.ArgumentParser(prog="spilt oracle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="as for --model_name")
    parser.add_argument("tuned", metavar="TUNED", help="a fine-tuned version of it")
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="FILE", help=f"a text a line, or rows of a data file; the first {SHOWN} tokens of each"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base_dir", default=".", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    return program(parser, argv, _oracle)


def _oracle(args: argparse.Namespace) -> int:
    texts = [asked.text for asked in files.asked_of(args.texts)]
    if args.picture is not None and args.picture.suffix != ".png":
        raise UserError(f"--picture {args.picture}: wanted a name that ends in .png")
    from spilt.model import host
    from spilt.run import quiet_libraries

    quiet_libraries()
    base, tuned = (host.load(locate(args.base_dir, said)[1], "float32", args.device) for said in (args.base, args.tuned))
    ids = [base.tokenizer(text, return_tensors="pt")["input_ids"][:, :SHOWN].to(args.device) for text in texts]
    found = blocks(base.model, tuned.model, ids)
    if args.picture is not None:
        from spilt.report.drawing import png_of
        from spilt.report.figures import oracle_figure

        atomic_write(args.picture, png_of(oracle_figure([one._asdict() for one in found])))
    if args.json:
        rows = [{"block": layer, **one._asdict()} for layer, one in enumerate(found)]
        print(json.dumps({"spilt": __version__, "schema": 1, "base": args.base, "tuned": args.tuned, "texts": len(texts), "blocks": rows}))
        return 0
    say(f"block  {'  '.join(f'rank of {part:.0%}' for part in HELD)}  KL (nats)  MLP's share")
    for layer, one in enumerate(found):
        ranks = "  ".join(f"{rank:>11}" for rank in one.ranks or ("-",) * len(HELD))
        say(f"{layer:5}  {ranks}  {one.kl:9.4g}  {'-' if one.mlp is None else f'{one.mlp:.0%}':>11}")
    return 0


def blocks(base: Any, tuned: Any, ids: Sequence[Any]) -> list[Block]:
    """Over all tokens of the texts [1, T] together."""
    import torch

    from spilt.engine import oracle
    from spilt.steering import anatomy

    added = torch.cat([oracle.oracle(base, tuned, one).added for one in ids], 2)
    scale = [max(float(oracle.outputs(base, one)[layer].abs().max()) for one in ids) for layer in range(len(added))]
    if all(part.abs().max() <= NOTHING * size for part, size in zip(added, scale, strict=True)):
        raise UserError("the models give the same streams on these texts: there is nothing to add")
    weights = [one.shape[1] for one in ids]
    kl = [oracle.kl_by_layer(base, tuned, one) for one in ids]
    shares: list[Any] = [None] * len(added)
    if not anatomy.family(base).norm_after_mlp:
        every = [oracle.parts(base, tuned, one) for one in ids]
        shares = oracle.mlp_share(oracle.Parts(*(torch.cat(part, 2) for part in zip(*every, strict=True))))
    found = []
    for layer, share in enumerate(shares):
        nats = sum(one[layer] * n for one, n in zip(kl, weights, strict=True)) / sum(weights)
        share = None if share is None or not math.isfinite(share) else share
        if added[layer].abs().max() <= NOTHING * scale[layer]:
            found.append(Block(None, [], nats, share))
            continue
        spectrum = oracle.spectrum(added[layer])
        found.append(Block(tuple(oracle.rank_of(spectrum, part) for part in HELD), spectrum[:64].tolist(), nats, share))
    return found


if __name__ == "__main__":
    sys.exit(main())
