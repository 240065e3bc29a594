"""A vector for vLLM-Hook's steer worker, with its configuration.

It reads {"steering": {vector_path, method: add_vector, coefficient, optimal_layer}}, per request as `steer`, with vector_path a torch
file of {"dir": [D]}, and adds coefficient dir to the output of decoder layer optimal_layer (mia/workers/steer_worker.py and
docs/mia_v0/configs.md of IBM/vLLM-Hook).
"""

from __future__ import annotations

import json
import shlex
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from spilt.engine import whole
from spilt.errors import UserError
from spilt.export.folding import Job, at_blocks
from spilt.steering.folding import ANYTHING
from spilt.steering.interventions import Vector
from spilt.steering.steering import Steering

CONFIG, DIRECTION = "steer.json", "vector.pt"
ABOUT = """With [vLLM-Hook](https://github.com/IBM/vLLM-Hook):

```sh
VLLM_WORKER_MULTIPROC_METHOD=spawn MIA_WORKER=steer vllm serve {base} --enforce-eager
```

Each request carries the `steering` part of {config}, as a string of JSON: `extra_body={{"vllm_xargs": {{"steer": "..."}}}}`. The
coefficient is the multiplier and may be another one; `vector_path` must be the place of {direction} on the serving machine."""


def write(job: Job, folder: Path) -> str:
    constants = {} if any(made.folded()[0] is not None for _, made in job.steering) else at_blocks(job._replace(multiplier=1.0))
    if len(constants) != 1:
        why = f"vLLM-Hook adds one vector at one block's output, and this is {job.steering}"
        raise UserError(f"{why}; --format vllm for a LoRA, or {ANYTHING}")
    ((layer, vector),) = constants.items()
    torch.save({"dir": vector.tolist()}, folder / DIRECTION)
    known = {"vector_path": str(job.place / DIRECTION), "method": "add_vector", "coefficient": job.multiplier, "optimal_layer": layer}
    (folder / CONFIG).write_text(json.dumps({"steering": known}, indent=1) + "\n", encoding="utf-8")
    return ABOUT.format(base=shlex.quote(job.base), config=CONFIG, direction=DIRECTION)


def reload(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    """The same sum as vLLM-Hook's, from the two files, on the model in memory."""
    known = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["steering"]
    vector = torch.tensor(torch.load(folder / DIRECTION, weights_only=True)["dir"])
    steering = Steering.of({known["optimal_layer"]: Vector.from_state(vector)})
    return whole.steer(job.model, steering.to(job.model), known["coefficient"])
