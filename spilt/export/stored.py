"""The Steering itself, one safetensors file that says everything; the multiplier stays a number of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from spilt.export.folding import Job
from spilt.steering.steering import Steering

FILE = "steering.safetensors"
ABOUT = """```python
import spilt

model, tokenizer = spilt.load("the base model's folder")
steering = spilt.Steering.load("{file}")
{use}
```

The multiplier is not in the numbers: any other can be given. For other programs: tensors `{{number}}.{{name}}`, a number for each
place; the metadata entry `steering` (JSON) has form, layer, read point and write point of each."""
EVERYWHERE = "with spilt.steer(model, steering, {:g}):\n    ..."
SOME = 'spilt.generate(model, tokenizer, steering, "a prompt", {:g})'  # which obeys the scope


def write(job: Job, folder: Path) -> str:
    job.steering.save(folder / FILE)
    use = EVERYWHERE if job.steering.scope == "all" else SOME
    return ABOUT.format(file=FILE, use=use.format(job.multiplier))


def reload(job: Job, folder: Path) -> AbstractContextManager[Steering]:
    return nullcontext(Steering.load(folder / FILE).to(job.model))
