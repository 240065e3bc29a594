"""Texts that are longer than the model's context: an error where its table of positions ends, elsewhere a warning. And how many of them
are made side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from spilt import memory
from spilt.data.chat import Encoded
from spilt.data.readers import Pair, Prompt
from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.team import place
from spilt.verbs.estimate import Batch, shape_from, side_by_side

log = logging.getLogger("spilt")


def check_context(model: nn.Module, what: str, texts: Sequence[tuple[int, int]], way_out: str, max_new_tokens: int | None = None) -> None:
    """texts: (0-based row of the data file, tokens). what: names the work in the warning, one for all texts.

    max_new_tokens: how many are generated after each. The last of them is chosen and never read, so it needs no position.
    Raises UserError when the model has a learned table of positions that is too short.
    """
    context = anatomy.context(model)
    if context is None:
        return
    more = max_new_tokens - 1 if max_new_tokens else 0
    beyond = [(tokens, row) for row, tokens in texts if tokens + more > context]
    if not beyond:
        return
    tokens, row = max(beyond)
    longest = f"row {row} (0-based), {tokens} tokens" + (f" with max_new_tokens {max_new_tokens}" if max_new_tokens else "")
    if anatomy.of(model).absolute_positions:
        raise UserError(f"{longest}: longer than the model's context of {context} tokens, where its table of positions ends; {way_out}")
    log.warning(
        "%s: %d of %d are longer than the model's context of %d tokens, beyond which it was not trained (the longest: %s); %s",
        what, len(beyond), len(texts), context, longest, way_out,
    )  # fmt: skip


def lengths_of(rows: Sequence[Pair | Prompt], sequences: Sequence[Encoded]) -> list[tuple[int, int]]:
    """For check_context: as many sequences of each row, one after the other."""
    each = len(sequences) // max(1, len(rows))
    return [(rows[i // each].row, len(sequence.input_ids)) for i, sequence in enumerate(sequences)]


def texts_at_once(model: nn.Module, given: int | None, prompts: Sequence[Sequence[int]], new: int) -> Batch:
    """Of a model that is loaded: `given`, else what its devices still hold. Processes on a CPU share its memory."""
    devices = {parameter.device for parameter in model.parameters()}
    kind = next((device.type for device in devices if device.type != "cpu"), "cpu")
    free = min(map(memory.free, devices)) * len(devices) / (place()[1] if kind == "cpu" else 1)
    if getattr(model, "tp_size", None):  # tensor parallel: all processes make the same batches
        import torch

        least = torch.tensor(free, dtype=torch.float64, device=min(devices, key=str))
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free = float(least)
    config, size = model.config.to_dict(), next(model.parameters()).dtype.itemsize  # type: ignore[operator, union-attr]
    return side_by_side(given, shape_from(config), size, max(map(len, prompts), default=0), new, free, kind)
