"""examples/main_table.py: what it would take, without running anything; and on a small model all of it, to the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import families
import forked
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "main_table.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return forked.run([SCRIPT, *words], 300)


def of(base: families.Base, *more: str) -> list[str]:
    return ["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one, "--device", "cpu", *more]


def results(base: families.Base) -> dict[str, str]:
    """Without what says when they were made."""
    return {name: content for name, content in families.listing(base.path / "vectors").items() if not name.endswith("manifest.json")}


def test_the_dry_run_says_hours_and_memory(tmp_path: Path) -> None:
    """Of the very steps that would run; what the run itself would refuse is refused; nothing is written."""
    base = families.make_base(tmp_path / "base", train=6)
    before = families.listing(base.path)
    done = run(*of(base, "--method", "caa", "spilt", "mean_centred", "--form", "vector", "--dry_run"))
    assert done.returncode == 2 and "neutral" in done.stderr  # as the run itself would say
    done = run(*of(base, "--method", "caa", "spilt", "lda", "--dry_run", "--tflops", "1e-7"))
    assert done.returncode == 0, done.stderr
    assert f"tiny {base.one}: 15 steps, " in done.stdout and "GiB at once" in done.stdout  # caa, lda, three of spilt; three verbs
    hours = float(done.stdout.split("in all about ")[1].split(" hours")[0])
    assert hours > 0 and families.listing(base.path) == before


@pytest.mark.long
def test_all_of_it_on_a_small_model(tmp_path: Path) -> None:
    base = families.make_base(tmp_path / "base", train=6)
    (kind := tmp_path / "kind.txt").write_text("Be kind.", encoding="utf-8")
    for path in (base.path / "data" / base.one).glob("*.jsonl"):  # answers of one word, so that accuracy is among the scores
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [{**row, **({"matching": "yes", "not_matching": "no"} if "matching" in row else {})} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--method", "sft", "spilt", "--form", "vector", "--control_pairs", "0", "--kl", "0.3", "--output", str(tmp_path / "tables")]
    words = of(base, *words, "--prompt_baseline", f"kind={kind}")
    done = subprocess.run([sys.executable, str(SCRIPT), *words, "--jobs", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "tables" / "tables.md").read_text()
    before = results(base)
    again = run(*words)  # in one process: all is there, and the tables are the same
    assert again.returncode == 0 and (tmp_path / "tables" / "tables.md").read_text() == said, again.stderr
    assert results(base) == before
    assert "| spilt vector |" in said and "| KL |" in said and "strengths of equal KL" in said
    head, _, *rows = [line for line in said.split("main results")[1].split("\n\n")[1].splitlines()]
    assert "score: accuracy" in head and len(rows) == 4  # unsteered, the prompt, two methods
    assert all(row.rstrip(" |").split("|")[-1].strip(" []")[0].isdigit() for row in rows), rows
