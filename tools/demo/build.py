"""Rebuilds examples/demo/{data,models,hparams} from nothing: python tools/demo/build.py"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.demo import data, hparams, tokenizer, train  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_only", action="store_true", help="data and hparams only")
    args = parser.parse_args()
    torch.set_num_threads(1)

    files = data.build()
    data.write(files, args.out / "data")
    hparams.write(args.out / "hparams")
    if args.data_only:
        return
    questions, statements = data.held_out(files)
    rng = Random(args.seed)
    makers = [maker for _, maker in train.MIXED]
    dialogues = [rng.choice(makers)(rng) for _ in range(20_000)]
    bpe = tokenizer.train(tokenizer.render(*d[:3]) for d in dialogues)
    folder = args.out / "models" / hparams.MODEL
    tokenizer.save(bpe, folder)
    source = train.Source(bpe, questions, statements, args.seed)
    model = train.train(source, args.seed, log=lambda line: print(line, flush=True))
    train.save(model, folder)
    shutil.copyfile(Path(__file__).with_name("card.md"), folder / "README.md")


if __name__ == "__main__":
    main()
