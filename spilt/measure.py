"""Losses of both answers of every pair at many multipliers, from recorded activations: the arithmetic of loss mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spilt import hooks, memory, suffix
from spilt.activations import Activations, max_tokens
from spilt.data.batches import by_length, position_mask
from spilt.interventions import Intervention, Vector
from spilt.scoring import scored_positions, token_logprobs


class Losses(NamedTuple):
    """Per multiplier and sequence [K, S], nats: summed over label tokens, and over the answer's own tokens; counts [S]."""

    total: np.ndarray  # answer and template suffix, as released
    answer: np.ndarray  # without the suffix
    tokens: np.ndarray
    answer_tokens: np.ndarray


def where_it_acts(intervention: Intervention, cache: Activations, indices: Sequence[int], positions: str, prefix: int) -> Tensor | None:
    """[B, T] bool for a vector (from the template prefix on), None = everywhere for lora and local_weight."""
    if not isinstance(intervention, Vector):
        return None
    return position_mask([cache.sequences[i] for i in indices], positions, prefix)


@torch.no_grad()
def losses(
    model: nn.Module,
    interventions: dict[int, Intervention],
    cache: Activations,
    multipliers: Sequence[float],
    positions: str,
    prefix: int,
    device: torch.device,
    budget: int | None = None,
    progress: Callable[[int], None] | None = None,
    share: slice = slice(None),
) -> Losses:
    """Score every sequence at every multiplier, many multipliers per batch. m = 0 is the base model: no intervention runs.

    interventions: layer -> module; `cache` holds the stream at the lowest layer, the others are steered as they are reached.
    share: the batches that are scored, the rest stays 0: processes add up their shares. progress: told of (sequence, multiplier) pairs.
    """
    first = min(interventions)
    lengths = [len(s.input_ids) for s in cache.sequences]
    room = budget or max_tokens(device)
    out = np.zeros((2, len(multipliers), len(cache.sequences)))
    zero = [k for k, m in enumerate(multipliers) if m == 0]
    rest = [k for k, m in enumerate(multipliers) if m != 0]

    def score(indices: Sequence[int], group: Sequence[int]) -> None:
        out[:, group, np.array(indices)[:, None]] = _scores(
            model, interventions, cache, indices, [multipliers[k] for k in group], positions, prefix, device
        )

    batches = []
    for indices in by_length(lengths, room):
        at_once = max(1, room // (len(indices) * lengths[indices[0]]))  # multipliers that fit beside each other
        batches += [(indices, group) for group in ([zero] if zero else []) + [rest[i : i + at_once] for i in range(0, len(rest), at_once)]]
    for indices, group in batches[share]:
        what = f"losses at layer {first}, sequences of {lengths[indices[0]]} tokens"
        smallest = (
            f"one sequence of {lengths[indices[0]]} tokens does not fit in memory at layer {first}; "
            "lower output_length, or use --device auto"
        )

        def over_sequences(group: Sequence[int], indices: Sequence[int] = indices, what: str = what, smallest: str = smallest) -> None:
            if len(group) > 1:  # fewer multipliers first, then fewer sequences
                score(indices, group)
            else:
                memory.halved(lambda some: score(some, group), indices, what, smallest)

        memory.halved(over_sequences, group, what, smallest)
        if progress is not None:
            progress(len(indices) * len(group))
    counts = np.array([[len(s.input_ids) - s.prompt_length, len(s.input_ids) - s.prompt_length - s.suffix_length] for s in cache.sequences])
    return Losses(out[0], out[1], counts[:, 0], counts[:, 1])


def _scores(
    model: nn.Module,
    interventions: dict[int, Intervention],
    cache: Activations,
    indices: Sequence[int],
    multipliers: Sequence[float],
    positions: str,
    prefix: int,
    device: torch.device,
) -> np.ndarray:
    """One batch, every sequence at every multiplier: [2, S, K] (label tokens; without the suffix).

    When all multipliers are 0, no intervention runs.
    """
    first, n = min(interventions), len(multipliers)
    tokens, seen = cache.batch(indices, interventions[first].component, device)
    factor = torch.tensor(multipliers, dtype=torch.float32, device=device).repeat_interleave(len(indices))[:, None, None]
    sites = []
    for layer, intervention in interventions.items() if any(multipliers) else ():
        acts = where_it_acts(intervention, cache, indices, positions, prefix)
        sites.append(hooks.Site(layer, intervention, factor, None if acts is None else acts.to(device).repeat(n, 1)))
    h = seen.h.repeat(n, 1, 1)
    x = {name: value.repeat(n, 1, 1) for name, value in seen.x.items()}
    for site in sites:
        if site.layer == first:
            h = hooks.steer(site, h, x.get(site.intervention.component or ""))
    with hooks.attach(model, [site for site in sites if site.layer != first]):
        logits = suffix.logits(model, first, h, scored_positions(tokens.answer_mask).repeat(n, 1))
    token = -token_logprobs(logits, tokens.input_ids[tokens.answer_mask].repeat(n)).view(n, -1).double()  # [n, scored tokens]
    row, own = tokens.answer_mask.nonzero()[:, 0], tokens.text_mask[tokens.answer_mask]
    summed = [torch.zeros(n, len(indices), dtype=torch.float64, device=device).index_add_(1, row, part) for part in (token, token * own)]
    return torch.stack(summed).transpose(1, 2).cpu().numpy()
