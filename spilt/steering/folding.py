"""What of a Steering can be weights of the model: W' = W + m (A B)^T and b' = b + m db of a linear map inside a block.

Exact where the intervention reads what that map reads, and nothing stands between what the map gives and the place that is written
(arXiv 2602.02343, eq. 3). Everything else is refused, with what is exact instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from spilt.errors import UserError
from spilt.settings.fields import WRITE_POINTS
from spilt.steering import anatomy
from spilt.steering.interventions import Intervention
from spilt.steering.steering import Site

Place = tuple[int, str]  # block, path of the linear map inside it
DOWN = ("mlp_mid", "down_proj")  # the down projection as a site has it: what is read, what is written
ELSEWHERE = ("attn", "mlp_input")  # write points that a map before them could write, which is not looked for
VECTORS = "--format gguf or vllm-hook holds vectors at the block's output"
ANYTHING = "--format safetensors holds any Steering"


def place(model: nn.Module, site: Site, made: Intervention, instead: str = ANYTHING, vectors: str = f"{VECTORS}, ") -> Place:
    """The map whose weights the intervention can be a part of. instead, vectors: of the message, what is exact for all and for a vector."""
    inside = site.write_point not in WRITE_POINTS
    if site.read_point is not None and site.read_point != (site.write_point if inside else DOWN[0]):
        raise UserError(
            f"the {made.form} of layer {site.layer} reads at {site.read_point!r}, and no weight of the model goes from there to the "
            f"stream; {instead}, and a fit with --set intervention_components=mlp_mid can be weights"
        )
    if inside:
        return site.layer, site.write_point
    return site.layer, down(model, site, made.form, "down_proj", instead, vectors)


def down(model: nn.Module, site: Site, form: str, at: str, instead: str = ANYTHING, vectors: str = f"{VECTORS}, ") -> str:
    """The path of the down projection, where what is written at the site is the same `at` 'down_proj' or the 'block' output.

    Raises UserError where a norm stands between the two, or there is no such projection (experts).
    """
    if site.write_point in ELSEWHERE:
        raise UserError(f"the {form} of layer {site.layer} is added at {site.write_point!r}, which no down projection writes; {instead}")
    row, parts = anatomy.family(model), anatomy.of(model).parts[site.layer]
    also = vectors if form == "vector" else ""
    if at == "down_proj" and parts.mlp_mid is None:
        why = f"block {site.layer} has no down projection that the {form} could become a part of: {parts.why}"
        raise UserError(f"{why}; {also}{instead}")
    if site.write_point == at or not row.norm_after_mlp:
        return parts.mlp_mid or ""
    way_out = f"{also}{instead}, and a fit with --set site=down_proj can be weights"
    if at == "block":
        way_out = f"{instead}, --format peft or merged what is added at the down projection"
    words = {"block": "the block's output", "down_proj": "the down projection", "mlp": "the MLP's output"}
    raise UserError(
        f"the {form} of layer {site.layer} is added at {words[site.write_point]}, and in {row.model_type} a norm follows the down "
        f"projection: the same at {words[at]} is something else; {way_out}"
    )


def linear(model: nn.Module, where: Place) -> Any:
    """The linear map itself."""
    return anatomy.block(model, where[0]).get_submodule(where[1])


def transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"
