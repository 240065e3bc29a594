"""The README says what the code does: tables are made from the code's, files that it names are there, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_tables_are_made_from_the_code() -> None:
    """python tools/readme_tables.py --write makes them new."""
    assert subprocess.run([sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"], timeout=120).returncode == 0


def test_what_it_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+?)\)", TEXT) if "://" not in link]
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.long
def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks under 'In Python', one after the other, in a folder that holds the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    section = TEXT[TEXT.index("## In Python") : TEXT.index("## Arguments")]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 5 and all(len(block.splitlines()) <= 10 for block in blocks)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert names["again"] == names["steering"] and names["both"] != names["steering"]


@pytest.mark.long
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person runs it: in a kernel of its own, with the package installed (here: on the path)."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "steering.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert sum("image/png" in out.get("data", {}) for out in shown) == 1 and len(shown) >= 5


def test_its_make_targets_and_flags_exist() -> None:
    from spilt.cli import parser
    from spilt.weight_steering import flags

    targets = set(re.findall(r"^(?:`)?make ([a-z-]+)", TEXT, re.M)) | set(re.findall(r"`make ([a-z-]+)`", TEXT))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"demo", "demo-small", "test"}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
    known = {flag for action in parser()._actions for flag in action.option_strings} | {
        "--source",
        "--input",
        "--name",
        "--steering",
        "--csv",
        "--format",
        "--layers",
        "--output",
        "--multiplier",
        "--like",
        "--for",
        "--by",
        "--prompt_baseline",
        "--behaviour",
        "--max_incoherent",
        "--max_damage",
        "--prefix",
        "--xstest",
        "--advbench",
        "--strongreject",
        "--kl",
        "--kl_of",
        "--jobs",  # of examples/main_table.py
        "--tasks",
        "--texts",
        "--picture",
        "--include_path",
        "--nproc_per_node",
    }
    known |= {name for flag in flags.FLAGS for name in flag.names}
    used = set(re.findall(r"(?<![\w-])--[a-z_]+(?:-[a-z_]+)*", TEXT))
    assert len(used) > 10
    assert used - known - flags_of_tasks() == set()


def flags_of_tasks() -> set[str]:
    """Of train, evaluate and table of `spilt tasks`."""
    import argparse

    from spilt.downstream import parser

    (works,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {flag for one in works.choices.values() for action in one._actions for flag in action.option_strings}
