"""Steered rows through the suffix and back, with weight 1 for each: log p_b depends on row b alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spilt.data.batches import Batch
from spilt.engine import attention, packing, suffix
from spilt.methods.scoring import AnswerLogProbs, answer_logprobs, scored_positions
from spilt.steering import hooks
from spilt.steering.interventions import Intervention, Multiplier


class ForwardInput(NamedTuple):
    """Rows [B, T] of one fit, ready for the blocks after `layer`."""

    model: nn.Module
    layer: int  # the recorded one
    tokens: Batch
    length: Tensor  # [B] real tokens of the whole sequence
    stream: Tensor  # [B, T, D] that leaves block `layer`; steered, with its graph, unless `inside`
    inside: hooks.Applied | None  # steered inside a later block: its intervention is a Cut
    start: int  # place of the first column in its sequence
    prefix_kv: packing.KeysValues  # of the `start` tokens before
    checkpointed: bool = False  # each block runs again in the backward pass, since memory is short


class ForwardResult(NamedTuple):
    """What came of them: log p without graph; the steered stream with its graph; d log p_b / d steered_b."""

    scored: AnswerLogProbs
    steered: Tensor
    slope: Tensor


class Cut(Intervention):
    """An intervention whose graph ends behind it: the model goes on with `leaf`, which holds the values of `steered`."""

    def __init__(self, inner: Intervention) -> None:
        super().__init__(inner.read_point, inner.write_point, 0.0)
        self.inner = inner
        self.steered = self.leaf = torch.empty(0)

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        self.steered = self.inner(h, x, multiplier)
        self.leaf = self.steered.detach().requires_grad_()
        return self.leaf


# what an activation function returned is not kept for the backward pass: it is computed again from its input, which is
RECOMPUTED: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(node._saved_self, approximate=node._saved_approximate),
}


def recompute_activations() -> AbstractContextManager[Any]:
    """Inside: the graph keeps two of the three middles of a gated MLP, act(g) u; the same gradients, bit for bit."""

    def pack(kept: Tensor) -> Any:
        node = kept.grad_fn
        return node if type(node).__name__ in RECOMPUTED else kept

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else RECOMPUTED[type(kept).__name__](kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def forward_backward(given: ForwardInput) -> ForwardResult:
    """All rows in one batch through the suffix, and back."""
    device, stream = given.stream.device, given.stream.detach()
    inputs: dict[str, Any] = {}
    if given.start or attention.products_win(stream):
        place = torch.arange(given.start, given.start + stream.shape[1], device=device).expand(len(stream), -1)
        branch = torch.where(given.tokens.attention_mask, packing.SHARED, packing.PADDING)
        inputs = packing.attention_inputs(given.model, packing.Rows(given.tokens.input_ids, place, branch), given.start)
        before = packing.given(given.prefix_kv, len(stream)) if given.start else None
        inputs |= {"past_key_values": before, "use_cache": before is not None}
    leaf = stream.requires_grad_(given.inside is None)
    saving = suffix.checkpointed(given.model, given.layer) if given.checkpointed else recompute_activations()
    with attention.sequences(given.model, inputs):  # what runs again in the backward pass, too
        with saving, hooks.attach(given.model, [] if given.inside is None else [given.inside]):
            logits = suffix.logits(given.model, given.layer, stream, scored_positions(given.tokens.answer_mask), **inputs)
        scored = answer_logprobs(logits, given.tokens.input_ids, given.tokens.answer_mask, given.length.to(logits.device))
        steered = given.stream
        if given.inside is not None:
            cut = given.inside.intervention
            assert isinstance(cut, Cut)
            leaf, steered = cut.leaf, cut.steered
        (slope,) = torch.autograd.grad(scored.total.sum(), [leaf])
    return ForwardResult(AnswerLogProbs(*(column.detach() for column in scored)), steered, slope)
