"""The paper's claims (design/analysis.md) on measured cells: holds, does not hold, undecided; and how many random interventions pass too.

A claim is a set of parts, functions of the mean curves that it says are > 0. It holds where all are: p = the largest one-sided p
(intersection-union test, Berger 1982); it does not where one is < 0: p = the smallest, times their number. Standard errors from the
paired bootstrap over questions, Student's t; Holm's correction over all claims and cells that are tested; 5%, two-sided.
Several fits of a cell (seeds): their mean curve is judged, with variance s^2_questions + sum s^2_fits / fits, degrees of freedom by
Welch (1947) and Satterthwaite. Of one fit alone a claim says nothing about other fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from spilt.analysis.chance import LEVEL, Curves
from spilt.analysis.curves.fitting import GOOD_R2
from spilt.analysis.questions import Array, Questions, on_shared

SMALL, NEAR_ZERO, OUTER = 0.25, 0.1, 0.75  # shares of the sweep's end: around 0; where a peak counts as at 0; the outer part
PLATEAU = 0.25  # of the slope around 0: an outer slope under it is a plateau
MIRROR = 0.05  # of the curve's range: |P(m) + P(-m) - 2 P(0)| under it at every m is a mirror image
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
COLUMNS = ["claim", "among", "cell", "than", "verdict", "estimate", "low", "high", "from", "to", "p", "fits", "random_pass", "random_draws"]
Parts = Callable[[Array, Array, Array], Array]
MeanCurves = tuple[Array, Array, Array]  # multipliers [m], preference and utility [draws, m]


class Case(NamedTuple):
    """One method and form: the questions of each of its fits (one split), its random ones, and per curve R^2 and held-out R^2."""

    method: str
    form: str
    fits: tuple[Questions, ...]
    random: Curves | None = None
    r2: tuple[tuple[float | None, float | None], ...] = ()


def _rising(m: Array, preference: Array, utility: Array) -> Array:
    return np.diff(preference[:, np.abs(m) <= SMALL * np.abs(m).max()], axis=1)


def _plateau(m: Array, preference: Array, utility: Array) -> Array:
    """PLATEAU * slope around 0 - |outer slope| > 0, either side; the outer part has two points at least."""
    end, parts = np.abs(m).max(), list[Array]()
    inner = np.abs(m) <= SMALL * end
    if inner.sum() < 2 or (m > 0).sum() < 2 or (m < 0).sum() < 2:
        return preference[:, :0]
    slope = _slope(m[inner], preference[:, inner])
    for outer in (m >= min(OUTER * end, m[-2]), m <= max(-OUTER * end, m[1])):
        parts += [PLATEAU * slope + sign * _slope(m[outer], preference[:, outer]) for sign in (1, -1)]
    return np.stack(parts, axis=1)


def _slope(m: Array, y: Array) -> Array:
    return np.asarray((y[:, -1] - y[:, 0]) / (m[-1] - m[0]))


def _peaks(m: Array, preference: Array, utility: Array) -> Array:
    far = np.abs(m) > NEAR_ZERO * np.abs(m).max()
    return np.asarray(utility[:, m == 0] - utility[:, far])


def _mirror(m: Array, preference: Array, utility: Array) -> Array:
    both = [x for x in m if x > 0 and -x in m]
    even = np.stack([preference[:, m == x] + preference[:, m == -x] - 2 * preference[:, m == 0] for x in both] or [preference[:, :0]])
    even = even[..., 0].T if both else even[0]
    margin = MIRROR * np.ptp(preference, axis=1, keepdims=True)
    return np.hstack([margin - even, margin + even])


# claim -> parts, and whether it is their negation that is claimed
CLAIMS: dict[str, tuple[Parts, bool]] = {
    f"preference rises with m around 0 (|m| up to {SMALL:.0%} of the sweep)": (_rising, False),
    f"further out it levels off (outer slopes under {PLATEAU:.0%} of that around 0)": (_plateau, False),
    f"utility is highest at m = 0 (beyond {NEAR_ZERO:.0%} of the sweep it is lower)": (_peaks, False),
    "+m and −m are not mirror images": (_mirror, True),
}
FITS = f"both fits reach R² {GOOD_R2:g}, also between the points fitted (held out)"
KEEPS = "at equal preference {} keeps more utility than {}"


def kept(m: Array, preference: Array, utility: Array, levels: Array) -> Array:
    """Largest utility change from m = 0 at any m with a preference gain of at least each level, or the largest gain [draws, level].

    levels: [level], or each draw's own [draws, level].
    """
    _, gain, change = _fine(m, preference, utility)
    reach = gain.max(axis=1)
    return np.stack([np.where(gain >= np.minimum(level, reach)[:, None], change, -np.inf).max(axis=1) for level in levels.T], axis=1)


def kept_at(m: Array, preference: Array, utility: Array, level: float) -> float:
    """At which m that is, of one level and one curve."""
    fine, gain, change = _fine(m, preference, utility)
    return float(fine[np.where(gain >= min(level, gain.max()), change, -np.inf)[0].argmax()])


def _fine(m: Array, preference: Array, utility: Array) -> MeanCurves:
    """Gain and change of utility from m = 0, piecewise linear on a finer grid."""
    zero = np.flatnonzero(m == 0)
    fine = np.union1d(np.linspace(m[0], m[-1], 101), m)
    right = np.clip(np.searchsorted(m, fine), 1, len(m) - 1)
    share = (fine - m[right - 1]) / (m[right] - m[right - 1])
    gain, change = (
        y[:, right - 1] * (1 - share) + y[:, right] * share for y in (preference - preference[:, zero], utility - utility[:, zero])
    )
    return fine, gain, change


def _kept(levels: Array, m: Array, preference: Array, utility: Array) -> Array:
    """Its mean over the levels [draws, 1]."""
    return np.asarray(kept(m, preference, utility, levels).mean(axis=1, keepdims=True))


def _ahead(one: MeanCurves, other: MeanCurves, levels: Array) -> Array:
    """Mean over the levels of the utility that one keeps more than the other [draws, 1]."""
    return _kept(levels, *one) - _kept(levels, *other)


def _curves(fits: Sequence[Questions], weights: Array | None = None) -> MeanCurves:
    """Mean over the fits, at the multipliers that are usable in each."""
    each = [_of_fit(questions, weights) for questions in fits]
    m = reduce(np.intersect1d, [own for own, _, _ in each])
    preference, utility = (np.mean([fit[k][:, np.isin(fit[0], m)] for fit in each], axis=0) for k in (1, 2))
    return m, preference, utility


def _both_sides(curves: MeanCurves) -> MeanCurves:
    """As far as both sides were measured: a sweep goes on along one of them for the recommendation alone."""
    m, preference, utility = curves
    inner = np.abs(m) <= (min(-m[0], m[-1]) if len(m) and m[0] < 0 < m[-1] else np.inf) * (1 + 1e-9)
    return m[inner], preference[:, inner], utility[:, inner]


def _of_fit(questions: Questions, weights: Array | None = None) -> MeanCurves:
    ok = questions.usable
    return questions.multipliers[ok], questions.mean("preference", weights)[:, ok], questions.mean("utility", weights)[:, ok]


def judged(questions: Questions, estimate: Array, drawn: Array, negated: bool, fits: Sequence[Array] = ()) -> dict[str, Any]:
    """Verdict before correction, of parts [part] and their resamples [draws, part]; the part shown is the one that decides.

    fits: the parts by each fit [fit, part], an array for each of the cells compared that have several.
    """
    spread, freedom = questions.spread(drawn), np.full(len(estimate), float(questions.freedom))
    if fits:
        variances = [(spread**2, questions.freedom), *((each.var(axis=0, ddof=1) / len(each), len(each) - 1) for each in fits)]
        total = sum(variance for variance, _ in variances)
        with np.errstate(divide="ignore", invalid="ignore"):
            welch = total**2 / sum(variance**2 / df for variance, df in variances)
        spread, freedom = np.sqrt(total), np.where(total > 0, welch, freedom)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(spread > 0, estimate / spread, np.sign(estimate) * np.inf)
    t = np.where(np.isnan(t), 0.0, t)
    above, below = special.stdtr(freedom, -t), special.stdtr(freedom, t)
    holds, fails = float(above.max()), float(min(1.0, len(t) * below.min()))
    weakest = int(t.argmin())
    low, high = questions.interval(drawn[:, weakest])
    if fits:
        low, high = estimate[weakest] + spread[weakest] * special.stdtrit(freedom[weakest], [0.025, 0.975])
    verdict = HOLDS if (holds < fails) != negated else FAILS
    sign = -1.0 if negated else 1.0
    low, high = sorted((sign * low, sign * high))
    return {
        "verdict": verdict,
        **{"estimate": sign * float(estimate[weakest]), "low": low, "high": high, "p": min(1.0, 2 * min(holds, fails))},
    }


def judge(cases: Mapping[str, Case], seed: int = 0) -> pd.DataFrame:
    """One row per claim and cell that can be judged (COLUMNS); `than`: the cell that it is compared with. p: after Holm's correction."""
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        case = case._replace(fits=on_shared(case.fits))
        if not _can_be_judged(case.fits):
            continue
        questions = case.fits[0]
        mean, drawn = _both_sides(_curves(case.fits)), _both_sides(_curves(case.fits, questions.resamples(seed)))
        for claim, (parts, negated) in CLAIMS.items():
            estimate = parts(*mean)[0] if len(mean[0]) > 2 else np.empty(0)
            if len(estimate):
                row = {"claim": claim, "among": case.form, "cell": name, "fits": len(case.fits)}
                row |= judged(questions, estimate, parts(*drawn), negated, _of_fits(parts, case.fits, mean[0]))
                rows.append(row | _random(case, partial(_passes, parts, negated)))
    rows += [_fits(name, case) for name, case in cases.items() if len(case.r2) and None not in [fit[0] for fit in case.r2]]
    pairs = [pair for pair in combinations(reversed(list(cases.items())), 2) if pair[0][1].form == pair[1][1].form]
    rows += filter(None, [keeps(a, one, b, other, seed) for (a, one), (b, other) in pairs])
    table = pd.DataFrame(rows, columns=COLUMNS)
    tested = table["p"].notna()
    table.loc[tested, "p"] = holm(table.loc[tested, "p"].to_numpy(float))
    table.loc[tested & ~(table["p"] <= LEVEL), "verdict"] = OPEN
    return table


