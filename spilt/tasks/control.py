"""Random interventions beside a measured one: what any update of its form and size does to these questions.

The user's intervention is exchangeable with the draws if it is nothing special; its rank among them is a test (analysis/chance.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from spilt import plan, verbs
from spilt.analysis import odds
from spilt.analysis.behaviour import share
from spilt.artifacts.losses import CONTROL, CONTROL_TEXTS
from spilt.data import readers
from spilt.engine import decode, dose, sampling, score, whole
from spilt.errors import UserError
from spilt.steering.interventions import Intervention
from spilt.steering.steering import Steering
from spilt.tasks.recordings import Run
from spilt.verbs import Step

DRAWS = 40  # so that p = .05 can be reached, with two to spare
DOSES = (0.1, 0.3, 0.9)  # |delta| / |h|, both signs
# prompts whose answers are read, and how many tokens of each: a keyword may stand anywhere, a one-word answer comes first
KEYWORDS, FIRST_WORD = (8, 32), (32, 6)
Losses = Callable[[int, Steering, Sequence[float]], score.Losses]  # (draw, steering, multipliers) -> losses of both answers


def random_like(steering: Steering, seed: int) -> Steering:
    """The same sites and forms, every parameter drawn from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(made: Intervention) -> Intervention:
        device = next(made.parameters()).device
        parameters = {name: torch.randn(p.shape, generator=generator) for name, p in made.named_parameters()}
        new = type(made).of_parameters(parameters, read_point=made.read_point, write_point=made.write_point, **made.options())
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


def texts(step: Step, steering: Steering, seen: Sequence[dose.Seen], multiplier: float, run: Run) -> pd.DataFrame | None:
    """control_texts.csv: how many answers show the behaviour at one dose, of the stored intervention (draw -1) and along random ones.

    Made as apply makes them, the first prompts only. None where no rule can tell (analysis/behaviour.py).
    """
    (cell,), request = step.cells, run.request
    try:
        fmt = verbs.entry_of("generate", "prompts", request.base_dir, cell.dataset)
    except UserError:  # the dataset has no prompts
        return None
    count, length = KEYWORDS if fmt.keywords else FIRST_WORD
    prompts = readers.read_prompts(fmt, cell.concept, count)
    if share((("", prompt.reference_response) for prompt in prompts), fmt.keywords) is None:
        return None
    s: Any = verbs.VERBS["generate"].settings(request, cell.method, cell.intervention).settings
    chat, model = run.host.chat(s.use_chat_template, s.system_prompt), run.host.model
    how = sampling.decoding(s.generation_params.as_kwargs(), model, run.host.tokenizer)
    how = how._replace(max_new_tokens=min(how.max_new_tokens, length))
    ids = [tuple(chat.prompt_ids(prompt.input)) for prompt in prompts]
    prefixes = chat.prefixes_of(prompt.input for prompt in prompts)
    amount, units = abs(multiplier) * dose.of(steering, seen), {}

    def score(draw: int) -> float:
        made = steering if draw < 0 else random_like(steering, step.settings.seed * DRAWS + draw)
        m = multiplier if draw < 0 else math.copysign(amount / dose.of(made, seen), multiplier)
        units[draw] = m
        rows = [decode.Row(prompt, m, f"{s.seed}/{i}/0") for i, prompt in enumerate(ids)]
        if plan.why_plain(step._replace(verb="generate", settings=s), request.engine):
            stream = whole.texts(model, made, rows, how, s.applied_positions, prefixes)
        else:
            stream = decode.generate(model, made, rows, how, request.batch_size or s.batch_size or len(rows))
        said = {i: run.host.tokenizer.decode(new, skip_special_tokens=True) for i, new in stream}
        return float(share(((said[i], prompt.reference_response) for i, prompt in enumerate(prompts)), fmt.keywords) or 0.0)

    def work() -> list[tuple[int, float, float]]:
        mine = run.team.shard(range(-1, DRAWS))
        bar = run.progress.bar(mine, desc=f"control texts {cell}", unit="draw")
        return [(draw, score(draw), units[draw]) for draw in bar]

    found = sorted(row for part in run.team.gather(work) for row in part)
    rows = [dict(zip(CONTROL_TEXTS, (draw, m, value, len(prompts)), strict=True)) for draw, value, m in found]
    return pd.DataFrame(rows, columns=[*CONTROL_TEXTS])
