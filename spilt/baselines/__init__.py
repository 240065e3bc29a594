"""Baselines by others for weight steering, on one path: `fit` gives a Steering of each, which is stored, attached, measured and calibrated
as any other; two are prompts.

From pairs of answers: streams(H+, H-) [n, D] at a place, each row the mean over an answer's tokens, and from those the parameters of a form
(estimates; design/weight_steering.md, section 4). A row here is everything that a method needs; fit.py runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from spilt.baselines.clusters import chars, topk_clusters
from spilt.baselines.directions import centred_pca, mean_centred, mean_diff
from spilt.baselines.planes import angular
from spilt.baselines.singular import sspace
from spilt.baselines.transport import linear_act

if TYPE_CHECKING:
    from torch import Tensor

BLOCK, LINEARS = "block", "linears"  # a block's output; the outputs of its down and attention output projections


class Baseline(NamedTuple):
    """A row. estimate: (H+, H- or neutral text's) -> parameters of the form; of sspace a singular.Basis too."""

    name: str
    summary: str
    form: str = ""
    estimate: Callable[..., Mapping[str, Tensor]] | None = None  # None: a system prompt
    where: str = BLOCK
    basis: bool = False  # super_sspace: singular vectors of many weights of the blocks together
    neutral: bool = False  # the second side is ordinary text


BASELINES: dict[str, Baseline] = {
    row.name: row
    for row in (
        Baseline("mean_diff", "difference of means, of length 1 (caa)", "vector", mean_diff),
        Baseline("mean_centred", "mean of matching answers less that of ordinary text", "vector", mean_centred, neutral=True),
        Baseline("pca", "principal direction of centred differences", "vector", centred_pca),
        Baseline("directional_ablation", "the component along mean_diff replaced by c", "directional_ablation", mean_diff),
        Baseline("cosine_gated", "mean_diff where the stream points along it, either way", "cosine_gated", mean_diff),
        Baseline("angular_steering", "turned to an angle in a plane", "angular", angular),
        Baseline("spherical", "turned towards mean_diff", "spherical", mean_diff),
        Baseline("linear_act", "each coordinate transported affinely", "linear_act", linear_act),
        Baseline("chars", "clusters carried to clusters by optimal transport", "chars", chars),
        Baseline("topk_clusters", "the nearest of several directions", "clusters", topk_clusters),
        Baseline("sspace", "a direction among a weight's singular vectors, gated", "sspace", sspace, LINEARS),
        Baseline("sspace_ablate", "the component along it replaced by c", "sspace_ablate", sspace, LINEARS),
        Baseline("super_sspace", "sspace at the block, singular vectors of many weights", "sspace", sspace, basis=True),
        Baseline("engineered_prompt", "system prompts written for the purpose, one for either side"),
        Baseline("prompt_only", "the persona as system prompt"),
    )
}
