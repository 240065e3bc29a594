"""Losses of both answers of every pair at many multipliers, from recorded activations: the arithmetic of loss mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spilt import memory
from spilt.data.batches import by_length, position_mask
from spilt.engine import packing, suffix
from spilt.engine.activations import Activations, max_tokens, prefix_pairs
from spilt.methods.scoring import token_logprobs
from spilt.steering import hooks
from spilt.steering.interventions import Intervention, Vector


class Losses(NamedTuple):
    """Per multiplier and sequence [K, S], nats: summed over label tokens, and over the answer's own tokens; counts [S]."""

    total: np.ndarray  # answer and template suffix, as released
    answer: np.ndarray  # without the suffix
    tokens: np.ndarray
    answer_tokens: np.ndarray


class Request(NamedTuple):
    """What is measured: the model with interventions (layer -> module), and where a vector acts (YAML `intervention_positions`)."""

    model: nn.Module
    interventions: dict[int, Intervention]
    positions: str
    prefix: int  # template prefix: a vector acts from there on
    device: torch.device

    @property
    def component(self) -> str | None:
        """The read point that must be recorded: that of an intervention on the recorded stream itself."""
        return next((i.component for layer, i in self.interventions.items() if self.on_stream(layer)), None)

    @property
    def base(self) -> int:
        """The layer whose output is recorded: the lowest steered block, or the one below it when its inside is steered."""
        return min(hooks.base(layer, intervention) for layer, intervention in self.interventions.items())

    def on_stream(self, layer: int) -> bool:
        return layer == self.base and self.interventions[layer].site == "block"


def losses(
    request: Request,
    cache: Activations,
    multipliers: Sequence[float],
    budget: int | None = None,
    progress: Callable[[int], None] | None = None,
    share: slice = slice(None),
    known: np.ndarray | None = None,
    keep: Callable[[int, Sequence[int], np.ndarray], None] | None = None,
) -> Losses:
    """Score every sequence at every multiplier, one multiplier per batch: its losses have the same bytes whatever others are asked for.

    Out of memory halves a batch: equal to rounding. m = 0 is the base model: no intervention runs.

    cache: the streams at `request.base`. share: the batches that are scored, the rest stays 0: processes add up their
    shares. progress: told of (sequence, multiplier) pairs. known: [2, K, S] as the sums of Losses, NaN where they are not
    known: a batch that is known whole is not scored. keep: told of each batch that was: which multiplier, which sequences,
    their sums [2, s].
    """
    acts = _where_it_acts(request, cache)
    if acts is not None and cache.prefix and not all(torch.equal(acts[0][: cache.prefix], a[: cache.prefix]) for a in acts):
        cache, acts = cache.unshared(), acts  # l{n} in a short prompt reaches into what the others share
    lengths = [len(p.ids) for p in cache.packs]
    room = budget or max_tokens(request.device)
    out = np.zeros((2, len(multipliers), len(cache.sequences)))
    # one multiplier per batch: what shares a batch with a row is decided by the data alone, and so is its rounding
    batches = [(k, numbers) for k in range(len(multipliers)) for numbers in by_length(lengths, room)]
    heads: dict[int, packing.KeysValues] = {}  # of the multiplier at work

    def score(k: int, numbers: Sequence[int]) -> None:
        if k not in heads:
            heads.clear()
            heads[k] = _head(request, cache, multipliers[k], acts)
        scored, members = _scores(request, cache, numbers, multipliers[k], heads[k], acts)
        out[:, k, members] = scored

    for k, numbers in batches[share]:
        members = [i for number in numbers for i in cache.packs[number].members]
        if known is not None and not np.isnan(known[:, k, members]).any():
            out[:, k, members] = known[:, k, members]
        else:
            longest = cache.prefix + lengths[numbers[0]]
            memory.halved(
                lambda some, k=k: score(k, some),  # type: ignore[misc]
                numbers,
                f"losses at layer {request.base}, questions of {longest} tokens",
                f"one question of {longest} tokens does not fit in memory at layer {request.base}; "
                "lower output_length, or use --device auto",
            )
            if keep is not None:
                keep(k, members, out[:, k, members])
        if progress is not None:
            progress(len(members))
    counts = np.array([[len(s.input_ids) - s.prompt_length, len(s.input_ids) - s.prompt_length - s.suffix_length] for s in cache.sequences])
    return Losses(out[0], out[1], counts[:, 0], counts[:, 1])


def _where_it_acts(request: Request, cache: Activations) -> list[Tensor] | None:
    """Per sequence [T] bool for a vector; None = everywhere, for lora and local_weight."""
    if not all(isinstance(intervention, Vector) for intervention in request.interventions.values()):
        return None
    return [position_mask([s], request.positions, request.prefix)[0] for s in cache.sequences]


