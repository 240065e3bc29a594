"""The README says what the code does: tables are made from the code's, files that it names are there, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_made_from_the_code() -> None:
    """python tools/readme_tables.py --write makes them new."""
    assert subprocess.run([sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"], timeout=120).returncode == 0


def test_what_it_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+?)\)", TEXT) if "://" not in link]
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_its_make_targets_and_flags_exist() -> None:
    from spilt.cli import parser

    targets = set(re.findall(r"^(?:`)?make ([a-z-]+)", TEXT, re.M)) | set(re.findall(r"`make ([a-z-]+)`", TEXT))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"demo", "test", "curves"}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
    known = {flag for action in parser()._actions for flag in action.option_strings} | {"--source", "--input", "--name"}
    used = set(re.findall(r"(?<![\w-])--[a-z_]+", TEXT))
    assert len(used) > 10
    assert used - known == set()
