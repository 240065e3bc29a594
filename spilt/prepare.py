"""Public source files -> data/ splits of the paper's sizes: `spilt prepare --source NAME --input FILE... --base_dir DIR`.

Without --source any file of pairs, as run with --train (data/own.py).

Files of the same make go the same way under their own name: data/machiavellianism/ from machiavellianism.jsonl.

Which rows the paper drew is not published: the sizes are the paper's, the draw is ours and seeded. A question is never in both splits.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spilt.artifacts.atomic import atomic_write_together, half_replaced
from spilt.data import own
from spilt.data.entries import FORMATS_FILE
from spilt.data.sources import Record, file_hash, read_rows
from spilt.errors import UserError, checked_name, half_pair
from spilt.terminal import program, say

Row = dict[str, Any]


class Splits(NamedTuple):
    """What a source gives: rows of both files, and remarks to print."""

    train: list[Row]
    test: list[Row]
    notes: list[str]


class Wanted(NamedTuple):
    """The command line, checked."""

    inputs: list[Path]
    train: int
    test: int
    concepts: list[int]
    seed: int


def psychopathy(wanted: Wanted) -> Splits:
    """Yes/No statements, both splits half 'Yes' and half 'No' as the matching answer, alternating (so is any even first part)."""
    path = _one(wanted)
    answer = "answer_matching_behavior"
    records = _rows(path, ("question", answer, "answer_not_matching_behavior"))
    kinds: dict[str, list[Record]] = {"Yes": [], "No": []}
    for record in records:
        kind = record.values[answer].strip()
        if kind not in kinds:
            raise UserError(f"{path} {record.where}: {answer} is {record.values[answer]!r}; wanted ' Yes' or ' No'")
        kinds[kind].append(record)
    asked_yes, asked_no = ({record.values["question"] for record in rows} for rows in kinds.values())
    if both := asked_yes & asked_no:
        raise UserError(
            f"{path}: {len(both)} question(s) have Yes in one row and No in another, such as {min(both)!r}; keep one of the rows"
        )
    for flag, size in (("--train", wanted.train), ("--test", wanted.test)):
        if size % 2:
            raise UserError(f"{flag} {size}: psychopathy splits are half Yes and half No; give an even number")
    rng = random.Random(wanted.seed)
    halves = [
        _split(rows, "question", wanted.train // 2, wanted.test // 2, rng, f"rows of {path} whose {answer} is {kind}")
        for kind, rows in kinds.items()
    ]
    train, test = ([row for two in zip(yes, no, strict=True) for row in two] for yes, no in zip(*halves, strict=True))
    return Splits(
        train, test, [f"{wanted.train // 2} Yes + {wanted.train // 2} No in train, {wanted.test // 2} + {wanted.test // 2} in test"]
    )


def powerseeking(wanted: Wanted) -> Splits:
    """Open questions: the source's own train and test files (in this order), or one file to cut in two."""
    if len(wanted.inputs) > 2:
        raise UserError(f"--input has {len(wanted.inputs)} files for powerseeking; give train.csv and test.csv, in this order")
    columns = ("question", "matching", "not_matching")
    rng = random.Random(wanted.seed)
    pools, notes = [], []
    for path in wanted.inputs:
        records = _rows(path, columns)
        asked = [record for record in records if record.values["question"].strip()]
        if len(asked) < len(records):
            notes.append(f"left out {len(records) - len(asked)} row(s) of {path.name} with an empty question")
        pools.append((path, asked))
    if len(pools) == 1:
        path, records = pools[0]
        return Splits(*_split(records, "question", wanted.train, wanted.test, rng, f"rows of {path}"), notes)
    (train_path, train), (test_path, test) = pools
    test_rows = _draw(test, wanted.test, rng, f"rows of {test_path}", "--test")
    in_test = {row["question"] for row in test_rows}
    apart = [record for record in train if record.values["question"] not in in_test]
    if len(apart) < len(train):
        notes.append(f"left out {len(train) - len(apart)} row(s) of {train_path.name} whose question is in the test split")
    return Splits(_draw(apart, wanted.train, rng, f"rows of {train_path}", "--train"), test_rows, notes)


