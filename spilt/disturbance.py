"""The multipliers at which each cell of a model and data set disturbs the model by one budget of KL: kl.csv in its folder of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spilt import api, plan, verbs
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.cell import variant_of
from spilt.data import readers
from spilt.errors import UserError
from spilt.model import host, identity
from spilt.run import quiet_libraries
from spilt.tasks.recordings import Run, stored
from spilt.verbs import Step
from spilt.verbs.base import parts_of

DECIDING = ("layers", "dtype", "use_chat_template", "system_prompt", "intervention_components", "site", "anatomy")


class How(NamedTuple):
    """budget: nats at the 95th percentile; prompts: the data set's first; max_new_tokens: of each answer."""

    budget: float
    prompts: int = 8
    max_new_tokens: int = 32


def calibrate(
    base: Path, model: str, dataset: str, cells: Sequence[tuple[str, str]], how: How, device: str = "", tell: Callable[[str], None] = print
) -> int:
    """Store what is not there yet of cells (method, form with layers and seed); the model is loaded once. Returns how many were measured.

    Raises UserError for a data set with concepts: each has a vector of its own.
    """
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    todo = [
        (step, request, seen, path, parts)
        for step, request, seen in steps(base, model, dataset, cells, device)
        for path, parts in [(Store(base).loss_folder(step.cells[0]) / Store.KL, _parts(step, how, seen))]
        if manifest.standing(path, parts) != "done"
    ]
    loaded: host.Host | None = None
    for number, (step, request, seen, path, parts) in enumerate(todo, 1):
        s: Any = step.settings
        if loaded is None:
            quiet_libraries()
            loaded = host.load(request.model_folder, s.dtype, device, s.anatomy)
        run = Run.alone(request, loaded, device, seen, tell)
        (cell,) = step.cells
        fmt = verbs.entry_of("generate", "prompts", base, dataset)
        prompts = [row.input for row in readers.read_prompts(fmt, None, how.prompts)]
        chat = {"use_chat_template": s.use_chat_template, "system_prompt": s.system_prompt, "batch_size": s.batch_size}
        steering = stored(cell, s, run)
        table = api.calibrate(loaded.model, loaded.tokenizer, steering, prompts, how.budget, max_new_tokens=how.max_new_tokens, **chat)
        table = table.assign(budget=how.budget)[["side", "multiplier", "status", "tokens", "kl_mean", "kl_p95", "kl_max", "budget"]]
        run.store_result(step, path, table.to_csv(index=False, lineterminator="\n"), parts, {"probes": len(table.attrs.get("probes", ()))})
        said = ", ".join(f"{row['multiplier']:.3g} ({row['status']})" for row in table.to_dict("records"))
        tell(f"[{number}/{len(todo)}] {cell}: m = {said}")
    return len(todo)


def steps(
    base: Path, model: str, dataset: str, cells: Sequence[tuple[str, str]], device: str, mode: str = "apply", split: str | None = None
) -> list[tuple[Step, verbs.Request, identity.Seen]]:
    """A step for each cell, as texts are made with it (or its losses measured)."""

    def variant(cell: tuple[str, str]) -> tuple[tuple[int, ...], int]:
        own = variant_of(cell[1])
        return own.layers or (), -1 if own.seed is None else own.seed

    out = []
    for (layers, seed), group in groupby(sorted(cells, key=variant), variant):
        words = tuple(f"{method}_{variant_of(form).form}" for method, form in group)
        own: dict[str, Any] = {"layers": (layers,) if layers else None, "seeds": (None if seed < 0 else seed,)}
        own |= {"device": device, "multipliers": (1.0,), "base_dir": base, "split": split}
        request = verbs.Request(dataset, words, model, ("vector",), mode, **own)
        seen = identity.Seen()
        for step in plan.make(request).steps:
            if len(step.cells) > 1 or step.cells[0].concept is not None:
                raise UserError(f"{dataset} has concepts, each with a vector of its own; equal KL and prompts are for data sets without")
            out.append((step, request, seen))
    return out


def _parts(step: Step, how: How, seen: identity.Seen) -> dict[str, Any]:
    settings = {name: value for name, value in step.settings.as_dict().items() if name in DECIDING}
    return parts_of(step, "prompts", {"settings": settings, "kl": how._asdict(), "split": "prompts"}, None, seen)
