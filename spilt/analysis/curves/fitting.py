"""Log-odds against multiplier: the paper's curve models and their fit (design/analysis.md "Curves"). numpy and scipy only.

Everything here is in the caller's units: m dimensionless, log-odds in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Array = npt.NDArray[np.float64]
Kind = Literal["preference", "utility"]

LINEAR = {"preference": ("alpha", "beta", "b"), "utility": ("beta_u", "b_u")}
DECAY = ("m_plus", "L_plus", "p_plus", "m_minus", "L_minus", "p_minus")
# scaled units (m / max|m|). L and p are searched on a log scale, they span decades
LOWER = np.array([0.0, np.log(1e-4), np.log(0.01), -1.0, np.log(1e-4), np.log(0.01)])
UPPER = np.array([1.0, np.log(1e3), np.log(20.0), 0.0, np.log(1e3), np.log(20.0)])
STARTS = 24
AGREE, ALIKE = 6, 1e-4  # ours: so many starts that end within that of the least loss (y has variance 1: of R^2), and no more are made
FEW_POINTS = 12
GOOD_R2 = 0.95
RIDGE = 1e-9  # keeps alpha, beta and b finite where D is so flat that they trade off against each other


@dataclass(frozen=True)
class Warned:
    """A named reason not to trust a fit as it is."""

    name: str
    text: str


@dataclass(frozen=True)
class CurveFit:
    """One fitted curve. `parameters` is None when no fit was made; the warnings then say why.

    r2 = 1 - SSres/SStot on the fitted points; r2_held_out: fitted on every second multiplier, scored on the others.
    gap: |D(0+) - D(0-)|. bound_hits: parameters that ended on a bound of the search. evaluations: of the objective, all starts.
    """

    kind: Kind
    parameters: dict[str, float] | None
    r2: float | None
    r2_held_out: float | None
    n_points: int
    gap: float | None = None
    bound_hits: tuple[str, ...] = ()
    warnings: tuple[Warned, ...] = ()
    evaluations: int = 0
    starts_agreeing: int = 0
    extent: tuple[float, float] = field(default=(0.0, 0.0))  # smallest and largest multiplier fitted

    def __call__(self, multiplier: npt.ArrayLike) -> Array:
        if self.parameters is None:
            raise ValueError(f"no {self.kind} fit: {'; '.join(w.text for w in self.warnings)}")
        return evaluate(self.kind, multiplier, self.parameters)

    def as_dict(self) -> dict[str, Any]:
        out = asdict(self)
        return {**out, "bound_hits": list(self.bound_hits), "extent": list(self.extent), "warnings": [asdict(w) for w in self.warnings]}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> CurveFit:
        warned = tuple(Warned(**w) for w in stored["warnings"])
        rest = {key: stored[key] for key in CurveFit.__dataclass_fields__ if key in stored}
        return CurveFit(**{**rest, "warnings": warned, "bound_hits": tuple(stored["bound_hits"]), "extent": tuple(stored["extent"])})


def validity_decay(multiplier: npt.ArrayLike, parameters: Mapping[str, float]) -> Array:
    """D(m) = (1 + (m - m_s)^2 / L_s)^(-p_s), s = + for m >= 0 and - for m < 0."""
    m = np.asarray(multiplier, dtype=float)
    sides = [np.exp(-parameters[f"p_{s}"] * np.log1p((m - parameters[f"m_{s}"]) ** 2 / parameters[f"L_{s}"])) for s in ("plus", "minus")]
    return np.asarray(np.where(m >= 0, *sides))


def evaluate(kind: Kind, multiplier: npt.ArrayLike, parameters: Mapping[str, float]) -> Array:
    """preference(m) = (alpha m + beta) D(m) + b; utility(m) = beta_u D(m) + b_u. In nats."""
    decay = validity_decay(multiplier, parameters)
    if kind == "utility":
        return np.asarray(parameters["beta_u"] * decay + parameters["b_u"])
    return np.asarray((parameters["alpha"] * np.asarray(multiplier, dtype=float) + parameters["beta"]) * decay + parameters["b"])


def r_squared(measured: npt.ArrayLike, predicted: npt.ArrayLike) -> float | None:
    """1 - SSres/SStot; None when nothing varies."""
    y, f = np.asarray(measured, dtype=float), np.asarray(predicted, dtype=float)
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    return float(1 - ((y - f) ** 2).sum() / total) if total > 0 else None


def warned_of(fit: CurveFit, name: str) -> bool:
    return any(w.name == name for w in fit.warnings)


def fit_curve(multiplier: npt.ArrayLike, value: npt.ArrayLike, kind: Kind, seed: int = 0, starts: int = STARTS) -> CurveFit:
    """CurveFit one averaged curve: multiplier [n], value [n] in nats. Same seed, same result. Never raises on bad points: it warns."""
    m, y = np.asarray(multiplier, dtype=float), np.asarray(value, dtype=float)
    warned: list[Warned] = []
    good = np.isfinite(m) & np.isfinite(y)
    if not good.all():
        left_out = ", ".join(f"{x:g}" for x in m[~good])
        warned.append(Warned("non_finite", f"{int((~good).sum())} of {len(m)} points are not finite and left out (m = {left_out})"))
    order = np.argsort(m[good], kind="stable")
    m, y = m[good][order], y[good][order]
    n, wanted = len(m), len(LINEAR[kind]) + len(DECAY) + 2
    extent = (float(m[0]), float(m[-1])) if n else (0.0, 0.0)

    def without(name: str, text: str) -> CurveFit:
        return CurveFit(kind, None, None, None, n, warnings=(*warned, Warned(name, text)), extent=extent)

    if len(np.unique(m)) < wanted:
        return without(
            "too_few_points", f"{len(np.unique(m))} multipliers; the {kind} curve needs {wanted} at least, 21 are better: not fitted"
        )
    if np.ptp(y) <= 1e-9 * max(1.0, np.abs(y).max()):
        return without("constant", f"all {n} points have the same value {y[0]:.6g}: nothing to fit")
    if n < FEW_POINTS:
        warned.append(Warned("few_points", f"{n} points for {wanted - 2} parameters: R^2 says little below {FEW_POINTS} points"))
    few = [sign for sign, count in (("m > 0", (m > 0).sum()), ("m < 0", (m < 0).sum())) if count < 4]
    if few:
        warned.append(Warned("one_sided", f"fewer than 4 points at {' and '.join(few)}: the decay there is not determined"))

    best = _search(m, y, kind, seed, starts)
    predicted = evaluate(kind, m, best.parameters)
    r2 = r_squared(y, predicted)
    held_out = None
    if n // 2 + n % 2 >= wanted - 2 and len(np.unique(m[::2])) >= wanted - 2 and np.ptp(y[::2]) > 0:
        half = _search(m[::2], y[::2], kind, seed, -(-starts // 3))  # a check: it finds the same where there is a curve
        held_out = r_squared(y[1::2], evaluate(kind, m[1::2], half.parameters))
    else:
        warned.append(Warned("no_held_out", f"{n} points are too few to fit every second one and score the others"))
    if _spikes(y, evaluate(kind, _between(m), best.parameters)):
        warned.append(Warned("spike", "the curve leaves the points between two of them: no peak or region is read from it"))
    if r2 is not None and r2 < GOOD_R2:
        warned.append(Warned("low_r2", f"R^2 {r2:.3f} is below {GOOD_R2}: read the points, not the line"))
    elif held_out is not None and held_out < GOOD_R2:
        warned.append(
            Warned("low_held_out_r2", f"held-out R^2 {held_out:.3f} is below {GOOD_R2}: the line between the points is not supported")
        )
    return CurveFit(kind, best.parameters, r2, held_out, n, best.gap, best.hits, tuple(warned), best.evaluations, best.agreeing, extent)


def checked(fit: CurveFit, multiplier: npt.ArrayLike, value: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> CurveFit:
    """The fit, with a warning where it misses the value at m = 0 by more than that value's interval, or has no peak (beta_u < 0)."""
    m, y, least, most = (np.asarray(x, dtype=float) for x in (multiplier, value, low, high))
    warned = []
    if fit.parameters is not None and (m == 0).any():
        at, base = float(fit(0.0)), int(np.argmax(m == 0))
        if at < least[base] or at > most[base]:
            warned.append(Warned("misses_zero", f"it gives {at:.3g} at m = 0, where {y[base]:.3g} was measured, beyond its interval"))
    if fit.kind == "utility" and fit.parameters is not None and fit.parameters["beta_u"] <= 0:
        warned.append(Warned("upside_down", "its level is not above 0: the curve is a trough, not a peak"))
    return replace(fit, warnings=(*fit.warnings, *warned))


