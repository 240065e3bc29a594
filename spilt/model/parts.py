"""A model in parts: the library's tensor parallel (tp_plan). No plan is a refusal; that read and write points are whole is tried out."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from spilt.errors import UserError
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import Intervention, Multiplier

log = logging.getLogger("spilt")
WHOLE = ("block", "mlp", "attn")  # what goes in and comes out there is the same in every process
ASKED = "--tensor_parallel"
CLOSE = 1e-3  # of the largest value: what processes compute of the same numbers; a part or a forgotten sum is as far off as the values


def check_plan(config: Any, model: nn.Module, device: str) -> None:
    """Raises UserError where the library has no plan for a model (on the meta device), or would place its parts elsewhere."""
    library = version("transformers")
    if int(library.split(".")[0]) < 5:  # 4.57 hands DTensors on between the modules, which hooks and stores would meet
        raise UserError(f"{ASKED}: needs transformers 5, and {library} is installed; pip install 'transformers>=5', or --device auto")
    if not getattr(model, "supports_tp_plan", False):
        raise UserError(f"{ASKED}: transformers {library} has no tp_plan for {type(model).__name__}; --device auto places it whole")
    accelerator = torch._C._get_accelerator().type  # what the library takes, whatever it is told
    if accelerator != torch.device(device).type:
        way_out = "CUDA_VISIBLE_DEVICES= hides the cards" if device == "cpu" else "--device cpu"
        raise UserError(f"{ASKED} --device {device}: the library would place the parts on {accelerator}; {way_out}")


def loading() -> dict[str, Any]:
    """Words for from_pretrained."""
    from transformers import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto")}


class _Look(Intervention):
    """No steering: what is read and what is written there is remembered."""

    def __init__(self, point: str) -> None:
        super().__init__(point, point, 0.0)
        self.seen: list[Tensor] = []

    def forward(self, h: Tensor, x: Tensor | None, multiplier: Multiplier) -> Tensor:
        self.seen = [h] if x is None else [h, x]
        return h


@torch.no_grad()
def check(model: nn.Module) -> None:
    """One short pass: every block, MLP and attention is given, and gives, the whole stream, the same in every process.

    Raises UserError, in all processes, where one does not: nothing could be read or written there as on one device.
    """
    at = {
        (layer, point): _Look(point)
        for layer, there in enumerate(anatomy.of(model).parts)
        for point in WHOLE
        if point == "block" or getattr(there, point) is not None
    }
    ids = torch.arange(4, device=anatomy.input_device(model))[None] % anatomy.vocabulary(model)
    with hooks.attach(model, [hooks.Applied(layer, look, 0.0) for (layer, _), look in at.items()]):
        model(input_ids=ids, use_cache=False)
    off = torch.stack([max(_off(seen, anatomy.hidden_size(model)) for seen in look.seen) for look in at.values()])
    torch.distributed.all_reduce(off, torch.distributed.ReduceOp.MAX)
    if bad := [f"{point} of block {layer}" for (layer, point), far in zip(at, off.tolist(), strict=True) if not far <= CLOSE]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{ASKED}: {bad[0]}{more}: not whole and the same in every process by this model's tp_plan; --device auto")
    share = split(model)
    log.info("%s: %.0f%% of the weights are split", ASKED, 100 * share)
    if share < 0.5:
        log.warning(
            "%s: only %.0f%% of the weights are split by the model's tp_plan; the rest is whole in each process", ASKED, 100 * share
        )


def _off(seen: Tensor, width: int) -> Tensor:
    """How far a tensor is from that of process 0, of its largest value; infinitely where it is not whole."""
    if type(seen) is not Tensor or seen.shape[-1] != width:
        return torch.tensor(torch.inf, device=seen.device)
    first = seen.contiguous().clone()
    torch.distributed.broadcast(first, src=0)
    return ((seen - first).abs().max() / first.abs().max()).float()


def split(model: nn.Module) -> float:
    """The share of the model's weights of which each process holds a part."""
    every = list(model.parameters())
    held = [p for p in every if any(placement.is_shard() for placement in getattr(p, "placements", ()))]
    return sum(p.numel() for p in held) / sum(p.numel() for p in every)
