"""Simulated truth: many experiments whose best multiplier, ties and nulls are known; what the intervals and verdicts say of them.

A question is drawn from a population: its own base, its own slope of preference, its own curvature of utility. The population's mean
curves are known, so its best multiplier is: gain(m) = G m below the budget's drop(m) = (m / 10)^2.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from counts import count
from scipy import optimize, stats

from spilt.analysis import chance, claims
from spilt.analysis.questions import Array, Questions
from spilt.analysis.recommend import NEAR, choice, next_multiplier, recommendation, solve

GRID = np.linspace(-20, 20, 21)
GAIN, BUDGET = 0.12, 0.5
BEST = 10 * np.sqrt(BUDGET)
EXPERIMENTS = count(200, 40)


def all_cover(covered: npt.ArrayLike) -> bool:
    """Between 90% and 98% of 200 experiments; of fewer as many as such a share leaves possible (99.9%)."""
    low, high = (0.9, 0.98) if EXPERIMENTS == 200 else stats.binom.ppf([0.0005, 0.9995], EXPERIMENTS, [0.9, 0.98]) / EXPERIMENTS
    share = np.asarray(covered) / EXPERIMENTS
    return bool(((share >= low) & (share <= high)).all())


class Population:
    """n questions of one experiment; `at(m)`: their preference and utility [question, multiplier]."""

    def __init__(self, rng: np.random.Generator, n: int, gain: float = GAIN, base: Array | None = None) -> None:
        self.base = rng.normal(size=(n, 2)) if base is None else base
        self.gain = gain * (1 + 0.6 * rng.normal(size=(n, 1)))
        self.curvature = 1 + 0.4 * rng.normal(size=(n, 1))

    def at(self, m: Array) -> tuple[Array, Array]:
        return self.base[:, :1] + self.gain * m, self.base[:, 1:] + 2 - self.curvature * (m / 10) ** 2

    def frame(self, multipliers: Iterable[float] = GRID, split: str = "train") -> pd.DataFrame:
        m = np.array(sorted(multipliers))
        return frame_of(*self.at(m), m, split)


class Peaked(Population):
    """Utility hardly falls; preference a m exp(-|m| / t), a and t of each question its own, peaks at `top`, off the grid."""

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        spread, middle = rng.uniform(0.1, 0.3), rng.uniform(4, 8)
        self.base = rng.normal(size=(n, 2))
        self.a, self.t = 0.3 * (1 + spread * rng.normal(size=(n, 1))), middle * np.exp(spread * rng.normal(size=(n, 1)))
        everyone = middle * np.exp(spread * stats.norm.ppf((np.arange(2000) + 0.5) / 2000))
        self.top = optimize.minimize_scalar(lambda m: -(m * np.exp(-m / everyone)).mean(), bounds=(1, 20), method="bounded").x

    def at(self, m: Array) -> tuple[Array, Array]:
        return self.base[:, :1] + self.a * m * np.exp(-np.abs(m) / self.t), self.base[:, 1:] + 2 - 5e-4 * m**2


def frame_of(preference: Array, utility: Array, m: Array, split: str = "train") -> pd.DataFrame:
    n = len(preference)
    keys = {"split": split, "example": np.repeat(np.arange(n), len(m)), "multiplier": np.tile(m, n)}
    return pd.DataFrame({**keys, "preference": preference.ravel(), "utility": utility.ravel()})


def refined(population: Population | Peaked, budget: float = BUDGET) -> list[float]:
    """The multipliers after the rounds of measuring where the budget is met, or nearer to the peak."""
    m = list(GRID)
    for _ in range(3):
        more = next_multiplier(population.frame(m), budget)
        if more is None:
            return m
        m.append(more)
    return m


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("n", "tested"), [(16, False), (48, True)])
def test_intervals_of_m_gain_and_drop_cover_the_truth(n: int, tested: bool) -> None:
    covered = np.zeros(3)
    for seed in range(EXPERIMENTS):
        rng = np.random.default_rng([n, seed])
        population = Population(rng, n)
        m = refined(population)
        frame = population.frame(m)
        if tested:
            frame = pd.concat([frame, Population(rng, n).frame(m, "test")])
        found = recommendation(frame, BUDGET)
        said, star = found["reported"] or found["chosen"], found["solved"]
        assert (found["reported"] is not None) == tested
        assert found["measured"] and abs(found["chosen"]["utility_drop"] - BUDGET) <= NEAR
        truth = ((found, "", BEST), (said, "gain_", GAIN * star), (said, "drop_", (star / 10) ** 2))
        covered += [place[f"{name}low"] <= value <= place[f"{name}high"] for place, name, value in truth]
    assert all_cover(covered), covered / EXPERIMENTS


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("n", [16, 48])
def test_intervals_of_m_cover_the_peak_where_the_gain_has_one(n: int) -> None:
    covered = 0
    for seed in range(EXPERIMENTS):
        population = Peaked(np.random.default_rng([n, seed, 1]), n)
        found = recommendation(population.frame(refined(population)))
        assert found["measured"]
        covered += found["low"] <= population.top <= found["high"]
    assert all_cover(covered), covered / EXPERIMENTS


def control_of(rng: np.random.Generator, base: Array, own: Population, draws: int = 40) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Random interventions on the same questions, on a coarse grid, and the user's own frame on a fine one."""
    m = np.array([-20.0, -12, -6, -2, 0, 2, 6, 12, 20])
    means = [[values.mean(0) for values in Population(rng, len(base), 0.1 * rng.normal(), base).at(m)] for _ in range(draws)]
    keys = {"split": "train", "draw": np.repeat(np.arange(draws), len(m)), "multiplier": np.tile(m, draws)}
    values = {name: np.ravel([mean[k] for mean in means]) for k, name in enumerate(("preference", "utility"))}
    return own.frame(), pd.DataFrame({**keys, **values, "n": len(base), "n_undefined": 0})


