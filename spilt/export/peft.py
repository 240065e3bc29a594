"""A PEFT adapter: LoRA on linear maps, a constant part as the bias of its B (LoraConfig.lora_bias, peft 0.14 and newer)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spilt.errors import UserError
from spilt.export.folding import Job, biases, factors, name_of
from spilt.steering.folding import linear, transposed

ABOUT = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

Where the base model lies is said by `base_model_name_or_path` in adapter_config.json. {bias}"""
BIAS = "The constant part is the bias of lora_B (`lora_bias`): PEFT applies it, and merges it only into layers that have a bias."


def write(job: Job, folder: Path) -> str:
    """What the library itself writes of a model with this adapter. Returns the card's words."""
    from peft import LoraConfig, TaskType, get_peft_model

    pairs, constants = factors(job), biases(job)
    places = sorted({*pairs, *constants})
    if not places:
        raise UserError("this Steering adds nothing: all its parameters are 0")
    modules = [linear(job.model, where) for where in places]
    rank = max((a.shape[1] for a, _ in pairs.values()), default=1)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=rank,  # the scale alpha / r is 1: the multiplier is in B
        target_modules=[name_of(job.model, where) for where in places],
        lora_bias=bool(constants),
        fan_in_fan_out=any(transposed(module) for module in modules),
        inference_mode=True,
    )
    with quiet():
        adapted: Any = get_peft_model(job.model, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for where in places:
            made = linear(adapted.get_base_model(), where)
            a, b = made.lora_A["default"], made.lora_B["default"]
            for parameter in (*a.parameters(), *b.parameters()):
                parameter.zero_()
            if where in pairs:
                a.weight.copy_(pairs[where][0].T)
                b.weight.copy_(pairs[where][1].T)
            if where in constants:
                b.bias.copy_(constants[where])
    setattr(adapted.peft_config["default"], "base_model_name_or_path", job.base)  # noqa: B010 - get_peft_model has put another one there
    with quiet():
        adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.unload()
    return ABOUT.format(bias=BIAS if constants else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's warnings about a bias of lora_B: it can't be merged, which the card says, and is no matrix that was cut off.

    And without one about a name of transformers' that PEFT asks for.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(lora_bias|lora_B.bias|is_gradient_checkpointing)")
        yield


@contextmanager
def reload(job: Job, folder: Path) -> Iterator[nn.Module]:
    """The library's model, of the base model in memory and the folder."""
    from peft import PeftModel

    with quiet():
        adapted: Any = PeftModel.from_pretrained(job.model, str(folder))  # type: ignore[arg-type]
    yield adapted.eval()
    adapted.unload()
