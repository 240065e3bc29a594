"""spilt: train, apply and measure small interventions on transformer language models.

For Python users (api/ says what each does): load, fit, steer, in_place, read_adapter, read_post_block, generate, measure,
divergence, calibrate, Steering, lm_eval_model.
Importing the package is fast: what needs torch comes when it is first asked for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_CALLS = ("calibrate", "divergence", "fit", "generate", "in_place", "load", "measure", "read_adapter", "read_post_block", "steer")
_FACE = dict.fromkeys(_CALLS, "spilt.api") | {"Steering": "spilt.steering.steering", "lm_eval_model": "spilt.lm_eval"}
__all__ = [*_FACE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'spilt' has no attribute {name!r}; have: {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