def _between(m: Array) -> Array:
    """A fine grid over each interval of neighbouring multipliers, its ends included [n - 1, 65]."""
    return np.linspace(m[:-1], m[1:], 65, axis=1)


def _spikes(y: Array, dense: Array) -> bool:
    """Whether a curve, on that grid, goes further than a quarter of the points' range beyond its own values at two neighbours."""
    ends = dense[:, [0, -1]]
    beyond = np.maximum(dense.max(1) - ends.max(1), ends.min(1) - dense.min(1))
    return bool(beyond.max() > np.ptp(y) / 4 or max(dense.max() - y.max(), y.min() - dense.min()) > np.ptp(y) / 4)


@dataclass(frozen=True)
class _Best:
    parameters: dict[str, float]
    gap: float
    hits: tuple[str, ...]
    evaluations: int
    agreeing: int


def _search(m: Array, y: Array, kind: Kind, seed: int, starts: int) -> _Best:
    """SLSQP from up to `starts` seeded points over D's six parameters; the linear ones are solved for each D (Golub & Pereyra 1973).

    Solving them inside leaves the same minimum as a search over all 8 or 9, and far fewer ways to miss it. The best minimum
    whose curve stays with the points is kept (ours: a decay narrower than their distance fits a single one, by a spike beside it);
    the best of all where none does.
    """
    scale, mean, std = float(np.abs(m).max()), float(y.mean()), float(y.std())
    problem = _Problem(m / scale, (y - mean) / std, kind == "preference")
    rng = np.random.default_rng(seed)
    # L between a tenth and three times the sweep's width, squared; p around 1
    low, high = np.log([0.01, 0.1]), np.log([10.0, 10.0])
    draws = rng.uniform([0, *low, -1, *low], [1, *high, 0, *high], (starts, 6))
    draws[: starts // 3, [0, 3]] *= 0.1  # a third of the starts decay from near 0, the paper's usual shape
    found: list[tuple[float, Array]] = []
    for start in draws[np.argsort(np.arange(starts) * 3 % starts, kind="stable")]:  # both kinds from the first on
        least = min((value for value, _ in found), default=np.inf)
        if sum(value - least < ALIKE for value, _ in found) >= AGREE:
            break
        with np.errstate(all="ignore"):
            result = minimize(
                problem.loss,
                start,
                jac=True,
                method="SLSQP",
                bounds=list(zip(LOWER, UPPER, strict=True)),
                constraints={"type": "eq", "fun": problem.gap, "jac": problem.gap_gradient},
                options={"maxiter": 200, "ftol": 1e-10},
            )
        if np.isfinite(result.x).all():
            found.append(problem.repaired(np.clip(result.x, LOWER, UPPER)))
    found.sort(key=lambda pair: pair[0])
    between = _between(m / scale)
    grid = _Problem(between.reshape(-1), problem.y, problem.sloped)

    def calm(theta: Array) -> bool:
        return not _spikes(problem.y, grid.curve(theta, problem.solve(problem.decay(theta)[0])[1]).reshape(between.shape))

    value, theta = next((pair for pair in found if calm(pair[1])), found[0])
    linear = problem.solve(problem.decay(theta)[0])[1]
    decay = dict(zip(DECAY, (theta[0], np.exp(theta[1]), np.exp(theta[2]), theta[3], np.exp(theta[4]), np.exp(theta[5])), strict=True))
    at_bound = np.minimum(theta - LOWER, UPPER - theta) < 1e-6
    # back to the caller's units: m scale, L scale^2, and the z-score undone
    units = {"m": scale, "L": scale**2, "p": 1.0}
    parameters = {name: float(v * units[name[0]]) + 0.0 for name, v in decay.items()}  # -0.0 is 0.0
    if kind == "preference":
        own = {"alpha": std * linear[0] / scale, "beta": std * linear[1], "b": std * linear[2] + mean}
    else:
        own = {"beta_u": std * linear[0], "b_u": std * linear[1] + mean}
    sides = [validity_decay(x, parameters) for x in (0.0, -1e-300)]
    return _Best(
        parameters={**{name: float(v) for name, v in own.items()}, **parameters},
        gap=float(abs(sides[0] - sides[1])),
        hits=tuple(name for name, hit in zip(DECAY, at_bound, strict=True) if hit),
        evaluations=problem.evaluations,
        agreeing=sum(other - value < 1e-3 for other, _ in found),
    )


class _Problem:
    """The scaled least-squares problem: x in [-1, 1], y with mean 0 and variance 1, so that the loss is 1 - R^2."""

    def __init__(self, x: Array, y: Array, sloped: bool) -> None:
        self.x, self.y, self.sloped = x, y, sloped
        self.minus = (x < 0).astype(int)  # 1 where it is the - side's
        self.sides = np.stack([1.0 - self.minus, self.minus], axis=1)
        self.evaluations = 0

    def decay(self, theta: Array) -> tuple[Array, Array]:
        """D [n] and dD by (m, log L, log p) of each point's own side [3, n]; theta = those of + and of -."""
        of_both = np.array([[theta[0], theta[3]], np.exp(theta[[1, 4]]), np.exp(theta[[2, 5]])])
        centre, length, power = of_both[:, self.minus]
        u = self.x - centre
        q = u * u / length
        t = np.log1p(q)
        d = np.exp(-power * t)
        falls = d * power / (1 + q)
        return d, np.array([falls * 2 * u / length, falls * q, -d * power * t])

    def solve(self, d: Array) -> tuple[Array, Array, float]:
        """Residual [n], linear parameters, and loss of the best curve with this D."""
        rows: Array = np.array([self.x * d, d, np.ones_like(d)] if self.sloped else [d, np.ones_like(d)])
        n = len(self.y)
        linear = np.linalg.solve(rows @ rows.T + n * RIDGE * np.eye(len(rows)), rows @ self.y)
        residual: Array = np.asarray(linear @ rows - self.y)
        return residual, np.asarray(linear), float(residual @ residual / n + RIDGE * linear @ linear)

    def curve(self, theta: Array, linear: Array) -> Array:
        """The curve at x, in scaled units."""
        d = self.decay(theta)[0]
        return np.asarray((linear[0] * self.x + linear[1]) * d + linear[2] if self.sloped else linear[0] * d + linear[1])

    def loss(self, theta: Array) -> tuple[float, Array]:
        """Loss and gradient. The linear parameters are optimal, so their change does not enter (envelope theorem)."""
        self.evaluations += 1
        d, slope = self.decay(theta)
        residual, linear, value = self.solve(d)
        weight = linear[0] * self.x + linear[1] if self.sloped else linear[0]
        return value, 2 / len(self.y) * ((slope * (residual * weight)) @ self.sides).T.ravel()

    @staticmethod
    def gap(theta: Array) -> float:
        """log D(0-) - log D(0+): 0 where D is continuous."""
        sides = [math.exp(p) * math.log1p(centre**2 / math.exp(length)) for centre, length, p in (theta[:3].tolist(), theta[3:].tolist())]
        return sides[0] - sides[1]

    @staticmethod
    def gap_gradient(theta: Array) -> Array:
        out: list[float] = []
        for sign, (centre, log_length, log_power) in ((1.0, theta[:3].tolist()), (-1.0, theta[3:].tolist())):
            length, power = math.exp(log_length), sign * math.exp(log_power)
            q = centre * centre / length
            out += [power * 2 * centre / length / (1 + q), -power * q / (1 + q), power * math.log1p(q)]
        return np.array(out)

    def repaired(self, theta: Array) -> tuple[float, Array]:
        """The candidate near theta that is continuous to rounding and has the smallest loss.

        SLSQP stops with |gap| around 1e-8 or gives up; the power of one side is set from the other's, or both centres are put at 0.
        """
        centred = theta.copy()
        centred[[0, 3]] = 0.0
        options = [centred]
        t = np.log1p(theta[[0, 3]] ** 2 / np.exp(theta[[1, 4]]))
        if (t > 0).all():
            for at, value in ((5, np.exp(theta[2]) * t[0] / t[1]), (2, np.exp(theta[5]) * t[1] / t[0])):
                if np.exp(LOWER[at]) <= value <= np.exp(UPPER[at]):
                    moved = theta.copy()
                    moved[at] = np.log(value)
                    options.append(moved)
        return min(((self.solve(self.decay(option)[0])[2], option) for option in options), key=lambda pair: pair[0])
