"""A model as it is loaded, and steered while it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spilt.api.given import frozen, steering_of, strengths_of
from spilt.engine import whole
from spilt.errors import unknown
from spilt.model import host
from spilt.model.identity import model_hash
from spilt.settings.fields import DTYPE_ALIASES, DTYPES
from spilt.steering import inplace, original
from spilt.steering.interventions import Multiplier
from spilt.steering.steering import Steering
from spilt.steering.steering import base_model as shape_of
from spilt.weights import adapters


class Loaded(NamedTuple):
    """A model in evaluation mode with frozen weights, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load(path: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", anatomy: str = "") -> Loaded:
    """A checkpoint folder of the Hugging Face layout, from local files only; no code from it is run. Raises UserError.

    anatomy: where its parts are, as in `blocks=model.layers,mlp=mlp`; left out, they are found by structure.
    """
    name = DTYPE_ALIASES.get(str(dtype), str(dtype))  # also torch.bfloat16
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    found = host.load(Path(path), name, device, anatomy)
    return Loaded(found.model, found.tokenizer)


@contextmanager
def steer(model: nn.Module, steering: Steering, multiplier: Multiplier = 1.0) -> Iterator[nn.Module]:
    """Inside the `with` every forward of the model is steered at every position, as apply does; after it the model is as before.

    multiplier: strength m, a number or a tensor [B] with one for each row of the batch. Works with `model.generate` and pipelines.
    """
    placed, strengths = steering_of(model, steering), strengths_of(multiplier)
    one = isinstance(multiplier, int | float) or not getattr(multiplier, "ndim", len(strengths))
    with whole.steer(model, placed, strengths[0] if one else torch.tensor(strengths, dtype=torch.float32)):
        yield model


@contextmanager
def in_place(model: nn.Module, steering: Steering, multiplier: float = 1.0) -> Iterator[nn.Module]:
    """As `steer` at one strength, in the weights: faster, the same logits up to rounding; the weights are given back bit by bit.

    For what can be weights: changes of linear maps, and constants. Raises UserError for the rest, before any weight is touched.
    """
    one = getattr(multiplier, "ndim", 0 if isinstance(multiplier, int | float) else 1) == 0  # also a number of numpy or torch
    with inplace.in_place(model, steering_of(model, steering), strengths_of(multiplier)[0] if one else multiplier):
        yield model


def read_adapter(model: nn.Module, folder: str | Path) -> Steering:
    """A PEFT adapter of any kind (lora, dora, pissa, delora, oft, boft, ia3 ...) as the change of its base model's weights.

    The difference of two, `read_adapter(model, a) - read_adapter(model, b)`, is weight steering (arXiv 2511.05408).
    """
    with frozen(model):
        found = adapters.read(model, folder)
    return Steering(found, {**found.about, "base_model": base_model(model)})


def read_post_block(
    model: nn.Module, path: str | Path, *, nonlinearity: str | None = None, scope: str | None = None, alpha: float = 1.0
) -> Steering:
    """A checkpoint of the public post-block code (pytorch_model.bin, adapter_steerer.pt) as a Steering. It says neither its activation
    (silu, relu, gelu, tanh, linear) nor its scope (all, last), so both are asked for: UserError.
    """
    with frozen(model):
        return original.read(Path(path), model, nonlinearity=nonlinearity, scope=scope, alpha=alpha)


def base_model(model: nn.Module) -> dict[str, Any]:
    """Kind, width and depth; of a checkpoint folder its name and hash too."""
    folder = Path(str(getattr(model.config, "name_or_path", "") or "nowhere"))
    return {**shape_of(model), **({"name": folder.name, "checkpoint": model_hash(folder)} if (folder / "config.json").is_file() else {})}
