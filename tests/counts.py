"""How often: a person is answered in minutes; with CI=true the same tests run in full."""

from __future__ import annotations

import os

CI = bool(os.environ.get("CI"))


def count(full: int, quick: int) -> int:
    """`full` where CI=true, else `quick`."""
    return full if CI else quick
