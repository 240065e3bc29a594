"""Difference of means beside the steering-vectors library, in one process: the same pairs, the same vectors.

    pip install steering-vectors
    OMP_NUM_THREADS=1 python benchmarks/extraction.py --pairs 64 --batch 1 8

Answers are one token: the last one, which steering-vectors reads, is all that caa averages over. Medians of processor seconds in turns.
Layers: the one of the settings, or all blocks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import spilt  # noqa: E402
from benchmarks import decoding, world  # noqa: E402

ANSWERS = ("Yes", "No")  # caa, as released, puts a space before them


def texts_of(tokenizer: Any, question: str) -> tuple[str, str]:
    """Both texts whole, as the library wants them."""
    asked = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    yes, no = (f"{asked} {answer}" for answer in ANSWERS)
    return yes, no


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2-12x512", choices=list(world.SHAPES))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of steering-vectors, whose default is 1")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        from steering_vectors import train_steering_vector
    except ImportError:
        parser.error("the library steering-vectors is not installed: pip install steering-vectors")
    shape = world.SHAPES[args.shape]
    model, tokenizer = world.model(shape), world.tokenizer(shape.config["vocab_size"])
    asked = world.questions(args.pairs, shape.config["vocab_size"], 0)
    both = [texts_of(tokenizer, question) for question in asked]
    pairs = [(question, *ANSWERS) for question in asked]
    columns = ["layers", "batch of theirs", "times faster", "ours CPU s", "theirs CPU s", "largest difference, of the largest number"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for layers in ([shape.layer], [*range(shape.config["num_hidden_layers"])]):
        for batch in args.batch:

            def ours(layers: list[int] = layers) -> Any:
                return spilt.fit(model, tokenizer, pairs, layer=layers, method="caa")

            def theirs(layers: list[int] = layers, batch: int = batch) -> Any:
                return train_steering_vector(model, tokenizer, both, layers=layers, batch_size=batch)

            runs = [(decoding.cpu_seconds(ours), decoding.cpu_seconds(theirs)) for _ in range(args.repeats)]
            took = [statistics.median(run[side][0] for run in runs) for side in (0, 1)]
            made, read = runs[0][0][1], runs[0][1][1]
            vectors = {site.layer: vector for site, vector in made}
            theirs_of = read.layer_activations
            apart = max(float((vectors[layer].v - theirs_of[layer]).abs().max() / theirs_of[layer].abs().max()) for layer in layers)
            print(f"| {len(layers)} | {batch} | **{took[1] / took[0]:.1f}** | {took[0]:.1f} | {took[1]:.1f} | {apart:.1g} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
