"""report, recommend, look and verify on trees that are broken, foreign, empty or hostile: a message, an exit code, and the rest goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from faults import Here, fresh
from mutations import mutated

from spilt import cli
from spilt.artifacts.losses import CONTROL
from spilt.report import main as report_main

pytestmark = pytest.mark.usefixtures("no_pictures")
RAW = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # steers a terminal; XML and HTML forbid most
LOSSES = "vectors/tiny/get_sft_loss/sft/mine/sft_vector"
TEXTS = "generation/tiny/sft/mine/sft_vector"
SWEEP = ("--mode", "loss", "--multipliers", "-2", "-1", "0", "1", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Two cells with losses, texts and a report."""
    base = families.make_base(tmp_path_factory.mktemp("made") / "base", train=6)
    for form in ("vector", "lora"):
        for words in (("--mode", "both", "--multipliers", "-1", "1"), (*SWEEP, *(["--no_report"] if form == "vector" else []))):
            assert cli.main([*base.argv("sft", form, *words), "--quiet"]) == 0
    control = ",".join(CONTROL) + "\n"
    control += "".join(f"train,{draw},{m},{abs(m)},0.1,1.0,2.0,2.1,6,0\n" for draw in range(4) for m in (-1.0, 0.0, 1.0))
    (base.path / LOSSES / "control.csv").write_text(control)
    return base


@pytest.fixture
def tree(made: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Here:
    shutil.copytree(made.path, tmp_path / "base")
    return Here(made._replace(path=tmp_path / "base"), capsys)


def programs(here: Here, caplog: pytest.LogCaptureFixture) -> dict[str, tuple[int, str]]:
    """Exit code and everything said, of each program that only reads."""
    said = {}
    names = ["--model_name", "tiny", "--dataset", "mine"]
    for program in ("recommend", "look", "verify", "report"):
        fresh()
        caplog.clear()
        here.capsys.readouterr()
        words = ["--base_dir", str(here.base.path), *(() if program == "verify" else names)]
        code = cli.main([program, *words])
        out, err = here.capsys.readouterr()
        said[program] = code, out + err + caplog.text
        assert code in (0, 1, 2) and "Traceback" not in out + err, (program, out + err)
        assert not RAW.search(out + err), (program, out + err)
    return said


BROKEN: dict[str, bytes] = {
    "hello": b"hello",
    "empty": b"",
    "garbage": bytes(range(256)) * 4,
    "list": b"[1, 2, [3]]",
    "object": b'{"a": 1}',
    "brackets": b"[" * 100_000,
    "words": b"split,draw,multiplier,preference,utility\ntrain,x,y,z,w\n",
    "escape": b'split\x1b[31m,\x00a\n"\x1b]0;title\x07",2\n',
}
# what a reader of each takes for another mistake
JSON, CSV = ("empty", "garbage", "list", "object", "brackets", "escape"), ("hello", "empty", "garbage", "words", "escape")


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((f"{LOSSES}/{name}", content) for name, kind in {"control.csv": CSV, "fit.json": JSON}.items() for content in kind),
        *((f"{LOSSES}/preference_utility.csv", content) for content in ("hello", "garbage")),  # with losses there it is not read
    ],
)
def test_loss_mode_goes_on_with_a_broken_file(tree: Here, caplog: pytest.LogCaptureFixture, file: str, content: str) -> None:
    """Made again where the run makes it, else named and left out; the table and exit code 0 are there in each case."""
    page = tree.path("vectors/tiny/get_sft_loss/report/mine/report.html")
    page.unlink()
    tree.path(file).write_bytes(BROKEN[content])
    code, said = tree.run(*SWEEP)
    assert code == 0 and "already done" in said and "report" in said and "Traceback" not in said, said
    text = page.read_text()
    assert "sft LoRA" in text and "sft vector" in text and not RAW.search(text)
    if file.endswith("control.csv"):
        assert "control left out" in text and "control.csv" in caplog.text
    elif file.endswith("fit.json"):
        assert "fit.json: is damaged" in caplog.text
        assert json.loads(tree.path(file).read_bytes())["cell"]["method"] == "sft"


