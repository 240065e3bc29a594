"""layer_{id}.pt of the released code, one for each layer; in the folder of a cell the command line reads it as its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from spilt.engine import whole
from spilt.errors import UserError
from spilt.export.folding import Job
from spilt.steering import layer_file
from spilt.steering.folding import ANYTHING
from spilt.steering.steering import Steering

ABOUT = """In `vectors/{{model}}/{{method}}/{{dataset}}/{{method}}_{form}/` every word of the tool reads it as what was fitted there.
The multiplier is not in the numbers: `--multipliers {multiplier:g}`."""


def write(job: Job, folder: Path) -> str:
    wrong = [site.write_point for site, _ in job.steering if site.write_point != "block"]
    if wrong or len(job.steering) > len(job.steering.layers) or len({*job.steering.forms}) > 1:
        what = f"at {wrong[0]}" if wrong else f"as {job.steering}"
        raise UserError(f"a released file holds one form at the output of one block, and this acts {what}; {ANYTHING}")
    for site, made in job.steering:
        (folder / f"layer_{site.layer}.pt").write_bytes(layer_file.dump(made, None))
    return ABOUT.format(form=job.steering.forms[0], multiplier=job.multiplier)


def reload(job: Job, folder: Path) -> AbstractContextManager[nn.Module]:
    return whole.steer(job.model, Steering.load(folder).to(job.model), job.multiplier)
