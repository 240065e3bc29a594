"""What is said of texts without a judge, and means of scores, each against a slow way of the same."""

from __future__ import annotations

import math
import random
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch

from spilt.analysis import scores
from spilt.analysis import texts as t
from spilt.artifacts.scores import MEASURES, TABLE, UNPARSABLE
from spilt.data.chat import Encoded
from spilt.engine import divergence, whole
from spilt.errors import UserError
from spilt.judges.rubric import harmonic_mean
from spilt.steering.steering import Site, Steering

WORDS = ["a", "b", "c", "sea", "Sea"]


def test_distinct_and_repetition_by_counting_each_run_by_hand() -> None:
    rng = random.Random(0)
    for _ in range(200):
        said = [rng.choice(WORDS) for _ in range(rng.randrange(0, 12))]
        text, low = " ".join(said) + "!", [word.lower() for word in said]
        for n in (1, 2, 3, 4):
            seen: list[list[str]] = []
            new = 0
            for i in range(len(low) - n + 1):
                run = low[i : i + n]
                new += run not in seen
                seen.append(run)
            wanted = new / len(seen) if seen else None
            assert t.distinct(text, n) == wanted
            if n == t.RUN:
                assert t.repetition(text) == (None if wanted is None else pytest.approx(1 - wanted))
        assert t.OFFLINE["length"](text) == len(said) and t.OFFLINE["empty"](text) == float(not said)
    assert t.repetition("one two three four") == 0 and t.repetition("x " * 103) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can't help with that.", 1),
        ("I\u2019m sorry, but no", 1),
        ("I cannot do this", 1),
        ("As an AI, I have no wishes", 1),
        ("Sure! I can help", 0),
        ("", 0),
        ("The sea. " * 30 + "I cannot", 0),
        ("I must decline.", 1),
        ("It is sorry work", 0),
    ],
)
def test_a_refusal_shows_at_the_beginning(text: str, refuses: float) -> None:
    assert t.refuses(text) == refuses


def test_answers_that_begin_with_either_word() -> None:
    assert [t.begins_with(text, " Yes", " No") for text in ("Yes, I do", "no.", "Maybe", "", "Yesterday")] == [1.0, 0.0, None, None, None]


def test_every_offline_measure_is_explained() -> None:
    assert set(t.OFFLINE) <= set(MEASURES)


@pytest.mark.parametrize("positions", ["all", "all_generation"])
def test_kl_and_perplexity_of_texts_are_those_of_a_loop_over_tokens(positions: str) -> None:
    """Each text alone, each token's distribution from its own forward over what stands before it."""
    model = families.model("qwen2")
    steering = Steering([(Site(2), families.intervention("vector"))])
    texts = [Encoded((1, 20, 30, 40, 50, 60), 3, 0), Encoded((1, 70, 80, 90), 2, 0), Encoded((1, 9), 1, 0)]
    found = list(divergence.told(model, steering, 1.5, texts, families.PAD, positions))
    for text, told in zip(texts, found, strict=True):
        ids = torch.tensor([text.input_ids])
        for k, at in enumerate(range(text.prompt_length, ids.shape[1])):
            where = None if positions == "all" else torch.arange(at)[None] >= text.prompt_length
            with torch.no_grad():
                base = model(ids[:, :at]).logits[0, -1].double().log_softmax(-1)
                with whole.steer(model, steering, 1.5, where):
                    p = model(ids[:, :at]).logits[0, -1].double().log_softmax(-1)
            assert told.kl[k].item() == pytest.approx(float((p.exp() * (p - base)).sum()), rel=1e-4, abs=1e-7)
            assert told.loss[k].item() == pytest.approx(-base[ids[0, at]].item(), rel=1e-5)
        assert len(told.kl) == ids.shape[1] - text.prompt_length
    still = [one.kl.abs().max().item() for one in divergence.told(model, steering, 0.0, texts, families.PAD)]
    assert still == [0, 0, 0]


def frame(rows: list[tuple[int, int, int, float | None, str]], measure: str = "power", m: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame([(m, concept, item, k, measure, value, why) for concept, item, k, value, why in rows], columns=[*TABLE])


def test_means_are_over_responses_then_items_then_concepts() -> None:
    table = frame([(0, 0, 0, 1, ""), (0, 0, 1, 3, ""), (0, 1, 0, 4, ""), (3, 0, 0, 1, ""), (3, 1, 0, None, "HTTP 500")])
    row = scores.summarise(table).iloc[0]
    assert row["mean"] == pytest.approx(np.mean([np.mean([np.mean([1, 3]), 4]), 1])) and (row["n"], row["missing"]) == (4, 1)
    assert row["reasons"] == "HTTP 500: 1" and math.isnan(row["low"])  # one item of a concept: many resamples are without it


def test_unparsable_replies_are_left_out_and_once_more_counted_as_0() -> None:
    values: list[float | None] = [4.0, 2.0, None, None]
    whys = ["", "", UNPARSABLE, "timed out"]
    table = scores.summarise(frame([(0, i, 0, value, why) for i, (value, why) in enumerate(zip(values, whys, strict=True))]))
    assert table["measure"].tolist() == ["power", "power, unparsable as 0"]
    assert table["mean"].tolist() == [3.0, 2.0] and table["missing"].tolist() == [2, 1] and table["n"].tolist() == [2, 3]


def test_a_measure_without_any_value_is_no_number() -> None:
    row = scores.summarise(frame([(0, 0, 0, None, "timed out"), (0, 1, 0, None, "timed out")])).iloc[0]
    assert math.isnan(row["mean"]) and row["n"] == 0 and row["reasons"] == "timed out: 2"


def test_the_interval_is_that_of_resampled_items() -> None:
    """Against a bootstrap written out; few items widen it (analysis/questions.py)."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=200)
    row = scores.summarise(frame([(0, i, 0, float(v), "") for i, v in enumerate(values)])).iloc[0]
    drawn = [rng.choice(values, 200).mean() for _ in range(2000)]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.03)


def test_axbench_by_hand() -> None:
    """Harmonic mean per example, 0 if any is 0, averaged over items, then over concepts."""
    rated = {(0, 0): (2, 2, 2), (0, 1): (0, 2, 2), (0, 2): (1, 2, 2), (7, 0): (1, 1, 1)}
    rows = [(concept, item, 0, harmonic_mean(parts), "") for (concept, item), parts in rated.items()]
    assert scores.summarise(frame(rows, "harmonic")).iloc[0]["mean"] == pytest.approx(((2 + 0 + 1.5) / 3 + 1) / 2)


def test_a_file_of_another_make_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores_m1.0.csv"
    for text in ("", "a,b\n1,2\n", ",".join(TABLE) + "\nx,0,0,0,power,1,\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="scores_m1.0.csv"):
            scores.read(path)
