"""Fixtures that several files ask for by name."""

from __future__ import annotations

from command_line import base, clean  # noqa: F401
from faults import bare, here, prepared  # noqa: F401
from hparams_tree import tree  # noqa: F401