@pytest.mark.slow
@pytest.mark.long
def test_one_more_random_intervention_is_beyond_chance_in_five_percent() -> None:
    said = []
    for seed in range(EXPERIMENTS):
        rng = np.random.default_rng([7, seed])
        base = rng.normal(size=(24, 2))
        found = chance.beyond_chance(chance.curves(*control_of(rng, base, Population(rng, 24, 0.1 * rng.normal(), base))))
        assert found is not None and found["draws"] == 40 and found["tests"]["gain"]["of"] == 41
        said.append(found["beyond"])
    low, high = stats.binom.interval(0.99, EXPERIMENTS, 2 / 41)  # ranks 1 and 2 of 41
    assert low <= sum(said) <= high


def test_a_strong_intervention_is_beyond_chance_and_a_weak_one_gets_no_recommendation() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(24, 2))
    frame, control = control_of(rng, base, Population(rng, 24, 0.5, base))
    strong = chance.beyond_chance(chance.curves(frame, control))
    assert (
        strong is not None
        and strong["beyond"]
        and strong["tests"]["gain"] | {"own": 0, "random": 0} == {**{"own": 0, "random": 0, "rank": 1, "of": 41, "p": 1 / 41}}
    )
    assert recommendation(frame, chance=strong)["multiplier"] == recommendation(frame)["solved"]
    frame, control = control_of(rng, base, Population(rng, 24, 0.03, base))
    weak = chance.beyond_chance(chance.curves(frame, control))
    found = recommendation(frame, chance=weak)
    assert weak is not None and not weak["beyond"] and found["solved"] > 0 and found["multiplier"] is None
    assert "not beyond chance: gain at equal drop ranks" in found["reason"]
    assert f"of 41 (p = {weak['tests']['gain']['p']:.2f})" in found["reason"]
    # behaviour of generated text decides too
    texts = pd.DataFrame({"draw": range(-1, 40), "multiplier": 4.0, "score": [0.4, *np.linspace(0, 1, 40)]})
    there = chance.curves(*control_of(rng, base, Population(rng, 24, 0.5, base)))
    dull = chance.beyond_chance(there, texts)
    assert dull is not None and not dull["beyond"] and "generated behaviour ranks" in dull["reason"]
    # of texts that all show it, the larger gain counts
    full = chance.beyond_chance(there, texts.assign(score=1.0))
    assert full is not None and full["beyond"] and full["tests"]["behaviour"]["rank"] == full["tests"]["gain"]["rank"] == 1
    faint = chance.curves(*control_of(rng, base, Population(rng, 24, 0.03, base)))
    also = chance.beyond_chance(faint, texts.assign(score=1.0))
    assert also is not None and also["tests"]["behaviour"]["rank"] == also["tests"]["gain"]["rank"] > 2
    few = chance.beyond_chance(chance.curves(*control_of(rng, base, Population(rng, 24, 0.5, base), draws=8)))
    assert few is not None and not few["beyond"] and "8 random ones are too few" in few["reason"]


