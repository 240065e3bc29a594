"""Rank 1 on the relabelled ListOps world of tests/listops_world.py: how far accuracies of one seed and another lie apart.

    OMP_NUM_THREADS=1 python benchmarks/listops.py --bases 0 1 --seeds 0 1 2 3
    OMP_NUM_THREADS=1 python benchmarks/listops.py --nonlinearity linear --set epochs=8

A base model for each --bases (240 steps on ListOps of depth 1), a data set and a start of the adapters for each --seeds, 2,000 rows and
500 unseen ones with (k + 1) mod 10, or --answer. An answer is right where each of its tokens is the likeliest, as greedy decoding has it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import listops_world as world  # noqa: E402
import torch  # noqa: E402

from spilt.data.batches import pad  # noqa: E402
from spilt.data.chat import Encoded  # noqa: E402
from spilt.downstream import listops, training, variants  # noqa: E402
from spilt.downstream.words import TrainSettings, Variant  # noqa: E402
from spilt.engine import whole  # noqa: E402

USED: dict[str, Any] = {"lr": 1e-2, "bs": 16, "grad_accum": 1, "epochs": 2}  # of section 11 of the design: 250 steps of 16 rows


def rows(seed: int, times: int, plus: int) -> tuple[list[Encoded], list[Encoded]]:
    """As world.write_task has them: training rows, and rows of other expressions; k is answered (times k + plus) mod 10."""
    words, known, parts = world.tokenizer(), frozenset[str](), []
    for number, count in enumerate((world.TRAIN, 50, world.TEST)):
        made = listops.expressions(count, world.SHAPE, 1000 * seed + number, known)
        known |= set(made)
        before = [words(world.prompt(text))["input_ids"] for text in made]
        after = [
            words(world.completion((times * listops.value(text) + plus) % 10), add_special_tokens=False)["input_ids"] + [2] for text in made
        ]
        parts.append([Encoded((*a, *b), len(a), 1) for a, b in zip(before, after, strict=True)])
    return parts[0], parts[2]


@torch.no_grad()
def accuracy(model: Any, steering: Any, held: list[Encoded]) -> float:
    right = 0
    for batch in training.chunks(held, 125):
        padded = pad(batch, 0)
        with whole.steer(model, steering, 1.0):
            logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        same = logits[:, :-1].argmax(-1) == padded.input_ids[:, 1:]
        right += int((same | ~padded.answer_mask[:, 1:]).all(1).sum())
    return right / len(held)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bases", nargs="+", type=int, default=[0])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    options.add_argument("--rank", type=int, default=1)
    options.add_argument("--kind", default="post_block")
    options.add_argument("--nonlinearity", default="silu")
    options.add_argument("--alpha", type=float, default=1.0)
    options.add_argument("--initial", type=float, default=1.0, help="D begins at this many times its own start")
    options.add_argument("--answer", nargs=2, type=int, default=[1, 1], metavar=("A", "B"), help="(A k + B) mod 10")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the training: lr=0.02 epochs=8")
    chosen = options.parse_args()
    said = {key: type(getattr(TrainSettings, key))(value) for key, _, value in (word.partition("=") for word in chosen.set)}
    begun, found = time.process_time(), []
    for base in chosen.bases:
        model = world.pretrained(base)
        for seed in chosen.seeds:
            learned, held = rows(seed, *chosen.answer)
            steering = variants.make(model, Variant(chosen.kind, chosen.rank, chosen.nonlinearity, alpha=chosen.alpha), seed)
            with torch.no_grad():
                for _, one in steering:
                    if chosen.initial != 1.0:
                        one.down.mul_(chosen.initial)
            training.train(training.Steered(model, steering, 0), learned, TrainSettings(**{**USED, **said, "seed": seed}))
            found.append(accuracy(model, steering, held))
            print(f"base {base} seed {seed}: {found[-1]:.3f}", flush=True)
    spread = f" (standard deviation {statistics.stdev(found):.2f})" if len(found) > 1 else ""
    print(f"mean {statistics.mean(found):.3f}{spread}, {min(found):.3f} to {max(found):.3f}; {time.process_time() - begun:.0f} CPU s")


if __name__ == "__main__":
    main()
