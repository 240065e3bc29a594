"""Losses of both answers of every pair at many multipliers, from recorded activations: the arithmetic of loss mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spilt import hooks, memory, packing, suffix
from spilt.activations import Activations, max_tokens, prefix_pairs
from spilt.data.batches import by_length, position_mask
from spilt.interventions import Intervention, Vector
from spilt.scoring import token_logprobs


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
    keep: Callable[[Sequence[int], Sequence[int], np.ndarray], None] | None = None,
) -> Losses:
    """Score every sequence at every multiplier, many multipliers per batch. m = 0 is the base model: no intervention runs.

    cache: the streams at `request.base`. share: the batches that are scored, the rest stays 0: processes add up their
    shares. progress: told of (sequence, multiplier) pairs. known: [2, K, S] as the sums of Losses, NaN where they are not
    known: a batch that is known whole is not scored. keep: told of each batch that was: which multipliers, which sequences,
    their sums [2, k, s].
    """
    acts = _where_it_acts(request, cache)
    if acts is not None and cache.prefix and not all(torch.equal(acts[0][: cache.prefix], a[: cache.prefix]) for a in acts):
        cache, acts = cache.unshared(), acts  # l{n} in a short prompt reaches into what the others share
    lengths = [len(p.ids) for p in cache.packs]
    room = budget or max_tokens(request.device)
    out = np.zeros((2, len(multipliers), len(cache.sequences)))
    zero = [k for k, m in enumerate(multipliers) if m == 0]
    rest = [k for k, m in enumerate(multipliers) if m != 0]

    # the same multipliers beside each other for all rows, so that the prefix is run once for each of them
    typical = max(1, sorted(lengths)[len(lengths) // 2])
    rows_wanted = min(len(lengths), 8)  # enough rows for the matrix products; more multipliers cost prefix runs that wait in memory
    at_once = max(1, min(len(rest), room // (typical * rows_wanted))) if rest else 1
    batches = []
    for group in ([zero] if zero else []) + [rest[i : i + at_once] for i in range(0, len(rest), at_once)]:
        batches += [(group, numbers) for numbers in by_length(lengths, max(1, room // len(group)))]
    heads: dict[tuple[int, ...], packing.KeysValues] = {}

    def score(group: Sequence[int], numbers: Sequence[int]) -> None:
        strengths = [multipliers[k] for k in group]
        if tuple(group) not in heads:
            heads.clear()
            heads[tuple(group)] = _head(request, cache, strengths, acts)
        scored, members = _scores(request, cache, numbers, strengths, heads[tuple(group)], acts)
        out[:, group, np.array(members)[:, None]] = scored

    def score_in_memory(group: Sequence[int], numbers: Sequence[int]) -> None:
        longest = cache.prefix + lengths[numbers[0]]
        what = f"losses at layer {request.base}, questions of {longest} tokens"
        smallest = (
            f"one question of {longest} tokens does not fit in memory at layer {request.base}; lower output_length, or use --device auto"
        )

        def over_rows(group: Sequence[int]) -> None:
            if len(group) > 1:  # fewer multipliers first, then fewer rows
                score(group, numbers)
            else:
                memory.halved(lambda some: score(group, some), numbers, what, smallest)

        memory.halved(over_rows, group, what, smallest)

    for group, numbers in batches[share]:
        members = [i for number in numbers for i in cache.packs[number].members]
        at = np.ix_((0, 1), group, members)
        if known is not None and not np.isnan(known[at]).any():
            out[at] = known[at]
        else:
            score_in_memory(group, numbers)
            if keep is not None:
                keep(group, members, out[at])
        if progress is not None:
            progress(len(group) * len(members))
    counts = np.array([[len(s.input_ids) - s.prompt_length, len(s.input_ids) - s.prompt_length - s.suffix_length] for s in cache.sequences])
    return Losses(out[0], out[1], counts[:, 0], counts[:, 1])


def _where_it_acts(request: Request, cache: Activations) -> list[Tensor] | None:
    """Per sequence [T] bool for a vector; None = everywhere, for lora and local_weight."""
    if not all(isinstance(intervention, Vector) for intervention in request.interventions.values()):
        return None
    return [position_mask([s], request.positions, request.prefix)[0] for s in cache.sequences]


def _sites(request: Request, strengths: Sequence[float], rows: int, acts: Tensor | None) -> list[hooks.Site]:
    """The sites for `rows` rows at each strength, one strength after the other; none when all strengths are 0. acts [rows, T]."""
    if not any(strengths):
        return []
    factor = torch.tensor(strengths, dtype=torch.float32, device=request.device).repeat_interleave(rows)[:, None, None]
    where = None if acts is None else acts.to(request.device).repeat(len(strengths), 1)
    return [hooks.Site(layer, intervention, factor, where) for layer, intervention in request.interventions.items()]


def _stream(request: Request, sites: Sequence[hooks.Site], seen: suffix.Recorded, copies: int) -> tuple[Tensor, list[hooks.Site]]:
    """The recorded rows once per strength, steered where the recorded block is; and the sites further up, still to be attached."""
    h = seen.h.repeat(copies, 1, 1)
    above = []
    for site in sites:
        if request.on_stream(site.layer):
            x = seen.x[site.intervention.component].repeat(copies, 1, 1) if site.intervention.component else None
            h = hooks.steer(site, h, x)
        else:
            above.append(site)
    return h, above


@torch.no_grad()
def _head(request: Request, cache: Activations, strengths: Sequence[float], acts: list[Tensor] | None) -> packing.KeysValues:
    """Keys and values of the shared prefix after the recorded block, a row per strength."""
    if not cache.prefix:
        return {}
    name = request.component
    seen = suffix.Recorded(
        cache.prefix_h[None].to(request.device), {name: cache.prefix_x[name][None].to(request.device)} if name is not None else {}
    )
    sites = _sites(request, strengths, 1, None if acts is None else acts[0][None, : cache.prefix])
    stream, above = _stream(request, sites, seen, len(strengths))
    with hooks.attach(request.model, above):
        return prefix_pairs(request.model, request.base, stream, cache.pad_id)


@torch.no_grad()
def _scores(
    request: Request,
    cache: Activations,
    numbers: Sequence[int],
    strengths: Sequence[float],
    head: packing.KeysValues,
    acts: list[Tensor] | None,
) -> tuple[np.ndarray, list[int]]:
    """One batch of packs at every strength: [2, S, K] (label tokens; without the suffix), and the S sequence numbers."""
    n, packs = len(strengths), [cache.packs[i] for i in numbers]
    rows, seen = cache.rows(numbers, request.component, request.device)
    sites = _sites(request, strengths, len(packs), None if acts is None else _in_rows(acts, packs, cache.prefix, rows.input_ids.shape[1]))
    stream, above = _stream(request, sites, seen, n)
    keep, targets, owner, own = _labels(cache, packs, rows.input_ids.shape[1])
    inputs = packing.attention_inputs(request.model, rows, cache.prefix, n)
    shared = packing.cache_of(head, torch.arange(n, device=request.device).repeat_interleave(len(packs)))
    with hooks.attach(request.model, above):
        logits = suffix.logits(request.model, request.base, stream, keep.to(request.device).repeat(n, 1), past_key_values=shared, **inputs)
    device = logits.device
    token = -token_logprobs(logits, targets.to(device).repeat(n)).view(n, -1).double()  # [n, scored tokens]
    members = [i for pack in packs for i in pack.members]
    parts = (token, token * own.to(device))
    summed = [torch.zeros(n, len(members), dtype=torch.float64, device=device).index_add_(1, owner.to(device), part) for part in parts]
    return torch.stack(summed).transpose(1, 2).cpu().numpy(), members


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
