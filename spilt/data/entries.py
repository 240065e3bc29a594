"""hparams/Steer/dataset_format.yaml: where the rows of each dataset lie, and what their columns are called.

Every mistake in an entry is one UserError with the file, the section and the dataset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spilt.data.chat import SYSTEM
from spilt.data.sources import ending_of, seen
from spilt.errors import Mistakes, UserError, unknown
from spilt.settings.files import DATA, is_own

FORMATS_FILE = Path("hparams/Steer/dataset_format.yaml")
ENTRY_KEYS = ("file_path", "field_names", "multi_concept", "keywords")
UNUSED_ENTRY_KEYS = ("hf_path", "n_shots")  # of the released file; they say nothing about pairs and prompts
PAIR_FIELDS = ("question", "matching", "not_matching")
PROMPT_FIELDS = ("input", "reference_response")
SIDES = ("positive", "negative")
CONTRAST = tuple(f"{field}_{side}" for field in ("question", SYSTEM) for side in SIDES)  # in place of question, or of system
ASKED = (SYSTEM, *CONTRAST)  # columns that a row may have: its own system prompt, and prompts that are compared
CONCEPT_FIELDS = ("output_concept", "concept_id", "concept_genre", "category")
UNUSED_FIELDS = ("concept", "text", "label", "choices")  # of the released file; `concept` is a second name of output_concept there
FIELDS = (*PAIR_FIELDS, *PROMPT_FIELDS, *ASKED, *CONCEPT_FIELDS, *UNUSED_FIELDS)
# section of dataset_format.yaml -> standard fields that a row of it has
SECTIONS = {"train": PAIR_FIELDS, "valid": PAIR_FIELDS, "generation": PROMPT_FIELDS, "neutral": PROMPT_FIELDS}
# (dataset, section) -> the entry that goes before its own: the released scripts read `--dataset axbench` from these, and the
# released entries named `axbench` are of another experiment
FIRST_ENTRY = {("axbench", "train"): "axbench_train", ("axbench", "generation"): "axbench_test"}


class DatasetFormat(NamedTuple):
    """One entry of dataset_format.yaml: where the rows of a dataset lie and what their columns are called."""

    dataset: str
    section: str  # of SECTIONS
    path: Path  # file_path, below base_dir unless it is absolute
    field_names: Mapping[str, str]  # standard name -> the file's column; a name left out is its own column
    multi_concept: bool  # one intervention per concept_id (axbench)
    keywords: tuple[str, ...] = ()  # of `generation`: words by which a person sees the trait in an answer
    named: bool = False  # ASKED are read only where field_names has them: a file of dataset_format.yaml may call something else so

    def column(self, field: str) -> str:
        """The file's column for a standard name."""
        return self.field_names.get(field, field)


def has_prompts(section: str) -> bool:
    """Whether its rows are prompts, not pairs."""
    return SECTIONS[section] is PROMPT_FIELDS


def load_formats(base_dir: Path) -> dict[str, dict[str, DatasetFormat]]:
    """All entries of `base_dir`/hparams/Steer/dataset_format.yaml: section -> dataset -> DatasetFormat.

    Raises UserError: no such file, not YAML, an unknown section or key, a dataset name that is no plain folder name.
    """
    raw = _sections(base_dir)
    return {
        section: {dataset: _format(base_dir, section, dataset, entry) for dataset, entry in raw[section].items()} for section in SECTIONS
    }


def dataset_format(base_dir: Path, dataset: str, section: str) -> DatasetFormat:
    """The entry of one dataset; other entries are not looked at, so a mistake in one dataset does not stop another.

    A missing `generation` entry is the `valid` one with input = question and reference_response = matching (of files of the user's
    own without held-out rows the `train` one).
    Raises UserError: unknown section or dataset (with those there are), or no entry in this section (with what to add).
    """
    if section not in SECTIONS:
        raise unknown("section", section, SECTIONS)
    raw = _sections(base_dir)
    entry = FIRST_ENTRY.get((dataset, section), dataset)
    if entry in raw[section]:
        return _format(base_dir, section, entry, raw[section][entry])._replace(dataset=dataset)
    if dataset in raw[section]:
        return _format(base_dir, section, dataset, raw[section][dataset])
    of_pairs = [name for name in ("valid", *(["train"] if is_own(base_dir, dataset) else [])) if dataset in raw[name]]
    if section == "generation" and of_pairs:
        return as_prompts(_format(base_dir, of_pairs[0], dataset, raw[of_pairs[0]][dataset]))
    file = formats_file(base_dir)
    there = sections_of(base_dir, dataset)
    if not there:
        said = f"{unknown('dataset', dataset, {name for entries in raw.values() for name in entries})} (in {file})"
        fields = ", ".join(SECTIONS["train"])
        plain = f"; or put {base_dir / DATA / dataset}/train.csv and test.csv there, with the columns {fields}"
        raise UserError(said + (plain if file != base_dir / FORMATS_FILE else ""))
    fields = ", ".join(f"{field}: <column>" for field in SECTIONS[section])
    raise UserError(
        f"dataset {dataset!r} has no {section!r} entry in {file} (it has: {', '.join(there)}); "
        f"add under '{section}:'\n  {dataset}: {{file_path: <file>, field_names: {{{fields}}}}}"
    )