@pytest.mark.long
def test_one_changed_digit_of_a_fit_is_found(tree: Here, made: families.Base, caplog: pytest.LogCaptureFixture) -> None:
    path = tree.path(f"{LOSSES}/fit.json")
    assert tree.run(*SWEEP)[0] == 0  # with the control that was put there
    whole = path.read_text()
    at = re.search(r'"preference": -?\d\.(\d)', whole)
    assert at is not None
    path.write_text(whole[: at.start(1)] + str((int(at[1]) + 1) % 10) + whole[at.end(1) :])
    assert tree.run(*SWEEP)[0] == 0
    assert path.read_text() == whole and "fit.json: is damaged" in caplog.text


@pytest.mark.parametrize("content", JSON)
@pytest.mark.few(1)
@pytest.mark.long
def test_a_broken_results_file_is_named(tree: Here, caplog: pytest.LogCaptureFixture, content: str) -> None:
    path = tree.path(f"{TEXTS}/m1.0/mine_results.json")
    path.write_bytes(BROKEN[content])
    path.with_suffix(".manifest.json").unlink(missing_ok=True)
    path.with_name("mine_results.manifest.json").unlink(missing_ok=True)
    for other in tree.path(TEXTS).rglob("*.manifest.json"):
        other.unlink()  # all of them the released code's
    said = programs(tree, caplog)
    assert said["look"][0] == 0 and "mine_results.json" in said["look"][1] and "m=-1" in said["look"][1]
    assert said["verify"][0] == 1 and said["report"][0] == 0
    assert "texts left out" in tree.path("vectors/tiny/get_sft_loss/report/mine/report.html").read_text()


@pytest.mark.parametrize("content", CSV)
@pytest.mark.few(1)
@pytest.mark.long
def test_a_broken_loss_table_is_named(tree: Here, caplog: pytest.LogCaptureFixture, content: str) -> None:
    for path in tree.path("vectors/tiny/get_sft_loss").rglob("*.manifest.json"):
        path.unlink()
    tree.path(f"{LOSSES}/vector_sft_m2.0_winning_only/train_losses.csv").write_bytes(BROKEN[content])
    said = programs(tree, caplog)
    assert said["recommend"][0] == 0 and "vector_sft_m2.0_winning_only/train_losses.csv" in said["recommend"][1]
    assert said["report"][0] == 0 and "left out" in said["report"][1] and said["verify"][0] == 1


@pytest.mark.long
def test_a_table_of_another_tool_that_is_broken(tree: Here, caplog: pytest.LogCaptureFixture) -> None:
    """preference_utility.csv alone, without loss rows: the other cell stays."""
    for folder in tree.path(LOSSES).iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    for content in BROKEN.values():
        tree.path(f"{LOSSES}/preference_utility.csv").write_bytes(content)
        said = programs(tree, caplog)
        assert said["recommend"][0] == 0 and "preference_utility.csv" in said["recommend"][1]
        assert said["report"][0] == 0


@pytest.mark.long
def test_a_multiplier_with_fewer_rows(tree: Here, caplog: pytest.LogCaptureFixture) -> None:
    path = tree.path(f"{TEXTS}/m1.0/mine_results.json")
    rows = json.loads(path.read_bytes())
    for manifest in tree.path(TEXTS).rglob("*.manifest.json"):
        manifest.unlink()
    path.write_text(json.dumps(rows[:1]))
    code, said = programs(tree, caplog)["look"]
    assert code == 0 and re.search(r"m=1 +\(none\)", said)
    for odd in ([], [{"pred": []}], [{"input": "x", "pred": "a text"}], [{"input": "x"}]):
        path.write_text(json.dumps(odd))
        assert programs(tree, caplog)["look"][0] == 0