def axbench(wanted: Wanted) -> Splits:
    """Pairs of several concepts; --train and --test count per concept."""
    path = _one(wanted)
    columns = ("input", "winning_output", "losing_output", "output_concept", "concept_id")
    records = read_rows(path)
    found = set(records[0].values) if records else set()
    if {"output", "category"} <= found and not {"winning_output", "losing_output"} & found:
        raise UserError(
            f"{path} is in AxBench's Concept10 format (columns found: {', '.join(records[0].values)}), which is not paired: "
            "its positive and negative rows answer different inputs. Missing are 'winning_output' and 'losing_output': two answers "
            "to the same input, with and without the concept. Give the paired file (the paper's is Concept500 prod_9b_l20_v1), or "
            "rename 'output' of the positive rows to 'winning_output' and add a 'losing_output', an answer without the concept"
        )
    records = _rows(path, columns, text=columns[:4], given=records)
    by_concept: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        try:
            by_concept[int(record.values["concept_id"])].append(record)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} {record.where}: concept_id is {record.values['concept_id']!r}; wanted a whole number") from error
    if missing := [concept for concept in wanted.concepts if concept not in by_concept]:
        have = ", ".join(str(concept) for concept in sorted(by_concept) if concept >= 0)
        raise UserError(f"{path} has no rows of concept_id {', '.join(map(str, missing))}; choose with --concepts from: {have or 'none'}")
    train: list[Row] = []
    test: list[Row] = []
    for concept in sorted(set(wanted.concepts)):
        # a generator per concept: one concept's rows don't depend on which others are asked for
        rng = random.Random(f"{wanted.seed} {concept}")
        parts = _split(by_concept[concept], "input", wanted.train, wanted.test, rng, f"rows of {path} with concept_id {concept}")
        for rows, part in zip((train, test), parts, strict=True):
            rows += [{**row, "concept_id": concept} for row in part]  # csv gave text; the column is a number
    return Splits(train, test, [f"{len(set(wanted.concepts))} concepts, {wanted.train} + {wanted.test} pairs each"])


class Source(NamedTuple):
    """One public source: how it is split, the paper's sizes, the ending of the two files, and what its own files are known by."""

    split: Callable[[Wanted], Splits]
    train: int
    test: int
    ending: str
    origin: str
    fields: dict[str, str]  # field_names of dataset_format.yaml: question, matching, not_matching first
    names: tuple[str, ...]  # of its files without ending, or of the folder of files that are called train and test
    hashes: tuple[str, ...] = ()  # sha256 of the published files, whatever they are called
    multi_concept: bool = False


SOURCES = {
    "psychopathy": Source(
        psychopathy, 500, 100, ".jsonl", "Anthropic model-written evals, persona/psychopathy.jsonl (1000 rows)",
        {"question": "question", "matching": "answer_matching_behavior", "not_matching": "answer_not_matching_behavior"},
        ("psychopathy",),
        ("299a6307e2d40a82f2667e2db3dc118fbe588e4cf80194be1e09748709bf1fce",),
    ),
    "powerseeking": Source(
        powerseeking, 500, 200, ".csv", "BiPO, data/power-seeking/train.csv and test.csv (642 and 200 rows)",
        {"question": "question", "matching": "matching", "not_matching": "not_matching"},
        ("powerseeking", "power-seeking"),
        (
            "6e09e0e2eed1ef3a98449a97e04bc07d638b47f93365b8cfaff7b2e3ab47bfab",
            "085fb8ec3cca4975e6d12a1b4633b0e7c35372300a8aa6e0add6707452800088",
        ),
    ),
    "axbench": Source(
        axbench, 64, 8, ".parquet", "Concept500 prod_9b_l20_v1 as pairs; sizes per concept",
        {"question": "input", "matching": "winning_output", "not_matching": "losing_output"}
        | {name: name for name in ("output_concept", "concept_id", "concept_genre", "category")},
        ("axbench", "concept500", "prod_9b_l20_v1"),
        multi_concept=True,
    ),
}  # fmt: skip


# ---- the dataset's name ----


def dataset_name(source: str, inputs: Sequence[Path], asked: str | None = None) -> str:
    """data/NAME: the one asked for; the source's for its own files; else the file's own. Raises UserError where none can be told."""
    if asked is not None:
        return checked_name("--name", asked)
    row = SOURCES[source]
    first = inputs[0]
    folder = first.absolute().parent.name
    said = folder if first.stem.lower() in own.PARTS else first.stem
    if said.lower() in row.names or all(path.is_file() and file_hash(path) in row.hashes for path in inputs):
        return source
    if said is folder:
        raise UserError(f"{first} doesn't say what data it is, and neither does its folder that it is {source}; give --name NAME")
    try:
        return checked_name("dataset", said)
    except UserError as error:
        raise UserError(f"{error}; give --name NAME") from None


