"""What an adapter after every block costs: training beside peft's LoRA, decoding beside the unsteered model. Tokens per processor second.

    OMP_NUM_THREADS=1 python benchmarks/tasks.py
    python benchmarks/tasks.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16

A Llama with random weights. The sides run in turns in one process, medians are compared; on a GPU seconds are wall seconds. Training:
one forward and backward of a batch, 16 of its 128 tokens supervised. Decoding: greedy, prompts read included, no end token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from spilt.data.chat import Encoded  # noqa: E402
from spilt.downstream import training, variants  # noqa: E402
from spilt.downstream.evaluation import greedy  # noqa: E402
from spilt.downstream.words import Variant  # noqa: E402
from spilt.engine import decode, whole  # noqa: E402
from spilt.engine.decode import Row  # noqa: E402

LENGTH, SUPERVISED, ROWS, NEW = 128, 16, 8, 32


def build(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 11 * options.hidden // 4, "num_hidden_layers": options.layers}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=8000, eos_token_id=None)
    model = LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype))
    return model.eval().requires_grad_(False)


def medians(sides: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each, in turns, after one of each that is not counted."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, side in sides.items():
            begun = clock()
            side()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                found[name].append(clock() - begun)
    return {name: statistics.median(values) for name, values in found.items()}


def learners(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A batch forward and back by each; all at rank 8."""
    draw = torch.Generator().manual_seed(0)
    rows = [Encoded(tuple(torch.randint(3, 8000, (LENGTH,), generator=draw).tolist()), LENGTH - SUPERVISED, 1) for _ in range(ROWS)]

    def ours(kind: str) -> Callable[[], object]:
        model = build(options)
        learner = training.Steered(model, variants.make(model, Variant(kind), 0), 0)
        learner.module.requires_grad_(True)
        return lambda: training.accumulate(learner, [rows])

    def theirs() -> Callable[[], object]:
        model = build(options)
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=linears))  # puts it into the model
        return lambda: (-whole.score(model, None, 0.0, rows, 0).total.sum() / (ROWS * SUPERVISED)).backward()

    return {**{f"{kind}, here": ours(kind) for kind in ("post_block", "vector", "lora")}, "lora, peft": theirs()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("layers", 12), ("repeats", 5)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--what", nargs="+", choices=("training", "decoding"), default=("training", "decoding"))
    options.add_argument("--batch", nargs="+", type=int, default=(1, 32))
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    chosen = options.parse_args()
    if "training" in chosen.what:
        found = medians(learners(chosen), chosen.repeats, chosen.device)
        print("| training | tokens/s | beside peft's LoRA |\n|---|---|---|")
        for name, seconds in found.items():
            print(f"| {name} | {ROWS * LENGTH / seconds:.0f} | {found['lora, peft'] / seconds:.2f} |")
    if "decoding" in chosen.what:
        decoding(chosen)


def decoding(chosen: argparse.Namespace) -> None:
    """A table of new tokens per second, prompts of 64 tokens."""
    model = build(chosen)
    steering = variants.make(model, Variant(), 0)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.normal_(0, 0.01)
    print("\n| decoding, batch | unsteered tokens/s | every block steered | share |\n|---|---|---|---|")
    for batch in chosen.batch:
        prompts = [tuple(torch.randint(3, 8000, (64,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(batch)]

        def side(m: float, prompts: list[tuple[int, ...]] = prompts) -> Callable[[], object]:
            acting = steering if m else variants.nothing(model)
            return lambda: list(decode.generate(model, acting, [Row(p, m, "") for p in prompts], greedy(NEW, (), 0), len(prompts)))

        seconds = medians({"unsteered": side(0.0), "steered": side(1.0)}, chosen.repeats, chosen.device)
        plain, steered = (batch * NEW / seconds[name] for name in ("unsteered", "steered"))
        print(f"| {batch} | {plain:.0f} | {steered:.0f} | {steered / plain:.2f} |")


if __name__ == "__main__":
    main()
