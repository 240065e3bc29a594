"""The rows of a task's splits: from a folder or file of the user's, from the hub's cache by the `datasets` library, or made (ListOps)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts.manifest import digest
from spilt.data import hub
from spilt.data.sources import READERS, Record, columns_of, ending_of, read_rows, seen
from spilt.downstream import listops, rows
from spilt.downstream.answers import extractor
from spilt.downstream.rows import OF_ONE, OWN, SPLITS, Example, Part, Task, of_listops
from spilt.errors import UserError, checked_name, half_pair, unknown

SEED = 42  # of the cut of official splits: one for all runs, so that they share their test rows
SIZES = {"train": 2000, "validation": 500, "test": 1000}  # of ListOps made here


class NotThere(UserError):
    """A split whose file is not in the folder."""


class Data(NamedTuple):
    """One split. without_answer: rows that were left out because they have none."""

    examples: tuple[Example, ...]
    without_answer: int

    @property
    def hash(self) -> str:
        return digest(json.dumps(self.examples).encode())


class Source(NamedTuple):
    """Where a task's rows are. said: a file or a folder; '' for the hub, or for what is made here. made: of ListOps, by its own words."""

    task: Task
    said: str = ""
    download: bool = False
    shape: listops.Shape = listops.Shape()
    sizes: Mapping[str, int] = SIZES
    seed: int = SEED

    def split(self, name: str) -> Data:
        """All rows of train, validation or test. Raises UserError for what is not there or not of the published columns."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        if self.task.name == "ListOps" and not self.said:
            return _examples(self.task, self._made(name))
        path = Path(self.said)
        part = self.task.splits[name]
        if self.said and not path.exists():
            raise UserError(f"--data {self.said}: no such file or folder")
        if self.said and path.is_file():
            all_of, share = read_rows(path), OF_ONE[name]
            if all_of and not _cut(all_of, share):
                raise UserError(
                    f"{path.name}: its {len(all_of)} rows leave none for {name}, which is {share.start:.0%} to {share.end:.0%} of them; "
                    f"give more, or a folder with {', '.join(f'{split}.jsonl' for split in SPLITS)}"
                )
            return _examples(self.task, _cut(all_of, share), path.name)
        if not self.said:
            source, _, config = self.task.source.partition(":")
            found = list(hub.rows(":".join(filter(None, ("hf", source, config, part.official))), self.download))
            return _examples(self.task, _cut(found, part), f"{self.task.source} {part.official}")
        files = [file for file in sorted(path.iterdir()) if (end := ending_of(file)) and file.name[: -len(end)] == part.official]
        if len(files) != 1:
            what = "none" if not files else f"{len(files)}: {', '.join(file.name for file in files)}"
            kind = UserError if files else NotThere
            raise kind(f"--data {self.said}: wanted one file {part.official}.jsonl ({', '.join(READERS)}); there is {what}")
        return _examples(self.task, _cut(read_rows(files[0]), part), files[0].name)

    def train(self) -> Data | None:
        """Its training rows; None where a folder has none: answers can be evaluated without them."""
        try:
            return self.split(SPLITS[0])
        except NotThere:
            return None

    def part(self, name: str) -> str:
        """What of a file that is cut a split is, in words; '' where it is a file of its own."""
        share = OF_ONE[name]
        return f"{name} is {share.start:.0%} to {share.end:.0%} of {Path(self.said).name}, shuffled" if Path(self.said).is_file() else ""

    def _made(self, name: str) -> list[Record]:
        """Expressions of one split, none of an earlier one."""
        known: set[str] = set()
        for number, split in enumerate(SPLITS):
            made = listops.expressions(self.sizes[split], self.shape, len(SPLITS) * self.seed + number, frozenset(known))
            if split == name:
                return [Record(i, f"row {i}", row) for i, row in enumerate(of_listops(made))]
            known |= set(made)
        raise AssertionError(name)


def _cut(found: list[Record], part: Part) -> list[Record]:
    """Its share of an official split in an order drawn once; the whole in its own order."""
    if (part.start, part.end) == (0.0, 1.0):
        return found
    order = list(range(len(found)))
    random.Random(SEED).shuffle(order)
    return [found[i] for i in order[round(part.start * len(order)) : round(part.end * len(order))]]


def _examples(task: Task, found: list[Record], where: str = "") -> Data:
    kept, label, left = [], extractor(task.extract).label, 0
    if not found:
        raise UserError(f"{where or task.name}: has no rows")
    for record in found:
        try:
            example = task.build({name: value for name, value in record.values.items() if value is not None or name == "label"})
            if example is None:
                left += 1
                continue
            label(example.label)
        except KeyError as error:
            what = "nothing in" if error.args[0] in record.values else "no"
            raise UserError(f"{where} {record.where}: {what} column {error} of {task.name}; {columns_of(record.values)}") from None
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise UserError(f"{where} {record.where}: is no row of {task.name}: {error}") from None
        if not example.prompt.strip() or not example.completion.strip():
            raise UserError(f"{where} {record.where}: its prompt or its completion is empty; write one or leave the row out")
        if half_pair(example.prompt + example.completion):
            raise UserError(f"{where} {record.where}: is not valid text (half of a surrogate pair)")
        kept.append(example)
    if not kept:
        raise UserError(f"{where or task.name}: no row that has an answer ({len(found)} read)")
    return Data(tuple(kept), left)


def source(
    name: str,
    data: str = "",
    *,
    extract: str = "",
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    download: bool = False,
    made: str = "",
) -> Source:
    """Checked words. A name that no row has is a task of the user's own, whose rows are {prompt, completion, label}."""
    known = {key.lower() for key in (*rows.TASKS, *rows.ALIASES)}
    if name.lower() in known:
        task = rows.task(name)
        if extract:
            raise UserError(f"--extractor is for a task of your own; the answers of {task.name} are read as {task.extract}")
    elif not data:
        raise unknown("task (of your own: --data FILE|FOLDER of rows prompt, completion, label)", name, (*rows.TASKS, *rows.ALIASES))
    else:
        task = Task(checked_name("dataset name", name), OWN, rows.own, extract or "text", rows.OFFICIAL)
        extractor(task.extract)
    task = task._replace(max_new_tokens=max_new_tokens or task.max_new_tokens, max_length=max_length or task.max_length)
    if made and (task.name != "ListOps" or data):
        raise UserError("--listops says how expressions are made; it goes with --dataset-name ListOps without --data")
    return Source(task, data, download, **_listops(made))