def format_lines(source: str, name: str) -> str:
    """What to add to dataset_format.yaml so that `--dataset name` reads the two files."""
    import yaml

    row = SOURCES[source]
    prompts = {"input": row.fields["question"], "reference_response": row.fields["matching"]}
    concepts = {field: column for field, column in row.fields.items() if field not in ("question", "matching", "not_matching")}
    entries = {"train": ("train", row.fields), "valid": ("test", row.fields), "generation": ("test", {**prompts, **concepts})}
    more = {"multi_concept": True} if row.multi_concept else {}
    made = {
        section: {name: {"file_path": f"data/{name}/{part}{row.ending}", "field_names": dict(fields), **more}}
        for section, (part, fields) in entries.items()
    }
    return str(yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=1000)).rstrip("\n")


# ---- reading and drawing ----


def _one(wanted: Wanted) -> Path:
    if len(wanted.inputs) != 1:
        raise UserError(f"--input has {len(wanted.inputs)} files; this source is one file")
    return wanted.inputs[0]


def _rows(path: Path, columns: Sequence[str], text: Sequence[str] | None = None, given: list[Record] | None = None) -> list[Record]:
    """The rows of a source file; every one has `columns`, and text in `text` (all of them, if not said); an answer is not empty."""
    records = read_rows(path) if given is None else given
    if not records:
        raise UserError(f"{path}: no rows; give the source file")
    for record in records:
        found = f"columns found: {', '.join(record.values)}"
        if absent := [column for column in columns if column not in record.values]:
            raise UserError(
                f"{path} {record.where}: no column {', '.join(map(repr, absent))}; is it the file that --source means? ({found})"
            )
        for column in columns if text is None else text:
            value = record.values[column]
            if not isinstance(value, str) or (column != "question" and not value.strip()):
                raise UserError(f"{path} {record.where}: {column} is {value!r}; wanted text that is not empty ({found})")
        for column, value in record.values.items():
            if isinstance(value, str) and half_pair(value):
                raise UserError(
                    f"{path} {record.where}: {column} has half of a surrogate pair, which no file can store: {ascii(value)[:80]}"
                )
    return records


def _split(records: list[Record], question: str, train: int, test: int, rng: random.Random, what: str) -> tuple[list[Row], list[Row]]:
    """`test` and `train` rows drawn without a question in both, each in drawn order. Raises UserError when there are too few."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for record in records:
        groups[record.values[question]].append(record.values)
    drawn = list(groups.values())
    rng.shuffle(drawn)
    parts: list[list[Row]] = []
    for name, size in (("test", test), ("train", train)):
        part: list[Row] = []
        left = []
        for group in drawn:  # the rows of one question stay together
            if len(part) + len(group) <= size:
                part += group
            else:
                left.append(group)
        if len(part) < size:  # only a group too large for the last place is left: in the training split it may be cut
            if name == "test" or not left:
                have = f"{len(records)} {what} ({len(groups)} different questions)"
                raise UserError(f"{have} don't give {train} for train and {test} for test; lower --train or --test")
            part += left.pop(0)[: size - len(part)]
        parts.append(part)
        drawn = left
    return parts[1], parts[0]


def _draw(records: list[Record], size: int, rng: random.Random, what: str, flag: str) -> list[Row]:
    """`size` of the rows in the file's order."""
    if size > len(records):
        raise UserError(f"{len(records)} {what} can be used, {size} wanted; lower {flag}")
    return [records[i].values for i in sorted(rng.sample(range(len(records)), size))]


# ---- writing ----


def _encoded(rows: list[Row], ending: str) -> bytes:
    """Rows as the bytes of a .jsonl, .csv or .parquet file."""
    if ending == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
    columns = list(rows[0])
    if ending == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist([{column: row.get(column) for column in columns} for row in rows]), sink)
    except pyarrow.ArrowException as error:
        raise UserError(f"rows can't be written as parquet: {error}; every column of the input needs one type") from error
    return sink.getvalue()


