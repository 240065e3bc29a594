"""Preference and utility log-odds from stored losses: closed forms, numbers worked by hand, formats, counting."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from spilt.analysis.odds import collect, preference_log_odds, read_summary, read_table, summarise, utility_log_odds, write_summary
from spilt.analysis.questions import EXACT
from spilt.errors import UserError


def test_closed_forms() -> None:
    p, n = np.array([0.5, 0.25, 0.9]), np.array([0.25, 0.25, 0.05])
    np.testing.assert_allclose(preference_log_odds(-np.log(p), -np.log(n)), np.log(p / n))
    np.testing.assert_allclose(utility_log_odds(-np.log(p), -np.log(n)), np.log((p + n) / (1 - p - n)), rtol=1e-12)


@pytest.mark.parametrize("rest", [0.4, 1e-3, 1e-9, 1e-15])
def test_utility_is_exact_where_almost_all_probability_is_on_the_answers(rest: float) -> None:
    # both hold (1 - rest) / 2: L = log 2 - log1p(-rest); utility = log((1 - rest) / rest)
    loss = np.log(2) - np.log1p(-rest)
    assert utility_log_odds(loss, loss) == pytest.approx(np.log1p(-rest) - np.log(rest), rel=max(1e-9, 3e-16 / rest))


def test_utility_of_unlikely_answers_does_not_underflow() -> None:
    assert utility_log_odds(900.0, 900.0) == pytest.approx(-900 + np.log(2), abs=1e-9)


def test_undefined_is_nan_without_a_warning_and_never_clipped() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = utility_log_odds([0.1, np.log(2), np.nan, np.inf, 1.0], [0.2, np.log(2), 1.0, np.inf, 1.0])
    assert np.isnan(values[:4]).all() and np.isfinite(values[4])


def write(cell: Path, m: float, kind: str, rows: list[dict[str, object]], split: str = "train", name: str = "vector_sft") -> Path:
    folder = cell / f"{name}_m{m}_{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / f"{split}_losses.csv", index=False)
    return folder / f"{split}_losses.csv"


def ours(example: int, pair: str, target: str, applied: float, answer_loss_sum: float, answer_tokens: int = 1) -> dict[str, object]:
    return {
        **{"epoch": 0, "step": example, "pos_steer_loss": 9.0, "pos_steering_factors": applied, "neg_steering_factors": applied},
        **{"example": example, "pair": pair, "target": target, "n_tokens": answer_tokens + 2, "loss_sum": 99.0},
        **{"answer_tokens": answer_tokens, "answer_loss_sum": answer_loss_sum},
    }


def released(step: int, applied: float, loss: float, epoch: int = 0) -> dict[str, object]:
    return {"epoch": epoch, "step": step, "pos_steer_loss": loss, "pos_steering_factors": applied, "neg_steering_factors": applied}


def one_question(cell: Path, m: float = 2.0) -> None:
    """At +2: L_p = 1 (4 / 4 tokens), L_n = 3; at -2: L_p = 5, L_n = 2."""
    write(cell, m, "winning_only", [ours(0, "orig_add", "matching", m, 4.0, 4), ours(0, "orig_sub", "not_matching", -m, 2.0)])
    write(cell, m, "losing_only", [ours(0, "orig_add", "not_matching", m, 3.0), ours(0, "orig_sub", "matching", -m, 10.0, 2)])


def test_roles_are_swapped_back_at_minus_m(tmp_path: Path) -> None:
    one_question(tmp_path)
    frame = collect(tmp_path, "train").set_index("multiplier")
    assert frame.loc[2.0, ["loss_matching", "loss_not_matching", "preference"]].tolist() == [1, 3, 2]
    assert frame.loc[-2.0, ["loss_matching", "loss_not_matching", "preference"]].tolist() == [5, 2, -3]
    mass = np.exp(-1) + np.exp(-3)
    assert frame.loc[2.0, "utility"] == pytest.approx(np.log(mass / (1 - mass)))
    summed = collect(tmp_path, "train", norm="sum").set_index("multiplier")
    assert summed.loc[[2.0, -2.0], "preference"].tolist() == [3 - 4, 2 - 10]


def test_folders_m_and_minus_m_give_each_value_once(tmp_path: Path) -> None:
    one_question(tmp_path, 2.0)
    # the folder of -2: orig_add rows at -2, orig_sub rows at +2, same losses
    write(tmp_path, -2.0, "winning_only", [ours(0, "orig_add", "matching", -2, 10.0, 2), ours(0, "orig_sub", "not_matching", 2, 3.0)])
    write(tmp_path, -2.0, "losing_only", [ours(0, "orig_add", "not_matching", -2, 2.0), ours(0, "orig_sub", "matching", 2, 4.0, 4)])
    frame = collect(tmp_path, "train")
    assert frame["multiplier"].tolist() == [-2, 2] and frame["preference"].tolist() == [-3, 2] and not frame.attrs["notes"]
    write(tmp_path, -2.0, "losing_only", [ours(0, "orig_add", "not_matching", -2, 2.5), ours(0, "orig_sub", "matching", 2, 4.0, 4)])
    assert "different runs" in collect(tmp_path, "train").attrs["notes"][0]


def test_zero_is_one_point(tmp_path: Path) -> None:
    write(tmp_path, 0.0, "winning_only", [ours(0, "orig_add", "matching", 0.0, 1.0), ours(0, "orig_sub", "not_matching", -0.0, 2.0)])
    write(tmp_path, 0.0, "losing_only", [ours(0, "orig_add", "not_matching", 0.0, 2.0), ours(0, "orig_sub", "matching", -0.0, 1.0)])
    frame = collect(tmp_path, "train")
    assert frame["multiplier"].tolist() == [0] and frame["preference"].tolist() == [1] and not np.signbit(frame["multiplier"]).any()


def test_one_answer_only_is_left_out_and_said(tmp_path: Path) -> None:
    one_question(tmp_path)
    write(tmp_path, 4.0, "winning_only", [ours(0, "orig_add", "matching", 4, 1.0), ours(0, "orig_sub", "not_matching", -4, 1.0)])
    frame = collect(tmp_path, "train")
    assert frame["multiplier"].tolist() == [-2, 2]
    assert frame.attrs["notes"] == ["train: only one of the two answers was scored at m = -4, 4; left out"]


def test_a_split_that_was_not_measured_is_empty_and_a_missing_folder_an_error(tmp_path: Path) -> None:
    one_question(tmp_path)
    assert collect(tmp_path, "test").empty and summarise(collect(tmp_path, "test")).empty
    with pytest.raises(UserError, match="no folder .*; run --mode loss first"):
        collect(tmp_path / "nowhere", "train")


def test_released_format_row_order_and_sign(tmp_path: Path) -> None:
    # two questions, pairs alternate; question 1 prefers the not-matching answer
    write(tmp_path, 1.0, "winning_only", [released(0, 1, 1.0), released(1, -1, 2.0), released(2, 1, 4.0), released(3, -1, 1.5)])
    write(tmp_path, 1.0, "losing_only", [released(0, 1, 3.0), released(1, -1, 5.0), released(2, 1, 2.5), released(3, -1, 6.0)])
    write(tmp_path, 0.0, "winning_only", [released(0, 0, 1.0), released(1, 0, 3.0), released(2, 0, 2.0), released(3, 0, 2.5)])
    write(tmp_path, 0.0, "losing_only", [released(0, 0, 3.0), released(1, 0, 1.0), released(2, 0, 2.5), released(3, 0, 2.0)])
    wide = collect(tmp_path, "train").pivot(index="example", columns="multiplier", values="preference")
    assert wide[1.0].tolist() == [2.0, -1.5] and wide[-1.0].tolist() == [-3.0, -4.5] and wide[0.0].tolist() == [2.0, 0.5]
    with pytest.raises(UserError, match="--norm mean"):
        collect(tmp_path, "train", norm="sum")


@pytest.mark.parametrize("header", [True, False])
def test_released_file_appended_on_a_rerun_uses_the_last_run(tmp_path: Path, header: bool) -> None:
    for kind, loss in (("winning_only", 1.0), ("losing_only", 3.0)):
        path = write(tmp_path, 1.0, kind, [released(0, 1, 8.0), released(1, -1, 8.0)])
        again = pd.DataFrame([released(0, 1, loss), released(1, -1, loss)]).to_csv(index=False, header=header)
        path.write_text(path.read_text() + again)
    frame = collect(tmp_path, "train")
    assert frame["multiplier"].tolist() == [-1, 1] and frame["preference"].tolist() == [-2, 2]


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "vector_sft_m1.0_winning_only"
    folder.mkdir()
    (folder / "train_losses.csv").write_text("epoch,loss\n0,1\n")
    with pytest.raises(UserError, match="no column 'pos_steer_loss'; have: epoch, loss"):
        collect(tmp_path, "train")
    (folder / "train_losses.csv").write_text("")
    with pytest.raises(UserError, match="not a readable CSV"):
        collect(tmp_path, "train")


def frame_of(matching: np.ndarray, not_matching: np.ndarray, multipliers: list[float]) -> pd.DataFrame:
    """Losses [question, multiplier] as collect gives them."""
    n, k = matching.shape
    frame = pd.DataFrame({"split": "train", "example": np.repeat(np.arange(n), k), "multiplier": np.tile(multipliers, n)})
    frame["loss_matching"], frame["loss_not_matching"] = matching.ravel(), not_matching.ravel()
    frame["preference"] = preference_log_odds(frame["loss_matching"], frame["loss_not_matching"])
    frame["utility"] = utility_log_odds(frame["loss_matching"], frame["loss_not_matching"])
    return frame


def test_undefined_utilities_are_counted_and_left_out_of_utility_only() -> None:
    summary = summarise(frame_of(np.array([[0.1], [1.0], [2.0]]), np.array([[0.2], [3.0], [2.0]]), [1.0]))
    row = summary.iloc[0]
    assert row["n"] == 3 and row["n_undefined"] == 1 and row["preference"] == pytest.approx((0.1 + 2 + 0) / 3)
    assert row["utility"] == pytest.approx(utility_log_odds([1.0, 2.0], [3.0, 2.0]).mean())
    assert row["accuracy"] == pytest.approx(2 / 3) and row["loss_not_matching"] == pytest.approx(5.2 / 3)


def test_a_loss_that_is_not_finite_shows_in_the_mean(tmp_path: Path) -> None:
    one_question(tmp_path)
    write(tmp_path, 2.0, "losing_only", [ours(0, "orig_add", "not_matching", 2, np.inf), ours(0, "orig_sub", "matching", -2, 10.0, 2)])
    summary = summarise(collect(tmp_path, "train")).set_index("multiplier")
    assert np.isnan(summary.loc[2.0, "preference"]) and summary.loc[2.0, "n_undefined"] == 1 and summary.loc[-2.0, "preference"] == -3


def test_interval_is_seeded_and_close_to_the_standard_error() -> None:
    rng = np.random.default_rng(0)
    frame = frame_of(rng.gamma(2, 1, (400, 3)) + 1, rng.gamma(3, 1, (400, 3)) + 1, [-1.0, 0.0, 1.0])
    summary = summarise(frame, seed=3)
    pd.testing.assert_frame_equal(summary, summarise(frame, seed=3))
    assert not summary.equals(summarise(frame, seed=4))
    errors = frame.groupby("multiplier")["preference"].std().to_numpy() / np.sqrt(400)
    np.testing.assert_allclose(summary["preference_high"] - summary["preference_low"], 2 * 1.96 * errors, rtol=0.12)
    assert (summary["utility_low"] < summary["utility"]).all() and (summary["utility"] < summary["utility_high"]).all()


def test_gain_and_drop_are_judged_on_the_same_questions() -> None:
    # questions differ by nats, the shift from 0 to 1 is the same small one for all: the paired interval sees it, the plain one cannot
    rng = np.random.default_rng(0)
    base, jitter = rng.normal(8, 2, (60, 1)), rng.normal(0, 0.01, (60, 2))
    summary = summarise(frame_of(np.full((60, 2), 8.0), base + [[0.0, 0.1]] + jitter, [0.0, 1.0])).set_index("multiplier")
    assert summary.loc[1.0, "gain_low"] < 0.1 < summary.loc[1.0, "gain_high"] < summary.loc[1.0, "gain_low"] + 0.02
    assert summary.loc[1.0, "preference_high"] - summary.loc[1.0, "preference_low"] > 0.5
    assert summary.loc[0.0, ["gain_low", "gain_high", "drop_low", "drop_high"]].tolist() == [0, 0, 0, 0]
    assert 0 < summary.loc[1.0, "drop_low"] < summary.loc[1.0, "drop_high"]
    without = summarise(frame_of(np.full((5, 1), 1.0), np.full((5, 1), 2.0), [1.0]))
    assert without[["gain_low", "drop_high"]].isna().all(axis=None)


def test_concepts_are_averaged_last() -> None:
    one, two = frame_of(np.full((1, 1), 1.0), np.full((1, 1), 3.0), [1.0]), frame_of(np.full((9, 1), 2.0), np.full((9, 1), 2.0), [1.0])
    summary = summarise(pd.concat([one.assign(concept=0), two.assign(concept=1)]))
    assert summary["preference"].tolist() == [1.0] and summary["n"].tolist() == [10]  # (2 + 0) / 2, not 2 / 10


def test_every_digit_of_a_number_is_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=20_000) * 10.0 ** draw.integers(-12, 12, 20_000)
    (tmp_path / "x.csv").write_text("x\n" + "\n".join(map(repr, values.tolist())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = read_table(tmp_path / "x.csv", ["x"], "", **EXACT)
    assert (table["x"].to_numpy() == values).all()


def test_summary_file_round_trip(tmp_path: Path) -> None:
    summary = summarise(frame_of(np.array([[0.1, 1.0]]), np.array([[0.2, 2.0]]), [0.0, 1.0]))
    write_summary(tmp_path / "deep" / "preference_utility.csv", summary)
    pd.testing.assert_frame_equal(read_summary(tmp_path / "deep" / "preference_utility.csv"), summary, check_dtype=False)
    (tmp_path / "foreign.csv").write_text("multiplier,preference\n0,1\n")
    with pytest.raises(UserError, match="no column 'utility'"):
        read_summary(tmp_path / "foreign.csv")
