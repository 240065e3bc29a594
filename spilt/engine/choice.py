"""Which engine does a piece of work: the fast one where it applies, else the plain one; and why. No torch: a dry run says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from spilt.errors import unknown
from spilt.settings.fields import WRITE_POINTS
from spilt.steering import anatomy

FAST, PLAIN = ENGINES = ("fast", "plain")
ASKED = "asked for with --engine plain"


def why_plain(
    sites: Iterable[tuple[int, str]], verb: str, *, family: str = "", engine: str = FAST, joint: bool = False, positions: str = "all"
) -> str:
    """Why the fast path does not apply; '' where it does.

    sites: (layer, write point). verb: fit, generate, measure. family: `config.model_type`. positions: which tokens are steered.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    places = list(sites)
    if engine == PLAIN:
        return ASKED
    if inside := [f"{path} of block {layer}" for layer, path in places if path not in WRITE_POINTS]:
        return f"{inside[0]} is steered"
    if family and (why := anatomy.family_of(family).plain):
        return why
    twice = [layer for layer, count in Counter(layer for layer, _ in places).items() if count > 1]
    if twice:
        return f"block {twice[0]} is steered twice"
    if verb == "fit" and joint and len(places) > 1:
        return "several layers are fitted jointly"
    if verb in ("fit", "measure") and any(layer == 0 and write_point != "block" for layer, write_point in places):
        return "the inside of block 0 is steered, and there is no block below it to record"
    if verb == "generate" and positions != "all":
        return f"steer_positions = {positions}: text is made fast where every token is steered"
    return ""
