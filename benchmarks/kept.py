"""What a fit's backward pass keeps in memory on a model of real shape: counted on the CPU, tensor by tensor, no GPU needed.

    python benchmarks/kept.py                                   # Gemma-2-9B and Qwen2.5-7B, batch 4, length 512, bfloat16
    python benchmarks/kept.py --shapes gemma-2-2b --length 128 --batch 16

One row is run through the suffix of the shape with one and with two blocks after the steered one; the difference is what
a block keeps. Widths are the real ones, so is the number of blocks in the sum; the vocabulary is cut (the head keeps the
scored rows alone, which are counted by hand).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import world  # noqa: E402
from spilt import memory
from spilt.engine import passes, suffix  # noqa: E402

SCORED = 8  # answer tokens of a row


def held(shape: world.Shape, blocks: int, length: int, dtype: str, lean: bool) -> int:
    """Bytes of tensors that the graph holds, parameters left out, for one row through `blocks` blocks after the first."""
    model = world.model(shape.config | {"num_hidden_layers": blocks + 1, "vocab_size": 1000}, dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Any:
        node = t.grad_fn
        if lean and type(node).__name__ in passes.RECOMPUTED:
            return node
        place = t.untyped_storage()
        if place.data_ptr() not in own:
            found[place.data_ptr()] = place.nbytes()
        return t

    stream = torch.randn(1, length, shape.config["hidden_size"], dtype=getattr(torch, dtype)).requires_grad_()
    keep = torch.zeros(1, length, dtype=torch.bool)
    keep[0, -SCORED - 1 : -1] = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = suffix.logits(model, 0, stream, keep)
    assert logits.grad_fn is not None
    return sum(found.values())


def report(name: str, length: int, batch: int, dtype: str) -> dict[str, float]:
    """Bytes: of a block and row (also without `lean`), of a whole minibatch at once, and the peak as it is run, part by part."""
    shape = world.SHAPES[name]
    c, size = shape.config, getattr(torch, dtype).itemsize
    # the last block's MLP sees the scored rows alone, so blocks are told apart above it
    block = held(shape, 3, length, dtype, True) - held(shape, 2, length, dtype, True)
    plain = held(shape, 3, length, dtype, False) - held(shape, 2, length, dtype, False)
    above, rows = c["num_hidden_layers"] - shape.layer - 1, 2 * batch
    at_once = max(1, min(rows, memory.max_tokens("cuda", backward=True) // length))
    parameters = (c["intermediate_size"] + 1) * c["hidden_size"] * 4
    # of the whole minibatch: x in float32 for dW's gradient, the stream, the delta and the slope; of the part: logits and their gradient
    steered = rows * length * (4 * c["intermediate_size"] + c["hidden_size"] * (4 + 3 * size))
    head = at_once * SCORED * c["vocab_size"] * (3 * size + 4)
    return {
        "a block and row": block,
        "the same with the activation kept": plain,
        "minibatch at once": rows * above * block,
        "rows at once": at_once,
        "suffix of a part": at_once * above * block,
        "peak above weights": at_once * above * block + steered + head + 5 * parameters,  # parameter, gradient twice, two moments
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gemma-2-9b", "qwen2.5-7b"], choices=list(world.SHAPES))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="pairs; both answers are scored")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    rows = [report(name, args.length, args.batch, args.dtype) for name in args.shapes]
    print(f"| {args.dtype}, batch {args.batch}, length {args.length} | {' | '.join(args.shapes)} |")
    print("|---" * (len(rows) + 1) + "|")
    for key in rows[0]:
        cells = [f"{row[key]:.0f}" if key == "rows at once" else f"{row[key] / 1e9:.2f} GB" for row in rows]
        print(f"| {key} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
