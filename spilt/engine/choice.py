"""Which engine does a piece of work: the fast one where it applies, else the plain one; and why. No torch: a dry run says it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from spilt.errors import UserError, unknown
from spilt.settings.fields import WRITE_POINTS
from spilt.steering import anatomy

FAST, PLAIN = ENGINES = ("fast", "plain")
PLAIN_STEP, STATIC, COMPILED, CAPTURED = STEPS = ("plain", "static", "compiled", "captured")  # of decoding; engine.static has them
VLLM = "vllm"  # another program's, for texts alone: tasks.generate asks it
ASKED = "asked for with --engine plain"


def why_plain(
    sites: Iterable[tuple[int, str]], verb: str, *, family: str = "", engine: str = FAST, joint: bool = False, positions: str = "all"
) -> str:
    """Why the fast path does not apply; '' where it does.

    sites: (layer, write point). verb: fit, generate, measure. family: `config.model_type`. positions: which tokens are steered.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    places = list(sites)
    if engine == PLAIN:
        return ASKED
    if inside := [f"{path} of block {layer}" for layer, path in places if path not in WRITE_POINTS]:
        return f"{inside[0]} is steered"
    if family and (why := anatomy.family_of(family).plain):
        return why
    if positions == "last":
        return "steer_positions = last: each logit has a steered token of its own"
    twice = [layer for layer, count in Counter(layer for layer, _ in places).items() if count > 1]
    if twice:
        return f"block {twice[0]} is steered twice"
    if verb == "fit" and joint and len(places) > 1:
        return "several layers are fitted jointly"
    if verb in ("fit", "measure") and any(layer == 0 and write_point != "block" for layer, write_point in places):
        return "the inside of block 0 is steered, and there is no block below it to record"
    if verb == "generate" and positions != "all":
        return f"steer_positions = {positions}: text is made fast where every token is steered"
    return ""


def refuse_vllm(verbs: Collection[str], device: str, dry: bool) -> None:
    """Raises UserError where `--engine vllm` cannot be meant. dry: nothing is run, perhaps on another machine."""
    if list(verbs) != ["generate"]:
        raise UserError("--engine vllm only produces text; fit and measure without it, then --mode apply --engine vllm")
    if device not in ("cuda", "cuda:0", "auto"):
        raise UserError(
            f"--engine vllm --device {device}: vLLM takes the first card that it sees (--device auto: all); CUDA_VISIBLE_DEVICES says which"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--engine vllm starts its own processes; run it without accelerate launch (--device auto: on all cards)")
    if not dry and find_spec("vllm") is None:
        raise UserError("--engine vllm: the package vllm is not installed here: pip install vllm, or leave --engine out")


def refuse_positions(positions: str, scope: str) -> None:
    """Raises UserError where settings say (`steer_positions`; '': nothing) that other tokens are steered than a Steering alone does."""
    if positions and positions != scope:
        which = "every token" if scope == "all" else f"scope {scope}"
        raise UserError(f"steer_positions = {positions}: here {which} is steered, another thing; --mode apply and evaluate obey it")


def refuse_in_vllm(dtype: str, positions: str) -> None:
    """Raises UserError for settings that vLLM's LoRA does not do. What of a Steering can be a LoRA, the export says."""
    if dtype == "float32":  # its kernels assert it (vLLM issue 14827)
        raise UserError("--engine vllm: vLLM's LoRA does not compute in float32; --dtype bfloat16 or float16")
    if positions != "all":
        raise UserError(f"--engine vllm: steer_positions = {positions}, and a LoRA in vLLM acts on every token; leave --engine out")


def refuse_in_parts(request: Any, verbs: Collection[str], config: Mapping[str, Any], processes: int, dry: bool) -> None:
    """Raises UserError where `--tensor_parallel` cannot be meant. config: config.json; processes: of the launcher; dry: nothing is run.

    Whether the library has a plan for the model, model.host asks it.
    """
    asked = "--tensor_parallel"
    if processes < 2 and not dry:
        way_out = "torchrun --nproc_per_node N run_spilt.py ... starts N"
        raise UserError(f"{asked}: each process holds a part of the model, and there is one process; {way_out}, or leave it out")
    if "evaluate" in verbs:
        raise UserError(f"{asked}: --mode evaluate is done by one process (a judge is asked once); leave it out, or --device auto")
    if request.engine == VLLM:
        raise UserError(f"{asked} --engine {VLLM}: vLLM splits a model by itself (--device auto); leave one of them out")
    if request.decode_step != PLAIN_STEP:
        raise UserError(f"{asked} --decode_step {request.decode_step}: that step is for a model that is whole on one device; leave one out")
    if request.device not in ("cpu", "cuda", "cuda:0"):
        way_out = "--device cuda: each process takes its own card; or cpu"
        raise UserError(f"{asked} --device {request.device}: the parts are not placed so; {way_out}")
    if config.get("quantization_config"):
        raise UserError(f"{asked}: the model is quantised, and parts of such are not tested; --device auto, or the unquantised one")
    text: Any = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = text.get(name)
        if isinstance(heads, int) and heads % processes:
            fits = [str(n) for n in range(2, heads + 1) if heads % n == 0]
            raise UserError(f"{asked}: {heads} {name} cannot be dealt out to {processes} processes; start {', '.join(fits) or 'one'}")


def refuse_split(component: str) -> None:
    """Raises UserError for a read point of which each process has but a part."""
    if component == "mlp_mid":
        raise UserError(
            "--tensor_parallel: mlp_mid is read, and each process holds a part of it; --set intervention_components=mlp, attn or block "
            "(whole everywhere), or --device auto"
        )


def refuse_step(step: str, texts: Mapping[str, str], device: str) -> None:
    """Raises UserError where `--decode_step` cannot be meant.

    texts: each piece of work that makes some -> why another engine than the fast one does it, or ''.
    """
    asked = f"--decode_step {step}"
    if step not in STEPS:
        raise unknown("decoding step", step, STEPS)
    if step == PLAIN_STEP:
        return
    if not texts:
        raise UserError(f"{asked}: it is about texts, and none are made here; leave it out")
    if step == CAPTURED and not device.startswith(("cuda", "auto")):
        raise UserError(f"{asked} --device {device}: a CUDA graph runs on a CUDA device; --decode_step {COMPILED}, or leave it out")
    for name, why in texts.items():
        if why:
            raise UserError(f"{asked}: {name} is not done by the fast engine, which alone has it ({why}); leave it out")
