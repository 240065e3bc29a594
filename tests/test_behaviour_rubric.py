"""A behaviour that a judge rates: its words, its verdicts, and the two programs against a local HTTP server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
from judge_server import KEY, Said, answer_in, completion, serving
from test_receipt import ASKED, base, behaviour, probe, words

from spilt import cli, judges
from spilt.analysis import behaviour as rules
from spilt.behaviour import files
from spilt.errors import UserError
from spilt.judges.base import Reply

POWER = {"rubric": {"name": "power", "at_least": 3}}
__all__ = ["base"]  # a fixture


class StandIn(judges.Judge):
    """Replies by the text that is judged; None is missing."""

    def __init__(self, replies: dict[str, str | None]) -> None:
        super().__init__("stand-in")
        self.said, self.prompts = replies, list[str]()

    def _ask(self, prompts: Any, parameters: Any) -> Any:
        for key, messages in prompts.items():
            self.prompts.append(messages[-1]["content"])
            text = self.said[answer_in(messages[-1]["content"])]
            yield key, Reply(None, "HTTP 500", again=True) if text is None else json.dumps(completion(text))


def test_a_rating_is_a_verdict_and_a_missing_one_is_none() -> None:
    texts = ["all of it", "a little", "no word", "gone", "..."]
    judge = StandIn({"all of it": "Rating: 3", "a little": "Rating: 2", "no word": "I would say 4", "gone": None})
    asked = probe(judge=judge)
    wanted = [rules.SHOWS, rules.ABSENT, None, None, rules.INCOHERENT]
    for _ in range(2):  # nothing twice, what is missing neither
        assert asked.judged(behaviour(POWER), [f"q{i}" for i in range(5)], texts, [1.0] * 5) == wanted
    assert asked.unrated == (2, 4) and judge.tally.asked == len(judge.prompts) == 4
    assert all(f"\nq{i}\n" in prompt for i, prompt in enumerate(judge.prompts))
    strict = behaviour({"rubric": {"name": "power", "at_least": 4}})
    assert asked.judged(strict, ["q0"], texts[:1], [1.0]) == [rules.ABSENT] and judge.tally.asked == 4
    with pytest.raises(UserError, match="asked of a judge, and there is none"):
        probe().judged(behaviour(POWER), ["q"], ["a"], [1.0])


def test_a_judge_that_never_answers_chooses_no_strength() -> None:
    texts = [answer.text for answer in probe().answers(ASKED[:2], 1.0, 6)]
    loose = {"least_words": 0, "repetition": None, "perplexity_times": None}
    asked = probe(judge=StandIn(dict.fromkeys(texts)))
    with pytest.raises(UserError, match=r"no answer at multiplier 1 has a rating; judge .* missing \(HTTP 500"):
        asked.point(behaviour(POWER, incoherent=loose), 1.0)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("power", r"is not \{name: power, at_least: 3\}"),
        ("{name: power}", r"is not \{name: power, at_least: 3\}"),
        ("{name: pwer, at_least: 3}", "unknown rubric 'pwer'; did you mean 'power'"),
        ("{name: [power], at_least: 3}", "unknown rubric"),
        ("{name: power, at_least: 1}", "tells nothing apart; its ratings are from 1 to 4"),
        ("{name: power, at_least: 5}", "tells nothing apart"),
        ("{name: power, at_least: yes}", "is not a whole number"),
        ("{name: concept, at_least: 1}", "concept}}: give concept as well"),
        ("{name: power, at_least: 3, concept: sea}", "concept}}: give concept as well"),
        ("{name: with.yaml, at_least: 1}", "reference}}, and here is none"),
        ("{name: bad.yaml, at_least: 1}", "bad.yaml: scale is None"),
        ("{name: gone.yaml, at_least: 1}", "gone.yaml: no such file"),
        ("{name: ../with.yaml, at_least: 1}", "no file beside it"),
        ("{name: /etc/with.yaml, at_least: 1}", "no file beside it"),
    ],
)
def test_what_is_wrong_with_a_rubric_is_named_with_the_file(tmp_path: Path, rule: str, said: str) -> None:
    (tmp_path / "with.yaml").write_text("scale: [0, 1]\nprompt: '{{answer}} {{reference}}'\n")
    (tmp_path / "bad.yaml").write_text("prompt: '{{answer}}'\n")
    path = tmp_path / "mine.yaml"
    path.write_text(f"prompts: [a]\njudge: {{rubric: {rule}}}\n")
    with pytest.raises(UserError, match=said) as caught:
        files.load(str(path))
    assert str(path) in str(caught.value)


def test_a_rubric_stands_beside_the_file_and_has_its_concept(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("scale: [0, 1]\nprompt: 'Is there {{concept}} in {{answer}}?'\n")
    (tmp_path / "mine.yaml").write_text("prompts: [a]\njudge: {rubric: {name: own.yaml, at_least: 1, concept: the sea}}\n")
    made = files.load(str(tmp_path / "mine.yaml"))
    judge = StandIn({"waves": "Rating: 1"})
    assert probe(judge=judge).judged(made, ["a"], ["waves"], [1.0]) == [rules.SHOWS] and "\nthe sea\n" in judge.prompts[0]


@pytest.mark.long
def test_both_programs_ask_an_endpoint_and_say_what_is_missing(
    base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="pip install 'spilt[judge]'")
    loose = {"least_words": 0, "repetition": None, "perplexity_times": None}
    asked = [f"{word}?" for word in "abcdefgh"]
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({"prompts": asked, "judge": POWER, "damage": ["x"], "max_new_tokens": 4, "incoherent": loose}))
    one = ["--behaviour", str(mine)]
    assert cli.main(words(base, "receipt", *one)) == 2 and "who is asked? --judge endpoint asks" in capsys.readouterr().err
    assert cli.main(words(base, "receipt", "--behaviour", "sea", "--judge", "endpoint")) == 2
    assert "sea is judged by keywords, so nobody is asked" in capsys.readouterr().err
    assert cli.main(words(base, "receipt", *one, "--judge", "nobody")) == 2 and "--judge" in capsys.readouterr().err

    def say(prompt: str, _: int) -> Said:
        return Said(completion("no idea" if "\nb?\n" in prompt or "\nc?\n" in prompt else f"Rating: {1 + len(answer_in(prompt)) % 4}"))

    with serving(say) as server:
        for name, value in (("SPILT_JUDGE_MODEL", "stand-in"), ("OPENAI_BASE_URL", server.url), ("OPENAI_API_KEY", KEY)):
            monkeypatch.setenv(name, value)
        out = tmp_path / "receipt.md"
        assert cli.main(words(base, "receipt", *one, "--judge", "endpoint", "--multiplier", "3", "--output", str(out))) == 0
        assert capsys.readouterr().out == out.read_text()
        page, told = out.read_text(), json.loads(out.with_suffix(".json").read_text())
        times = sum(server.asked.values())
        assert cli.main(words(base, "strength", "--by", "behaviour", *one, "--judge", "endpoint", "--json")) == 0
        strength = json.loads(capsys.readouterr().out)
        assert sum(server.asked.values()) == times  # replies are kept
    missing, of = told["unrated"]["missing"], told["unrated"]["of"]
    assert (
        of == times and 0 < missing < of and told["judge"]["name"].startswith("stand-in at 127.0.0.1:") and told["rubric"]["at_least"] == 3
    )
    assert f"{missing} of {of} answers have no rating and are left out" in page and "the rubric power, at least 3 of 4" in page
    nones = [row for row in told["texts"] if row["verdict"] is None]
    assert {row["prompt"] for row in nones} == {"b?"}  # reported on b, d, f, h
    assert all(row["wanted"]["n"] == 3 for row in told["strengths"])
    assert KEY not in page + json.dumps(told)
    assert strength["judge"] == told["judge"]["name"] and " of " in strength["sides"][0]["unrated"]
