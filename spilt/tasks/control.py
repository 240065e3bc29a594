"""Random interventions beside a measured one: what any update of its form and size does to these questions.

The user's intervention is exchangeable with the draws if it is nothing special; its rank among them is a test (analysis/chance.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from spilt.analysis import odds
from spilt.artifacts.losses import CONTROL
from spilt.engine import dose, score
from spilt.steering.interventions import Intervention
from spilt.steering.steering import Steering

DRAWS = 40  # so that p = .05 can be reached, with two to spare
DOSES = (0.1, 0.3, 0.9)  # |delta| / |h|, both signs
Losses = Callable[[int, Steering, Sequence[float]], score.Losses]  # (draw, steering, multipliers) -> losses of both answers


def random_like(steering: Steering, seed: int) -> Steering:
    """The same sites and forms, every parameter drawn from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(made: Intervention) -> Intervention:
        device = next(made.parameters()).device
        parameters = {name: torch.randn(p.shape, generator=generator) for name, p in made.named_parameters()}
        new = type(made).of_parameters(parameters, read_point=made.read_point, write_point=made.write_point)
        return new.eval().requires_grad_(False).to(device)

    return Steering((site, drawn(made)) for site, made in steering)


def along_random(steering: Steering, seen: Sequence[dose.Seen], seed: int, losses: Losses, split: str) -> pd.DataFrame:
    """Means over the questions for each draw at each signed dose and at 0, columns of CONTROL without `multiplier`; `dose` is signed."""
    signed = [sign * amount for amount in DOSES for sign in (-1.0, 1.0)]
    tables, base = [], None
    for draw in range(DRAWS):
        made = random_like(steering, seed * DRAWS + draw)
        unit = dose.of(made, seen)
        if base is None:
            base = _means(losses(draw, made, [0.0]), [0.0])
        tables.append(pd.concat([base, _means(losses(draw, made, [d / unit for d in signed]), signed)]).assign(draw=draw))
    return pd.concat(tables).assign(split=split).sort_values(["draw", "dose"], ignore_index=True)


def _means(found: score.Losses, doses: Sequence[float]) -> pd.DataFrame:
    mean = found.answer / found.answer_tokens
    matching, not_matching = mean[:, 0::2], mean[:, 1::2]
    utility = odds.utility_log_odds(matching, not_matching)
    defined = np.isfinite(utility).sum(1)
    table: dict[str, Any] = {
        "dose": list(doses),
        "preference": odds.preference_log_odds(matching, not_matching).mean(1),
        "utility": np.where(defined > 0, np.nansum(utility, 1) / np.maximum(defined, 1), np.nan),
        "loss_matching": matching.mean(1),
        "loss_not_matching": not_matching.mean(1),
        "n": utility.shape[1],
        "n_undefined": utility.shape[1] - defined,
    }
    return pd.DataFrame(table)


def of_cell(along: pd.DataFrame, unit: float) -> pd.DataFrame:
    """control.csv of a cell whose dose at multiplier 1 is `unit`: multipliers in its own units."""
    multiplier = along["dose"] / unit if unit else along["dose"] * np.nan
    return along.assign(multiplier=multiplier + 0.0, dose=along["dose"].abs())[[*CONTROL]]