def _listops(said: str) -> dict[str, Any]:
    """`operators=MIN+MAX,depth=1,fewest=2,most=4,train=2000,seed=1`."""
    shape, sizes, seed = listops.Shape(), dict(SIZES), SEED
    for word in filter(None, said.split(",")):
        key, _, value = word.partition("=")
        if key == "operators":
            names = tuple(value.upper().split("+"))
            for name in names:
                if name not in listops.OPERATORS:
                    raise unknown("operator of --listops", name, listops.OPERATORS)
            shape = shape._replace(operators=names)
            continue
        if key not in ("depth", "fewest", "most", "seed", *sizes):
            raise unknown("word of --listops", key, ("operators", "depth", "fewest", "most", "seed", *sizes))
        if not (value.isascii() and value.isdigit() and len(value) < 8 and (int(value) or key == "seed")):
            raise UserError(f"--listops {word}: wanted a whole number, at least 1")
        if key in sizes:
            sizes[key] = int(value)
        elif key == "seed":
            seed = int(value)
        else:
            shape = listops.Shape(**{**shape._asdict(), key: int(value)})
    if shape.fewest > shape.most:
        raise UserError(f"--listops: fewest {shape.fewest} is more than most {shape.most}")
    return {"shape": shape, "sizes": sizes, "seed": seed}


def misread(task: Task, data: Data) -> list[int]:
    """The rows (by number, 0-based) whose own completion would not be counted as right: who learns them is wrong."""
    score = extractor(task.extract).score
    return [i for i, example in enumerate(data.examples) if score(example.completion, example.label) is not True]


def says_misread(task: Task, example: Example) -> str:
    """One such row: what is read in its completion, and its label."""
    found = extractor(task.extract).find(example.completion)
    what = "no answer is read" if found is None else f"{seen(found)} is read"
    return f"in its completion {seen(example.completion)} {what} ({extractor(task.extract).says}), and its label is {seen(example.label)}"


def seen_in(train: Data, other: Data) -> int:
    """How many rows have a prompt that is also one of train."""
    known = {example.prompt for example in train.examples}
    return sum(example.prompt in known for example in other.examples)
