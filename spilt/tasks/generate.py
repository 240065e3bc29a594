"""Generate: text from a steered model, or from the unsteered one behind a prompt (`--mode apply`)."""

from __future__ import annotations

import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from spilt import plan, verbs
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.journal import Journal
from spilt.artifacts.texts import CONCEPT_KEYS, ROW_KEYS
from spilt.cell import Cell
from spilt.data import readers
from spilt.data.chat import readable
from spilt.data.prompt_baseline import behind
from spilt.engine import decode as generation
from spilt.engine import sampling, whole
from spilt.steering.steering import Steering
from spilt.tasks.context import check_context, texts_at_once
from spilt.tasks.recordings import Run, stored, to_make
from spilt.verbs import Step
from spilt.verbs.generate import text_identities

log = logging.getLogger("spilt")


class Text(NamedTuple):
    """Which text of a step: multiplier (None: the unsteered answer), concept, prompt number, response number."""

    multiplier: float | None
    concept: int | None
    prompt: int
    response: int


class Unfinished(Journal):
    """Texts that are made but not yet in a results file: a line each, so a killed run loses at most the last.

    A line counts only with the identity of the result that it belongs to. Lines of other settings are ignored.
    """

    def __init__(self, path: Path, identities: dict[float | None, str]) -> None:
        super().__init__(path)
        self.identities = identities

    def read(self) -> dict[Text, list[int]]:
        """Text -> new token ids, of the lines of this request."""
        found: dict[Text, list[int]] = {}
        known = {identity: multiplier for multiplier, identity in self.identities.items()}
        for line in self.whole():
            try:
                identity, concept, prompt, response, tokens = line
                if identity in known and all(isinstance(token, int) for token in tokens):
                    found[Text(known[identity], concept, prompt, response)] = tokens
            except (ValueError, TypeError):  # not ours
                continue
        return found

    def add(self, text: Text, tokens: list[int]) -> None:
        self.append([[self.identities[text.multiplier], *text[1:], tokens]])


def generate(step: Step, run: Run) -> str:
    """Text for every prompt, multiplier and response of a step, in one stream; one file per multiplier."""
    outputs = dict(zip(step.multipliers, verbs.output_parts(step, run.request.limit, run.seen).items(), strict=True))
    wanted = to_make(step, run, outputs)
    if not wanted:
        return "already done"
    identities = text_identities({m: outputs[m][1] for m in wanted})
    unfinished = Unfinished(run.store.unfinished(step.cells[0], run.team.rank), identities)
    if run.request.force:
        run.team.on_main(unfinished.remove)
    made: dict[float, list[dict[str, Any]]] = {m: [] for m in wanted}
    try:
        for cell in step.cells:
            for m, results in _texts(cell, step, wanted, run, unfinished).items():
                made[m].append(results)
    finally:
        unfinished.close()

    def write() -> None:
        for m in wanted:
            content: Any = made[m] if step.cells[0].concept is not None else made[m][0]["generated_results"]
            run.seen.again(step.inputs)
            atomic_write(run.store.generation_log(step.cells[0], m), _generation_log(step, m, made[m]))
            run.store_result(step, outputs[m][0], json.dumps(content, indent=2, ensure_ascii=False) + "\n", outputs[m][1])
        unfinished.remove()

    run.team.on_main(write)
    return "done"


