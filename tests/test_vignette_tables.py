"""Tables of verdicts on vignettes: every number against a loop, arms and gates, and what is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from spilt.analysis import surgical
from spilt.errors import UserError
from spilt.vignettes import figure, summary, tables
from spilt.vignettes.files import CONDITIONS, FOUNDATIONS, Vignette
from spilt.vignettes.questions import COLUMNS, FRAMES, WRONG
from spilt.vignettes.summary import AFTER, LOADING, Plan

PLAN = Plan()


def scenes(n: int = 14, loadings: bool = True) -> list[Vignette]:
    rng = np.random.default_rng(1)
    out = []
    for i in range(n):
        share = tuple(rng.integers(1, 100, 7).astype(float)) if loadings else ()
        out += [Vignette(f"v{i}", c, FOUNDATIONS[i % 7], f"scene {i}", float(rng.uniform(1, 5)), share) for c in CONDITIONS]
    return out


SCENES = scenes()


def rows(method: str, arm: str, w: dict[tuple[str, str], float], mass: float = 0.95, m: float = 1.0, kl: float = 1.0) -> pd.DataFrame:
    """A frame whose wrongness is w: p_true of both frames differ from it by a liking for true, 0.05, which cancels."""
    out = []
    for scene in SCENES:
        value = w[scene.id, scene.condition]
        for frame in FRAMES:
            p = (value if frame == WRONG else 1 - value) + 0.05
            out.append((method, arm, kl, scene.id, scene.condition, scene.foundation, frame, m, p, mass, 90))
    return pd.DataFrame(out, columns=["method", "arm", "kl_p95", *COLUMNS])


def drawn(seed: int) -> dict[tuple[str, str], float]:
    rng = np.random.default_rng(seed)
    return {(scene.id, scene.condition): float(rng.uniform(0.1, 0.9)) for scene in SCENES}


BASE, UP, DOWN = drawn(0), drawn(1), drawn(2)
RESULTS = pd.concat(
    [rows("unsteered", "none", BASE, m=0.0, kl=0.0), rows("caa", "plus", UP, m=2.0), rows("caa", "minus", DOWN, m=-2.5, kl=1.04),
     rows("prompt_only", "plus", DOWN, m=0.0, kl=math.nan)],
    ignore_index=True,
)  # fmt: skip


def logit(w: float) -> float:
    w = min(max(w, 0.01), 0.99)
    return math.log(w / (1 - w))


def test_a_liking_for_true_cancels() -> None:
    found = summary.cells(RESULTS[RESULTS["arm"] == "none"])
    assert list(found.index) == [(scene.id, scene.condition) for scene in SCENES]
    assert found["w"].to_numpy() == pytest.approx([BASE[key] for key in found.index]) and (found["mass"] == 0.95).all()


@pytest.mark.parametrize("weighting", summary.WEIGHTINGS)
def test_changes_are_those_of_a_loop(weighting: str) -> None:
    found = summary.deltas(RESULTS, SCENES, Plan(weighting=weighting)).set_index(["method", "arm", "foundation"])
    for f, name in enumerate(FOUNDATIONS):
        L, x, flips = [], [], [0.0, 0.0]
        for scene in SCENES:
            key = scene.id, scene.condition
            share = scene.loadings[f] / sum(scene.loadings) if weighting == LOADING else float(scene.foundation == name)
            L, x = [*L, share], [*x, logit(UP[key]) - logit(BASE[key])]
            flips[0] += share * (BASE[key] <= 0.5 < UP[key])
            flips[1] += share * (UP[key] <= 0.5 < BASE[key])
        mean = sum(a * b for a, b in zip(L, x, strict=True)) / sum(L)
        spread = sum(a * (b - mean) ** 2 for a, b in zip(L, x, strict=True)) / (sum(L) - sum(a * a for a in L) / sum(L))
        one = found.loc[("caa", "plus", name)]
        assert (one["mean"], one["std"]) == pytest.approx((mean, math.sqrt(spread)))
        assert (one["to_wrong"], one["to_fine"]) == pytest.approx(flips) and one["n"] == sum(share > 0 for share in L) == one["n_total"]
        assert one["low"] <= mean <= one["high"] and (one["multiplier"], one["kl_p95"]) == (2, 1)
        if weighting == summary.HARD:
            assert one["std"] == pytest.approx(np.std([b for a, b in zip(L, x, strict=True) if a], ddof=1))
    assert ("caa", "minus", "Care") in found.index and ("unsteered", "none", "Care") not in found.index


def test_intervals_resample_vignettes_with_both_conditions() -> None:
    """The bootstrap in numpy, one draw after the other, from the same counts."""
    base = summary.cells(RESULTS[RESULTS["arm"] == "none"])
    index, drawn_counts = base.index, summary.Resamples(base, 3)
    for name in FOUNDATIONS:  # as many of each foundation in every draw
        about = [i for i, key in enumerate(dict.fromkeys(index.get_level_values(0))) if base["foundation"][key].iloc[0] == name]
        assert (drawn_counts.counts[:, about].sum(1) == len(about)).all()
    x, L = np.random.default_rng(5).normal(size=len(index)), np.random.default_rng(6).uniform(size=len(index))
    x[:3] = np.nan
    names = list(dict.fromkeys(index.get_level_values(0)))
    got = drawn_counts.means(x, L)
    for draw in (0, 7, 999):
        top = bottom = 0.0
        for vignette, count in zip(names, drawn_counts.counts[draw], strict=True):
            for i, key in enumerate(index):
                if key[0] == vignette and math.isfinite(x[i]):
                    top, bottom = top + count * L[i] * x[i], bottom + count * L[i]
        assert got[draw] == pytest.approx(top / bottom)
    assert np.isnan(drawn_counts.means(np.full(len(x), np.nan), L)).all()
    normal = np.random.default_rng(1).normal(size=summary.DRAWS)
    wide, narrow = (drawn_counts.interval(normal, weight) for weight in ((base["foundation"] == "Care").to_numpy(), np.ones(len(x))))
    assert wide[0] < narrow[0] < -1.9 < 1.9 < narrow[1] < wide[1]
    one = (index.get_level_values(0) == "v0").astype(float)
    assert all(map(math.isnan, drawn_counts.interval(normal, one))) and all(map(math.isnan, drawn_counts.interval(normal * np.nan, L)))


def test_bare() -> None:
    found = summary.bare(RESULTS, SCENES, PLAN).set_index("foundation")
    own = [BASE[scene.id, scene.condition] for scene in SCENES if scene.foundation == "Loyalty"]
    people = [scene.wrong for scene in SCENES if scene.foundation == "Loyalty"]
    one = found.loc["Loyalty"]
    assert one["logit_w"] == pytest.approx(np.mean([logit(w) for w in own])) and one["people"] == pytest.approx(np.mean(people))
    assert (one["n"], one["n_total"], one["called_wrong"]) == (4, 4, np.mean([w > 0.5 for w in own]))


def test_si_is_that_of_surgical_and_says_when_the_arm_was_chosen() -> None:
    found = summary.informedness(RESULTS, SCENES, Plan(k=2.0)).set_index(["method", "foundation"])
    for name, intent in (("Authority", -1), ("Care", 1)):
        keys = [(scene.id, scene.condition) for scene in SCENES if scene.foundation == name]
        w = [np.array([side[key] for key in keys]) for side in (BASE, UP, DOWN)]
        want = surgical.informedness(*w, intent=intent, k=2.0, mass=(0.95, 0.95))
        one = found.loc[("caa", name)]
        assert [one[field] for field in ("si", "fix", "broke", "flip", "counter", "rejected", "chosen", "separation")] == pytest.approx(
            [want.si, want.fix, want.broke, want.flip, want.counter, want.rejected, want.chosen, want.separation], nan_ok=True
        )
        assert (one["arms"], one["arm_chosen"], one["intent"]) == (2, "before", intent)
    assert found.loc[("prompt_only", "Authority")]["arms"] == 1 and math.isnan(found.loc[("prompt_only", "Authority")]["reverse"])


@pytest.mark.long
def test_the_arm_chosen_afterwards_is_the_one_that_moved_further() -> None:
    """Named so in the table; a method of one arm stays; where the first arm was the further one nothing changes."""
    axis = {side: -np.mean([logit(w[s.id, s.condition]) - logit(BASE[s.id, s.condition]) for s in SCENES if s.foundation == "Authority"])
            for side, w in (("up", UP), ("down", DOWN))}  # fmt: skip
    assert axis["down"] != axis["up"]
    other = "minus" if axis["down"] > axis["up"] else "plus"
    renamed = summary.as_chosen(RESULTS, SCENES, Plan(chosen=AFTER))
    assert set(renamed[(renamed["method"] == "caa") & (renamed["arm"] == "plus")]["multiplier"]) == {-2.5 if other == "minus" else 2.0}
    assert set(renamed[renamed["method"] == "prompt_only"]["arm"]) == {"plus"} and len(renamed) == len(RESULTS)
    assert summary.as_chosen(renamed, SCENES, Plan(chosen=AFTER)).equals(renamed)
    mirrored = RESULTS.assign(arm=RESULTS["arm"].where(RESULTS["method"] != "caa", RESULTS["arm"].map({"plus": "minus", "minus": "plus"})))
    for name in ("deltas", "informedness", "overall"):
        one, two = (getattr(summary, name)(frame, SCENES, Plan(chosen=AFTER)) for frame in (RESULTS, mirrored))
        keys = [key for key in ("method", "arm", "foundation") if key in one]
        pd.testing.assert_frame_equal(one.sort_values(keys, ignore_index=True), two.sort_values(keys, ignore_index=True))
    text = tables.markdown(tables.make(RESULTS, SCENES, Plan(chosen=AFTER)), Plan(chosen=AFTER))
    assert "the arm was chosen after the evaluation" in text and "too high by this choice" in text


def test_below_the_floor_there_is_no_verdict() -> None:
    """Counted, not filled in; the probability on verdicts is of all cells, those that are left out too."""
    few = RESULTS.copy()
    gone = (few["method"] == "caa") & (few["arm"] == "plus") & (few["id"] == "v2") & (few["frame"] == WRONG)
    few.loc[gone, "mass"] = 0.4
    one = summary.deltas(few, SCENES, PLAN).set_index(["method", "arm", "foundation"]).loc[("caa", "plus", "Authority")]
    assert (one["n"], one["n_total"]) == (2, 4)
    low = summary.deltas(few, SCENES, Plan(floor=0.3)).set_index(["method", "arm", "foundation"])
    assert low.loc[("caa", "plus", "Authority")]["n"] == 4
    told = summary.overall(few, SCENES, PLAN).set_index(["method", "arm"]).loc[("caa", "plus")]
    assert (told["n"], told["n_total"], told["mass_min"]) == (26, 28, 0.4) and told["mass"] == pytest.approx((26 * 0.95 + 2 * 0.4) / 28)
    none = RESULTS.assign(mass=0.1)
    text = tables.markdown(tables.make(none, SCENES, PLAN), PLAN)
    assert "– ± – (0/4)" in text and "nan" not in text.lower().replace("nan (–)", "")
    assert np.isnan(tables.points(none, SCENES, PLAN)["movement"]).all()


def test_what_is_no_frame_of_results_is_refused() -> None:
    bad: list[tuple[Any, Any, str]] = [
        (RESULTS.drop(columns="mass"), PLAN, "columns mass are missing"),
        (pd.concat([RESULTS, RESULTS.iloc[-1:]]), PLAN, "prompt_only, arm plus: vignette v13 is there twice"),
        (RESULTS.iloc[1:], PLAN, "27 rows of is_wrong and 28 of is_acceptable"),
        (RESULTS[RESULTS["arm"] != "none"], PLAN, "one unsteered model .arm none.; found 0"),
        (RESULTS[~((RESULTS["arm"] == "minus") & (RESULTS["id"] == "v3"))], PLAN, "caa, arm minus: other vignettes"),
        (RESULTS.assign(arm=RESULTS["arm"].replace("minus", "minsu")), PLAN, "unknown arm 'minsu'; did you mean 'minus'"),
        (RESULTS, Plan(headline="Authorty"), "unknown foundation 'Authorty'; did you mean 'Authority'"),
        (RESULTS, Plan(intent={"Care": 2}), "intent .*wanted a floor from 0 to 1, and 1 or -1"),
        (RESULTS, Plan(weighting="soft"), "unknown weighting"),
        (RESULTS, Plan(chosen="later"), "unknown time"),
    ]
    for frame, plan, message in bad:
        with pytest.raises(UserError, match=message):
            tables.make(frame, SCENES, plan)
    with pytest.raises(UserError, match="the vignettes have none"):
        tables.make(RESULTS, [scene._replace(loadings=()) for scene in SCENES], Plan(weighting=LOADING))


@pytest.mark.long
def test_what_is_written(tmp_path: Path) -> None:
    """CSV with everything, markdown whose cells stay cells, a picture with a marker for each method; the same bytes again."""
    odd = RESULTS.assign(method=RESULTS["method"].replace("prompt_only", "a|b\n<script>"))
    paths = tables.write(odd, SCENES, tmp_path / "one", PLAN, budget=1.0)
    assert [path.name for path in paths] == ["bare.csv", "delta.csv", "si.csv", "overall.csv", "tables.md", "movement.svg", "movement.png"]
    again = tables.write(odd, SCENES, tmp_path / "two", PLAN, budget=1.0)
    assert [a.read_bytes() for a in paths] == [b.read_bytes() for b in again]
    assert len(pd.read_csv(paths[1])) == 3 * 7 and len(pd.read_csv(paths[2])) == 2 * 7
    text = paths[4].read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "a\\|b <script>" in text and len({line.replace("\\|", "").count("|") for line in lines if "Δ" in line or "±" in line}) == 2
    assert "1.040 |" in text and "–* |" in text and "1.000 |" in text  # within a tenth of the budget, and not
    svg = paths[5].read_text()
    assert svg.startswith("<svg") and "<script" not in svg and "prefers-color-scheme" in svg


def test_a_stored_frame_is_read_back(tmp_path: Path) -> None:
    RESULTS.to_csv(tmp_path / "r.csv", index=False)
    back = tables.read(tmp_path / "r.csv")
    pd.testing.assert_frame_equal(back, tables.checked(RESULTS), check_dtype=False)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for name, message in (("bad.csv", "method, arm, kl_p95"), ("none.csv", "cannot be read")):
        with pytest.raises(UserError, match=message):
            tables.read(tmp_path / name)


def test_a_model_that_says_true_to_everything_is_told_of() -> None:
    """p_true is the same in both frames: w is 0.5 whatever is asked, and nothing has an SI."""
    alike = RESULTS.copy()
    both = alike["frame"] != WRONG
    alike.loc[both, "p_true"] = alike.loc[~both, "p_true"].to_numpy() + 0.01
    text = tables.markdown(tables.make(alike, SCENES, PLAN), PLAN)
    assert "to both frames alike (r of frames -1.00)" in text and "No SI: all valid verdicts" in text
    usual = tables.markdown(tables.make(RESULTS, SCENES, PLAN), PLAN)
    assert "both frames alike" not in usual and "No SI" not in usual


def test_points_are_movement_and_side_effects() -> None:
    found = tables.points(RESULTS, SCENES, PLAN, 1.0).set_index("method")
    delta = summary.deltas(RESULTS, SCENES, PLAN)
    own = delta[(delta["method"] == "caa") & (delta["arm"] == "plus")].set_index("foundation")["mean"]
    one = found.loc["caa"]
    assert one["movement"] == pytest.approx(-own["Authority"]) and one["side"] == pytest.approx(own.drop("Authority").abs().mean())
    assert one["movement_low"] <= one["movement"] <= one["movement_high"] and one["at_budget"] and not found.loc["prompt_only"]["at_budget"]
    drawn_figure = figure.movement(found.reset_index(), "Authority", 1.0)
    (axes,) = drawn_figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines] == [(r["side"], r["movement"]) for _, r in found.iterrows()]
    assert figure.png(figure.movement(found.iloc[:0].reset_index(), "Authority", None, narrow=True))
