"""fit(name, model, tokenizer, pairs, layers): a baseline as a Steering."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spilt.baselines import BASELINES, LINEARS, Baseline
from spilt.baselines.singular import Basis, of_linear, of_stream
from spilt.data.batches import by_length, pad
from spilt.data.chat import Chat, Encoded
from spilt.data.readers import Pair
from spilt.engine import train
from spilt.errors import UserError, unknown
from spilt.methods.base import DIRECTIONS
from spilt.model import host
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import INTERVENTIONS, Intervention, Multiplier
from spilt.steering.steering import KINDS, Site, Steering, base_model

OUT = re.compile(r"(.*\.)?(o_proj|out_proj|c_proj|dense|wo)")  # attention's output projection, as families call it
TOKENS = 4096  # read at once
Place = tuple[int, str]  # layer, write point


class _Mean(Intervention):
    """Leaves the stream as it is, and keeps its mean over the tokens of a mask [B, T], row by row."""

    def __init__(self, write_point: str) -> None:
        super().__init__(None, write_point, 0.0)
        self.mask: Tensor | None = None
        self.found: list[Tensor] = []

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        assert self.mask is not None
        weight = self.mask.to(h.device)[..., None].float()
        self.found.append((h.float() * weight).sum(1) / weight.sum(1))
        return h


@torch.no_grad()
def streams(model: nn.Module, places: Sequence[Place], sequences: Sequence[Encoded], pad_id: int) -> dict[Place, Tensor]:
    """What leaves each place, averaged over each sequence's answer tokens, float32 [S, D]; one pass through the library's own forward."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    watches = {place: _Mean(place[1]) for place in places}
    order = []
    for numbers in by_length([len(one.input_ids) for one in sequences], TOKENS):
        batch = pad([sequences[i] for i in numbers], pad_id)
        for watch in watches.values():
            watch.mask = batch.text_mask
        with hooks.attach(model, [hooks.Applied(layer, watch, 1.0) for (layer, _), watch in watches.items()]):
            model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.long().to(device), use_cache=False)
        order += numbers
    back = torch.tensor(order).argsort()
    return {place: torch.cat(watch.found)[back.to(watch.found[0].device)] for place, watch in watches.items()}


def places_of(model: nn.Module, baseline: Baseline, layers: Sequence[int]) -> list[Place]:
    """Where it acts: blocks, or the two maps of each that write to the stream."""
    if baseline.where != LINEARS:
        return [(layer, "block") for layer in layers]
    out = []
    for layer in layers:
        parts, at = anatomy.of(model).parts[layer], anatomy.block(model, layer)
        mixer = at.get_submodule(parts.attn) if parts.attn else nn.Module()
        named = [f"{parts.attn}.{name}" for name, module in mixer.named_modules() if OUT.fullmatch(name) and hasattr(module, "weight")]
        if len(named) != 1 or parts.mlp_mid is None:
            raise UserError(f"{baseline.name}: block {layer} has no attention output projection and down projection by known names")
        out += [(layer, named[0]), (layer, parts.mlp_mid)]
    return out


def fit(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    *,
    neutral: Sequence[str] = (),
    system_prompt: str = "",
    output_length: int = 512,
    **how: Any,
) -> Steering:
    """The baseline of this name at these blocks, from pairs of answers, all blocks at one strength.

    neutral: ordinary texts, for mean_centred. how: of the estimate (k and seed of clusters, r of sspace). Raises UserError for the
    baselines that are prompts, and for what the model or the pairs do not have.
    """
    if name not in BASELINES:
        raise unknown("baseline", name, BASELINES)
    baseline = BASELINES[name]
    if baseline.estimate is None:
        raise UserError(f"{name} is a system prompt: nothing is fitted; evaluate takes it as system_prompt")
    if not pairs or not layers:
        raise UserError(f"{name}: {len(pairs)} pairs at {len(layers)} layers: there is nothing to fit")
    chat, pad_id = Chat.of(tokenizer, True, system_prompt), host.pad_id(tokenizer)
    sides = [chat.encode(question, text, output_length, pair.row) for pair in pairs for question, text in pair.sides]
    if baseline.neutral and not neutral:
        raise UserError(f"{name} subtracts the mean of ordinary text: give neutral=[...], each of two tokens or more")
    texts = [Encoded(tuple(tokenizer(text)["input_ids"][:output_length]), 1, 0) for text in (neutral if baseline.neutral else ())]
    places = places_of(model, baseline, layers)
    found = streams(model, places, [*sides, *texts], pad_id)
    basis = _bases(model, baseline, layers)
    entries: list[tuple[Site, Intervention]] = []
    for place in places:
        h = found[place][: len(sides)]
        up, down = h[0::2], found[place][len(sides) :] if baseline.neutral else h[1::2]
        more = {} if (own := basis(place)) is None else {"basis": own}
        made = _made(baseline, baseline.estimate(up, down, **more, **how), place[1])
        train.check_usable(made, f"{name}, {place[1]} of block {place[0]}")
        entries.append((Site(place[0], None, place[1]), made.eval().requires_grad_(False).to(anatomy.device_of(model, place[0]))))
    return Steering(entries, {"method": name, "base_model": base_model(model), "pairs": len(pairs)})


def _made(baseline: Baseline, parameters: Any, write_point: str) -> Intervention:
    if baseline.form in DIRECTIONS:
        return INTERVENTIONS[baseline.form].from_direction(parameters["direction"], write_point=write_point)
    return KINDS[baseline.form].of_parameters(parameters, write_point=write_point)


def _bases(model: nn.Module, baseline: Baseline, layers: Sequence[int]) -> Any:
    """place -> its Basis, or None."""
    if baseline.where == LINEARS:
        return lambda place: of_linear(anatomy.write_point(model, *place))

    @cache
    def shared() -> Basis:
        modules = [at for layer in layers for at in anatomy.block(model, layer).modules()]
        return of_stream((at for at in modules if getattr(getattr(at, "weight", None), "ndim", 0) == 2), anatomy.hidden_size(model))

    return lambda place: shared() if baseline.basis else None
