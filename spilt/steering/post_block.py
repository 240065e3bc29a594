"""Post-block steering (arXiv 2603.00425): h <- h + m alpha U act(D h) at every block, or h <- h + m v, as one Steering to be trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from spilt.errors import UserError, unknown
from spilt.settings.fields import WRITE_POINTS
from spilt.settings.values import SCOPES
from spilt.steering import anatomy
from spilt.steering.interventions import Intervention, PostBlock, Vector
from spilt.steering.steering import SCOPE, Site, Steering

KINDS = ("adapter", "vector")


def build(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    sites: Sequence[str] = ("block",),
    *,
    kind: str = "adapter",
    rank: int = 8,
    nonlinearity: str = "silu",
    alpha: float = 1.0,
    scope: str = "all",
    seed: int = 42,
) -> Steering:
    """A fresh Steering, exactly nothing at the start, float32, trainable, where the blocks compute. The same seed gives the same start.

    layers: 0-based decoder blocks; None: all. sites: of WRITE_POINTS, an entry for each in each layer. kind: 'adapter' has 2 D r
    parameters a site, 'vector' D. scope: which tokens are steered, a word of SCOPES; it is stored, and engine.scopes obeys it.
    Raises UserError for names that do not exist.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    for name in sites:
        if name not in WRITE_POINTS:
            raise unknown("site", name, WRITE_POINTS)
    wanted = tuple(range(len(anatomy.blocks(model))) if layers is None else layers)
    if not sites or not wanted or len({*sites}) < len(sites) or len({*wanted}) < len(wanted):
        raise UserError(f"layers {list(wanted)} and sites {list(sites)}: wanted one or more of each, none twice")
    if rank < 1:
        raise UserError(f"rank {rank}: wanted 1 or more")
    entries: list[tuple[Site, Intervention]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in wanted:
            for name in sites:
                hidden = anatomy.write_width(model, layer, name)
                made: Intervention
                if kind == "vector":
                    made = Vector(hidden, write_point=name)
                    nn.init.zeros_(made.v)
                else:
                    made = PostBlock(hidden, write_point=name, rank=rank, nonlinearity=nonlinearity, alpha=alpha)
                entries.append((Site(layer, None, name), made.to(anatomy.device_of(model, layer))))
    return Steering(entries, {SCOPE: scope} if scope != "all" else {})
