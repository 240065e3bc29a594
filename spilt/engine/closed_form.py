"""Directions that need no training: from the streams of the answers after a block, each averaged over an answer's tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spilt.data.chat import Encoded
from spilt.engine import activations
from spilt.errors import UserError
from spilt.methods import Method
from spilt.settings.fields import FitSettings
from spilt.steering import anatomy
from spilt.steering.interventions import INTERVENTIONS
from spilt.steering.steering import Steering

Means = Callable[[nn.Module, Collection[int], list[Encoded], bool, int], Mapping[int, Tensor]]


def estimate(
    model: nn.Module,
    layers: Sequence[int],
    sequences: list[Encoded],
    settings: FitSettings,
    method: Method,
    pad_id: int,
    neutral: Sequence[Encoded] = (),
    means: Means = activations.answer_means,
) -> dict[int, Tensor]:
    """A closed form's direction [D] at each layer, from the streams [n, D] after that block, each averaged over an answer's tokens.

    sequences: both answers of each pair, matching first; neutral: texts, for the methods that want them. means: as `answer_means`, which
    runs the blocks up to the highest layer once.
    """
    assert method.estimate is not None
    if settings.multiple_choice and all(
        a.input_ids[:-1] == b.input_ids[:-1] for a, b in zip(sequences[0::2], sequences[1::2], strict=True)
    ):
        raise UserError(
            "multiple_choice reads the token before the last, and up to it both answers of each pair are the same; leave it out"
        )
    found = means(model, layers, sequences, settings.multiple_choice, pad_id)
    if method.against_neutral:
        other = activations.answer_means(model, layers, [*neutral], False, pad_id, together=1)
    else:
        other = {layer: found[layer][1::2] for layer in layers}
    return {layer: method.estimate(found[layer][0::2], other[layer]) for layer in layers}


def closed_form(model: nn.Module, layers: Sequence[int], sequences: list[Encoded], settings: FitSettings, *how: Any) -> Steering:
    """The form of the settings along the direction of each layer, or of `direction_layer` at all of them. how: as for `estimate`."""
    form, one = INTERVENTIONS[settings.intervention_method], settings.direction_layer
    found = estimate(model, layers if one is None else [one], sequences, settings, *how)
    made = {n: form.from_direction(found[n if one is None else one], write_point=settings.site) for n in layers}
    return Steering.of({n: made[n].eval().requires_grad_(False).to(anatomy.device_of(model, n)) for n in layers})