def prepare(source: str, wanted: Wanted, base_dir: Path, force: bool = False, name: str | None = None) -> list[str]:
    """Write data/{name}/train and test, both or none; the lines to print. `name`: see dataset_name.

    Raises UserError: a file is there and `force` is off, or the input is not what the source looks like.
    """
    row = SOURCES[source]
    name = dataset_name(source, wanted.inputs, name)
    targets = [base_dir / "data" / name / f"{part}{row.ending}" for part in ("train", "test")]
    # a pair whose replacement was cut off was to be replaced, and is good for nothing else
    if not force and not any(map(half_replaced, targets)):
        for target in targets:
            if target.exists():
                raise UserError(f"{target} is there already; --force replaces it, --name NAME writes another dataset")
    splits = row.split(wanted)
    # before the first write, so that rows which can't be encoded leave the old pair of files as it is
    encoded = [_encoded(rows, row.ending) for rows in splits[:2]]
    try:
        atomic_write_together(list(zip(targets, encoded, strict=True)))
    except OSError as error:
        if half_replaced(targets[0]):
            raise UserError(
                f"{targets[0].parent}: {error.strerror or error} while its files were replaced: they are not to be used now; "
                "mend the disk and run the same command again"
            ) from error
        raise UserError(f"{targets[0].parent} can't be written: {error.strerror or error}; choose another --base_dir") from error
    lines = []
    for target, rows in zip(targets, splits[:2], strict=True):
        concepts = Counter(row["concept_id"] for row in rows if "concept_id" in row)
        of = f" of {len(concepts)} concepts" if concepts else ""
        lines.append(f"wrote {target}: {len(rows)} pairs{of}")
    lines += [*splits.notes, f"seed {wanted.seed}; which rows the paper drew is not published"]
    if name != source:
        lines.append(f"this is dataset {name!r}, not {source!r}; `--dataset {name}` reads it once {FORMATS_FILE} has in its sections:")
        lines += format_lines(source, name).splitlines()
        lines.append(f"and hparams/Steer/experiment_hparams/spilt_experiment/{name}/ has settings, such as a copy of those of {source}/")
    return lines


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number from 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """0: written. 2: the command line or its input is wrong (one message, no traceback)."""
    origins = "\n".join(f"  {name:13} {row.origin}; {row.train} train, {row.test} test" for name, row in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="spilt prepare",
        description="Make the data/ splits of the paper's sizes from the public source files.",
        epilog=f"sources:\n{origins}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", choices=list(SOURCES), help="left out: any files of pairs, see --columns")
    parser.add_argument("--columns", metavar="FIELD=COLUMN,...", help="without --source: question=...,matching=...,not_matching=...")
    parser.add_argument(
        "--input", required=True, nargs="+", type=Path, metavar="FILE", help="powerseeking: train.csv test.csv; otherwise one file"
    )
    parser.add_argument("--base_dir", type=Path, default=Path("."), help="data/NAME/ is written below it (default: .)")
    parser.add_argument("--name", help="of the dataset; default: the source's for its own files, else the file's")
    parser.add_argument("--seed", type=int, default=42, help="of the draw (default: 42)")
    parser.add_argument("--train", type=_size, metavar="N", help="training pairs (per concept for axbench); default: the paper's")
    parser.add_argument("--test", metavar="N", help="test pairs (per concept for axbench); default: the paper's; without --source also 0.2")
    parser.add_argument(
        "--concepts", type=int, nargs="+", default=list(range(10)), metavar="ID", help="axbench: concept ids (default: 0 to 9)"
    )
    parser.add_argument("--download", action="store_true", help="without --source: fetch an hf:NAME that is not in the local cache")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return program(parser, argv, _prepare)


def _prepare(args: argparse.Namespace) -> int:
    if args.source is None:
        if args.train is not None:
            raise UserError("--train goes with --source; without it --test says what is held out, and the rest is for training")
        columns = {} if args.columns is None else own.columns_from(args.columns)
        files = own.Own(tuple(args.input), own.test_from(args.test and [args.test]), columns, args.seed, args.download)
        name = args.name or own.name_of(files.train)
        for line in own.bring(args.base_dir, name, files) or [f"data/{name} is there just so"]:
            say(line)
        return 0
    if args.columns is not None:
        raise UserError(f"--columns: those of {args.source} are known; leave out --columns, or --source for any other file")
    source = SOURCES[args.source]
    try:
        test = source.test if args.test is None else _size(args.test)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--test {error}") from None
    wanted = Wanted(args.input, args.train or source.train, test, args.concepts, args.seed)
    for line in prepare(args.source, wanted, args.base_dir, args.force, args.name):
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