def test_nothing_is_put_beside_a_control_of_other_questions() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(24, 2))
    frame, control = control_of(rng, base, Population(rng, 24, 0.5, base))
    assert chance.curves(frame, control.assign(split="test")) is None and chance.curves(frame, control.assign(n=25)) is None
    assert chance.curves(frame, None) is None and "not tested against chance" in recommendation(frame)["reason"]
    assert chance.curves(frame[frame["multiplier"] != 0], control) is None
    dosed = chance.curves(frame.assign(dose=frame["multiplier"].abs() / 40), control.assign(dose=control["multiplier"].abs() / 40))
    plain, by_dose = chance.beyond_chance(chance.curves(frame, control)), chance.beyond_chance(dosed)
    assert plain is not None and by_dose is not None and (plain["unit"], by_dose["unit"]) == ("m", "dose")
    assert by_dose["tests"]["slope"]["own"] == pytest.approx(40 * plain["tests"]["slope"]["own"])


def cells(rng: np.random.Generator, n: int, gains: dict[str, float]) -> dict[str, Population]:
    base = rng.normal(size=(n, 2))
    return {name: Population(rng, n, gain, base) for name, gain in gains.items()}


@pytest.mark.slow
@pytest.mark.long
def test_ties_are_called_ties_and_a_clear_winner_is_not() -> None:
    tied, won, shares = 0, 0, []
    for seed in range(EXPERIMENTS // 2):
        rng = np.random.default_rng([3, seed])
        same = choice({name: p.frame() for name, p in cells(rng, 32, {"a": GAIN, "b": GAIN, "c": GAIN}).items()})
        tied += bool(same["tied"].all())
        far = choice({name: p.frame() for name, p in cells(rng, 64, {"a": GAIN, "b": 0.5 * GAIN}).items()})
        won += not far["tied"].any() and far["share"]["a"] > 0.95
        shares.append(same["share"]["a"])
        assert same["share"].sum() == pytest.approx(1)
    assert tied >= 0.90 * EXPERIMENTS / 2 and won >= 0.90 * EXPERIMENTS / 2 and 0.2 < np.mean(shares) < 0.47


@pytest.mark.long
@pytest.mark.slow
def test_no_claim_holds_by_chance_more_often_than_in_five_percent() -> None:
    wrong, compared = 0, 0
    for seed in range(EXPERIMENTS):
        rng = np.random.default_rng([5, seed])
        # nothing has any effect: every claim about a slope, a peak or a lack of symmetry is false, all are about 0
        noise = {name: rng.normal(size=(2, 24, 1)) + 0.3 * rng.normal(size=(2, 24, 9)) for name in ("sft", "spilt")}
        table = claims.judge({name: claims.Case(name, "vector", (Questions.of(frame_of(*y, GRID[2:19:2])),)) for name, y in noise.items()})
        wrong += (table["verdict"] != claims.OPEN).any()
        if seed % 2:
            continue
        same = cells(rng, 24, {"sft": GAIN, "spilt": GAIN})
        table = claims.judge({name: claims.Case(name, "vector", (Questions.of(p.frame(GRID[2:19:2])),)) for name, p in same.items()})
        compared += (table.loc[table["than"].notna(), "verdict"] != claims.OPEN).any()
    assert wrong <= stats.binom.ppf(0.99, EXPERIMENTS, 0.05) and compared <= stats.binom.ppf(0.99, EXPERIMENTS // 2, 0.05)


@pytest.mark.slow
@pytest.mark.long
def test_methods_whose_fits_differ_by_chance_are_not_told_apart_and_by_one_fit_they_would_be() -> None:
    """Each fit (seed) of either method has an effect of its own; the methods have the same."""
    wrong = {1: 0, 3: 0}
    for seed in range(EXPERIMENTS // 2):
        rng = np.random.default_rng([11, seed])
        base, gains = rng.normal(size=(24, 2)), GAIN * (1 + 0.3 * rng.normal(size=(2, 3)))
        fits = [tuple(Questions.of(Population(rng, 24, gain, base).frame(GRID[2:19:2])) for gain in of) for of in gains]
        for n in wrong:
            table = claims.judge({name: claims.Case(name, "vector", of[:n]) for name, of in zip(("sft", "spilt"), fits, strict=True)})
            wrong[n] += (table.loc[table["than"].notna(), "verdict"] != claims.OPEN).any()
    most = stats.binom.ppf(0.99, EXPERIMENTS // 2, 0.05)
    assert wrong[3] <= most < wrong[1], wrong


def test_fits_that_agree_decide_and_their_spread_is_in_the_interval() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=(48, 2))
    gains = {"sft": (0.5, 0.51, 0.49), "spilt": (1.0, 1.02, 0.98)}
    fits = {name: tuple(Questions.of(Population(rng, 48, GAIN * gain, base).frame()) for gain in of) for name, of in gains.items()}
    told = claims.judge({name: claims.Case(name, "vector", of) for name, of in fits.items()})
    ahead = told[told["than"].notna()].iloc[0]
    assert (ahead["cell"], ahead["verdict"], ahead["fits"]) == ("spilt", claims.HOLDS, 3)
    wide = fits | {"spilt": tuple(Questions.of(Population(rng, 48, GAIN * gain, base).frame()) for gain in (0.7, 1.0, 1.3))}
    other = claims.judge({name: claims.Case(name, "vector", of) for name, of in wide.items()})
    assert other["high"][ahead.name] - other["low"][ahead.name] > 1.3 * (ahead["high"] - ahead["low"])


def test_claims_that_are_true_hold_and_random_ones_are_counted() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(64, 2))
    better = 2 * np.tanh(GRID / 6) - 0.3 * np.tanh(GRID / 6) ** 2, -((GRID / 20) ** 2)
    worse = 2 * np.tanh(GRID / 6), -8 * (GRID / 20) ** 2
    made = {}
    for name, (preference, utility) in {"sft": worse, "spilt": better}.items():
        spread = 1 + 0.2 * rng.normal(size=(2, 64, 1))
        made[name] = frame_of(base[:, :1] + spread[0] * preference, base[:, 1:] + 2 + spread[1] * utility, GRID)
    _, control = control_of(rng, base, Population(rng, 64, GAIN, base))
    case = {name: claims.Case(name, "vector", (Questions.of(frame),), chance.curves(frame, control)) for name, frame in made.items()}
    table = claims.judge(case)
    told = table[table["cell"] == "spilt"].set_index("claim")
    assert (told["verdict"] == claims.HOLDS).all() and len(told) == 5, told["verdict"]
    assert table.set_index(["claim", "cell"])["verdict"]["+m and −m are not mirror images", "sft"] == claims.FAILS
    rises, peaks = (told["random_pass"][[key for key in told.index if word in key][0]] for word in ("rises", "highest"))
    assert 10 < rises < 30 and peaks == 40  # half of the random ones rise, and all of them cost utility
    against = table[table["than"] == "sft"].iloc[0]
    assert against["low"] < against["estimate"] < against["high"] and against["to"] > against["from"]


def test_the_budget_is_met_between_the_points_and_measured_there() -> None:
    population = Population(np.random.default_rng(0), 64)
    star = solve(population.frame())
    assert star is not None and 6 < star < 8
    asked = next_multiplier(population.frame())
    assert asked == float(f"{star:.4g}")
    m = refined(population)
    assert asked in m and next_multiplier(population.frame(m)) is None and solve(population.frame(m)) in m
    assert next_multiplier(population.frame(), budget=100.0) is None and solve(population.frame(), budget=100.0) == 20
    assert "end of the sweep" in recommendation(population.frame(), budget=100.0)["reason"]


def test_a_sweep_that_ends_within_the_budget_goes_on() -> None:
    population = Population(np.random.default_rng(0), 64)
    near = [-4.0, -2.0, 0.0, 2.0, 4.0]  # the budget is met at about 7
    assert next_multiplier(population.frame(near)) is None and next_multiplier(population.frame(near), reach=5.0) is None
    m, asked = list(near), []
    while (more := next_multiplier(population.frame(m), reach=16.0)) is not None:
        asked.append(more)
        m.append(more)
    assert asked[:2] == [6.0, 9.0] and len(asked) <= 5 and solve(population.frame(m)) in m
    found = recommendation(population.frame(m))
    assert abs(found["chosen"]["utility_drop"] - BUDGET) <= NEAR and "end of the sweep" not in found["reason"]


def test_a_cheap_point_beyond_a_dear_one_is_not_on_the_way() -> None:
    m = np.array([-2.0, -1, 0, 1, 2, 3])
    utility = np.array([[0.0, 0, 0, -0.2, -2, -0.1]])
    frame = frame_of(np.array([[-9.0, -1, 0, 1, 2, 9]]), utility, m)
    assert solve(frame) == pytest.approx(1 + 0.3 / 1.8)  # not 3, whose drop is 0.1
    assert solve(frame.assign(preference=-frame["preference"])) == -2  # either sign of m


def test_a_gain_that_cannot_be_told_from_0_is_no_recommendation() -> None:
    rng = np.random.default_rng(4)
    frame = frame_of(0.02 * GRID + rng.normal(size=(12, 21)), 2 - (GRID / 10) ** 2 + 0.01 * rng.normal(size=(12, 21)), GRID)
    found = recommendation(frame)
    assert found["multiplier"] == 0 and found["solved"] != 0 and found["usable"] is None and "holds 0" in found["reason"]
    falls = recommendation(frame_of(np.tile(-np.abs(GRID), (12, 1)), np.tile(-np.abs(GRID), (12, 1)), GRID))
    assert falls["multiplier"] == 0 and "no multiplier raises preference" in falls["reason"]


def test_the_usable_range_is_where_the_gain_is_certain_and_the_drop_is_within_budget() -> None:
    population = Population(np.random.default_rng(1), 64)
    found = recommendation(population.frame(refined(population)))
    low, high = found["usable"]
    assert low == 0 and high == pytest.approx(found["solved"], rel=0.02)
    # a step: nothing is gained before m = 4
    late = population.frame().assign(preference=lambda f: np.where(f["multiplier"] > 4, 1.0, 0.0) + 0.01 * f["example"])
    assert recommendation(late)["usable"][0] == pytest.approx(4, abs=0.2)


# --- stored averages alone: one row per split and multiplier, no questions


def averages(split: str, m: list[float], preference: list[float], utility: list[float], undefined: int = 0) -> pd.DataFrame:
    frame = pd.DataFrame({"split": split, "multiplier": m, "preference": preference, "utility": utility, "n": 10, "n_undefined": undefined})
    return frame.assign(accuracy=0.5)


def test_chosen_on_train_and_reported_on_test() -> None:
    train = averages("train", [-1, 0, 1, 2], [0, 1, 2, 5], [4, 4, 3.6, 3.4])
    test = averages("test", [-1, 0, 1, 2], [0, 1, 1.5, 5], [4, 4, 3.2, 3.4])
    found = recommendation(pd.concat([train, test]), budget=0.5)
    assert found["multiplier"] == pytest.approx(1.5) and not found["measured"] and found["low"] is None and found["chosen"]["n"] == 10
    assert found["chosen"]["preference_gain"] == pytest.approx(2.5) and found["chosen"]["utility_drop"] == pytest.approx(0.5)
    assert found["reported_on"] == "test" and found["reported"]["preference_gain"] == pytest.approx(2.25)
    assert found["reported"]["utility_drop"] == pytest.approx(0.7)  # over the budget on test items, and said so
    assert recommendation(pd.concat([train, test]), budget=1.0)["multiplier"] == 2
    assert next_multiplier(train, 0.5) == 1.5 and recommendation(train, budget=0.0)["multiplier"] == 0


def test_one_held_out_question_says_nothing_of_a_gain() -> None:
    """It has no interval: what is reported is the training items', and of one question alone it is said that nobody knows."""
    people = Population(np.random.default_rng(1), 24), Population(np.random.default_rng(2), 1, gain=-0.5)
    train, against = people[0].frame(), people[1].frame(split="test")
    found, wanted = recommendation(pd.concat([train, against])), recommendation(train)
    assert found["reported_on"] is None and found["multiplier"] == wanted["multiplier"] > 0 and found["chosen"]["gain_low"] > 0
    few = Population(np.random.default_rng(1), 3)
    few.gain = np.array([[0.3], [-0.2], [0.05]])
    unsure = recommendation(pd.concat([few.frame(), Population(np.random.default_rng(2), 1).frame(split="test")]))
    assert unsure["multiplier"] == 0.0 and "no gain beyond chance" in unsure["reason"]
    alone = recommendation(Population(np.random.default_rng(3), 1).frame())
    assert alone["chosen"]["gain_low"] is None and "how sure that is is not known" in alone["reason"]


def test_without_a_base_or_with_undefined_utilities() -> None:
    assert recommendation(averages("train", [1, 2], [1, 2], [1, 1]))["multiplier"] is None
    most = averages("train", [0, 1, 2], [0, 1, 2], [1, 1, 1])
    most.loc[2, "n_undefined"] = 6
    found = recommendation(most)
    assert found["multiplier"] == 1 and found["left_out"] == [2.0]
    gone = recommendation(averages("train", [0, 1], [0, 1], [np.nan, 1]))
    assert gone["multiplier"] is None and "m = 0" in gone["reason"] and next_multiplier(averages("train", [1, 2], [1, 2], [1, 1])) is None


def test_a_side_that_was_measured_further_does_not_change_what_is_said_of_the_curve() -> None:
    """A sweep that went on for the recommendation: its claims are judged where both sides were measured."""
    rng = np.random.default_rng(4)
    base, spread = rng.normal(size=(48, 2)), 1 + 0.2 * rng.normal(size=(2, 48, 1))

    def told(m: Array) -> pd.DataFrame:
        frame = frame_of(base[:, :1] + spread[0] * 2 * np.tanh(m / 6), base[:, 1:] - spread[1] * (m / 20) ** 2, m)
        return claims.judge({"sft": claims.Case("sft", "vector", (Questions.of(frame),))})

    pd.testing.assert_frame_equal(told(GRID), told(np.append(GRID, [30.0, 45.0])))
    assert len(told(np.array([0.0, 1, 2, 4, 8]))) > 0, "one side alone is judged as it is"
