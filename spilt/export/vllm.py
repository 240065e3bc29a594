"""Folders for vLLM: a PEFT adapter and the line that serves it, or a vector and its configuration for vLLM-Hook's steer worker.

vLLM applies LoRA weights alone, no biases (its pull request 25807 took `bias_enabled` away), of rank at most 512. vLLM-Hook reads
{"steering": {vector_path, method: add_vector, coefficient, optimal_layer}}, per request as `steer`, with vector_path a torch file of
{"dir": [D]}, and adds coefficient dir to the output of decoder layer optimal_layer (mia/workers/steer_worker.py, docs/mia_v0/configs.md).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from spilt.engine import whole
from spilt.errors import UserError
from spilt.export import peft
from spilt.export.folding import ANYTHING, Job, biases, factors
from spilt.steering.interventions import Vector
from spilt.steering.steering import Steering

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
ADAPTER, CONFIG, DIRECTION = "adapter", "steer.json", "vector.pt"
LORA = """```sh
{line}
```

Run in this folder; requests then name the model `steered` (or the base model, for unsteered answers)."""
HOOK = f"""With [vLLM-Hook](https://github.com/IBM/vLLM-Hook):

```sh
VLLM_WORKER_MULTIPROC_METHOD=spawn MIA_WORKER=steer vllm serve {{base}} --enforce-eager
```

Each request carries the configuration of {CONFIG} as `extra_body={{{{"vllm_xargs": {{{{"steer": json.dumps(config["steering"])}}}}}}}}`.
The coefficient is the multiplier and may be another one; `vector_path` must be the place of {DIRECTION} on the serving machine."""


def write_lora(job: Job, folder: Path) -> str:
    pairs = factors(job)
    if not pairs or biases(job, "down_proj"):
        why = "vLLM's LoRA has no biases, and this Steering adds a constant"
        raise UserError(f"{why}; --format merged, --format vllm-hook for a vector, or {ANYTHING}")
    rank = next(iter(pairs.values()))[0].shape[1]
    if rank > RANKS[-1]:
        raise UserError(f"this Steering is a LoRA of rank {rank}, and vLLM takes {RANKS[-1]} at most; --format merged, or {ANYTHING}")
    peft.write(job, folder / ADAPTER)
    most = next(n for n in RANKS if n >= rank)
    words = ["vllm", "serve", job.base, "--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"steered={ADAPTER}"]
    return LORA.format(line=shlex.join(words))


def reload_lora(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    """By PEFT: vLLM itself needs a GPU."""
    return peft.reload(job, folder / ADAPTER)


def write_hook(job: Job, folder: Path) -> str:
    constants = biases(job._replace(multiplier=1.0), "block")
    if factors(job) or len(constants) != 1:
        why = f"vLLM-Hook adds one vector at one block's output, and this is {job.steering}"
        raise UserError(f"{why}; --format vllm for a LoRA, or {ANYTHING}")
    ((layer, vector),) = constants.items()
    torch.save({"dir": vector.numpy().tolist()}, folder / DIRECTION)
    steering = {"vector_path": str(job.place / DIRECTION), "method": "add_vector", "coefficient": job.multiplier, "optimal_layer": layer}
    (folder / CONFIG).write_text(json.dumps({"steering": steering}, indent=1) + "\n", encoding="utf-8")
    return HOOK.format(base=shlex.quote(job.base))


@contextmanager
def reload_hook(job: Job, folder: Path) -> Iterator[nn.Module]:
    """The same sum as vLLM-Hook's, from the two files, on the model in memory."""
    known = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["steering"]
    vector = torch.tensor(torch.load(folder / DIRECTION, weights_only=True)["dir"])
    steering = Steering.of({known["optimal_layer"]: Vector.from_state(vector)})
    with whole.steer(job.model, steering.to(job.model), known["coefficient"]) as model:
        yield model
