"""Losses of both answers of every pair at many multipliers, from recorded activations: the arithmetic of loss mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spilt import memory
from spilt.data.batches import by_length, position_mask
from spilt.data.chat import Encoded
from spilt.engine import packing, suffix
from spilt.engine.activations import Activations, max_tokens, prefix_pairs
from spilt.methods.scoring import token_logprobs
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering


class Losses(NamedTuple):
    """Per multiplier and sequence [K, S], nats: summed over label tokens, and over the answer's own tokens; counts [S]."""

    total: np.ndarray  # answer and template suffix, as released
    answer: np.ndarray  # without the suffix
    tokens: np.ndarray
    answer_tokens: np.ndarray


class Scorer:
    """How the losses of sequences at one multiplier are found: from recorded activations (`Recorded`) or plainly (whole.Scorer)."""

    sequences: Sequence[Encoded]
    batches: Sequence[Sequence[int]]  # numbers of what is scored together, decided by the data alone, and so is its rounding

    def members(self, numbers: Sequence[int]) -> list[int]:
        """The sequences of a batch, in the order of their scores."""
        return list(numbers)

    def score(self, multiplier: float, numbers: Sequence[int]) -> np.ndarray:
        """[2, s] nats: -log p summed over label tokens (the template's suffix too, as released); over the answer's own."""
        raise NotImplementedError(f"{type(self).__name__} does not score")

    def smallest(self, numbers: Sequence[int]) -> tuple[str, str]:
        """For messages: what a batch is, and what to do where a single one of it does not fit."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a batch is")


def losses(
    scorer: Scorer,
    multipliers: Sequence[float],
    progress: Callable[[int], None] | None = None,
    share: slice = slice(None),
    known: np.ndarray | None = None,
    keep: Callable[[int, Sequence[int], np.ndarray], None] | None = None,
) -> Losses:
    """Score every sequence at every multiplier, one multiplier per batch: its losses have the same bytes whatever others are asked for.

    Out of memory halves a batch: equal to rounding. m = 0 is the base model: no intervention runs.

    share: the batches that are scored, the rest stays 0: processes add up their shares. progress: told of (sequence,
    multiplier) pairs. known: [2, K, S] as the sums of Losses, NaN where they are not known: a batch that is known whole is
    not scored. keep: told of each batch that was: which multiplier, which sequences, their sums [2, s].
    """
    out = np.zeros((2, len(multipliers), len(scorer.sequences)))

    def score(k: int, numbers: Sequence[int]) -> None:
        out[:, k, scorer.members(numbers)] = scorer.score(multipliers[k], numbers)

    for k, numbers in [(k, numbers) for k in range(len(multipliers)) for numbers in scorer.batches][share]:
        members = scorer.members(numbers)
        if known is not None and not np.isnan(known[:, k, members]).any():
            out[:, k, members] = known[:, k, members]
        else:
            memory.halved(lambda some, k=k: score(k, some), numbers, *scorer.smallest(numbers))  # type: ignore[misc]
            if keep is not None:
                keep(k, members, out[:, k, members])
        if progress is not None:
            progress(len(members))
    counts = np.array(
        [[len(s.input_ids) - s.prompt_length, len(s.input_ids) - s.prompt_length - s.suffix_length] for s in scorer.sequences]
    )
    return Losses(out[0], out[1], counts[:, 0], counts[:, 1])


class Recorded(Scorer):
    """The fast scorer: only the blocks above the recorded one, the template's prefix once per multiplier.

    positions: which tokens are steered (`steer_positions`); prefix: tokens of the template
    before the prompt. budget: padded tokens per batch.
    """

    def __init__(
        self, model: nn.Module, steering: Steering, cache: Activations, positions: str, prefix: int, budget: int | None = None
    ) -> None:
        self.model, self.steering = model, steering
        self.device = anatomy.device_of(model, steering.layers[0])
        self.base, self.read_point = recorded_at(steering)
        self.acts = _where_it_acts(cache, positions, prefix)
        if (
            self.acts is not None
            and cache.prefix
            and not all(torch.equal(self.acts[0][: cache.prefix], a[: cache.prefix]) for a in self.acts)
        ):
            cache = cache.unshared()  # l{n} in a short prompt reaches into what the others share
        self.cache, self.sequences = cache, cache.sequences
        self.lengths = [len(p.ids) for p in cache.packs]
        self.batches = by_length(self.lengths, budget or max_tokens(self.device))
        self.heads: dict[float, packing.KeysValues] = {}  # of the multiplier at work

    def members(self, numbers: Sequence[int]) -> list[int]:
        return [i for number in numbers for i in self.cache.packs[number].members]

    def smallest(self, numbers: Sequence[int]) -> tuple[str, str]:
        longest = self.cache.prefix + self.lengths[numbers[0]]
        return (
            f"losses at layer {self.base}, questions of {longest} tokens",
            f"one question of {longest} tokens does not fit in memory at layer {self.base}; lower output_length, or use --device auto",
        )

    def score(self, multiplier: float, numbers: Sequence[int]) -> np.ndarray:
        if multiplier not in self.heads:
            self.heads.clear()
            self.heads[multiplier] = self._head(multiplier)
        return self._scores(multiplier, numbers)

    def _sites(self, strength: float, rows: int, acts: Tensor | None) -> list[hooks.Applied]:
        """The sites for `rows` rows at this strength; none at 0. acts [rows, T]."""
        if not strength:
            return []
        factor = torch.full((rows, 1, 1), strength, dtype=torch.float32, device=self.device)
        where = None if acts is None else acts.to(self.device)
        return self.steering.at(factor, where)

    def _stream(self, sites: Sequence[hooks.Applied], seen: suffix.Recorded) -> tuple[Tensor, list[hooks.Applied]]:
        """The recorded rows, steered where the recorded block is; and the sites further up, still to be attached."""
        h, above = seen.h, []
        for site in sites:
            if site.layer == self.base and site.intervention.write_point == "block":
                h = hooks.steer(site, h, seen.x[site.intervention.read_point] if site.intervention.read_point else None)
            else:
                above.append(site)
        return h, above

    @torch.no_grad()
    def _head(self, strength: float) -> packing.KeysValues:
        """Keys and values of the shared prefix after the recorded block, one row."""
        cache, name = self.cache, self.read_point
        if not cache.prefix:
            return {}
        read: dict[str | int, Tensor] = {name: cache.x[name][None, : cache.prefix].to(self.device)} if name is not None else {}
        sites = self._sites(strength, 1, None if self.acts is None else self.acts[0][None, : cache.prefix])
        stream, above = self._stream(sites, suffix.Recorded(cache.h[None, : cache.prefix].to(self.device), read))
        with hooks.attach(self.model, above):
            return prefix_pairs(self.model, self.base, stream, cache.pad_id)

    @torch.no_grad()
    def _scores(self, strength: float, numbers: Sequence[int]) -> np.ndarray:
        cache, packs = self.cache, [self.cache.packs[i] for i in numbers]
        rows, seen = cache.rows(numbers, self.read_point, self.device)
        width = rows.input_ids.shape[1]
        sites = self._sites(strength, len(packs), None if self.acts is None else _in_rows(self.acts, packs, cache.prefix, width))
        stream, above = self._stream(sites, seen)
        keep, targets, owner, own = _labels(cache, packs, width)
        inputs = packing.attention_inputs(self.model, rows, cache.prefix)
        shared = packing.given(self.heads[strength], len(packs))
        with hooks.attach(self.model, above):
            logits = suffix.logits(self.model, self.base, stream, keep.to(self.device), past_key_values=shared, **inputs)
        device = logits.device
        token = -token_logprobs(logits, targets.to(device)).view(-1).double()  # [scored tokens]
        count = len(self.members(numbers))
        parts = (token, token * own.to(device))
        summed = [torch.zeros(count, dtype=torch.float64, device=device).index_add_(0, owner.to(device), part) for part in parts]
        return torch.stack(summed).cpu().numpy()


def recorded_at(steering: Steering) -> tuple[int, str | None]:
    """The block whose output is recorded (the lowest steered one, or the one below it when its inside is steered), and the read point
    that an intervention on that very stream needs."""
    base = min(hooks.base(site.layer, made) for site, made in steering)
    return base, next((made.read_point for site, made in steering if site.layer == base and made.write_point == "block"), None)


def _where_it_acts(cache: Activations, positions: str, prefix: int) -> list[Tensor] | None:
    """Per sequence [T] bool; None = everywhere."""
    return None if positions == "all" else [position_mask([s], positions, prefix)[0] for s in cache.sequences]


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
