"""`--train hf:NAME[:CONFIG][:SPLIT]`: by a stand-in of the datasets library; test_hub_library.py has the library itself."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import families
import pytest
from refusal import message

from spilt import cli
from spilt.data import hub, own
from spilt.data.sources import read_rows

ROWS = families.pairs(8)
STAND_IN = """
import json, os, types
class Rows(list):
    info = types.SimpleNamespace(config_name="default")
__version__ = "4.1.0"
def disable_progress_bars():
    print("a library may write to stderr", file=__import__("sys").stderr)
def load_dataset(path, name=None, *, split=None):
    if path == "org/gone" or (path == "org/far" and os.environ.get("HF_HUB_OFFLINE") == "1"):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
    rows = {"train": ROWS, "held": ROWS[:2], "other": [dict(row, question="in " + str(name)) for row in ROWS]}
    if split not in rows:
        raise ValueError(f"Unknown split '{split}'. Should be one of {list(rows)}.")
    return Rows(rows[split])
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, as a module of the other process."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "datasets.py").write_text(textwrap.dedent(STAND_IN) + f"ROWS = {ROWS!r}\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    hub.rows.cache_clear()
    return folder


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("hf:org/pairs", ("org/pairs", None, "train")),
        ("hf:pairs:held", ("pairs", None, "held")),
        ("hf:org/pairs:hard:held", ("org/pairs", "hard", "held")),
    ],
)
def test_what_a_name_means(said: str, wanted: tuple[str, str | None, str]) -> None:
    assert hub.spec_of(said) == wanted


@pytest.mark.parametrize("said", ["hf:", "hf:../x", "hf:a/b/c", "hf:org/pairs:a:b:c", "hf:/etc", "hf:org/pairs: x"])
def test_other_names_are_refused(said: str) -> None:
    assert "wanted hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT" in message(hub.spec_of, said)


def test_a_dataset_is_taken_over_as_a_file_is(library: Path, tmp_path: Path) -> None:
    given = own.Own((Path("hf:org/pairs"),), (Path("hf:org/pairs:held"),))
    assert own.name_of(given.train) == "pairs"
    (said,) = own.bring(tmp_path, "pairs", given)
    assert said.endswith("8 pairs in train.jsonl, 2 pairs in test.jsonl from hf:org/pairs")
    assert [record.values for record in read_rows(tmp_path / "data/pairs/train.jsonl")] == ROWS
    assert own.bring(tmp_path, "pairs", given) == [], "the same rows again"
    assert [row["file"] for row in json.loads((tmp_path / "data/pairs/source.json").read_text())["train"]] == ["hf:org/pairs"]
    hub.rows.cache_clear()
    (library / "datasets.py").write_text((library / "datasets.py").read_text().replace("is 3 odd?", "is 3 even?"))
    assert own.bring(tmp_path, "pairs", given)[0].count("was replaced") == 1
    assert hub.rows("hf:org/pairs:hard:other")[0].values["question"] == "in hard"


def test_only_the_cache_unless_a_download_is_asked_for(library: Path) -> None:
    said = message(hub.rows, "hf:org/far")
    assert said == (
        "hf:org/far: is not in the local cache of datasets, or cannot be reached: Couldn't reach 'org/far' on the Hub; "
        "--download fetches it from the hub"
    )
    assert len(hub.rows("hf:org/far", True)) == 8
    assert message(hub.rows, "hf:org/gone", True).endswith("Couldn't reach 'org/gone' on the Hub")


def test_what_is_wrong_is_told(library: Path, tmp_path: Path) -> None:
    assert "hf:org/pairs:x: cannot be read: Unknown split 'x'. Should be one of ['train'" in message(hub.rows, "hf:org/pairs:x")
    said = message(own.bring, tmp_path, "pairs", own.Own((Path("hf:org/pairs"),), columns={"matching": "good"}))
    assert said.startswith("hf:org/pairs row 0 (0-based): no column 'good' (columns found: question, matching, not_matching)")
    (library / "datasets.py").write_text("__version__ = '3.6.0'\n")
    assert "datasets 3.6.0 may run a dataset's own code; wanted 4 or later" in message(hub.rows, "hf:org/new")
    (library / "datasets.py").write_text("raise ImportError\n")
    assert message(hub.rows, "hf:org/none") == "hf:org/none: the datasets library is not installed here: pip install datasets"


def test_from_the_command_line(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=4)
    given = ["--train", "hf:org/pairs", "--test", "2", "--model_name", base.model, "--method", "caa", "--intervention_method", "vector"]
    given += ["--device", "cpu", "--base_dir", str(base.path), "--dtype", "float32", "--quiet", "--mode", "generate"]
    assert cli.main([*given, "--dry_run"]) == 0 and not (base.path / "data/pairs").exists()
    assert cli.main(given) == 0 and (base.path / "vectors/tiny/caa/pairs/caa_vector/layer_2.pt").is_file()
    assert cli.main([*given, "--train", "hf:org/gone"]) == 2
    assert "--download fetches it from the hub" in capsys.readouterr().err
    words = ["prepare", "--input", "hf:org/pairs:held", "--base_dir", str(base.path), "--name", "held"]
    assert cli.main(words) == 0 and len(read_rows(base.path / "data/held/train.jsonl")) == 2
