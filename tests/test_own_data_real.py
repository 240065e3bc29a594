"""A CSV and the real model, as a newcomer would type it: one command from the file to steered text."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_real_model import FOLDER, REAL, ROOT, WHY

pytestmark = [pytest.mark.real_model, pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=WHY)]


@pytest.mark.long
def test_a_csv_to_steered_text_in_one_command(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/smollm").symlink_to(FOLDER.resolve())
    with (REAL / "data/sea/train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    with (tmp_path / "seaside.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";").writerows([["ask", "good", "bad"], *rows[1:]])
    words = "--train seaside.csv --test 0.2 --columns question=ask,matching=good,not_matching=bad --layers 14 --model_name smollm"
    words += " --method caa --intervention_method vector --device cpu --dtype float32 --multipliers 0 12 --limit 3"
    words += " --set generation_params.max_new_tokens=12 --set generation_params.do_sample=false"
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "spilt", *words.split()], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "51 pairs in train.jsonl, 13 pairs in test.jsonl from seaside.csv" in done.stdout
    folder = tmp_path / "generation/smollm/caa/seaside/caa_vector@layer14"
    plain, steered = ([row["pred"] for row in json.loads((folder / f"m{m}.0/seaside_results.json").read_text())] for m in (0, 12))
    assert len(plain) == len(steered) == 3 and plain != steered
