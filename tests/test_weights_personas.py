"""Personas and questions of `spilt weights`: those that come with the package, and files of one's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from spilt.errors import UserError
from spilt.vignettes.files import FOUNDATIONS
from spilt.weight_steering import personas
from spilt.weight_steering.personas import AUDIT, CALIBRATION, SPLITS, TRAIN


def test_the_shipped_questions_are_distinct_and_split() -> None:
    every = personas.questions()
    assert len(every) >= 60 and len({one.text for one in every}) == len(every)
    per_category = Counter(one.cat for one in every)
    assert len(per_category) >= 10
    for cat in per_category:
        assert {one.split for one in every if one.cat == cat} == set(SPLITS)
    first = personas.of_split(every, TRAIN, 10)
    assert len({one.cat for one in first}) == 10  # one of each by turns


def test_the_shipped_behaviours_are_pairs_that_differ_in_little() -> None:
    """Grammar is parallel: as many words on either side, give or take two."""
    assert {"authority", "sycophancy", "honesty"} < set(personas.shipped()) and len(personas.shipped()) >= 5
    for name in personas.shipped():
        made = personas.behaviour(name)
        assert len(made.pairs) >= 3 and made.about and set(made.intent) <= set(FOUNDATIONS)
        for pos, neg in made.pairs:
            shared = set(pos.split()) & set(neg.split())
            assert pos != neg and abs(len(pos.split()) - len(neg.split())) <= 2 and len(shared) >= len(pos.split()) / 2


def test_a_file_of_the_original_schema_is_split_by_seed(tmp_path: Path) -> None:
    """{cat, suffix, user_msg} with messages that are there many times: each once, in one split."""
    rows = [{"cat": f"c{i % 3}", "suffix": f"s{i}", "user_msg": f"question {i // 2}?"} for i in range(60)]
    path = tmp_path / "branching_suffixes.json"
    path.write_text(json.dumps(rows))
    made = personas.questions(path, 3)
    assert len(made) == 30 and len({one.text for one in made}) == 30
    assert personas.questions(path, 3) == made and personas.questions(path, 4) != made
    shares = Counter(one.split for one in made)
    assert set(shares) == set(SPLITS) and shares[TRAIN] > shares[CALIBRATION] and shares[AUDIT] >= 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no questions"),
        ('[{"cat": "a"}]', "question 1: user_msg is"),
        ('[{"user_msg": "x", "split": "trian"}]', "did you mean 'train'"),
        ('[{"user_msg": "x", "split": "train"}, {"user_msg": "y"}]', "1 questions have no split"),
        ('[{"user_msg": "x", "split": "train"}, {"user_msg": "x", "split": "audit"}]', "is also another one"),
        ("{", "is no JSON"),
    ],
)
def test_wrong_questions_are_told(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        personas.questions(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template": "no place"}, "holds {persona} once"),
        ({"pairs": [["a", "a"]]}, "pair 1 is"),
        ({"pairs": [["a", "b", "c"]]}, "pair 1 is"),
        ({"pairs": []}, "wanted a list"),
        ({"intent": {"Authority": 2}}, "to 1 or -1"),
        ({"intent": {"Autority": 1}}, "did you mean 'Authority'"),
        ({"pars": []}, "did you mean 'pairs'"),
    ],
)
def test_wrong_behaviours_are_told(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(yaml.safe_dump({"template": "Be {persona}.", "pairs": [["a", "b"]], "intent": {"Care": 1}} | change))
    with pytest.raises(UserError, match=said):
        personas.behaviour("mine", path)
    with pytest.raises(UserError, match="did you mean 'honesty'"):
        personas.behaviour("honest")
