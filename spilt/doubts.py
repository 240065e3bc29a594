"""A stored vector is used as what it is: what its manifest says against a use."""

from __future__ import annotations

from typing import Any

from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.errors import UserError
from spilt.methods import METHODS, stand_ins
from spilt.model import identity
from spilt.settings import resolve_fit
from spilt.verbs import Request, entry_of
from spilt.verbs.base import with_own


def doubts_of(cell: Cell, layer: int, settings: Any, request: Request, seen: identity.Seen) -> list[str]:
    """What the manifest of a stored vector says against its use by `cell` at `layer`, a sentence each. Without manifest: nothing is known.

    Raises UserError where the use can't be meant: a vector of another method, form, layer, concept or write point.
    """
    store = Store(request.base_dir)
    path = store.vector(cell, layer)
    parts = (manifest.read(path) or {}).get("parts")
    then = parts.get("settings") if isinstance(parts, dict) else None
    if not isinstance(parts, dict) or not isinstance(then, dict):
        return []
    ours = {"method": cell.method, "intervention_method": cell.intervention, "layers": [layer], "site": settings.site}
    found = {name: then.get(name) for name in ours} | {"concept": parts.get("concept")}
    together = found["layers"] if then.get("joint") else None
    if isinstance(together, list) and layer in together:
        found["layers"] = [layer]
    if other := manifest.differences(found, ours | {"concept": cell.concept}):
        raise UserError(
            f"{path}: is another vector by its manifest: {other.replace('(now', '(wanted')}; put it where it belongs, fit this one with "
            f"--mode generate, or remove {manifest.manifest_path(path).name} to use it as it is"
        )
    said = []
    if isinstance(together, list) and set(together) != set(cell.layers):
        others = ", ".join(str(n) for n in together if n != layer)
        said.append(f"was fitted jointly with layer {others}, and acts here with other layers")
    if parts.get("model") != seen.of(store.model(cell.model)):
        said.append(f"was fitted on another model than {store.relative(store.model(cell.model))} holds now")
    given = with_own(request.overrides, cell.method, cell.seed, cell.layers if cell.apart else None)
    try:
        names = (cell.model, cell.dataset, cell.method, cell.intervention)
        adapters = METHODS[cell.method].adapters
        found_now = resolve_fit(request.base_dir, *names, given, cell.layers, adapters, like=stand_ins(*names[2:]))
        data = entry_of("fit", "train", request.base_dir, cell.dataset).path
    except UserError:  # a vector needs no settings of its fit to be used
        return said
    fitted = found_now.settings.as_dict()
    # the model's dtype may differ on purpose: fitted in one, used in another
    both = {name: value for name, value in then.items() if name in fitted and name not in ("dtype", "layers")}
    both["joint"] = then.get("joint", False)
    if edited := manifest.differences(both, {name: fitted.get(name, False) for name in both}):
        said.append(f"was fitted with other settings: {edited}")
    if data.is_file() and parts.get("data") != seen.of(data):
        said.append(f"was fitted on other data than {store.relative(data)} holds now")
    return said
