"""KL(steered || base) along the steered path: how much steering changes what comes next, at each token of the text that it makes.

KL_t = sum_v p_s(v) (log p_s(v) - log p_b(v)), v over the whole vocabulary, both distributions after the same tokens (arXiv 2511.05408's
rebuilds; design/weight_steering.md 2.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt.data.batches import pad
from spilt.data.chat import Encoded
from spilt.engine import scopes, whole
from spilt.methods.scoring import scored_positions
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering

LOGITS = 2**26  # held at once, for either distribution


class Told(NamedTuple):
    """At each answer token of a text, nats [tokens] float64: KL(steered || base), and -log p_base of the token itself."""

    kl: Tensor
    loss: Tensor


def at_once(model: nn.Module, texts: Sequence[Encoded]) -> int:
    """How many texts are read together."""
    return max(1, LOGITS // (max(len(text.input_ids) for text in texts) * anatomy.vocabulary(model)))


@torch.no_grad()
def told(
    model: nn.Module, steering: Steering, multiplier: float, texts: Sequence[Encoded], pad_id: int, positions: str = "all", prefix: int = 0
) -> Iterator[Told]:
    """For each text, one after the other. texts: prompts with what the steered model answered.

    positions: which tokens are steered (`steer_positions`); prefix: tokens of the template before the prompt.
    """
    together = at_once(model, texts)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for begin in range(0, len(texts), together):
        part = list(texts[begin : begin + together])
        batch = pad(part, pad_id)
        keep = scored_positions(batch.answer_mask).to(device)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.long().to(device)

        def scores(attached: AbstractContextManager[Any], ids: Tensor = ids, mask: Tensor = mask, keep: Tensor = keep) -> Tensor:
            with attached:
                return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[keep]

        if positions == scopes.LAST:
            made = scopes.last_logits(model, steering, multiplier, ids, mask, keep)
        else:
            made = scores(whole.steer(model, steering, multiplier, whole.acts(part, positions, prefix)))
        steered, base = (logits.float().log_softmax(-1) for logits in (made, scores(hooks.attach(model, []))))
        change = (steered - base).masked_fill(steered == -torch.inf, 0)  # p = 0 adds nothing
        kl = (steered.double().exp() * change).sum(-1).cpu()
        loss = -base.gather(-1, batch.input_ids[batch.answer_mask].to(base.device)[:, None])[:, 0].double().cpu()
        lengths = [len(text.input_ids) - text.prompt_length for text in part]
        yield from map(Told, kl.split(lengths), loss.split(lengths))


def along_path(model: nn.Module, steering: Steering, multiplier: float, texts: Sequence[Encoded], pad_id: int) -> Iterator[Tensor]:
    """KL at each answer token of each text, one after the other, nats [tokens] float64; steered in the scope of the Steering."""
    return (one.kl for one in told(model, steering, multiplier, texts, pad_id, steering.scope))


@torch.no_grad()
def next_token(model: nn.Module, steering: Steering, multiplier: float, prompts: Sequence[Encoded], pad_id: int) -> Iterator[Tensor]:
    """log p of the token after each prompt, steered, [V] float32. prompts: without an answer."""
    together = at_once(model, prompts)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for begin in range(0, len(prompts), together):
        part = list(prompts[begin : begin + together])
        batch = pad(part, pad_id)
        with whole.steer(model, steering, multiplier):
            out = model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.long().to(device), use_cache=False)
        yield from out.logits[range(len(part)), [len(one.input_ids) - 1 for one in part]].float().log_softmax(-1).cpu()