def _texts(cell: Cell, step: Step, multipliers: list[float], run: Run, unfinished: Unfinished) -> dict[float, dict[str, Any]]:
    """multiplier -> {concept_id, concept_name, generated_results, eval_data, multiplier} of one cell."""
    s: Any = step.settings
    limit = readers.fewest(run.request.limit, s.generation_data_size)
    prompts = readers.read_prompts(run.entry(step, "prompts"), cell.concept, limit)
    steering = run.team.each(lambda: stored(cell, s, run)) if step.prompt is None else Steering.nothing(run.host.model)
    chat = run.host.chat(s.use_chat_template, s.system_prompt)
    turns = step.prompt.turns if step.prompt else ()
    questions = [behind(turns, prompt.input, s.system_prompt) if turns else prompt.input for prompt in prompts]
    ids = [tuple(chat.prompt_ids(question)) for question in questions]
    bare = [tuple(chat.prompt_ids(prompt.input)) for prompt in prompts] if turns and s.generate_orig_output else ids
    prefixes = chat.prefixes_of(questions)

    strengths = [*([None] if s.generate_orig_output else []), *multipliers]
    every = [Text(m, cell.concept, i, k) for m in strengths for i in range(len(ids)) for k in range(s.num_responses)]
    how = sampling.decoding(s.generation_params.as_kwargs(), run.host.model, run.host.tokenizer)
    lengths = [(prompt.row, len(tokens)) for prompt, tokens in zip(prompts, ids, strict=True)]
    way_out = "shorten the prompt or lower generation_params.max_new_tokens"
    check_context(run.host.model, f"apply {cell}, prompts", lengths, way_out, how.max_new_tokens)

    known = run.team.on_main(unfinished.read)

    def work() -> dict[Text, list[int]]:
        mine = run.team.shard(every)
        texts = {text: known[text] for text in mine if text in known}
        todo = [text for text in mine if text not in texts]
        # the seed is the prompt's and the response's own: the same random numbers at every multiplier
        rows = [
            generation.Row((ids if t.multiplier is not None else bare)[t.prompt], t.multiplier or 0.0, f"{s.seed}/{t.prompt}/{t.response}")
            for t in todo
        ]
        with run.progress.bar(total=len(mine), initial=len(texts), desc=f"apply {cell}", unit="text") as bar:
            if step.engine:  # exports are above this room: looked up as a verb's work is
                vllm = import_module("spilt.export.serving")
                stream = vllm.texts(run.host, steering, rows, how, s.dtype, vllm.cards(run.request.device))
            elif plan.why_plain(step, run.request.engine):
                where = s.applied_positions if step.prompt is None else "all"
                stream = whole.texts(run.host.model, steering, rows, how, where, [prefixes[t.prompt] for t in todo])
            else:
                batch = texts_at_once(run.host.model, run.request.batch_size or s.batch_size, ids, how.max_new_tokens)
                log.info("apply %s: %s", cell, batch)
                stream = generation.generate(run.host.model, steering, rows, how, batch.texts, step=run.request.decode_step)
            for number, new in stream:
                texts[todo[number]] = new
                if run.team.writes:
                    unfinished.add(todo[number], new)
                bar.update()
        return texts

    texts = {text: tokens for part in run.team.gather(work) for text, tokens in part.items()}

    def decode(tokens: Any, skip: bool) -> str:
        return run.host.tokenizer.decode(list(tokens), skip_special_tokens=skip)

    def answers(multiplier: float | None, i: int) -> list[list[int]]:
        return [texts[Text(multiplier, cell.concept, i, k)] for k in range(s.num_responses)]

    out = {}
    for m in multipliers:
        results = [
            dict(
                zip(
                    ROW_KEYS,
                    (
                        readable(prompt.input),
                        [decode(new, True) for new in answers(None, i)] if s.generate_orig_output else [],
                        [decode(new, True) for new in answers(m, i)],
                        prompt.reference_response,
                        [decode([*ids[i], *new], False) for new in answers(m, i)],
                    ),
                    strict=True,
                )
            )
            for i, prompt in enumerate(prompts)
        ]
        name = next((prompt.concept for prompt in prompts if prompt.concept), None)
        extra = [prompt.extra for prompt in prompts]
        out[m] = dict(zip(CONCEPT_KEYS, (cell.concept, name, results, extra, m), strict=True))
    return out


def _generation_log(step: Step, multiplier: float, made: list[dict[str, Any]]) -> str:
    rows = sum(len(part["generated_results"]) for part in made)
    return f"{step}\nmultiplier {multiplier}\nprompts {rows}\nsettings {json.dumps(step.settings.as_dict(), default=str)}\n"
