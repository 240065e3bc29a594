"""How often: a person is answered in minutes; with CI=true the same tests run in full."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

CI = bool(os.environ.get("CI"))


def count(full: T, quick: T) -> T:
    """`full` where CI=true, else `quick`."""
    return full if CI else quick
