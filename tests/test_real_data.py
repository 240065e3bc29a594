"""examples/real: data written for this project, read as the tool reads it; what a person would check by eye, checked for every row."""

from __future__ import annotations

import difflib
import re
from itertools import combinations
from pathlib import Path

import pytest

from spilt.data import dataset_format, read_pairs, read_prompts
from spilt.data.readers import FORMATS_FILE
from spilt.errors import UserError

REAL = Path(__file__).parents[1] / "examples" / "real"
TRAITS = ("sea", "ambition")


def texts(trait: str) -> dict[str, list[tuple[str, ...]]]:
    """Split -> rows: question, and the two answers where there are any."""
    pairs = {name: read_pairs(dataset_format(REAL, trait, name)) for name in ("train", "valid")}
    found = {name: [(p.question, p.matching, p.not_matching) for p in rows] for name, rows in pairs.items()}
    return {**found, "generation": [(p.input,) for p in read_prompts(dataset_format(REAL, trait, "generation"))]}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def sentences(rows: list[tuple[str, ...]]) -> set[str]:
    """All but a question's frame, such as 'What do you do?'."""
    parts = [words(part) for row in rows for text in row for part in re.split(r"[.!?;:]", text)]
    return {" ".join(part) for part in parts if len(part) > 4 or not {"you", "what"} & set(part)} - {""}


@pytest.mark.parametrize("trait", TRAITS)
def test_counts(trait: str) -> None:
    found = texts(trait)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 64, "valid": 32, "generation": 24}
    every = [row for rows in found.values() for row in rows]
    assert len({row[0] for row in every}) == 120
    answers = [answer for row in every for answer in row[1:]]
    assert len(set(answers)) == 192 and all(4 <= len(words(answer)) <= 24 and answer[-1] in ".?" for answer in answers)


@pytest.mark.parametrize("trait", TRAITS)
def test_the_splits_share_no_question_and_no_sentence(trait: str) -> None:
    for one, other in combinations(texts(trait).values(), 2):
        assert sentences(one) & sentences(other) == set()
        for column in range(min(len(one[0]), len(other[0]))):
            for a in one:
                for b in other:
                    like = difflib.SequenceMatcher(None, words(a[column]), words(b[column])).ratio()
                    assert like < (0.85 if column == 0 else 0.6), (a[column], b[column])


@pytest.mark.parametrize("trait", TRAITS)
def test_the_keywords_tell_the_answers_apart(trait: str) -> None:
    """They are found in many matching answers, in hardly any other one, and never in a prompt."""
    keywords = dataset_format(REAL, trait, "generation").keywords
    assert list(keywords) == sorted(set(keywords)) and all(word == word.lower() for word in keywords)
    found = texts(trait)
    pairs = found["train"] + found["valid"]
    share = [sum(bool(set(words(row[side])) & set(keywords)) for row in pairs) / len(pairs) for side in (1, 2)]
    assert share[0] > 0.25 and share[1] < 0.03, share
    assert not any(set(words(prompt)) & set(keywords) for (prompt,) in found["generation"])


@pytest.mark.parametrize("trait", TRAITS)
def test_neutral_texts_have_nothing_of_the_trait(trait: str) -> None:
    neutral = read_prompts(dataset_format(REAL, trait, "neutral"))
    assert len(neutral) == 24 and all(row.reference_response for row in neutral)
    said = {word for row in neutral for word in words(f"{row.input} {row.reference_response}")}
    assert not said & set(dataset_format(REAL, trait, "generation").keywords)


def test_the_licence_is_said() -> None:
    card = (REAL / "README.md").read_text(encoding="utf-8")
    assert "CC0" in card and "written for this project" in card and "creativecommons.org/publicdomain/zero/1.0" in card


def formats(base: Path, text: str) -> Path:
    (base / FORMATS_FILE).parent.mkdir(parents=True)
    (base / FORMATS_FILE).write_text(text)
    return base


def test_keywords_are_kept(tmp_path: Path) -> None:
    base = formats(tmp_path, "generation: {mine: {file_path: p.jsonl, keywords: [sea, café]}}\nneutral: {mine: {file_path: n.jsonl}}")
    assert dataset_format(base, "mine", "generation").keywords == ("sea", "café")
    assert dataset_format(base, "mine", "neutral").keywords == ()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("generation: {mine: {file_path: p, keywords: sea}}", "keywords is 'sea'; wanted a list of single words"),
        ("generation: {mine: {file_path: p, keywords: [sea, 7]}}", "keywords is ['sea', 7]"),
        ("generation: {mine: {file_path: p, keywords: [sea, yes]}}", "quote a word such as 'yes'"),
        ("generation: {mine: {file_path: p, keywords: [open water]}}", "keywords is ['open water']"),
        ("valid: {mine: {file_path: p, keywords: [sea]}}", "write them in the 'generation' section"),
    ],
)
def test_what_is_no_list_of_words_is_refused(tmp_path: Path, entry: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        dataset_format(formats(tmp_path, entry), "mine", entry.partition(":")[0])
