"""log p of the token after each of many texts, each at its own multiplier: one forward per text, nothing is generated.

By the fast engine the blocks up to the lowest steered one run once per text, whatever the number of multipliers, and the beginning that all
texts share once; else by hooks and the library's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from spilt import memory
from spilt.data.batches import by_length, pad
from spilt.data.chat import Encoded
from spilt.engine import choice, whole
from spilt.engine.decode import refuse_not_finite
from spilt.engine.prompts import Prompts, Row
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering


@torch.no_grad()
def logprobs(
    model: nn.Module, steering: Steering | None, rows: Sequence[Row], pad_id: int, batch_size: int = 16, engine: str = choice.FAST
) -> Iterator[tuple[int, Tensor]]:
    """(number of the row, log p [V] float32 on the CPU), in any order. steering None: the unsteered model, whatever the multipliers.

    A steering acts at multiplier 0 too: some are not the identity there. Raises NotFinite where scores break down.
    """
    device = anatomy.input_device(model)
    family = str(model.config.model_type)  # type: ignore[union-attr]
    fast = steering is not None and not choice.why_plain(steering.places, "generate", family=family, engine=engine)
    prompts = Prompts(model, steering.at, rows, pad_id, device) if steering is not None and fast else None
    found: list[tuple[int, Tensor]] = []

    def some(numbers: Sequence[int]) -> None:
        here = [rows[i] for i in numbers]
        scores = prompts.start(rows, list(numbers)).scores if prompts else _plain(model, steering, here, pad_id, device)
        refuse_not_finite(scores, here)
        found.extend(zip(numbers, scores.float().log_softmax(-1).cpu(), strict=True))

    # those of a text beside each other: what is recorded of it is kept as long as rows want it
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].prompt), rows[i].prompt))
    for numbers in by_length([len(rows[i].prompt) for i in order], memory.max_tokens(device.type), batch_size):
        longest = f"texts of up to {max(len(rows[order[i]].prompt) for i in numbers)} tokens"
        memory.halved(some, [order[i] for i in numbers], longest, f"one of the {longest} does not fit in memory; use --device auto")
        yield from found
        found.clear()


def _plain(model: nn.Module, steering: Steering | None, rows: Sequence[Row], pad_id: int, device: torch.device) -> Tensor:
    """Scores [B, V] by the library's own forward, padded on the right."""
    batch = pad([Encoded(row.prompt, len(row.prompt), 0) for row in rows], pad_id)
    strength = torch.tensor([row.multiplier for row in rows], dtype=torch.float32, device=device)
    with hooks.attach(model, []) if steering is None else whole.steer(model, steering, strength):
        out = model(**batch.inputs(device))
    return out.logits[range(len(rows)), [len(row.prompt) - 1 for row in rows]]
