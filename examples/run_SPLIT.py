"""The released runner's name and place: run_spilt.py with this checkout as its base_dir, from wherever it is started."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spilt.cli import main  # noqa: E402

raise SystemExit(main(base_dir=ROOT))
