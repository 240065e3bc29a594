"""Before a fit is stored: do the pairs agree on a direction at its layer? Told, kept with the fit, and warned of where they do not."""

from __future__ import annotations

import logging
from typing import Any

import torch

from spilt.analysis.direction import Direction, screen
from spilt.data import readers
from spilt.data.chat import Encoded
from spilt.tasks.recordings import Run
from spilt.verbs import Step

log = logging.getLogger("spilt")
PAIRS = 128  # the first so many are looked at


def direction(step: Step, layer: int, run: Run, fmt: readers.DatasetFormat) -> Direction | None:
    """None where rows have no two answers, or no block's output is steered that could be looked at."""
    settings: Any = step.settings
    (cell,) = step.cells
    limit = min(run.recordings.rows(settings) or PAIRS, PAIRS)
    pairs = readers.read_pairs(fmt, cell.concept, limit)
    if pairs[0].kind in (readers.ONE_SIDED, readers.QUESTIONS):
        return None
    key = next((key for key in run.recordings.keys(step) if key.layer == layer), None)
    if key is not None and key in run.recordings.kept:  # recorded for the fit
        cache = run.recordings.kept[key].first(2 * limit)
        means = [
            cache.batch([i], None, cache.h.device)[1].h[0].float()[one.prompt_length : len(one.input_ids) - one.suffix_length].mean(0)
            for i, one in enumerate(cache.sequences)
        ]
        found = torch.stack(means).cpu()
    else:
        chat = run.host.chat(settings.use_chat_template, settings.system_prompt)
        sequences: list[Encoded] = [chat.encode_caa(question, text, p.row) for p in pairs for question, text in p.sides]
        found = run.recordings.means(step, run.host.model, [layer], sequences, False, run.host.pad_id)[layer].cpu()
    return screen(found[0::2].numpy(), found[1::2].numpy())


def tell(step: Step, layer: int, run: Run, fmt: readers.DatasetFormat) -> dict[str, Any] | None:
    """What a manifest keeps of it; nan is None."""
    found = direction(step, layer, run, fmt)
    if found is None:
        return None
    line = f"{step} layer {layer}: {found.told}"
    if run.progress.quiet:
        log.info("%s", line)
    else:
        run.progress.tell(line)
    if found.doubt:
        log.warning("%s layer %d: %s", step, layer, found.doubt)
    return {name: value if value == value else None for name, value in found._asdict().items()}
