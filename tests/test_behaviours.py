"""Behaviour files, what a verdict is, intervals and agreement, the search for a strength, agreement of pairs. No model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from spilt.analysis import behaviour as rules
from spilt.analysis import chosen as c
from spilt.analysis.direction import screen
from spilt.analysis.intervals import change, kappa, pooled, share
from spilt.behaviour import files
from spilt.errors import UserError

REAL = Path(__file__).parents[1] / "examples" / "real"


# ---------------------------------------------------------------- files


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_the_shipped_ones_are_read_and_ask_what_the_demo_asks() -> None:
    demo = yaml.safe_load((REAL / "hparams" / "Steer" / "dataset_format.yaml").read_text(encoding="utf-8"))["generation"]
    assert set(files.shipped()) >= {"sea", "ambition", "agreement"}
    for name in files.shipped():
        made = files.load(name)
        assert made.name == name and made.about and not {a.text for a in made.chosen_on} & {a.text for a in made.reported_on}
        if name in demo:
            assert list(made.judge.rule) == demo[name]["keywords"]
            asked = [row.text for row in files.asked_of(REAL / "data" / name / "prompts.jsonl")]
            assert [a.text for a in made.prompts] == asked
    for name, suite in files.SUITES.items():
        assert len(suite.read(files.SHIPPED / f"{name}.csv")) == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompts: [a]\njudge: {keywords: [x]}\nkeyword: [x]", "unknown key 'keyword'.*have: "),
        ("prompts: [a]\njudge: {keyword: [x]}", "unknown judge 'keyword'; did you mean 'keywords'"),
        ("prompts: [a]\njudge: {keywords: [x], regex: y}", "judge = .* is not one of"),
        ("prompts: [a]", "has no 'judge'"),
        ("judge: {keywords: [x]}", "has no 'prompts'"),
        ("prompts: []\njudge: {keywords: [x]}", "prompts = .*no list of prompts"),
        ("prompts: [3]\njudge: {keywords: [x]}", "prompts = .*no list of prompts"),
        ("prompts: [a]\njudge: {regex: '(x'}", r"regex that is wrong: '\(x' is no regular expression"),
        ('prompts: [a]\njudge: {regex: "\\bx"}', r"holds the character \\x08; .* single quotes"),
        ("prompts: [a]\njudge: {first_token: {shows: Yes, otherwise: No}}", "in quotes where it is Yes or No"),
        ("prompts: [a]\njudge: {first_token: columns}", "columns matching, not_matching"),
        ("prompts: [a]\njudge: {yes_no: maybe}", "unknown answer 'maybe'"),
        ("prompts: [a]\njudge: {keywords: [x]}\nwant: show", "unknown wish 'show'; did you mean 'shows'"),
        ("prompts: [a]\njudge: {keywords: [x]}\nincoherent: {repeat: 1}", "unknown key 'repeat'"),
        ("prompts: [a]\njudge: {keywords: [x]}\nincoherent: {repetition: 3}", "repetition = 3 is too large"),
        ("prompts: [a]\njudge: {keywords: [x]}\nmax_new_tokens: 0", "max_new_tokens = 0 is too small"),
        ("prompts: ../secret.txt\njudge: {keywords: [x]}", "no file beside it"),
        ("prompts: /etc/hostname\njudge: {keywords: [x]}", "no file beside it"),
        ("prompts: [a]\njudge: {keywords: [x]}\nlabels: ../../labels.csv", "no file beside it"),
        ("prompts: gone.txt\njudge: {keywords: [x]}", "gone.txt can't be read"),
        ("prompts: empty.txt\njudge: {keywords: [x]}", "has no prompt"),
        ("prompts: odd.jsonl\njudge: {keywords: [x]}", "none of the columns input, prompt, question; columns found: asked"),
        ("prompts: !!python/object/apply:os.system [ls]\njudge: {}", "tag .* is not allowed"),
        ("[]", "holds a list"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "", "empty.txt")
    write(tmp_path, '{"asked": "a"}\n', "odd.jsonl")
    with pytest.raises(UserError, match=said) as caught:
        files.load(write(tmp_path, text))
    assert str(tmp_path) in str(caught.value)


def test_prompts_stand_in_a_file_beside_it_and_a_name_that_is_none_is_told(tmp_path: Path) -> None:
    write(tmp_path, "one\n\n two \n", "asked.txt")
    write(tmp_path, "question,matching,not_matching\nq,yes,no\n", "rows.csv")
    made = files.load(write(tmp_path, "prompts: asked.txt\ntune_on: [z]\njudge: {yes_no: yes}\nwant: absent"))
    assert [a.text for a in made.reported_on] == ["one", "two"] and [a.text for a in made.chosen_on] == ["z"]
    assert made.judge == ("yes_no", "yes") and made.want == rules.ABSENT and len(made.benign) > 5
    assert files.load(write(tmp_path, "prompts: rows.csv\njudge: {first_token: columns}")).prompts[0].row["matching"] == "yes"
    with pytest.raises(UserError, match="unknown behaviour 'see'; did you mean 'sea'"):
        files.load("see")


def test_a_pattern_that_does_not_end_is_a_mistake_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "SECONDS", 0.05)
    with pytest.raises(UserError, match="takes more than 0.05 s"):
        rules.found(r"(a|aa)+\d$", "a" * 60)
    assert rules.found("can't", "I CAN’T") and not rules.found("^b", "ab")


# ---------------------------------------------------------------- numbers


def test_shares_changes_and_agreement_are_those_of_the_books() -> None:
    assert share([False] * 10)[:3] == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert share([True, False] * 5)[:3] == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert math.isnan(share([]).value)
    ours, theirs = "s" * 25 + "a" * 25, "s" * 20 + "a" * 5 + "s" * 10 + "a" * 15
    assert kappa([*ours], [*theirs]).value == pytest.approx(0.4)  # Wikipedia's example
    assert math.isnan(kappa(["s"] * 4, ["s"] * 4).value)
    full = kappa(["s", "a"] * 4, ["s", "a"] * 4)
    assert full.value == 1 and full.low < 0.9  # of eight items no certainty
    gain = change([False] * 12, [True] * 12)
    assert gain.value == 1 and 0.5 < gain.low < 1 and gain.high == 1
    assert change([True, False] * 6, [True, False] * 6).low < 0 < change([True, False] * 6, [True, False] * 6).high
    drawn = pooled([[1.0, 2.0], [3.0], [2.0, 2.0]])
    assert drawn.value == 2 and drawn.low < 2 < drawn.high and drawn.n == 3 and math.isnan(pooled([[1.0]]).low)


def test_intervals_of_changes_hold_the_truth() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        u = rng.random(16)
        found = change([*(u < 0.3)], [*((u < 0.2) | (rng.random(16) < 0.4))])
        held += found.low <= 0.2 + 0.8 * 0.4 - 0.3 <= found.high
    assert held >= 370


# ---------------------------------------------------------------- the search


def points(success: Callable[[float], float], broken: Callable[[float], float] = lambda d: 0.0) -> tuple[Any, list[float]]:
    tried: list[float] = []

    def measure(m: float) -> c.Point:
        tried.append(m)
        return c.Point(m, success(m / 10), broken(abs(m) / 10), abs(m) / 10)

    return measure, tried


@pytest.mark.parametrize("sign", [1, -1])
def test_the_strength_that_shows_most_and_the_edges_of_what_works(sign: int) -> None:
    """Grows to dose 0.5, where answers begin to break; half of the gain is reached at 0.25."""
    measure, tried = points(lambda d: min(max(sign * d, 0), 0.5), lambda d: float(d > 0.5))
    found = c.choose(measure, 0.1)
    inner, outer = found.edges
    assert found.status == c.CHOSEN and 0.4 <= sign * found.multiplier / 10 <= 0.5 and len(tried) == len(set(tried)) < 25
    half = sign * found.multiplier / 20
    assert inner.fails is not None and inner.why == "shows it less"
    assert sign * inner.fails / 10 < half <= sign * inner.works / 10 <= half * 1.25
    assert outer.fails is not None and 0.4 <= sign * outer.works / 10 <= 0.5 < sign * outer.fails / 10 and outer.why == "incoherent"
    assert found.point.success == max(p.success for p in found.points if p.incoherent == 0)


def test_a_search_that_finds_nothing_says_which_nothing() -> None:
    assert c.choose(points(lambda d: 0.3)[0], 0.1).status == c.NO_EFFECT
    assert c.choose(points(abs, lambda d: float(d > 0))[0], 0.1).status == c.TOO_MUCH
    assert c.choose(points(lambda d: abs(d) * (abs(d) > 0.3), lambda d: float(d > 0.1))[0], 0.1).status == c.NO_EFFECT
    limited = c.choose(points(lambda d: d)[0], 0.1, c.Limits(damage=0.3))
    assert limited.status == c.CHOSEN and abs(limited.multiplier) <= 3 and limited.edges[1].why == "damage"
    assert c.choose(points(lambda d: d)[0], 0.1).edges[1].fails is None  # the end of what was tried, and said so
    assert c.choose(points(lambda d: math.nan if d else 0.0, lambda d: math.nan if d else 0.0)[0], 0.1).status == c.TOO_MUCH


# ---------------------------------------------------------------- a direction


def test_pairs_with_a_direction_and_without() -> None:
    rng = np.random.default_rng(1)
    base, noise, way = rng.normal(size=(24, 16)), rng.normal(size=(2, 24, 16)), rng.normal(size=16)
    there = screen(base + noise[0] + way, base + noise[1])
    none = [screen(base + a, base + b) for a, b in rng.normal(size=(60, 2, 24, 16))]
    assert there.p < 0.01 and there.held_out > 0.9 and there.auc > 0.8 and there.cosine > 0.3 and not there.doubt
    assert sum(bool(one.doubt) for one in none) > 50 and abs(np.mean([one.held_out for one in none]) - 0.5) < 0.08
    assert "no direction to be seen" in next(one.doubt for one in none if one.doubt)
    assert "too few" in screen(base[:2], base[2:4]).doubt and screen(base, base).p == 1


def test_each_pair_is_judged_by_the_others_alone() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 7, 5)) + [[[0.5]], [[0]]]
    scores, cosines = [], []
    for i in range(7):
        v = (a - b)[np.arange(7) != i].mean(0)
        v /= np.linalg.norm(v)
        scores.append((a[i] @ v, b[i] @ v))
        cosines.append((a[i] - b[i]) @ v / np.linalg.norm(a[i] - b[i]))
    found = screen(a, b)
    assert found.cosine == pytest.approx(np.mean(cosines)) and found.held_out == pytest.approx(np.mean([x > y for x, y in scores]))
    assert found.auc == pytest.approx(np.mean([x > y for x, _ in scores for _, y in scores]))
