"""fit (`--mode generate`): pairs -> layer_{id}.pt."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from spilt.artifacts.losses import NEUTRAL
from spilt.artifacts.store import Store
from spilt.cell import FORMS
from spilt.data.readers import BARE_CONTRASTS, CONTRASTS, ONE_SIDED, PAIR_FIELDS, QUESTIONS
from spilt.errors import UserError
from spilt.memory import max_tokens
from spilt.methods import METHODS, Method
from spilt.settings.resolve import COMMAND_LINE, Resolved
from spilt.verbs.base import Request, Step, Verb, layers_of
from spilt.verbs.estimate import Cost, Shape, recording

CLOSED = [name for name, row in METHODS.items() if row.estimate is not None]


def refuses(method: Method, s: Any, kind: str) -> str:
    """Why a method can find nothing from pairs of this kind (Pair.kind), and what would; '' where it can."""
    closed = method.estimate is not None
    if kind == QUESTIONS:
        return f"there are no answers to fit on; add the columns {', '.join(PAIR_FIELDS[1:])}"
    if kind in (CONTRASTS, BARE_CONTRASTS) and not closed:
        return f"{method.name} is trained on answers to one question, not on two prompts; methods that compare them: {', '.join(CLOSED)}"
    if kind == BARE_CONTRASTS and s.multiple_choice:
        return "multiple_choice reads an answer's token, and there are no answers; leave it out: then the prompt's last token is read"
    if kind == ONE_SIDED and (closed or method.needs_losing(s)):
        alone = ", ".join(name for name, row in METHODS.items() if row.estimate is None and not row.needs_losing(s))
        others = f"--method {alone} --set preference_pairs=orig_add does without, --complete_losing has the model write them"
        return f"{method.name} needs not_matching answers too; {others}"
    if kind == ONE_SIDED and "orig_sub" in s.preference_pairs:
        return "orig_sub shows the not_matching answers, and there are none; --set preference_pairs=orig_add"
    return ""


def refuse_without_effect(s: Any) -> None:
    """Raises UserError for a setting that a method makes nothing of."""
    if METHODS[s.method].estimate is None and s.direction_layer is not None:
        others = ", ".join(CLOSED)
        raise UserError(f"direction_layer = {s.direction_layer}: {s.method} is trained at its layers; --method {others} find a direction")


class Fit(Verb):
    name, mode = "fit", "generate"
    does = "find the parameters of interventions from pairs of answers"
    flags = ("checkpoint_seconds", "tensor_parallel")
    sections = {"train": "train", NEUTRAL: "neutral"}
    work = "spilt.tasks.fit:fit"
    fits = True
    not_deciding = ()  # the batch size decides a fit

    def purposes(self, method: str) -> Collection[str]:
        return self.sections if METHODS[method].against_neutral else ("train",)

    def settings(self, request: Request, method: str, form: str) -> Resolved:
        found = super().settings(request, method, form)
        s, where = found.settings, found.files[-1] if found.files else COMMAND_LINE
        if METHODS[method].estimate is not None and s.site != "block":
            why = "the mean is taken at the block's output, which is another space where a norm follows the MLP"
            raise UserError(f"{where}: {method} with site: {s.site} does not exist: {why}; leave site out")
        if METHODS[method].estimate is not None and s.joint:
            raise UserError(f"{where}: joint with {method} does not exist: each layer has its own mean; leave joint out")
        refuse_without_effect(s)
        return found

    def multipliers(self, request: Request, settings: Any) -> tuple[float, ...]:
        return ()

    def refuses(self, step: Step, kind: str) -> str:
        return refuses(METHODS[step.cells[0].method], step.settings, kind)

    def outputs(self, store: Store, step: Step) -> list[Path]:
        return [store.vector(cell, layer) for cell in step.cells for layer in cell.layers]

    def decided_by(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        settings = step.settings.as_dict()
        return [
            ("train", {"settings": {**settings, "layers": layers}, "concept": cell.concept})
            for cell in step.cells
            for layers in layers_of(step, cell)
        ]

    def cost(self, step: Step, shape: Shape, rows: Sequence[Any], request: Request) -> Cost:
        """Of a closed form one pass up to the highest layer; else a fit at each layer, or one at all of them together."""
        s, kind = step.settings, request.device.split(":")[0]
        method = METHODS[step.cells[0].method]
        if method.estimate is not None:
            at = s.layers if s.direction_layer is None else [s.direction_layer]
            recorded, _, _ = recording(step, shape, rows, kind, max(at) + 1)
            return recorded._replace(cache=len(at) * 2 * len(rows) * shape.hidden * 4)  # a mean of each answer
        groups = [s.layers] if s.joint or method.adapters else [[layer] for layer in s.layers]
        fits = [self._trained(step, shape, rows, kind, group) for group in groups]
        tokens, flops, cache, peak, _ = zip(*fits, strict=True)
        return Cost(sum(tokens), sum(flops), sum(cache), max(peak))

    def _trained(self, step: Step, shape: Shape, rows: Sequence[Any], kind: str, layers: Sequence[int]) -> Cost:
        """One pass below the layer, then forward and backward above it for every pair that is shown."""
        s, method = step.settings, METHODS[step.cells[0].method]
        recorded, questions, answers = recording(step, shape, rows, kind, shape.below(layers))
        above, size = shape.above(layers), shape.size(s)
        length = recorded.tokens / len(rows)
        sides = 2 if method.needs_losing(s) else 1
        times = s.n_epochs * (1 if method.adapters or method.one_side else len(s.preference_pairs)) * sides
        shown = times * (questions + answers / 2)
        flops = recorded.flops + 2 * shape.run(shown, above, length) + 2 * shape.head * times * answers / 2
        shapes = FORMS[step.cells[0].intervention].shapes(shape.hidden, shape.read(step), s.rank)
        adam = 4 * 4 * len(layers) * sum(map(math.prod, shapes.values()))  # parameter, gradient, two moments, float32
        at_once = min(s.batch_size * sides * length, max(length, max_tokens(kind, backward=True)))
        return Cost(recorded.tokens + shown, flops, recorded.cache, adam + above * shape.kept(at_once, length, size))
