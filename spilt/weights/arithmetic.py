"""Pure functions of weight updates: sums by place, differences, parts. tau+ and tau- are Steerings of two adapters of one base model.

`+`, `-` and `*` of Steering are the arithmetic itself and keep every term as an entry; `combined` makes one of those at the same site.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.steering import anatomy
from spilt.steering.folding import DOWN, Place, place, transposed
from spilt.steering.interventions import Intervention, LocalWeight, LoRA, Vector
from spilt.steering.steering import Site, Steering


def difference(pos: Steering, neg: Steering) -> Steering:
    """dW = tau+ - tau- = theta_pos - theta_neg, one intervention for each map; low-rank where both are: of rank r+ + r- at most."""
    return combined(pos - neg)


def bisector(pos: Steering, neg: Steering) -> Steering:
    """|tau+ - tau-| u / |u|,  u = tau+ / |tau+| - tau- / |tau-|: the direction in which both count the same, as long as dW."""
    sizes = norm(pos), norm(neg)
    if not all(0 < size < math.inf for size in sizes):
        raise UserError(f"a bisector needs two adapters that change something; their norms are {sizes[0]:g} and {sizes[1]:g}")
    made = combined(pos * (1 / sizes[0]) - neg * (1 / sizes[1]))
    size = norm(made)
    if not size:
        raise UserError("both adapters change the weights in the same direction, so nothing lies between them")
    return made * (norm(difference(pos, neg)) / size)


def combined(steering: Steering) -> Steering:
    """The same sum with one intervention for each site: factors side by side, dense updates and constants added up."""
    sites: dict[Site, list[Intervention]] = {}
    for site, made in steering:
        sites.setdefault(site, []).append(made)
    return Steering(((site, _one(made).eval().requires_grad_(False)) for site, made in sites.items()), steering.about)


def _one(made: Sequence[Intervention]) -> Intervention:
    at = {"read_point": made[0].read_point, "write_point": made[0].write_point}
    with torch.random.fork_rng(devices=[]):  # an intervention draws its first values, whatever is put in their place
        if not made[0].reads:
            return Vector.from_state(_sum([_constant(one) for one in made]), write_point=made[0].write_point)
        if all(isinstance(one, LoRA) for one in made):
            a, b = _joined([one.folded()[0] for one in made])
            return LoRA.from_state({"lora_A": a, "lora_B": b}, **at)
        state = {"weight": _sum([one.update() for one in made]), "bias": _sum([_constant(one) for one in made])}
        return LocalWeight.from_state(state, **at)


def _joined(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """sum_i A_i B_i = [A_1 A_2 ...] [B_1; B_2; ...]; those with the same A have their B added, so that equal terms cancel to 0."""
    kept: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        assert pair is not None
        same = next((i for i, (a, _) in enumerate(kept) if torch.equal(a, pair[0])), None)
        if same is None:
            kept.append(pair)
        else:
            kept[same] = kept[same][0], kept[same][1] + pair[1]
    return torch.cat([a for a, _ in kept], 1), torch.cat([b for _, b in kept], 0)


def _constant(made: Intervention) -> Tensor:
    """db [D]; zeros of a form without."""
    bias = made.folded()[1]
    if bias is None:
        pair = made.folded()[0]
        assert pair is not None
        return pair[1].new_zeros(pair[1].shape[1])
    return bias


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]).sum(0) if len(tensors) > 1 else tensors[0]


def part(steering: Steering, layers: Collection[int] | None = None, modules: Collection[str] | None = None) -> Steering:
    """What of it acts at these blocks and maps. modules: last words of their paths, such as q_proj or self_attn.q_proj; None: all."""
    kept = [
        (site, made)
        for site, made in steering
        if (layers is None or site.layer in layers)
        and (modules is None or any(f".{site.write_point}".endswith(f".{name}") for name in modules))
    ]
    if not kept:
        have = f"layers {', '.join(map(str, steering.layers))}; {', '.join(dict.fromkeys(site.write_point for site, _ in steering))}"
        raise UserError(f"nothing of this Steering is at layers {layers or 'all'}, maps {modules or 'all'}; it has {have}")
    return Steering(kept, steering.about)


def at_maps(model: nn.Module, steering: Steering) -> Steering:
    """The same as changes of linear maps: what is added at a block's output is its down projection's. Raises UserError where it is not."""
    entries = []
    for site, made in steering:
        new = _site(model, place(model, site, made, "it is no change of the weights", ""), made.reads)
        moved = type(made).of_parameters(
            dict(made.named_parameters()), read_point=new.read_point, write_point=new.write_point, **made.options()
        )
        entries.append((new, moved.eval().requires_grad_(False)))
    return Steering(entries, steering.about)


def of_tensor(model: nn.Module, name: str, change: Tensor) -> Steering | None:
    """The change of one parameter of the blocks, such as 3.mlp.up_proj.weight; None where it is none of a linear map."""
    number, _, rest = name.partition(".")
    path, _, kind = rest.rpartition(".")
    module = dict(anatomy.block(model, int(number)).named_modules()).get(path) if number.isdigit() else None
    if kind not in ("weight", "bias") or getattr(getattr(module, "weight", None), "ndim", 0) != 2:
        return None
    assert module is not None
    site = _site(model, (int(number), path), kind == "weight")
    if kind == "bias":
        return Steering([(site, Vector.from_state(change, write_point=site.write_point))])
    weight = change if transposed(module) else change.T
    state = {"weight": weight, "bias": weight.new_zeros(weight.shape[1])}
    return Steering([(site, LocalWeight.from_state(state, read_point=site.read_point, write_point=site.write_point))])


def _site(model: nn.Module, where: Place, reads: bool) -> Site:
    layer, path = where
    read, write = DOWN if path == anatomy.of(model).parts[layer].mlp_mid else (path, path)
    return Site(layer, read if reads else None, write)


def constants(steering: Steering) -> Steering:
    """Its biases alone, as vectors."""
    found = [(site, made) for site, made in steering if (bias := made.folded()[1]) is not None and bias.any()]
    if not found:
        raise UserError("this Steering has no constant part: its adapters have no biases")
    vectors = [
        (Site(site.layer, None, site.write_point), Vector.from_state(_constant(made), write_point=site.write_point)) for site, made in found
    ]
    return Steering(((site, made.eval().requires_grad_(False)) for site, made in vectors), steering.about)


def inner(a: Steering, b: Steering) -> float:
    """<dW_a, dW_b> over all maps, constants too, without a product [F, D] of what is low-rank: <A B, C E> = sum((A^T C) * (B E^T))."""
    others: dict[tuple[int, str], list[Intervention]] = {}
    for site, made in b:
        others.setdefault((site.layer, _map(site)), []).append(made)
    return sum(_inner(made, other) for site, made in a for other in others.get((site.layer, _map(site)), ()))


def _map(site: Site) -> str:
    """What is changed: the read point of a map belongs to it."""
    return site.write_point if site.read_point in (None, DOWN[0], site.write_point) else f"{site.read_point} > {site.write_point}"


def _inner(a: Intervention, b: Intervention) -> float:
    (first, db), (second, other) = a.folded(), b.folded()
    found = 0.0
    if first is not None and second is not None:
        p, q = first, second
        if isinstance(a, LocalWeight) or isinstance(b, LocalWeight):
            found += float((a.update().double() * b.update().double()).sum())
        else:
            found += float(((p[0].double().T @ q[0].double()) * (p[1].double() @ q[1].double().T)).sum())
    if db is not None and other is not None:
        found += float(db.double() @ other.double())
    return found


def norm(steering: Steering) -> float:
    """Frobenius norm over all maps together."""
    return math.sqrt(max(inner(steering, steering), 0.0))


def cosine(a: Steering, b: Steering) -> float:
    """<dW_a, dW_b> / (|dW_a| |dW_b|): of a steering and another fine-tune's task vector, what they have in common; NaN for a zero one."""
    sizes = norm(a) * norm(b)
    return inner(a, b) / sizes if sizes else math.nan
