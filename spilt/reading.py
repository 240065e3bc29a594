"""What a request reads of its dataset: the entries as they are, or will be once files of the user's own are brought; read once and
checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from spilt.artifacts.losses import NEUTRAL, SPLITS
from spilt.data import entries, own, readers, sense
from spilt.data.chat import LETTER
from spilt.errors import Mistakes, UserError, unknown
from spilt.verbs import VERBS, Request, Step, Verb

FIRST_CONCEPTS = 10


def entry(request: Request, section: str) -> readers.DatasetFormat:
    """The dataset's entry; of files of the user's own as it will be once they are brought."""
    if request.own is None:
        return entries.dataset_format(request.base_dir, request.dataset, section)
    made = own.formats(request.base_dir, request.dataset, request.own)
    if section == "generation":
        return entries.as_prompts(made.get("valid", made["train"]))
    if section not in made:
        if section == NEUTRAL:
            raise UserError(f"dataset {request.dataset!r} has no neutral text; section `neutral` of dataset_format.yaml names a file")
        raise UserError(f"dataset {request.dataset!r} has no held-out rows: --test 0.2 holds some out, --test FILE names them")
    return made[section]


def read_by(verb: Verb, request: Request, methods: Collection[str]) -> dict[str, str]:
    """What a verb reads of this dataset for any of these methods: purpose -> section."""
    there = _sections(request) if verb.optional else ()
    read = {purpose for method in methods for purpose in verb.purposes(method)}
    return {name: section for name, section in verb.sections.items() if name in read and (name not in verb.optional or section in there)}


def splits_of(request: Request) -> tuple[str, ...]:
    """The item sets that loss mode measures."""
    if request.split not in (None, "both"):
        return (str(request.split),)
    there = _sections(request)
    splits = tuple(split for split in SPLITS if request.split == "both" or VERBS["measure"].sections[split] in there) or ("train",)
    tables = bool(request.words) or request.released_files is False
    return (*splits, NEUTRAL) if tables and NEUTRAL in there else splits


def concept_ids(request: Request, formats: Mapping[str, readers.DatasetFormat], dry: bool) -> list[int | None]:
    """The concepts of the request: [None] for a dataset without; the first ten ids unless --concepts says which."""
    # the training pairs say whether a dataset has concepts, also when only prompts are read
    every = [*formats.values(), *([entry(request, "train")] if "train" in _sections(request) else [])]
    first = next((fmt for fmt in every if fmt.multi_concept), every[0])
    if not first.multi_concept:
        if request.concepts is not None:
            raise UserError(f"--concepts: dataset {request.dataset!r} has no concepts (multi_concept in dataset_format.yaml)")
        return [None]
    if (dry or first not in formats.values()) and not first.path.exists():
        return list(request.concepts or range(FIRST_CONCEPTS))
    have = list(readers.concepts(first))
    if request.concepts is None:
        return list(have[:FIRST_CONCEPTS])
    for concept in request.concepts:
        if concept not in have:
            raise unknown("concept", str(concept), map(str, have))
    return list(request.concepts)


def columns(fmt: readers.DatasetFormat) -> dict[str, Any]:
    """What of a dataset_format.yaml entry decides the rows: the columns of the same file can be read as other data."""
    fields = (*entries.SECTIONS[fmt.section], *(("concept_id", "output_concept") if fmt.multi_concept else ()))
    fields += tuple(field for field in readers.ASKED if field in fmt.field_names)
    first = first_pair(fmt)
    letters = {"answers": "letters"} if first is not None and LETTER.fullmatch(first.matching) else {}
    return {"columns": {field: fmt.column(field) for field in fields}, "multi_concept": fmt.multi_concept, **letters}


def first_pair(fmt: readers.DatasetFormat) -> readers.Pair | None:
    """The first of a file's pairs, which are all of one kind; None of prompts, and of a file that can't be read (told elsewhere)."""
    try:
        return readers.read_pairs(fmt, limit=1)[0] if fmt.path.is_file() and not entries.has_prompts(fmt.section) else None
    except UserError:
        return None


def refuse_rows(steps: Sequence[Step], kinds: Mapping[str, str]) -> None:
    """Raises UserError for steps that make no sense of their rows. kinds: section -> Pair.kind."""
    mistakes = Mistakes()
    for step in steps:
        for purpose, path in step.data.items():
            kind = kinds.get(VERBS[step.verb].sections[purpose], readers.PAIRS)
            with mistakes.each():
                if why := VERBS[step.verb].refuses(step, kind):
                    raise UserError(f"{step}: {path} has {kind}: {why}")
    mistakes.tell()


def check_data(base_dir: Path, formats: Mapping[str, readers.DatasetFormat], concepts: list[int | None], limit: int | None) -> list[str]:
    """Read everything once: a broken line, or pairs that nothing can be learnt from, are found before anything is written.

    Returns what is odd, a sentence each.
    """
    said = []
    found = {section: {concept: _rows(fmt, concept, limit) for concept in concepts} for section, fmt in formats.items()}
    flat = {section: [row for rows in by_concept.values() for row in rows] for section, by_concept in found.items()}
    for section, fmt in formats.items():
        if not entries.has_prompts(section):
            for concept, rows in found[section].items():
                sense.refuse_useless(fmt, rows, concept)
            said += sense.remarks(fmt, flat[section])
        if section != "train" and "train" in formats:
            said += sense.overlap(formats["train"], flat["train"], fmt, flat[section])
    if set(formats) == {"train"}:
        said += _of_held_out(base_dir, formats["train"], flat["train"], concepts)
    return said


def _of_held_out(base_dir: Path, train: readers.DatasetFormat, fitted: list[Any], concepts: list[int | None]) -> list[str]:
    """For a fit alone: what it has in common with the rows that later commands measure on. What is wrong with those, they say."""
    for section in ("valid", "generation"):
        try:
            fmt = entries.dataset_format(base_dir, train.dataset, section)
            rows = [row for concept in concepts for row in _rows(fmt, concept, None)]
        except UserError:
            continue
        return sense.overlap(train, fitted, fmt, rows)
    return []


def _rows(fmt: readers.DatasetFormat, concept: int | None, limit: int | None) -> list[Any]:
    return list(readers.read_entry(fmt, concept, limit))


def _sections(request: Request) -> Collection[str]:
    if request.own is None:
        return entries.sections_of(request.base_dir, request.dataset)
    return own.formats(request.base_dir, request.dataset, request.own)
