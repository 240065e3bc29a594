"""Losses of both answers of every pair at many multipliers, from recorded activations: the arithmetic of loss mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spilt import hooks, suffix
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
) -> Losses:
    """Score every sequence at every multiplier, many multipliers per batch. m = 0 is the base model: no intervention runs.

    interventions: layer -> module; `cache` holds the stream at the lowest layer, the others are steered as they are reached.
    """
    first = min(interventions)
    out = np.zeros((2, len(multipliers), len(cache.sequences)))
    lengths = [len(s.input_ids) for s in cache.sequences]
    room = budget or max_tokens(device)
    zero = [k for k, m in enumerate(multipliers) if m == 0]
    rest = [k for k, m in enumerate(multipliers) if m != 0]
    for indices in by_length(lengths, room):
        tokens, seen = cache.batch(indices, interventions[first].component, device)
        at_once = max(1, room // tokens.input_ids.numel())  # multipliers that fit beside each other
        keep = scored_positions(tokens.answer_mask)
        for group in [zero[:1]] * bool(zero) + [rest[i : i + at_once] for i in range(0, len(rest), at_once)]:
            n, base = len(group), group == zero[:1]
            factor = torch.tensor([multipliers[k] for k in group], device=device).repeat_interleave(len(indices))[:, None, None]
            sites = []
            for layer, intervention in interventions.items():
                acts = where_it_acts(intervention, cache, indices, positions, prefix)
                sites.append(hooks.Site(layer, intervention, factor, None if acts is None else acts.to(device).repeat(n, 1)))
            h = seen.h.repeat(n, 1, 1)
            x = {name: value.repeat(n, 1, 1) for name, value in seen.x.items()}
            above = [] if base else [site for site in sites if site.layer != first]
            if not base:
                site = next(site for site in sites if site.layer == first)
                h = hooks.steer(site, h, x.get(site.intervention.component or ""))
            with hooks.attach(model, above):
                logits = suffix.logits(model, first, h, keep.repeat(n, 1))
            targets = tokens.input_ids[tokens.answer_mask].repeat(n)
            token = -token_logprobs(logits, targets).view(n, -1).double()  # [n, scored tokens]
            row = tokens.answer_mask.nonzero()[:, 0]
            own = tokens.text_mask[tokens.answer_mask]
            for which, part in enumerate((token, token * own)):
                summed = torch.zeros(n, len(indices), dtype=torch.float64, device=device).index_add_(1, row, part)
                out[which][np.ix_(zero if base else group, indices)] = summed.cpu().numpy()
        if progress is not None:
            progress(len(indices))
    counts = np.array([[len(s.input_ids) - s.prompt_length, len(s.input_ids) - s.prompt_length - s.suffix_length] for s in cache.sequences])
    return Losses(out[0], out[1], counts[:, 0], counts[:, 1])
