"""The page of `spilt tasks table`: the numbers of its CSV files, one file that needs nothing else, foreign text shown as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import listops_world as world
import pandas as pd
import pytest
from test_report import HOSTILE, Browser, browser, text_of
from test_tasks import Said, words

from spilt import cli
from spilt.downstream import picture, table
from spilt.report.comparison import Table

__all__ = ["browser"]  # the fixture


def made(count: int = 4, title: str = "mine, toy, test") -> list[Table]:
    """Tables of runs with accuracies 0, 1/10, ... of 40 rows; the first is the reference."""
    runs = []
    for i in range(count):
        name, right = ("base", "post_block_block_silu_r8", HOSTILE, "lora_r8 lr0.001_bs4x1_ep1_warmup0.03_wd0_seed42")[i % 4], 4 * i
        asked: dict[str, Any] = {"reading": {}, "max_new_tokens": 5}
        summary = {
            "task": title.split(", ")[0], "model": "toy", "variant": name if i < 4 else f"vector_{i}", "run": "run", "multiplier": 1.0,
            "part": "all", "parameters": 100 * i, "share": i / 1000, "no_answer": i, "cut_off": 0, "prompts_truncated": 0,
            "prompts_left_out": 0, "rows_without_answer": 0, "seen_in_train": None if i else 2, "commonest": 0.25,
        }  # fmt: skip
        runs.append(table.Run(summary, tuple(k < right for k in range(40)), "data", "model", asked))
    return table._tables(runs, "base", "test", "")


def test_the_page_has_every_number_and_the_files_are_alike(tmp_path: Path, capsys: Said) -> None:
    base = world.write_untrained(tmp_path)
    world.write_task(base / "new", 1, train=16, test=6)
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    assert cli.main(words(base, "train", "--variant", "vector", "--lr", "1e-2", "--bs", "4", "--quiet", "--do-eval", "--test-only")) == 0
    assert cli.main(["tasks", "table", "--base_dir", str(base), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(base), "--format", "html"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == (tmp_path / "out/tasks.html").read_text().rstrip("\n")
    page, found = text_of(tmp_path / "out/tasks.html"), pd.read_csv(tmp_path / "out/tasks_accuracy.csv")
    assert "<h2>new, tiny, test</h2>" in page and "spilt tasks table" in page and "Preference and utility" not in page
    for row in found.to_dict("records"):
        assert row["variant"] in page and f'data-v="{row["accuracy"]}"' in page and f'data-v="{row["parameters"]}"' in page
    assert "McNemar" in page and "The commonest label is that of" in page and found["reference"].eq("base").all()


def test_foreign_names_are_text_and_nothing_is_asked_of_anybody() -> None:
    page = table.html(made())
    assert HOSTILE not in page and "&lt;script&gt;document.title" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "script-src 'sha256-" in page
    assert "Whether training prompts are among these rows was not counted for all" in page


@pytest.mark.long
def test_more_runs_than_are_drawn_are_told_and_one_alone_is_a_page() -> None:
    many = made(picture.MOST + 3)
    assert f"The first {picture.MOST} of {picture.MOST + 3} runs." in table.html(many)
    drawn = [text.get_text() for text in picture.accuracy(many[0].values).axes[0].texts][::2]
    assert drawn == many[0].values["variant"].tolist()[: picture.MOST] and len({*drawn}) == picture.MOST
    (alone,) = made(1)
    assert "Every pair" not in table.html([alone]) and not picture.accuracy(alone.values).axes[0].lines[1:]


def test_the_picture_shows_the_numbers() -> None:
    values = made()[0].values
    axes = picture.accuracy(values).axes[0]
    lines = {round(float(line.get_xdata()[0]), 6) for line in axes.lines if len(line.get_xdata()) == 1}
    assert lines == {round(100 * share, 6) for share in values["accuracy"]}
    long = made()[0].values["variant"][1]
    for narrow, most in ((True, 34), (False, 64)):
        (cut,) = (text.get_text() for text in picture.accuracy(values, narrow).axes[0].texts if text.get_text().endswith("seed42"))
        assert len(cut) <= most and long.startswith(cut.partition("…")[0])
    assert [text.get_text() for text in axes.texts][1::2] == ["", *(f"{share:.2%}" for share in values["share"][1:])]


@pytest.mark.long
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser_it_fits_and_sorts(width: int, tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "tasks.html"
    path.write_text(table.html([*made(6), *made(2, "other, toy, test")]))
    browser.open(path, width)
    assert browser.js("document.title") == "Tasks · spilt" and browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("[...document.images].every((i) => i.complete && i.naturalWidth > 100)")
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    values = "[...document.querySelector('table').tBodies[0].rows].map((r) => Number(r.children[1].dataset.v))"
    start = browser.js(values)
    browser.js("document.querySelectorAll('table thead button')[1].click()")
    assert browser.js(values) == sorted(start) != start
    assert HOSTILE in browser.js("[...document.querySelectorAll('tbody th')].map((h) => h.textContent)")
