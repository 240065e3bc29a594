"""Which engine does a piece of work: the fast one where it applies, else the plain one; and why."""

from __future__ import annotations

from collections import Counter

from spilt.steering import hooks
from spilt.steering.steering import Steering

FAST, PLAIN = ENGINES = ("fast", "plain")


def why_plain(steering: Steering, verb: str, joint: bool = False) -> str:
    """Why the fast path does not apply to this steering; '' where it does. verb: fit, generate, measure."""
    twice = [layer for layer, count in Counter(site.layer for site, _ in steering).items() if count > 1]
    if twice:
        return f"block {twice[0]} is steered twice"
    if verb == "fit" and joint and len(steering) > 1:
        return "several layers are fitted jointly"
    if verb in ("fit", "measure") and min(hooks.base(site.layer, made) for site, made in steering) < 0:
        return "the inside of block 0 is steered, and there is no block below it to record"
    if verb == "measure" and len({made.positional for _, made in steering}) > 1:
        return "its forms act at different positions"
    return ""
