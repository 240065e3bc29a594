"""Two adapters from the pairs of a dataset, and what their difference is.

theta_pos = argmin L(matching answers), theta_neg = argmin L(not-matching answers), each from the same start (one seed) with the token mean
of -log p of the answer; dW = theta_pos - theta_neg (arXiv 2511.05408). The loop is engine/train.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt.data.chat import Encoded
from spilt.engine import train as training
from spilt.engine import whole
from spilt.errors import UserError
from spilt.methods import METHODS, Scored
from spilt.settings import FitSettings
from spilt.settings.fields import CONTRASTS
from spilt.steering.interventions import LocalWeight
from spilt.steering.steering import Steering
from spilt.weights import adapters, arithmetic, diagnostics
from spilt.weights.adapters import Sizes, Wrapped

SIDES = ("matching", "not_matching")  # whose answers the first and the second adapter learn
# what is made of tau+ and tau-; settings.fields.CONTRASTS has the names
MADE: dict[str, Callable[[Steering, Steering], Steering]] = {
    "difference": arithmetic.difference,
    "bisector": arithmetic.bisector,
    "matching": lambda pos, neg: pos,
    "not_matching": lambda pos, neg: neg * -1.0,
}
assert tuple(MADE) == CONTRASTS


class Adapted(nn.Module):
    """The trained parameters of an adapter as a module of their own: what the loop counts, saves and puts into training mode."""

    def __init__(self, held: Wrapped) -> None:
        super().__init__()
        self.kept = nn.ParameterList(held.trained().values())
        self.maps: Collection[Any] = tuple(held.maps.values())  # no submodules: their base weights are not trained

    def train(self, mode: bool = True) -> Adapted:
        for module in self.maps:
            module.train(mode)  # an adapter's dropout
        return super().train(mode)


class Fit(training.Job):
    """One adapter, in the model that it was put into, on one side's answers: those at the even places of `sequences`."""

    intervention: Adapted

    def __init__(self, model: nn.Module, held: Wrapped, sequences: Sequence[Encoded], settings: FitSettings, pad_id: int) -> None:
        super().__init__(settings, METHODS[settings.method])
        self.model, self.sequences, self.pad_id = model, sequences, pad_id
        self.intervention = Adapted(held)
        self.device = next(self.intervention.parameters()).device

    def gradients(self, minibatch: list[training.Entry], share: int) -> tuple[float, list[Tensor]]:
        scored = whole.score(self.model, None, 0.0, [self.sequences[entry.winning] for entry in minibatch], self.pad_id)
        assert self.method.loss is not None
        loss = self.method.loss(Scored(scored, None), self.settings) / share
        return loss.item(), list(torch.autograd.grad(loss, list(self.intervention.parameters())))


class Trained(NamedTuple):
    """Both adapters as changes of the weights, what is made of them, their geometry, and a row of the log for each step."""

    pos: Steering
    neg: Steering
    made: Steering
    geometry: dict[str, float]
    log: list[dict[str, Any]]


def train(
    model: nn.Module,
    sequences: Sequence[Encoded],
    settings: FitSettings,
    pad_id: int,
    *,
    resume: dict[str, Any] | None = None,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Both adapters, one after the other. sequences: 2 i the matching answer of pair i, 2 i + 1 the other one.

    checkpoint is given a function that returns the whole state; resume goes on from such a state to the same result.
    """
    import peft

    kind = str(settings.adapter)
    sizes = Sizes(settings.rank, settings.lora_alpha, settings.dropout, settings.block_size or Sizes().block_size)
    places = adapters.maps(model, settings.layers, settings.modules or (), kind)
    one_sided = replace(settings, preference_pairs=("orig_add",), substraction_type="normal")
    finished: list[dict[str, Any]] = list((resume or {}).get("finished", []))
    going_on = (resume or {}).get("state")
    taus: list[Steering] = []
    for number, side in enumerate(SIDES):
        shown = [sequences[2 * (i // 2) + ((i + number) % 2)] for i in range(len(sequences))]

        def save(state: Callable[[], dict[str, Any]]) -> None:
            if checkpoint is not None:
                checkpoint(lambda: {"finished": finished, "state": state()})

        def tell(step: int, steps: int, loss: float, number: int = number) -> None:
            if progress is not None:
                progress(number * steps + step, 2 * steps, loss)

        with adapter_in(model, lambda: peft.get_peft_model(model, adapters.config(model, kind, places, sizes)), settings.seed) as held:
            job = Fit(model, held, shown, one_sided, pad_id)
            if number < len(finished):
                job.intervention.load_state_dict(finished[number]["parameters"])
            else:
                log = training.fit(job, resume=going_on, checkpoint=save, progress=tell)
                going_on = None
                parameters = {name: value.detach().cpu().clone() for name, value in job.intervention.state_dict().items()}
                finished.append({"parameters": parameters, "log": [{"answers": side, **row} for row in log]})
            taus.append(_of_form(adapters.update(model, held, kind), settings.intervention_method))
    pos, neg = taus
    made = MADE[str(settings.contrast)](pos, neg)
    return Trained(pos, neg, made, diagnostics.geometry(pos, neg), [row for one in finished for row in one["log"]])


def adapter_in(model: nn.Module, make: Callable[[], Any], seed: int) -> Any:
    """adapters.wrapped with the first values of the adapter drawn from the seed."""

    def seeded() -> Any:
        devices = [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return make()

    return adapters.wrapped(model, seeded)


def _of_form(tau: Steering, form: str) -> Steering:
    """The factors of a LoRA as they are, or multiplied out for the form that is dense."""
    if set(tau.forms) == {form}:
        return tau
    entries = []
    for site, made in tau:
        dW = made.update()
        state = {"weight": dW, "bias": dW.new_zeros(dW.shape[1])}
        dense = LocalWeight.from_state(state, read_point=site.read_point, write_point=site.write_point)
        entries.append((site, dense.eval().requires_grad_(False)))
    return Steering(entries)


def check(made: Steering, what: str) -> None:
    """Nothing useless is stored: NotFinite, or UserError where all of it is 0."""
    for site, one in made:
        if not one.norm() < training.NO_EFFECT:  # one map that nothing has changed is no mistake; NaN is none that small
            training.check_usable(one, f"{what} layer {site.layer} {site.write_point}")
    if arithmetic.norm(made) < training.NO_EFFECT:
        why = "both adapters are the same, so their difference changes nothing"
        raise UserError(f"{what}: {why}; do the answers differ, and is lr large enough?")
