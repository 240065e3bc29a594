"""generate (`--mode apply`): prompts and a stored intervention -> texts, one file for each multiplier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spilt import memory
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.data.chat import readable
from spilt.data.prompt_baseline import behind
from spilt.model import identity
from spilt.verbs.base import RECOMMENDED, Request, Step, Verb, output_parts
from spilt.verbs.estimate import TEMPLATE, Cost, Shape, side_by_side, tokens


class Generate(Verb):
    name, mode = "generate", "apply"
    does = "produce text with them, at any strength"
    flags = ("multipliers", "batch_size", "prompt_baseline", "decode_step", "tensor_parallel")
    sections = {"prompts": "generation"}
    work = "spilt.tasks.generate:generate"
    together = True
    words = (RECOMMENDED,)
    prompts = True
    not_deciding = ("multipliers", "batch_size")

    def outputs(self, store: Store, step: Step) -> list[Path]:
        return [store.results(step.cells[0], m) for m in step.multipliers]

    def decided_by(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        concepts = [cell.concept for cell in step.cells]
        engine = {"engine": step.engine} if step.engine else {}
        return [("prompts", {"multiplier": float(m), "concepts": concepts, **engine}) for m in step.multipliers]

    def unfinished(self, step: Step, limit: int | None, seen: identity.Seen) -> set[str]:
        outputs = output_parts(step, limit, seen)
        return set(text_identities(dict(zip(step.multipliers, outputs.values(), strict=True))).values())

    def cost(self, step: Step, shape: Shape, rows: Sequence[Any], request: Request) -> Cost:
        """Each prompt once below the layer, above it once per text; then a token at a time."""
        s, head = step.settings, shape.head
        turns = step.prompt.turns if step.prompt else ()
        prompts = [tokens(readable(behind(turns, prompt.input))) + TEMPLATE for prompt in rows]
        texts = len(prompts) * s.num_responses * (len(step.multipliers) + step.waits + s.generate_orig_output)
        length = sum(prompts) / len(prompts)
        new = texts * s.generation_params.max_new_tokens
        whole = length + s.generation_params.max_new_tokens
        flops = (
            shape.run(sum(prompts), shape.below(s.layers), length) + shape.run(texts * length, shape.above(s.layers), length) + texts * head
        )
        flops += shape.run(new, shape.layers, whole) + new * head
        kind, size, longest, each = request.device.split(":")[0], shape.size(s), max(prompts), s.generation_params.max_new_tokens
        free = memory.free() - shape.weights * size if kind == "cpu" else None
        batch = side_by_side(request.batch_size or s.batch_size, shape, size, longest, each, free, kind)
        peak = min(batch.texts, texts) * shape.of_text(longest, each, size)
        return Cost(sum(prompts) + texts * length + new, flops, 0, peak, str(batch))


def text_identities(outputs: Mapping[float, Mapping[str, Any]]) -> dict[float | None, str]:
    """multiplier -> whose the unfinished texts are. outputs: multiplier -> parts; None: the unsteered texts, the same for all."""
    found: dict[float | None, str] = {m: manifest.identity(dict(parts)) for m, parts in outputs.items()}
    return {**found, None: manifest.identity({**next(iter(outputs.values())), "multiplier": None})}