def _passes(parts: Parts, negated: bool, m: Array, preference: Array, utility: Array) -> Array:
    found = parts(*_both_sides((m, preference, utility)))
    return np.asarray((found > 0).all(axis=1) != negated if found.shape[1] else np.full(len(found), np.nan))


def holm(p: Array) -> Array:
    """Adjusted p-values (Holm 1979)."""
    order = np.argsort(p)
    out = np.empty(len(p))
    out[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return out


def _random(case: Case, passes: Callable[[Array, Array, Array], Array]) -> dict[str, Any]:
    """How many random interventions' mean curves pass; where a curve cannot be judged it does not."""
    if case.random is None:
        return {}
    r = case.random
    with np.errstate(invalid="ignore"):
        passed = np.asarray(passes(r.multipliers, r.preference[1:], r.utility[1:]), dtype=float)
    passed = np.where(np.isfinite(r.preference[1:]).all(1), passed, 0.0)
    return {"random_pass": int(passed.sum()), "random_draws": len(passed)} if np.isfinite(passed).all() else {}


def _fits(name: str, case: Case) -> dict[str, Any]:
    own, other = zip(*case.r2, strict=True)
    good = all(r2 >= GOOD_R2 for r2 in own)
    sure = good and all(r2 is not None and r2 >= GOOD_R2 for r2 in other)
    return {"claim": FITS, "among": case.form, "cell": name, "verdict": HOLDS if sure else OPEN if good else FAILS, "estimate": min(own)}


def keeps(a: str, one: Case, b: str, other: Case, seed: int) -> dict[str, Any] | None:
    """Does `one` keep more utility than `other` at equal preference? Over the gains that both reach, on the questions of both."""
    both = on_shared((*one.fits, *other.fits))
    first, second = both[: len(one.fits)], both[len(one.fits) :]
    if not _can_be_judged(both):
        return None
    weights = both[0].resamples(seed)
    means = [_curves(fits) for fits in (first, second)]
    if min(len(m) for m, _, _ in means) < 3:
        return None
    tops = [float((p - p[:, m == 0]).max()) for m, p, _ in means]
    if min(tops) <= 0:
        return None
    levels = np.linspace(0, min(tops), 21)
    drawn = _ahead(_curves(first, weights), _curves(second, weights), levels)
    base = float(means[0][1][0, means[0][0] == 0][0])
    row = {"claim": KEEPS.format(one.method, other.method), "among": one.form, "cell": a, "than": b, "from": base, "to": base + min(tops)}
    spreads = [each for fits, mean in zip((first, second), means, strict=True) for each in _of_fits(partial(_kept, levels), fits, mean[0])]
    row |= {"fits": min(len(first), len(second))} | judged(both[0], _ahead(means[0], means[1], levels)[0], drawn, False, spreads)

    def passes(m: Array, preference: Array, utility: Array) -> Array:
        """Random ones in the place of `one`, over what each of them and `other` reach; those that reach nothing do not pass."""
        rival = _curves([questions.first(one.random.questions if one.random else 0) for questions in other.fits])
        top = np.minimum((preference - preference[:, m == 0]).max(axis=1), float((rival[1] - rival[1][:, rival[0] == 0]).max()))
        there = np.isfinite(preference).all(axis=1) & np.isfinite(utility).all(axis=1) & (top > 0)
        levels = np.linspace(0, np.where(there, top, 0.0), 21, axis=-1)
        return np.asarray(there & (_ahead((m, preference, utility), rival, levels)[:, 0] > 0))

    return row | _random(one, passes)


def _can_be_judged(fits: Sequence[Questions]) -> bool:
    return fits[0].freedom >= 1 and all(questions.zero >= 0 and questions.usable[questions.zero] for questions in fits)


def _of_fits(parts: Parts, fits: Sequence[Questions], m: Array) -> list[Array]:
    """[[fit, part]] of several fits at these multipliers; of one alone nothing is known."""
    each = [_of_fit(questions) for questions in fits]
    return [np.stack([parts(m, *(y[:, np.isin(own, m)] for y in curves))[0] for own, *curves in each])] if len(fits) > 1 else []
