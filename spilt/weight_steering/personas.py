"""Behaviours as pairs of personas, and the questions that are asked under both: files of our own, or the user's.

A behaviour file: `template` ("Answer as {persona} would."), `pairs` of [POS, NEG], `intent` {foundation: +1 or -1}, which way + is meant to
move the verdicts on vignettes. A question file: rows {cat, user_msg, split}, YAML or JSON; of rows without a split (the original's
{cat, suffix, user_msg}) one is drawn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spilt.errors import UserError, half_pair, printable, unknown
from spilt.settings.files import load_yaml
from spilt.vignettes.files import FOUNDATIONS

SHIPPED = Path(__file__).parent / "shipped"
POOL = "questions"  # the file of questions among the shipped ones
TRAIN, CALIBRATION, AUDIT = SPLITS = ("train", "calibration", "audit")
SHARES = {TRAIN: 0.5, CALIBRATION: 0.25, AUDIT: 0.25}  # of the distinct questions of each category, where no split is given
KEYS = ("behavior", "about", "template", "pairs", "intent")
PLACE = "{persona}"
MAX_BYTES = 20_000_000


class Pair(NamedTuple):
    """Two system messages that differ in what the behaviour is."""

    pos: str
    neg: str


class Behaviour(NamedTuple):
    """intent: foundation -> whether + is to judge more (+1) or less (-1) wrong there."""

    name: str
    about: str
    pairs: tuple[Pair, ...]
    intent: Mapping[str, int]


class Question(NamedTuple):
    text: str
    cat: str
    split: str


def shipped() -> tuple[str, ...]:
    """The behaviours that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml") if path.stem != POOL))


def behaviour(name: str, file: Path | None = None) -> Behaviour:
    """A shipped one, or that of a YAML file. Raises UserError naming the file and what is wrong in it."""
    if file is None and name not in shipped():
        raise UserError(f"--behavior: {unknown('behavior', name, shipped())}; --personas FILE gives one of your own")
    path = file or SHIPPED / f"{name}.yaml"
    given = load_yaml(path)
    for key in given:
        if key not in KEYS:
            raise UserError(f"{path}: {unknown('key', key, KEYS)}")
    template, pairs, intent = given.get("template", PLACE), given.get("pairs"), given.get("intent") or {}
    if not isinstance(template, str) or template.count(PLACE) != 1:
        raise UserError(f"{path}: template is {str(template)[:60]!r}; wanted a text that holds {PLACE} once")
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{path}: pairs is {str(pairs)[:60]!r}; wanted a list of [POS, NEG]")
    made = []
    for number, pair in enumerate(pairs, 1):
        good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, str) and side.strip() for side in pair)
        if not good or pair[0].strip() == pair[1].strip():
            raise UserError(f"{path}: pair {number} is {str(pair)[:80]}; wanted [POS, NEG], two texts that differ")
        made.append(Pair(*(template.replace(PLACE, side.strip()) for side in pair)))
    if not isinstance(intent, dict) or any(type(way) is not int or way not in (1, -1) for way in intent.values()):
        raise UserError(f"{path}: intent is {str(intent)[:60]}; wanted a mapping of foundations to 1 or -1")
    for foundation in intent:
        if foundation not in FOUNDATIONS:
            raise UserError(f"{path}: intent: {unknown('foundation', str(foundation)[:40], FOUNDATIONS)}")
    return Behaviour(name, str(given.get("about", "")), tuple(made), intent)


def questions(file: Path | None = None, seed: int = 0) -> tuple[Question, ...]:
    """Distinct questions with their splits: those of the package, or of a YAML or JSON file. Raises UserError."""
    path = file or SHIPPED / f"{POOL}.yaml"
    rows = _json(path) if path.suffix == ".json" else load_yaml(path)
    if isinstance(rows, dict):
        rows = rows.get("questions")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: holds no questions; wanted a list of {{cat, user_msg}}, of YAML below `questions:`")
    found: dict[str, Question] = {}
    for number, row in enumerate(rows, 1):
        text = row.get("user_msg") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip() or half_pair(text):
            raise UserError(f"{path}: question {number}: user_msg is {str(text)[:60]!r}; wanted a text")
        split, cat = row.get("split", ""), row.get("cat", "")
        if split and split not in SPLITS:
            raise UserError(f"{path}: question {number}: {unknown('split', str(split)[:40], SPLITS)}")
        made = Question(text.strip(), printable(str(cat)), str(split))
        other = found.setdefault(made.text, made)
        if other.split != made.split:
            raise UserError(f"{path}: question {number} is also another one, in the split {other.split or 'that is drawn'}: {text[:60]!r}")
    every = tuple(found.values())
    if not any(one.split for one in every):
        return _drawn(every, seed)
    if lacking := [one.text for one in every if not one.split]:
        raise UserError(
            f"{path}: {len(lacking)} questions have no split and others have ({lacking[0][:60]!r}); give all of them one, or none"
        )
    return every


def _json(path: Path) -> Any:
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'is no plain file' if path.exists() else 'no such file'}; wanted questions as JSON or YAML")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: more than {MAX_BYTES:,} bytes; a file of questions has some hundred thousand")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({error})") from None


def _drawn(every: Sequence[Question], seed: int) -> tuple[Question, ...]:
    """Each category shuffled by the seed and cut by SHARES; of a category of one question it is train."""
    generator, splits = random.Random(seed), dict[str, str]()
    for cat in dict.fromkeys(one.cat for one in every):
        own = [one.text for one in every if one.cat == cat]
        generator.shuffle(own)
        first = len(own) - int(len(own) * SHARES[CALIBRATION]) - int(len(own) * SHARES[AUDIT])
        last = len(own) - int(len(own) * SHARES[AUDIT])
        splits |= {text: TRAIN if i < first else CALIBRATION if i < last else AUDIT for i, text in enumerate(own)}
    return tuple(one._replace(split=splits[one.text]) for one in every)


def of_split(every: Sequence[Question], split: str, most: int | None = None) -> list[Question]:
    """The first `most` of a split, one of each category by turns."""
    by_cat: dict[str, list[Question]] = {}
    for one in every:
        if one.split == split:
            by_cat.setdefault(one.cat, []).append(one)
    longest = max(map(len, by_cat.values()), default=0)
    turns = [own[i] for i in range(longest) for own in by_cat.values() if i < len(own)]
    return turns[:most]