HOSTILE = "\x1b[31mred\x00\x07\x9b2J\u202eabc\r\nerror: fake"


@pytest.mark.long
def test_what_is_in_a_file_never_steers_the_terminal_or_the_page(tree: Here, caplog: pytest.LogCaptureFixture) -> None:
    for path in tree.base.path.rglob("*.manifest.json"):
        path.unlink()
    path = tree.path(f"{TEXTS}/m1.0/mine_results.json")
    row = {"input": HOSTILE, "pred": [HOSTILE], "orig_pred": [HOSTILE], "reference_response": HOSTILE, "complete_output": [HOSTILE]}
    path.write_text(json.dumps([row]))
    tree.path(f"{TEXTS}/m-1.0/mine_results.json").write_text(json.dumps([{HOSTILE: 1, "pred": {HOSTILE: 2}}]))
    tree.path(f"{LOSSES}/control.csv").write_text(f'"{HOSTILE}",b\n1,2\n')
    tree.path(f"{LOSSES}/vector_sft_m2.0_winning_only/train_losses.csv").write_text(f'"{HOSTILE}",b\n1,2\n')
    folder = tree.path("vectors/tiny/get_sft_loss") / "m\x1b[31m" / "mine" / "m\x1b[31m_f\x1b[2J"
    shutil.copytree(tree.path(LOSSES), folder)
    said = programs(tree, caplog)
    assert "\\x1b[31m" in said["verify"][1]
    page = tree.path("vectors/tiny/get_sft_loss/report/mine/report.html").read_text()
    assert not RAW.search(page) and "\\x1b[31mred" in page
    code, text = tree.run(*SWEEP)
    assert code in (0, 1) and not RAW.search(text) and "\nerror: fake" not in text


def odd_places(base: Path, rng: random.Random) -> list[tuple[str, Callable[[Path], Any]]]:
    """What may stand where a file is expected."""

    def hurt(path: Path) -> None:
        path.write_bytes(mutated(path.read_bytes(), rng))

    return [
        ("damage", hurt),
        ("damage again", hurt),
        ("folder", lambda path: (path.unlink(), path.mkdir())),
        ("fifo", lambda path: (path.unlink(), os.mkfifo(path))),
        ("device", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
        ("loop", lambda path: (path.unlink(), path.symlink_to(path.name))),
        ("foreign", lambda path: path.write_bytes(rng.choice(list(BROKEN.values())))),
        ("unreadable names", lambda path: path.rename(path.with_name(f"{path.stem}\udc80{path.suffix}"))),
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.long
def test_any_tree_gives_a_message_and_a_code(tree: Here, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """Four stored files at random hurt at random, three times over; each program ends with a code and no traceback."""
    rng = random.Random(seed)
    for _ in range(2):
        files = [p for top in ("vectors", "generation") for p in sorted(tree.path(top).rglob("*")) if p.is_file() and not p.is_symlink()]
        for path in rng.sample([p for p in files if p.suffix in (".csv", ".json", ".pt", ".jsonl")], 4):
            rng.choice(odd_places(tree.base.path, rng))[1](path)
        programs(tree, caplog)


def test_empty_and_foreign_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["nothing", LOSSES, "vectors/tiny/get_sft_loss", f"{TEXTS}/m1.0"]
    for number, place in enumerate(places):
        (tmp_path / str(number) / place).mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for base in [*(tmp_path / str(n) for n in range(len(places))), tmp_path / "file", tmp_path / "nowhere"]:
        for program in ("recommend", "look", "report", "verify"):
            names = () if program == "verify" else ("--model_name", "tiny", "--dataset", "mine")
            code = cli.main([program, "--base_dir", str(base), *names])
            out, err = capsys.readouterr()
            assert code in ((0, 2) if program == "verify" else (2,)), (base, program, out, err)
            assert code == 0 or (err.startswith("error: ") and "Traceback" not in err)
    assert report_main(["--base_dir", str(tmp_path / "nowhere")]) == 2
