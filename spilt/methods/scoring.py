"""Token log-probabilities and answer losses: pure functions of tensors. All quantities in nats.

The causal shift is done once, here: the logits at position t score the token at t + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # rows of logits that are held in float32 at once


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(logits)[target] without a float32 copy of all logits: float32 only for `CHUNK` rows at a time."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        log_z = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(CHUNK)]) if len(logits) else logits.new_zeros(0).float()
        ctx.save_for_backward(logits, targets, log_z)
        return logits.gather(-1, targets[:, None])[:, 0].float() - log_z

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        """d log p(target) / d logits = onehot(target) - softmax(logits)."""
        logits, targets, log_z = ctx.saved_tensors
        out = torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK):
            part = slice(start, start + CHUNK)
            rows = (logits[part].float() - log_z[part, None]).exp_().mul_(-grad[part, None])
            rows.scatter_add_(-1, targets[part, None], grad[part, None])
            out[part] = rows
        return out, None


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) for logits [n, V] and targets [n] -> [n], float32."""
    result = _TokenLogProbs.apply(logits, targets)
    assert isinstance(result, Tensor)
    return result


def scored_positions(answer_mask: Tensor) -> Tensor:
    """[B, T] bool: the positions whose logits score an answer token, i.e. the answer mask moved one to the left."""
    keep = torch.zeros_like(answer_mask)
    keep[:, :-1] = answer_mask[:, 1:]
    return keep


class AnswerLogProbs(NamedTuple):
    """Per sequence: log p of the answer summed over its tokens, that count, and all real tokens (prompt included)."""

    total: Tensor  # [B] nats
    tokens: Tensor  # [B]
    length: Tensor  # [B]

    def mean_loss(self) -> Tensor:
        """L = -sum over the batch's answer tokens of log p / their number: the released token mean. Scalar."""
        return -self.total.sum() / self.tokens.sum()

    def losses(self) -> Tensor:
        """L(A) per sequence, nats per answer token [B]."""
        return -self.total / self.tokens


def answer_logprobs(logits: Tensor, input_ids: Tensor, answer_mask: Tensor, length: Tensor) -> AnswerLogProbs:
    """From logits [n, V] at `scored_positions(answer_mask)` (row-major) to sums per sequence; length [B]: its real tokens."""
    token = token_logprobs(logits, input_ids[answer_mask])
    rows = answer_mask.nonzero()[:, 0]
    total = torch.zeros(len(input_ids), dtype=token.dtype, device=token.device).index_add(0, rows, token)
    return AnswerLogProbs(total, answer_mask.sum(1), length)