def sections_of(base_dir: Path, dataset: str) -> tuple[str, ...]:
    """The sections of dataset_format.yaml that have an entry for a dataset, whatever is wrong with that entry or with others."""
    raw = _sections(base_dir)
    return tuple(name for name in SECTIONS if {dataset, FIRST_ENTRY.get((dataset, name), dataset)} & raw[name].keys())


def _sections(base_dir: Path) -> dict[str, dict[str, Any]]:
    """section -> dataset -> entry as written; every section is there, empty when the file lacks it."""
    from spilt.settings import load_yaml  # here, since reading data files needs no YAML

    file, plain = formats_file(base_dir), _plain_files(base_dir)
    raw = load_yaml(file) if file.exists() or not plain else {}
    mistakes = Mistakes()
    for section, entries in raw.items():
        with mistakes.each():
            if section not in SECTIONS:
                raise UserError(f"{unknown('section', str(section), SECTIONS)} (in {file})")
            if not isinstance(entries, dict | None):
                raise UserError(f"{file}: section {section!r} is {entries!r}; wanted 'dataset: {{file_path: ...}}' entries")
    if mistakes.said:  # whose entries stand there, nobody knows: told with what else is wrong in the file
        for section in SECTIONS:
            for name, entry in (raw[section] if isinstance(raw.get(section), dict) else {}).items():
                with mistakes.each():
                    _format(base_dir, section, str(name), entry)
    mistakes.tell()
    found = {section: {str(name): entry for name, entry in (raw.get(section) or {}).items()} for section in SECTIONS}
    for (section, name), paths in plain.items():  # which of several is meant, nobody has said: refused when asked for
        if file != base_dir / FORMATS_FILE or is_own(base_dir, name):
            found[section].setdefault(name, {"file_path": paths[0]} if len(paths) == 1 else f"one of {', '.join(paths)}")
    return found


def formats_file(base_dir: Path) -> Path:
    """The dataset_format.yaml that is read: where there is no hparams/Steer, the one that comes with the package."""
    from spilt.settings.files import tree_of

    return tree_of(base_dir, FORMATS_FILE.parent) / FORMATS_FILE


def _plain_files(base_dir: Path) -> dict[tuple[str, str], list[str]]:
    """(section, dataset) -> data/{dataset}/train.* or test.*: known without an entry where no dataset_format.yaml is, or own.py made it."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((base_dir / DATA).glob("*/*")):
        ending = ending_of(path) or path.suffix
        section = {"train": "train", "test": "valid"}.get(path.name.removesuffix(ending))
        if section is not None and ending_of(path):
            found.setdefault((section, path.parent.name), []).append(str(path.relative_to(base_dir)))
    return found


def _format(base_dir: Path, section: str, dataset: str, entry: Any) -> DatasetFormat:
    """Check one entry of dataset_format.yaml."""
    here = f"{formats_file(base_dir)}: {section}: {dataset}"
    # the name becomes a folder of vectors/ and generation/: it must stay in there
    if not re.fullmatch(r"[^\x00-\x1f/\\:]+", dataset) or dataset in (".", ".."):
        raise UserError(
            f"{here}: {dataset!r} can't be a dataset's name: it names folders, so no '/', '\\', ':', control character, '.' or '..'"
        )
    if not isinstance(entry, dict):
        raise UserError(f"{here}: {entry!r} is no entry; wanted the keys {', '.join(ENTRY_KEYS)}")
    wrong = [str(unknown("key", str(key), ENTRY_KEYS)) for key in entry if key not in (*ENTRY_KEYS, *UNUSED_ENTRY_KEYS)]
    file_path, names, multi = entry.get("file_path"), entry.get("field_names") or {}, entry.get("multi_concept") or False
    if not isinstance(file_path, str) or not file_path.strip() or "\0" in file_path:
        wrong.append(f"file_path is {file_path!r}; wanted the data file's path, absolute or from base_dir")
    if not isinstance(multi, bool):
        wrong.append(f"multi_concept is {multi!r}; wanted true or false")
    words = [] if (given := entry.get("keywords")) is None else given
    if not isinstance(words, list) or not all(isinstance(word, str) and re.fullmatch(r"\w+", word) for word in words):
        wrong.append(f"keywords is {seen(words)}; wanted a list of single words, such as [sea, boat]; quote a word such as 'yes'")
    elif words and section != "generation":
        wrong.append("keywords are looked for in generated texts; write them in the 'generation' section")
    if not isinstance(names, dict):
        wrong.append(f"field_names is {names!r}; wanted 'standard name: column' entries")
        names = {}
    for field, column in names.items():
        if not isinstance(field, str) or not isinstance(column, str | None):
            wrong.append(f"field_names has {field!r}: {column!r}; wanted a standard name and the file's column, both text")
        elif field not in FIELDS:
            wrong.append(str(unknown("field name", field, FIELDS)))
    if wrong:
        raise UserError("\n".join(f"{here}: {what}" for what in wrong))
    columns = {field: column for field, column in names.items() if column}  # null: the file has no such column
    return DatasetFormat(dataset, section, base_dir / str(file_path), columns, multi, tuple(words), not is_own(base_dir, dataset))


def as_prompts(valid: DatasetFormat) -> DatasetFormat:
    """An entry of pairs read as a `generation` entry: ask the question, keep the winning answer as the reference."""
    renamed = {"input": valid.column("question"), "reference_response": valid.column("matching")}
    kept = {field: column for field, column in valid.field_names.items() if field not in (*PAIR_FIELDS, *PROMPT_FIELDS)}
    return valid._replace(section="generation", field_names={**renamed, **kept})
