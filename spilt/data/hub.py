"""`hf:NAME[:CONFIG][:SPLIT]`: rows of a Hugging Face dataset, by the `datasets` library, in a process of its own.

From the local cache only, unless a download is asked for. No code of a dataset is ever run: versions that would are refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from spilt.data.sources import LARGEST, Record
from spilt.errors import UserError

log = logging.getLogger("spilt")
SCHEME = "hf:"
SPEC = re.compile(r"hf:(?P<name>[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?)(:(?P<config>[\w.-]*)(?=:))?(:(?P<split>[\w.-]+))?", re.ASCII)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
NOTE = "spilt: "  # begins a line on stderr that is for the reader, where others are the library's
NO_NAME = "default"  # what the library calls the configuration of a dataset that names none
OLDEST = 4  # of `datasets`: the first version that runs no code of a dataset


class Spec(NamedTuple):
    name: str
    config: str | None
    split: str


def spec_of(said: str) -> Spec:
    """Raises UserError for another form. Of one word after the name that is the split; left out, it is `train`."""
    found = SPEC.fullmatch(said)
    if found is None or ".." in said:
        raise UserError(f"{said}: wanted hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, such as hf:org/pairs:train")
    return Spec(found["name"], found["config"] or None, found["split"] or "train")


@lru_cache(maxsize=8)
def rows(said: str, download: bool = False) -> tuple[Record, ...]:
    """All rows. Raises UserError where the library or the dataset is not there, or the dataset cannot be read."""
    spec = spec_of(said)
    return table(spec.name, spec.config or "", spec.split, download, said)


def table(name: str, config: str, split: str, download: bool = False, said: str = "") -> tuple[Record, ...]:
    """All rows of a split. name: of the hub, or a folder as an absolute path. said: how messages call it."""
    return tables(name, config, (split,), download, said)[0]


def tables(name: str, config: str, splits: Sequence[str], download: bool = False, said: str = "") -> list[tuple[Record, ...]]:
    """Those of several splits, by one start of the library: that is what takes the time."""
    import subprocess

    said = said or f"{name}, config {config}, split {' and '.join(splits)}"
    home = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))), **({} if download else OFFLINE)}
    command = [sys.executable, "-m", "spilt.data.hub", name, config, *splits]
    # not in the user's folder: a name must not mean what lies there
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=sys.prefix, env=env)
    if done.returncode:
        why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"{said}: {why[-1][:400]}" + ("" if download or done.returncode != ABSENT else "; --download fetches it from the hub")
        )
    for line in done.stderr.splitlines():
        if line.startswith(NOTE):
            log.warning("%s: %s", said, line.removeprefix(NOTE))
    rows: list[list[Record]] = [[] for _ in splits]
    for line in done.stdout.split("\n")[:-1]:
        number, values = json.loads(line)
        own = rows[number]
        own.append(Record(len(own), f"row {len(own)} (0-based)", values))
    return [tuple(own) for own in rows]


# ---------------------------------------------------------------- in the other process

ABSENT = 3  # exit code


def main(name: str, config: str, *splits: str) -> int:
    """Write a row a line, with the number of its split."""
    from tempfile import TemporaryDirectory

    try:
        import datasets
    except ImportError:
        return _refused("the datasets library is not installed here: pip install datasets")
    if int(datasets.__version__.split(".")[0]) < OLDEST:
        return _refused(f"datasets {datasets.__version__} may run a dataset's own code; wanted {OLDEST} or later: pip install -U datasets")
    datasets.disable_progress_bars()
    try:
        # what the library keeps of a folder goes by its last name and survives an edit: of a folder nothing is kept
        with TemporaryDirectory() if Path(name).is_absolute() else nullcontext(None) as kept:
            aside = {"cache_dir": kept, "keep_in_memory": True} if kept else {}
            found = [datasets.load_dataset(name, config or None, split=split, **aside) for split in splits]
        if not config and (taken := found[0].info.config_name) != NO_NAME:  # from the cache any that alone is there, whatever the hub has
            print(f"{NOTE}no configuration was named, and {taken} was taken", file=sys.stderr)
        for line in _lines(found):
            sys.stdout.write(line)
    except Exception as error:  # noqa: BLE001 - of the hub, the network, the cache, a damaged file: all are told in one line
        said = " ".join(str(error).split()) or type(error).__name__
        # not there; ConnectionError where it was looked for on the hub; ValueError where the cache has other configurations of it
        if isinstance(error, OSError) or said.startswith("Couldn't find cache"):
            _refused(f"is not in the local cache of datasets, or cannot be reached: {said}")
            return ABSENT
        return _refused(f"cannot be read: {said}")
    return 0


def _lines(found: Sequence[Any]) -> Iterator[str]:
    written = 0
    for number, row in ((number, row) for number, split in enumerate(found) for row in split):
        line = json.dumps([number, row], default=str) + "\n"
        written += len(line)
        if written > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes; all rows are held in memory: give fewer")
        yield line


def _refused(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
