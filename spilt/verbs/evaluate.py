"""evaluate (`--mode evaluate`): stored texts -> scores, a table for each multiplier: what a judge says, the first tokens of answers of one
word, and what needs neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spilt.artifacts import manifest
from spilt.artifacts.losses import NEUTRAL
from spilt.artifacts.store import Store
from spilt.data.chat import readable
from spilt.data.readers import Pair
from spilt.verbs.base import RECOMMENDED, Request, Step, Verb
from spilt.verbs.estimate import TEMPLATE, Cost, Shape, tokens

TEST = "test"  # purpose of the held-out pairs
AGAIN = "ask_again"  # note of a table: how many ratings a rerun may still get


class Evaluate(Verb):
    name, mode = "evaluate", "evaluate"
    does = "score stored texts: by a judge, by first tokens, and without either"
    flags = ("multipliers", "judge", "rubric", "judge_limit", "prompt_baseline")
    sections = {TEST: "valid", NEUTRAL: "neutral", "prompts": "generation"}
    optional = (TEST, NEUTRAL)
    settings_of = "generate"
    work = "spilt.tasks.evaluate:evaluate"
    together = True
    words = (RECOMMENDED,)
    prompts = True
    # of how the texts were made: they are there
    not_deciding = (
        "multipliers",
        "batch_size",
        "generation_params",
        "generation_data_size",
        "num_responses",
        "generate_orig_output",
        "seed",
    )

    def filled(self, step: Step, request: Request, store: Store) -> Step:
        """The multipliers that have texts, unless some are asked for; the judge and its rubrics. Those of a recommendation have some."""
        from spilt import judges

        if step.prompt is None and request.multipliers is None and not request.words and (there := store.generated(step.cells[0])):
            step = step._replace(multipliers=tuple(multiplier for multiplier, _ in there))
        rubrics = judges.rubrics_of(request.rubrics) if request.rubrics else judges.of_dataset(request.dataset)
        scoring: Mapping[str, Any] = {}
        lacks = ""
        if request.judge is not None and rubrics:
            name = judges.name_of(request.judge, request.base_dir)
            scoring = {"judge": name, "rubrics": [rubric.decides for rubric in rubrics], "limit": request.judge_limit}
        elif request.judge is not None:
            lacks = f"{request.dataset} has no rubric of its own, so the judge is not asked; --rubric {' '.join(judges.BUILT_IN)}, or FILE"
        elif rubrics:
            lacks = f"no judge: {', '.join(rubric.name for rubric in rubrics)} of the texts left out; {judges.HOW}"
        return step._replace(texts=tuple(store.results(step.cells[0], m) for m in step.multipliers), scoring=scoring, lacks=lacks)

    def outputs(self, store: Store, step: Step) -> list[Path]:
        return [store.scores(step.cells[0], m) for m in step.multipliers]

    def decided_by(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        others = {purpose: manifest.file_hash(path) for purpose, path in step.data.items() if purpose in self.optional and path.is_file()}
        same = {"concepts": [cell.concept for cell in step.cells], "split": "prompts", "others": others, "scoring": step.scoring}
        known = {path: manifest.file_hash(path) if path.is_file() else None for path in step.texts}
        return [
            ("prompts", {"multiplier": float(m), "texts": known[path], **same})
            for m, path in zip(step.multipliers, step.texts, strict=True)
        ]

    def complete(self, step: Step, path: Path) -> bool:
        """Ratings that could not be had are asked for again."""
        return not (manifest.read(path) or {}).get("notes", {}).get(AGAIN)

    def cost(self, step: Step, shape: Shape, rows: Sequence[Any], request: Request) -> Cost:
        """Each text through the steered and the unsteered model; of pairs two answers once per multiplier."""
        s, strengths = step.settings, len(step.multipliers)
        asked = [
            tokens(readable(question)) + TEMPLATE for row in rows for question in (row.questions if isinstance(row, Pair) else (row.input,))
        ]
        if isinstance(rows[0], Pair):
            read, times = sum(asked) + len(asked), strengths
        else:
            read, times = (sum(asked) + len(asked) * s.generation_params.max_new_tokens) * s.num_responses, 2 * strengths
        flops = times * (shape.run(read, shape.layers, read / len(rows)) + shape.head * read)
        limit = step.scoring.get("limit") or len(rows)
        each = len(step.scoring.get("rubrics", ())) * min(limit, len(rows)) * s.num_responses * strengths * len(step.cells)
        said = f"{each:,} ratings by {step.scoring['judge']}, less those that it has given before" if each else "no judge"
        return Cost(times * read, flops, 0, 2 * 4 * 2**26, said)
