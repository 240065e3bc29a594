"""KL(steered || base) along the steered path: how much steering changes what comes next, at each token of the text that it makes.

KL_t = sum_v p_s(v) (log p_s(v) - log p_b(v)), v over the whole vocabulary, both distributions after the same tokens (arXiv 2511.05408's
rebuilds; design/weight_steering.md 2.5).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt import memory
from spilt.data.batches import pad
from spilt.data.chat import Encoded
from spilt.engine import scopes, whole
from spilt.engine.decode import Active, refuse_not_finite
from spilt.engine.prompts import Prompts, Row, forward
from spilt.engine.sampling import Decoding, choose
from spilt.methods.scoring import scored_positions
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering

log = logging.getLogger("spilt")
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

    def steered(part: Sequence[Encoded]) -> AbstractContextManager[Any]:
        return whole.steer(model, steering, multiplier, whole.acts(part, positions, prefix))

    def last(ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        return scopes.last_logits(model, steering, multiplier, ids, mask, keep)

    yield from compared(model, steered, texts, texts, pad_id, last if positions == scopes.LAST else None)


@torch.no_grad()
def compared(
    model: nn.Module,
    steered: Callable[[Sequence[Encoded]], AbstractContextManager[Any]],
    texts: Sequence[Encoded],
    base_texts: Sequence[Encoded],
    pad_id: int,
    read: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Told]:
    """As `told`, by any way to steer: a context in which the model is steered for these texts.

    base_texts: the same answers as the unsteered model reads them, perhaps behind other prompts. read: in place of the context, (ids,
    attention mask, the tokens that are kept [B, T]) to the steered logits [n, V] there.
    """
    together = at_once(model, [*texts, *base_texts])
    device = anatomy.input_device(model)

    def plain(ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[keep.to(logits.device)]

    def log_probs(part: list[Encoded], attached: AbstractContextManager[Any], read: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        batch = pad(part, pad_id)
        keep = scored_positions(batch.answer_mask)
        with attached:
            logits = read(batch.input_ids.to(device), batch.attention_mask.long().to(device), keep.to(device))
        return logits.float().log_softmax(-1), batch.input_ids[batch.answer_mask]

    for begin in range(0, len(texts), together):
        part = list(texts[begin : begin + together])
        steered_p, _ = log_probs(part, steered(part) if read is None else nullcontext(), read or plain)
        base, tokens = log_probs(list(base_texts[begin : begin + together]), hooks.attach(model, []), plain)
        kl = _kl(steered_p, base).cpu()
        loss = -base.gather(-1, tokens.to(base.device)[:, None])[:, 0].double().cpu()
        lengths = [len(text.input_ids) - text.prompt_length for text in part]
        yield from map(Told, kl.split(lengths), loss.split(lengths))


def along_path(model: nn.Module, steering: Steering, multiplier: float, texts: Sequence[Encoded], pad_id: int) -> Iterator[Tensor]:
    """KL at each answer token of each text, one after the other, nats [tokens] float64; steered in the scope of the Steering."""
    return (one.kl for one in told(model, steering, multiplier, texts, pad_id, steering.scope))


def _kl(steered: Tensor, base: Tensor) -> Tensor:
    """sum_v p_s(v) (log p_s(v) - log p_b(v)): log p [..., V] to nats [...] float64."""
    change = (steered - base).masked_fill(steered == -torch.inf, 0)  # p = 0 adds nothing
    return (steered.double().exp() * change).sum(-1)


@torch.no_grad()
def rests_at_0(model: nn.Module, steering: Steering, prompt: Encoded, pad_id: int) -> bool:
    """Is the model at multiplier 0 the unsteered one, to the bit, at every token of a prompt?"""
    batch = pad([prompt], pad_id)
    ids = batch.input_ids.to(anatomy.input_device(model))
    with whole.steer(model, steering, 0.0):
        steered = model(input_ids=ids, use_cache=False).logits
    return torch.equal(steered, model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def while_decoding(model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, together: int) -> Iterator[Tensor]:
    """`along_path` of the greedy answers that `decode.generate` makes, while they are made: beside each row goes an unsteered one, given
    its tokens. For a steering that rests at 0, where the fast engine decodes. together: rows of both kinds at once.
    """
    begin, half = 0, max(1, together // 2)
    while begin < len(rows):
        try:
            found = _side_by_side(model, steering, rows[begin : begin + half], how)
        except (RuntimeError, MemoryError) as error:
            if half == 1 or not memory.ran_out(error):
                raise
            half //= 2
            log.warning("out of memory: divergence of several texts at once; going on with %d", half)
            continue
        yield from found
        begin += half


def _side_by_side(model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding) -> list[Tensor]:
    n = len(rows)
    both = [*rows, *(row._replace(multiplier=0.0) for row in rows)]  # row i + n follows row i
    device = anatomy.input_device(model)
    prompts = Prompts(model, steering.at, both, how.pad, device, 2 * n)
    columns = max(len(row.prompt) for row in rows) + how.max_new_tokens - prompts.shared
    active = Active(2 * n, columns)
    for started in prompts.few_at_a_time(both, range(2 * n)):
        active.join(started)
    new: list[list[int]] = [[] for _ in rows]
    kl: list[list[float]] = [[] for _ in rows]
    while True:
        refuse_not_finite(active.scores, [both[i] for i in active.rows])
        going = [i for i in active.rows if i < n]
        steered, base = ([active.rows.index(i + shift) for i in going] for shift in (0, n))
        log_p = active.scores.log_softmax(-1)
        ids = [[*rows[i].prompt, *new[i]] for i in going] if how.processors else []
        chosen = dict(zip(going, choose(active.scores[steered], how, None, ids).tolist(), strict=True))
        for i, nats in zip(going, _kl(log_p[steered], log_p[base]).tolist(), strict=True):
            new[i].append(chosen[i])
            kl[i].append(nats)
        ended = {i for i in going if chosen[i] in how.eos or len(new[i]) >= how.max_new_tokens}
        keep = [place for place, i in enumerate(active.rows) if i % n not in ended]
        if not keep:
            return [torch.tensor(one, dtype=torch.float64) for one in kl]

        def held(i: int) -> int:
            return len(both[i].prompt) + len(new[i % n]) - 1

        if ended:
            active.select(keep, max(held(active.rows[place]) for place in keep) - prompts.shared)
        tokens = torch.tensor([chosen[i % n] for i in active.rows], device=active.scores.device)
        begun = prompts.begun([both[i] for i in active.rows])
        active.scores = forward(model, steering.at(active.multiplier), tokens, [held(i) for i in active.rows], active.cache, begun)


@torch.no_grad()
def next_token(model: nn.Module, steering: Steering, multiplier: float, prompts: Sequence[Encoded], pad_id: int) -> Iterator[Tensor]:
    """log p of the token after each prompt, steered, [V] float32. prompts: without an answer."""
    together = at_once(model, prompts)
    device = anatomy.input_device(model)
    for begin in range(0, len(prompts), together):
        part = list(prompts[begin : begin + together])
        batch = pad(part, pad_id)
        with whole.steer(model, steering, multiplier):
            out = model(**batch.inputs(device))
        yield from out.logits[range(len(part)), [len(one.input_ids) - 1 for one in part]].float().log_softmax(-1).cpu()