def _sites(request: Request, strength: float, rows: int, acts: Tensor | None) -> list[hooks.Site]:
    """The sites for `rows` rows at this strength; none at 0. acts [rows, T]."""
    if not strength:
        return []
    factor = torch.full((rows, 1, 1), strength, dtype=torch.float32, device=request.device)
    where = None if acts is None else acts.to(request.device)
    return [hooks.Site(layer, intervention, factor, where) for layer, intervention in request.interventions.items()]


def _stream(request: Request, sites: Sequence[hooks.Site], seen: suffix.Recorded) -> tuple[Tensor, list[hooks.Site]]:
    """The recorded rows, steered where the recorded block is; and the sites further up, still to be attached."""
    h, above = seen.h, []
    for site in sites:
        if request.on_stream(site.layer):
            h = hooks.steer(site, h, seen.x[site.intervention.component] if site.intervention.component else None)
        else:
            above.append(site)
    return h, above


@torch.no_grad()
def _head(request: Request, cache: Activations, strength: float, acts: list[Tensor] | None) -> packing.KeysValues:
    """Keys and values of the shared prefix after the recorded block, one row."""
    if not cache.prefix:
        return {}
    name = request.component
    seen = suffix.Recorded(
        cache.prefix_h[None].to(request.device), {name: cache.prefix_x[name][None].to(request.device)} if name is not None else {}
    )
    sites = _sites(request, strength, 1, None if acts is None else acts[0][None, : cache.prefix])
    stream, above = _stream(request, sites, seen)
    with hooks.attach(request.model, above):
        return prefix_pairs(request.model, request.base, stream, cache.pad_id)


@torch.no_grad()
def _scores(
    request: Request,
    cache: Activations,
    numbers: Sequence[int],
    strength: float,
    head: packing.KeysValues,
    acts: list[Tensor] | None,
) -> tuple[np.ndarray, list[int]]:
    """One batch of packs at one strength: [2, S] (label tokens; without the suffix), and the S sequence numbers."""
    packs = [cache.packs[i] for i in numbers]
    rows, seen = cache.rows(numbers, request.component, request.device)
    sites = _sites(request, strength, len(packs), None if acts is None else _in_rows(acts, packs, cache.prefix, rows.input_ids.shape[1]))
    stream, above = _stream(request, sites, seen)
    keep, targets, owner, own = _labels(cache, packs, rows.input_ids.shape[1])
    inputs = packing.attention_inputs(request.model, rows, cache.prefix)
    shared = packing.cache_of(head, torch.zeros(len(packs), dtype=torch.long, device=request.device))
    with hooks.attach(request.model, above):
        logits = suffix.logits(request.model, request.base, stream, keep.to(request.device), past_key_values=shared, **inputs)
    device = logits.device
    token = -token_logprobs(logits, targets.to(device)).view(-1).double()  # [scored tokens]
    members = [i for pack in packs for i in pack.members]
    parts = (token, token * own.to(device))
    summed = [torch.zeros(len(members), dtype=torch.float64, device=device).index_add_(0, owner.to(device), part) for part in parts]
    return torch.stack(summed).cpu().numpy(), members


def _in_rows(acts: list[Tensor], packs: Sequence[packing.Pack], prefix: int, width: int) -> Tensor:
    """Masks of sequences [T] as masks of rows [B, width]."""
    out = torch.zeros(len(packs), width, dtype=torch.bool)
    for b, pack in enumerate(packs):
        for i, places in zip(pack.members, pack.places, strict=True):
            out[b, list(places)] = acts[i][prefix:]
    return out


def _labels(cache: Activations, packs: Sequence[packing.Pack], width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where logits are needed [B, width], and per such position, row by row: the token scored, whose it is, whether it is answer text."""
    keep = torch.zeros(len(packs), width, dtype=torch.bool)
    found = []
    for b, pack in enumerate(packs):
        for i, places in zip(pack.members, pack.places, strict=True):
            s = cache.sequences[i]
            for t in range(s.prompt_length, len(s.input_ids)):
                at = places[t - 1 - cache.prefix]
                keep[b, at] = True
                found.append((b, at, s.input_ids[t], i, t < len(s.input_ids) - s.suffix_length))
    found.sort()
    numbers = {i: k for k, i in enumerate(i for pack in packs for i in pack.members)}
    columns = list(zip(*found, strict=True))
    targets, owner = torch.tensor(columns[2]), torch.tensor([numbers[i] for i in columns[3]])
    return keep, targets, owner, torch.tensor(columns[4], dtype=torch.float64)
