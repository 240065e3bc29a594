"""A PEFT adapter for vLLM, and the line that serves it.

vLLM applies LoRA weights alone, no biases (its pull request 25807 took `bias_enabled` away), of rank at most 512.
"""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from spilt.errors import UserError
from spilt.export import peft
from spilt.export.folding import Job, biases, factors
from spilt.steering.folding import ANYTHING

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
ADAPTER = "adapter"
ABOUT = """```sh
{line}
```

Run in this folder; requests then name the model `steered` (or the base model, for unsteered answers)."""


def write(job: Job, folder: Path) -> str:
    most = adapter(job, folder / ADAPTER)
    words = ["vllm", "serve", job.base, "--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"steered={ADAPTER}"]
    return ABOUT.format(line=shlex.join(words))


def adapter(job: Job, folder: Path) -> int:
    """The adapter alone; returns the maximal rank that vLLM is to be told."""
    pairs = factors(job)
    if not pairs or biases(job):
        why = "vLLM's LoRA has no biases, and this Steering adds a constant"
        raise UserError(f"{why}; --format merged, --format vllm-hook for a vector, or {ANYTHING}")
    rank = next(iter(pairs.values()))[0].shape[1]
    if rank > RANKS[-1]:
        raise UserError(f"this Steering is a LoRA of rank {rank}, and vLLM takes {RANKS[-1]} at most; --format merged, or {ANYTHING}")
    peft.write(job, folder)
    return next(n for n in RANKS if n >= rank)


def reload(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    """By PEFT: vLLM itself needs a GPU."""
    return peft.reload(job, folder / ADAPTER)
