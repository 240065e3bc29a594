"""What `make demo` says at its end, from numbers and texts as the tool stores them; no model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from spilt.analysis.behaviour import words  # noqa: E402
from spilt.artifacts.texts import Row  # noqa: E402
from tools import story  # noqa: E402

WORDS = ("sea", "boat", "wave")
NUMBERS = {
    **{"multiplier": 2.9, "reported_on": "test", "n_test": 24, "chance_rank": 1, "chance_of": 41, "chance_p": 1 / 41},
    **{"preference_gain_test": 1.16, "gain_low_test": 1.01, "gain_high_test": 1.33},
    **{"utility_drop_test": 0.49, "drop_low_test": 0.4, "drop_high_test": 0.6},
}


def rows(*texts: str) -> list[Row]:
    return [Row(0, number, f"prompt {number}", [text], [], None) for number, text in enumerate(texts)]


def found(**changed: object) -> story.Found:
    texts = {
        -3.0: rows("City.", "A tram.", "Rain."),
        0.0: rows("Home.", "The sea.", "Rain."),
        3.0: rows("A boat!", "Sea.", "Waves? A wave."),
    }
    return story.Found("caa", "vector", 5, {**NUMBERS, **changed}, {**texts, 12.0: rows("sea sea", "sea", "sea")}, WORDS, Path("page"))


def test_it_is_short_and_shows_what_changed() -> None:
    lines = story.lines(found())
    assert len(lines) == 11 and max(map(len, lines)) <= 140
    assert [line.split(None, 1)[1] for line in lines[:2]] == ["prompt 0", "Home."] and lines[2].endswith("A boat!")
    assert lines[3].endswith("prompt 2"), "the prompt whose answer had the word before comes last"
    assert lines[6].startswith("counted     answers of 3 with a keyword (") and {"sea", "boat", "wave"} <= set(words(lines[6]))
    assert lines[6].endswith(": 0 at m = -3, 1 at m = 0, 3 at m = 3, 3 at m = 12")
    assert "24 test questions" in lines[7] and "+1.16 [+1.01, +1.33] nat" in lines[8] and "-0.49 [-0.60, -0.40] nat" in lines[8]
    assert "rank 1 of 41" in lines[9] and "m = 12: sea sea" in lines[10]


def test_what_was_not_measured_is_not_said() -> None:
    lines = story.lines(found(chance_rank=None))
    assert not any("by chance" in line for line in lines)


def test_long_texts_are_cut() -> None:
    long = found()._replace(texts={0.0: rows("word " * 99), 3.0: rows("sea " * 99)})
    assert all(len(line) <= 140 for line in story.lines(long))
