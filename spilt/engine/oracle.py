"""A fine-tuned model as steering of its base: what has to be added behind every block (arXiv 2603.00425), and what it is made of.

delta_l = h_FT,l - f_l(h_FT,l-1), f_l the base's block: with it behind every block the base is the fine-tuned model, exactly. Its spectrum
says what rank could do it, the KL with one block alone put right how much is decided there, and the share of the MLP in the change of a
block's output how much an edit of the MLP's output alone could see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import Intervention, Multiplier


class _Put(Intervention):
    """h + m (wanted - h), wanted [B, T, D] of one batch of texts; it keeps what it added. None: it only looks."""

    def __init__(self, wanted: Tensor | None, write_point: str = "block") -> None:
        super().__init__(None, write_point, 0.0)
        self.wanted, self.added, self.seen = wanted, torch.empty(0), torch.empty(0)

    def delta(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        self.seen = h.detach()
        self.added = torch.zeros_like(h) if self.wanted is None else self.wanted.to(h) - h
        return multiplier * self.added


class Oracle(NamedTuple):
    """Of a base whose stream is put to the fine-tuned model's: what was added [layers, B, T, D], and its logits [B, T, V]."""

    added: Tensor
    logits: Tensor


@torch.no_grad()
def outputs(model: nn.Module, input_ids: Tensor, write_point: str = "block") -> Tensor:
    """[L, B, T, D]: what every block, or the part of it at a write point, gives. Texts without padding."""
    looks = [_Put(None, write_point) for _ in anatomy.blocks(model)]
    with hooks.attach(model, [hooks.Applied(layer, look, 0.0) for layer, look in enumerate(looks)]):
        model(input_ids=input_ids, use_cache=False)
    return torch.stack([look.seen.to(input_ids.device) for look in looks])


@torch.no_grad()
def oracle(base: nn.Module, tuned: nn.Module, input_ids: Tensor, layers: Iterable[int] | None = None) -> Oracle:
    """The base with its stream put right behind these blocks (None: all). Raises UserError for models of unlike shapes."""
    shapes = [(len(anatomy.blocks(model)), anatomy.hidden_size(model)) for model in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the models have {shapes[0]} and {shapes[1]} (blocks, width): one is no fine-tuned version of the other")
    wanted = outputs(tuned, input_ids)
    puts = {layer: _Put(wanted[layer]) for layer in (range(len(wanted)) if layers is None else layers)}
    with hooks.attach(base, [hooks.Applied(layer, put, 1.0) for layer, put in puts.items()]):
        found = base(input_ids=input_ids, use_cache=False).logits
    return Oracle(torch.stack([put.added.to(input_ids.device) for put in puts.values()]), found)


@torch.no_grad()
def kl_by_layer(base: nn.Module, tuned: nn.Module, input_ids: Tensor) -> list[float]:
    """KL(steered || fine-tuned), nats per token, with the stream put right behind one block alone: a number for each block."""
    wanted = tuned(input_ids=input_ids, use_cache=False).logits.double().log_softmax(-1)
    found = []
    for layer in range(len(anatomy.blocks(base))):
        steered = oracle(base, tuned, input_ids, [layer]).logits.double().log_softmax(-1)
        found.append(float((steered.exp() * (steered - wanted)).sum(-1).mean()))
    return found


def spectrum(added: Tensor) -> Tensor:
    """Shares of the squared singular values, largest first, of what is added behind one block, [..., D] as [tokens, D]."""
    squares = torch.linalg.svdvals(added.flatten(0, -2).double()) ** 2
    return squares / squares.sum()


def rank_of(shares: Tensor, part: float) -> int:
    """The smallest rank that holds so large a part of the squares."""
    return int((shares.cumsum(0) < part).sum()) + 1


class Parts(NamedTuple):
    """The change of every block's output [L, B, T, D], fine-tuned less base: of its MLP, and of all that goes around it."""

    mlp: Tensor
    skip: Tensor


def parts(base: nn.Module, tuned: nn.Module, input_ids: Tensor) -> Parts:
    """Raises UserError where a norm or a factor follows the MLP, so that its output is not what is added."""
    if anatomy.family(base).norm_after_mlp:
        raise UserError(
            f"{anatomy.family(base).model_type}: what its MLP gives is not what is added to the stream, so it has no share there"
        )
    mlp = outputs(tuned, input_ids, "mlp") - outputs(base, input_ids, "mlp")
    return Parts(mlp, outputs(tuned, input_ids) - outputs(base, input_ids) - mlp)


def mlp_share(changes: Parts) -> list[float]:
    """||dMLP|| / (||dMLP|| + ||dskip||) of every block, norms averaged over tokens."""
    mlp, skip = (part.double().norm(dim=-1).flatten(1).mean(1) for part in changes)
    return (mlp / (mlp + skip)).tolist()  # type: ignore[no-any-return]
