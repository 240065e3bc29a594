"""The multipliers at which each cell of a model and data set disturbs the model by one budget of KL: kl.csv in its folder of losses.

Of a data set with concepts, one multiplier for all of them, as everywhere: the mean over the concepts' vectors, each on its own prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch

from spilt import api, plan, verbs
from spilt.artifacts import manifest
from spilt.artifacts.losses import KL_COLUMNS, TRIED
from spilt.artifacts.store import Store
from spilt.cell import variant_of
from spilt.data import readers
from spilt.engine import choice
from spilt.errors import NotFinite, UserError
from spilt.model import host, identity
from spilt.run import quiet_libraries
from spilt.tasks.recordings import Run, stored
from spilt.verbs import Step
from spilt.verbs.base import parts_of

DECIDING = ("layers", "dtype", "use_chat_template", "system_prompt", "intervention_components", "site", "anatomy")


class How(NamedTuple):
    """budget: nats at the 95th percentile; prompts: the data set's first (each concept's); max_new_tokens: of each answer."""

    budget: float
    prompts: int = 8
    max_new_tokens: int = 32


def calibrate(
    base: Path,
    model: str,
    dataset: str,
    cells: Sequence[tuple[str, str]],
    how: How,
    device: str = "",
    tell: Callable[[str], None] = print,
    concepts: Sequence[int] = (),
    also: Mapping[tuple[str, str], Sequence[float]] = MappingProxyType({}),
) -> int:
    """Store what is not there yet of cells (method, form with layers and seed); the model is loaded once. Returns how many were measured.

    A row for each side, and those that were tried. concepts: of a data set that has some; without them it is refused. also: further
    multipliers of a cell to try.
    """
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    todo = [
        (step, request, seen, path, parts)
        for step, request, seen in steps(base, model, dataset, cells, device, concepts=concepts)
        for path, parts in [(Store(base).loss_folder(replace(step.cells[0], concept=None)) / Store.KL, _parts(step, how, seen))]
        if manifest.standing(path, parts) != "done"
    ]
    loaded: host.Host | None = None
    for number, (step, request, seen, path, parts) in enumerate(todo, 1):
        s: Any = step.settings
        if loaded is None:
            quiet_libraries()
            loaded = host.load(request.model_folder, s.dtype, device, s.anatomy)
        run = Run.alone(request, loaded, device, seen, tell)
        fmt = verbs.entry_of("generate", "prompts", base, dataset)
        chat: dict[str, Any] = {name: getattr(s, name) for name in ("use_chat_template", "system_prompt", "batch_size")}
        asked = [(stored(cell, s, run), [row.input for row in readers.read_prompts(fmt, cell.concept, how.prompts)]) for cell in step.cells]
        try:
            for steering, _ in asked:
                choice.refuse_positions(s.steer_positions, steering.scope)
        except UserError as error:
            tell(f"warning: {step.cells[0]}: no strength of equal KL: {error}")
            continue
        chat |= {"max_new_tokens": how.max_new_tokens}
        at = partial(_mean, [api.divergences(loaded.model, loaded.tokenizer, steering, prompts, **chat) for steering, prompts in asked])
        table = api.both_sides(at, None, how.budget, *map(max, zip(*(api.reach(steering) for steering, _ in asked), strict=True)))
        own = (step.cells[0].method, step.cells[0].variant)
        more = [_beside(at, m) for m in also.get(own, ())]
        probes = pd.concat([table.attrs["probes"], *more], ignore_index=True).assign(status=TRIED)
        table = pd.concat([table, probes], ignore_index=True).assign(budget=how.budget)[[*KL_COLUMNS]]
        run.store_result(step, path, table.to_csv(index=False, lineterminator="\n"), parts, {"probes": len(probes)})
        said = ", ".join(f"{row['multiplier']:.3g} ({row['status']})" for row in table[table["status"] != TRIED].to_dict("records"))
        tell(f"[{number}/{len(todo)}] {step.cells[0]}: m = {said}")
    return len(todo)


def _beside(at: Callable[..., pd.DataFrame], m: float) -> pd.DataFrame | None:
    """A row more of what was tried; None where the model breaks down there."""
    try:
        return at([m]).assign(side="negative" if m < 0 else "positive")
    except NotFinite:
        return None


def _mean(concepts: Sequence[Callable[[Sequence[float]], pd.DataFrame]], strengths: Sequence[float]) -> pd.DataFrame:
    """As `api.divergence`: means over the concepts, of which each has its Steering and its prompts."""
    merged = {"tokens": "sum", "kl_mean": "mean", "kl_p95": "mean", "kl_max": "max"}
    return pd.concat([at(strengths) for at in concepts]).groupby("multiplier", sort=False).agg(merged).reset_index()


def steps(
    base: Path,
    model: str,
    dataset: str,
    cells: Sequence[tuple[str, str]],
    device: str,
    mode: str = "apply",
    split: str | None = None,
    concepts: Sequence[int] = (),
) -> list[tuple[Step, verbs.Request, identity.Seen]]:
    """A step for each cell, as texts are made with it (or its losses measured).

    Raises UserError for a data set with concepts where none are named.
    """

    def variant(cell: tuple[str, str]) -> tuple[tuple[int, ...], int]:
        own = variant_of(cell[1])
        return own.layers or (), -1 if own.seed is None else own.seed

    out = []
    for (layers, seed), group in groupby(sorted(cells, key=variant), variant):
        words = tuple(f"{method}_{variant_of(form).form}" for method, form in group)
        own: dict[str, Any] = {"layers": (layers,) if layers else None, "seeds": (None if seed < 0 else seed,)}
        own |= {"device": device, "multipliers": (1.0,), "base_dir": base, "split": split, "concepts": tuple(concepts) or None}
        request = verbs.Request(dataset, words, model, ("vector",), mode, **own)
        seen = identity.Seen()
        for step in plan.make(request).steps:
            if not concepts and step.cells[0].concept is not None:
                raise UserError(f"{dataset} has concepts, each with a vector of its own; prompts are baselines of data sets without")
            out.append((step, request, seen))
    return out


def _parts(step: Step, how: How, seen: identity.Seen) -> dict[str, Any]:
    settings = {name: value for name, value in step.settings.as_dict().items() if name in DECIDING}
    concepts = {"concepts": [cell.concept for cell in step.cells]} if step.cells[0].concept is not None else {}
    own = {"settings": settings, "kl": how._asdict(), "split": "prompts", TRIED: True, **concepts}
    return parts_of(step, "prompts", own, None, seen)
