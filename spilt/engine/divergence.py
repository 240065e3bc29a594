"""KL(steered || base) along the steered path: how much steering changes what comes next, at each token of the text that it makes.

KL_t = sum_v p_s(v) (log p_s(v) - log p_b(v)), v over the whole vocabulary, both distributions after the same tokens (arXiv 2511.05408's
rebuilds; design/weight_steering.md 2.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from spilt.data.batches import pad
from spilt.data.chat import Encoded
from spilt.engine import whole
from spilt.methods.scoring import scored_positions
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering

LOGITS = 2**26  # held at once, for either distribution


@torch.no_grad()
def along_path(model: nn.Module, steering: Steering, multiplier: float, texts: Sequence[Encoded], pad_id: int) -> Iterator[Tensor]:
    """KL at each answer token of each text, one after the other, nats [tokens] float64; every token is steered.

    texts: prompts with what the steered model answered.
    """
    at_once = max(1, LOGITS // (max(len(text.input_ids) for text in texts) * anatomy.vocabulary(model)))
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for begin in range(0, len(texts), at_once):
        part = list(texts[begin : begin + at_once])
        batch = pad(part, pad_id)
        keep = scored_positions(batch.answer_mask).to(device)
        both = []
        for attached in (whole.steer(model, steering, multiplier), hooks.attach(model, [])):
            with attached:
                out = model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.long().to(device), use_cache=False)
            both.append(out.logits[keep].float().log_softmax(-1))
        steered, base = both
        change = (steered - base).masked_fill(steered == -torch.inf, 0)  # p = 0 adds nothing
        found = (steered.double().exp() * change).sum(-1).cpu()
        yield from found.split([len(text.input_ids) - text.prompt_length for text in part])
