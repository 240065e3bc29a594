"""What a weight update looks like: its geometry, where its norm lies, its spectrum, and what rounding takes from it. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from spilt.steering.folding import linear
from spilt.steering.inplace import by_place, change, lost
from spilt.steering.interventions import Intervention, LocalWeight
from spilt.steering.steering import Steering
from spilt.weights.arithmetic import combined, difference, inner, norm

if TYPE_CHECKING:
    import pandas as pd


def geometry(pos: Steering, neg: Steering) -> dict[str, float]:
    """Of two adapters, with M = (tau+ + tau-) / 2 what both learned and b = (tau+ - tau-) / 2 what tells them apart.

    cos_anti -<tau+, tau->/(|tau+| |tau-|), asymmetry |tau+|/|tau-|, drift |M|/|b|, cos_dW_M (|tau+|^2 - |tau-|^2)/2 / (|dW| |M|) in size.
    """
    plus, minus, together = inner(pos, pos), inner(neg, neg), inner(pos, neg)
    dW, M = math.sqrt(max(plus + minus - 2 * together, 0)), math.sqrt(max(plus + minus + 2 * together, 0)) / 2
    return {
        "norm_pos": math.sqrt(plus),
        "norm_neg": math.sqrt(minus),
        "norm_dW": dW,
        "cos_anti": _ratio(-together, math.sqrt(plus * minus)),
        "asymmetry": _ratio(math.sqrt(plus), math.sqrt(minus)),
        "drift": _ratio(M, dW / 2),
        "cos_dW_M": _ratio(abs(plus - minus) / 2, dW * M),
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def by_module(steering: Steering, model: nn.Module | None = None) -> pd.DataFrame:
    """A row for each map: norm of its update, its share of |dW|^2, the largest singular value's share of its own, the effective rank.

    effective_rank exp(-sum p log p), p = sigma^2 / sum sigma^2. With a model also relative, |dW| / |W| of the map.
    """
    import pandas as pd  # slow to load, and fits need no table

    summed = combined(steering)
    whole, rows = norm(summed) ** 2, []
    for site, made in summed:
        energy = spectrum(made).double().square()
        p = energy / energy.sum() if energy.sum() else energy
        size = made.norm()
        row = {
            "layer": site.layer,
            "module": site.write_point,
            "form": made.form,
            "norm": size,
            "share": _ratio(size**2, whole),
            "top": float(p.max()) if len(p) else math.nan,
            "effective_rank": float(torch.special.entr(p).sum().exp()) if len(p) and energy.sum() else math.nan,
        }
        if model is not None:
            (where,) = by_place(model, Steering([(site, made)]))
            row["relative"] = _ratio(size, float(linear(model, where).weight.detach().float().norm()))
        rows.append(row)
    return pd.DataFrame(rows)


def spectrum(made: Intervention) -> Tensor:
    """Singular values of dW, largest first; of factors A B those of R_a R_b^T, with A = Q_a R_a and B^T = Q_b R_b. [] without dW."""
    pair = made.folded()[0]
    if pair is None:
        return torch.zeros(0)
    if isinstance(made, LocalWeight):
        return torch.linalg.svdvals(made.update())
    (_, a), (_, b) = torch.linalg.qr(pair[0]), torch.linalg.qr(pair[1].T)
    return torch.linalg.svdvals(a @ b.T)


def rounding(model: nn.Module, pos: Steering, neg: Steering, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Relative errors |found - dW| / |dW| over all maps, of a dW kept in `dtype` in each of three ways, against float32.

    stored: dW itself rounded. merged: both adapters merged into rounded weights and then subtracted. applied: W + dW rounded, less W.
    """
    wrong = dict.fromkeys(("stored", "merged", "applied"), 0.0)
    whole = 0.0
    sides = [by_place(model, side) for side in (pos, neg)]
    for where, made in by_place(model, difference(pos, neg)).items():
        module = linear(model, where)
        dW = change(module, made)[0]
        if dW is None:
            continue
        before = module.weight.detach().float()
        plus, minus = (_rounded(before, change(module, side.get(where, ()))[0], dtype) for side in sides)
        wrong["stored"] += float((dW.to(dtype).double() - dW.double()).square().sum())
        wrong["merged"] += float((plus.double() - minus.double() - dW.double()).square().sum())
        wrong["applied"] += lost(before, dW, dtype)[0]
        whole += float(dW.double().square().sum())
    return {name: _ratio(math.sqrt(value), math.sqrt(whole)) for name, value in wrong.items()}


def _rounded(before: Tensor, summand: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (before if summand is None else before + summand).to(dtype)


class Explained(NamedTuple):
    """strengths m that minimise |task - sum_i m_i dW_i|; the share of |task| that is left; each one's own cosine with it; |task|."""

    strengths: list[float]
    left: float
    cosines: list[float]
    norm: float


def explained(task: Iterable[Steering], steerings: Sequence[Steering]) -> Explained:
    """Least squares over all maps. task: parts at different maps, one after the other. Of equal steerings each gets the same share."""
    along, whole = torch.zeros(len(steerings), dtype=torch.float64), 0.0
    for part in task:
        along += torch.tensor([inner(part, one) for one in steerings], dtype=torch.float64)
        whole += inner(part, part)
    gram = torch.tensor([[inner(a, b) for b in steerings] for a in steerings], dtype=torch.float64)
    strengths = torch.linalg.pinv(gram, hermitian=True) @ along
    left = whole - 2 * float(strengths @ along) + float(strengths @ gram @ strengths)
    size = math.sqrt(whole)
    cosines = [_ratio(value, math.sqrt(own) * size) for value, own in zip(along.tolist(), gram.diagonal().tolist(), strict=True)]
    return Explained(strengths.tolist(), math.sqrt(max(left, 0.0) / whole) if whole else math.nan, cosines, size)
