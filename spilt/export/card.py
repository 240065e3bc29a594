"""README.md of an export: what it is, at which strength, how it is loaded, what was compared, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spilt import __version__
from spilt.errors import printable
from spilt.export.folding import Job
from spilt.report.cells import CURVES_FILE
from spilt.steering.steering import RECOMMENDED


def text(job: Job, kind: str, loading: str, facts: Mapping[str, Any], checked: str, picture: bool) -> str:
    """facts: what is known of the fit, shown as a list; whatever comes from names or files is shown as code."""
    name = Path(job.base).name if Path(job.base).is_absolute() else job.base  # where it lies on this machine is nobody's business
    head = {"base_model": name, "tags": ["steering", "spilt"]} | ({"library_name": "peft"} if kind == "peft" else {})
    where = ", ".join(f"{made.form} at layer {site.layer} ({site.write_point})" for site, made in job.steering)
    known = {"base model": name, "what": where, **facts, "multiplier": f"{job.multiplier:g}"}
    if RECOMMENDED in job.steering.about:
        known["recommended multiplier"] = f"{job.steering.about[RECOMMENDED]:g}"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, allow_unicode=True).strip(),
            "---",
            f"# A steered `{_code(name)}`",
            "",
            f"Made by spilt {__version__}, `--format {kind}`. {steered(job.steering.scope).capitalize()}.",
            "",
            *(f"- {name}: `{_code(value)}`" for name, value in known.items() if value not in (None, "")),
            "",
            "## Loading",
            "",
            loading.strip(),
            "",
            "## Checked",
            "",
            checked,
            "",
            *(["## What it buys and costs", "", f"![preference and utility against the multiplier]({CURVES_FILE})", ""] if picture else []),
            "## Limits",
            "",
            "Made for this base model alone; another checkpoint of the same shape takes it and does something else. Stronger than the",
            "recommended multiplier, answers stop being valid. Nothing was measured but what is said here.",
            "",
        ]
    )


def steered(scope: str) -> str:
    """Which tokens, in words."""
    return "every token is steered" if scope == "all" else f"the tokens of scope {scope} alone are steered"


def _code(value: Any) -> str:
    """One line without what would end a span of code."""
    return printable(str(value)).replace("`", "'")
