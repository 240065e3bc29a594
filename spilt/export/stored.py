"""The Steering itself, one safetensors file that says everything; the multiplier stays a number of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from spilt.engine import whole
from spilt.export.folding import Job
from spilt.steering.steering import RECOMMENDED, Steering

FILE = "steering.safetensors"
ABOUT = """```python
import spilt

model, tokenizer = spilt.load("the base model's folder")
with spilt.steer(model, spilt.Steering.load("{file}"), {multiplier:g}):
    ...
```

The multiplier is not in the numbers: any other can be given. For other programs: tensors `{{number}}.{{name}}`, a number for each
place; the metadata entry `steering` (JSON) has form, layer, read point and write point of each."""


def write(job: Job, folder: Path) -> str:
    Steering(job.steering, {**job.steering.about, RECOMMENDED: job.multiplier}).save(folder / FILE)
    return ABOUT.format(file=FILE, multiplier=job.multiplier)


def reload(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    steering = Steering.load(folder / FILE)
    return whole.steer(job.model, steering.to(job.model), steering.about[RECOMMENDED])
