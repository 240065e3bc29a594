"""Clusters of streams by cosine, and what is done with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from spilt.baselines.transport import sinkhorn
from spilt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CLUSTERS, ROUNDS = 4, 20


class Found(NamedTuple):
    """means [k, D] of the clusters' rows, and their share of the rows [k]."""

    means: Tensor
    shares: Tensor


def k_means(rows: Tensor, k: int, seed: int) -> Found:
    """Each row belongs to the cluster whose mean has the largest cosine with it; ROUNDS times. An empty one begins again at the row that
    fits its own worst. Raises UserError for fewer rows than clusters."""
    import torch

    if len(rows) < k:
        raise UserError(f"{k} clusters of {len(rows)} pairs; give more pairs or fewer clusters")
    generator = torch.Generator().manual_seed(seed)
    means = rows[torch.randperm(len(rows), generator=generator)[:k].to(rows.device)]
    directions = _unit(rows)
    for _ in range(ROUNDS + 1):
        near = directions @ _unit(means).T
        own = near.argmax(1)
        for empty in sorted({*range(k)} - {*own.tolist()}):
            fits = near[range(len(rows)), own].clone()
            lone = torch.bincount(own, minlength=k)[own] == 1  # the only one of its cluster stays
            worst = int(fits.masked_fill(lone, torch.inf).argmin())
            own[worst] = empty
        means = torch.stack([rows[own == i].mean(0) for i in range(k)])
    return Found(means, torch.bincount(own, minlength=k).to(rows) / len(rows))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def chars(matching: Tensor, not_matching: Tensor, k: int = CLUSTERS, seed: int = 0) -> dict[str, Tensor]:
    """a, b: cluster means of H- and H+ (seeds s, s + 1), P: the entropic transport of their shares at cost |a_i - b_j|^2."""
    import torch

    a, b = k_means(not_matching.double(), k, seed), k_means(matching.double(), k, seed + 1)
    plan = sinkhorn(torch.cdist(a.means, b.means).pow(2), a.shares, b.shares)
    return {"source": a.means.float(), "target": b.means.float(), "plan": plan.float(), "bandwidth": torch.zeros(())}


def topk_clusters(matching: Tensor, not_matching: Tensor, k: int = CLUSTERS, seed: int = 0) -> dict[str, Tensor]:
    """r: cluster means of D = H+ - H-, of length 1, each turned so that it points as mean(D) does."""
    import torch

    rows = (matching - not_matching).double()
    means = k_means(rows, k, seed).means
    up = torch.where(means @ rows.mean(0) < 0, -1.0, 1.0).to(means)
    return {"centroids": _unit(means * up[:, None]).float()}
