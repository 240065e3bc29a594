"""Evaluate: stored texts -> a table of scores for each multiplier (`--mode evaluate`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from spilt import judges, verbs
from spilt.analysis import scores
from spilt.analysis import texts as offline
from spilt.analysis.behaviour import words
from spilt.analysis.provenance import made_otherwise
from spilt.artifacts import manifest, texts
from spilt.artifacts.journal import Journal
from spilt.artifacts.losses import NEUTRAL
from spilt.artifacts.scores import ALONG, CHOICE, HARMONIC, NEUTRAL_LOSS, TABLE, UNPARSABLE
from spilt.cell import Cell
from spilt.data import readers
from spilt.data.chat import Encoded, Question, readable
from spilt.data.prompt_baseline import behind
from spilt.engine import activations, choice, divergence, score, whole
from spilt.errors import UserError
from spilt.judges.rubric import Rubric, harmonic_mean
from spilt.steering import hooks
from spilt.steering.steering import Steering
from spilt.tasks.recordings import Run, stored, to_make
from spilt.verbs import Step
from spilt.verbs.evaluate import AGAIN, TEST

log = logging.getLogger("spilt")
PARTS = ("concept", "instruction", "fluency")  # of AxBench's overall score
NOT_FINITE, NO_TEXT = "not a finite number", "empty text"
WORST = 0.95  # of a text's tokens
WHOLE = 10**6  # tokens: a stored text is not cut
HOW_MADE = ("use_chat_template", "system_prompt", "steer_positions", "method", "intervention_method", "site")  # of texts, and of this


class Value(NamedTuple):
    """A row of TABLE without its multiplier and concept. value None: reason says why."""

    item: int
    response: int
    measure: str
    value: float | None
    reason: str = ""


class Unfinished(Journal):
    """What the model says of texts, by the table that it belongs to: [identity, concept, item, response, the values of ALONG]."""

    def read(self, identity: str) -> dict[tuple[int, int, int], list[float | None]]:
        found = {}
        for line in self.whole():
            try:
                whose, concept, item, response, values = line
                if whose == identity and len(values) == len(ALONG) and all(v is None or math.isfinite(v) for v in values):
                    found[concept, item, response] = values
            except (ValueError, TypeError):  # not ours
                continue
        return found


def evaluate(step: Step, run: Run) -> str:
    """The tables that are not there yet; several processes deal the multipliers out."""
    outputs = dict(zip(step.multipliers, verbs.output_parts(step, run.request.limit, run.seen).items(), strict=True))
    wanted = to_make(step, run, outputs)
    if not wanted:
        return "already done"
    for said in run.team.on_main(lambda: made_otherwise(run.store, step.cells[0])):
        log.warning("%s: %s", step, said)
    unfinished = Unfinished(run.store.unfinished_scores(step.cells[0], run.team.rank))
    if run.request.force:
        run.team.on_main(unfinished.remove)
    judge = _judge(step, run)
    cells = [_Texts(step, cell, run) for cell in step.cells]

    def work() -> None:
        mine = run.team.shard(wanted)
        try:
            for m, path in zip(step.multipliers, step.texts, strict=True):
                if m in mine:
                    _refuse_others(step, path, run)
                    _table(step, run, cells, m, path, outputs[m], judge, unfinished)
        finally:
            unfinished.close()
            if judge is not None:
                line = f"judge {judge.name}: {judge.tally}"
                if judge.tally.missing:
                    log.warning("%s", line)
                elif not run.progress.quiet:
                    run.progress.tell(line)

    run.team.gather(work)
    run.team.on_main(unfinished.remove)
    if judge is not None and (mute := run.team.on_main(lambda: _unrated(step))):
        raise ConnectionError(f"the judge {judge.name} gave no rating ({mute}); what needs none is stored, and the same command asks again")
    return "done"


def _unrated(step: Step) -> str:
    """Why nobody has rated any text of a step, where asking again may help; '' where somebody has."""
    table, names = scores.read_all(step.outputs), [rubric["name"] for rubric in step.scoring["rubrics"]]
    rated = table[table["measure"].isin(names)]
    if rated["value"].notna().any() or not any((manifest.read(path) or {}).get("notes", {}).get(AGAIN) for path in step.outputs):
        return ""
    return "; ".join(f"{why}: {count}" for why, count in sorted(rated["reason"].value_counts().items()))


def _judge(step: Step, run: Run) -> judges.Judge | None:
    """One for all steps of a run: a local model is loaded once."""
    if not step.scoring:
        return None
    if run.recordings.judge is None:
        about = (run.request.base_dir, run.store.judged(), run.request.device, step.settings.dtype)
        run.recordings.judge = judges.judge_of(str(run.request.judge), *about)
    return run.recordings.judge


def _table(
    step: Step,
    run: Run,
    cells: Sequence[_Texts],
    m: float,
    path: Path,
    output: tuple[Path, dict[str, Any]],
    judge: judges.Judge | None,
    unfinished: Unfinished,
) -> None:
    """The scores at one multiplier, stored."""
    rows: list[tuple[Any, ...]] = []
    again = 0
    # of a table that only lacks ratings, what the model said of the texts stays
    usable = not run.request.force and manifest.standing(*output) == "done"
    before = scores.read(output[0]).query("measure in @ALONG") if usable else pd.DataFrame(columns=[*TABLE])
    stored_rows = texts.read(path)
    for texts_of in cells:
        concept = texts_of.cell.concept or 0
        said = texts_of.rows(stored_rows, path)
        values = [*texts_of.at_first_token(m), *texts_of.neutral(m), *_by_themselves(said, texts_of.pairs)]
        values += _along(texts_of, said, m, manifest.identity(output[1]), unfinished, before)
        if judge is not None:
            rated, lost = _judged(step, judge, texts_of, said, run)
            values, again = [*values, *rated], again + lost
        rows += [(m, concept, *value) for value in values]
    table = pd.DataFrame(rows, columns=[*TABLE])
    run.store_result(step, output[0], table.to_csv(index=False, lineterminator="\n"), output[1], {AGAIN: again, "rows": len(table)})


def _refuse_others(step: Step, path: Path, run: Run) -> None:
    """Raises UserError for texts that are not of the vector (or prompt), model, data and template that are asked for now. Without manifest:
    not known."""
    if not manifest.manifest_path(path).exists():
        return
    record = manifest.read(path)
    if record is None or not manifest.matches(path, record):
        raise UserError(f"{path}: is not the file that its manifest speaks of (damaged, or changed by hand); --mode apply makes it again")
    then = record.get("parts") or {}
    settings = then.get("settings") or {}
    now = verbs.parts_of(step, "prompts", {}, run.request.limit, run.seen)
    same: tuple[str, ...] = ("model", "data", "vectors", "columns")
    same += ("prompt",) if step.prompt else ()
    before = {name: then.get(name) for name in same} | {name: settings.get(name) for name in HOW_MADE if name in settings}
    wanted = {name: now[name] for name in same} | {name: now["settings"].get(name) for name in HOW_MADE if name in settings}
    if other := manifest.differences(before, wanted):
        raise UserError(f"{path}: was made with {other.replace('(now', '(wanted')}; --mode apply makes it again")


class _Texts:
    """What is known of one cell whatever the multiplier: its prompts, its held-out pairs and neutral texts, encoded and recorded once.

    Of a prompt baseline, 'steered' is the unsteered model behind the prompt.
    """

    def __init__(self, step: Step, cell: Cell, run: Run) -> None:
        self.step, self.cell, self.run, self.s = step, cell, run, step.settings
        self.chat = run.host.chat(self.s.use_chat_template, self.s.system_prompt)

    @cached_property
    def steering(self) -> Steering:
        return stored(self.cell, self.s, self.run)

    def _read(self, purpose: str) -> list[Any]:
        """The rows of a data file, [] where the dataset has none."""
        if purpose not in self.step.data:
            return []
        fmt = self.run.entry(self.step, purpose)
        concept = self.cell.concept if fmt.multi_concept else None
        return list(readers.read_entry(fmt, concept, self.run.request.limit))

    @cached_property
    def prompts(self) -> list[readers.Prompt]:
        return self._read("prompts")

    @cached_property
    def pairs(self) -> list[readers.Pair]:
        """Held-out pairs where each answer is one word (or a letter), else none."""
        found: list[readers.Pair] = self._read(TEST)
        one = all(pair.kind == readers.PAIRS and len(words(answer)) == 1 for pair in found for _, answer in pair.sides)
        return found if one else []

    def rows(self, every: Sequence[texts.Row], path: Path) -> list[texts.Row]:
        """Those of this concept. Raises UserError where they answer other prompts than the data file has."""
        limit = self.run.request.limit
        found = [row for row in every if row.concept == (self.cell.concept or 0) and (limit is None or row.number < limit)]
        if not found:
            raise UserError(f"{path}: holds no text of {self.cell}; --mode apply makes it again")
        for row in found:
            if not row.texts:
                raise UserError(f"{path}: row {row.number} has no text; --mode apply makes it again")
            if row.number >= len(self.prompts) or readable(self.prompts[row.number].input) != row.prompt:
                raise UserError(
                    f"{path}: row {row.number} answers another prompt than {self.step.data['prompts']} has; --mode apply makes it again"
                )
        return found

    def encode(self, question: Question, answer: str, row: int) -> Encoded:
        """As the steered model reads it, without the template's suffix."""
        turns = self.step.prompt.turns if self.step.prompt else ()
        return self.plainly(behind(turns, question, self.s.system_prompt) if turns else question, answer, row)

    def plainly(self, question: Question, answer: str, row: int) -> Encoded:
        """As the unsteered model reads it."""
        found = self.chat.encode(question, answer, WHOLE, row)
        return found._replace(input_ids=found.input_ids[: len(found.input_ids) - found.suffix_length], suffix_length=0)

    def _scorer(self, sequences: list[Encoded], together: int) -> score.Scorer:
        """By the engine that applies, with the tokens steered that are steered while text is made."""
        model, pad, where = self.run.host.model, self.run.host.pad_id, self.s.applied_positions
        if self.step.prompt is not None:
            return whole.Scorer(model, None, sequences, pad)
        family = str(model.config.model_type)  # type: ignore[union-attr]
        if choice.why_plain(self.steering.places, "measure", family=family, engine=self.run.request.engine, positions=where):
            return whole.Scorer(model, self.steering, sequences, pad, where, self.chat.prefix_length)
        base, read = score.recorded_at(self.steering)
        recorded = activations.record(model, base, sequences, [read] if read else [], pad, together)
        return score.Recorded(model, self.steering, recorded, where, self.chat.prefix_length)

    @cached_property
    def _first_tokens(self) -> score.Scorer:
        both = [self.encode(question, answer, pair.row) for pair in self.pairs for question, answer in pair.sides]
        return self._scorer([one._replace(input_ids=one.input_ids[: one.prompt_length + 1]) for one in both], together=2)

    @cached_property
    def _neutral_texts(self) -> score.Scorer:
        rows = self._read(NEUTRAL)
        return self._scorer([self.encode(row.input, str(row.reference_response), row.row) for row in rows], together=1)

    def along(self, m: float, texts: Sequence[Encoded], plain: Sequence[Encoded]) -> Iterator[divergence.Told]:
        """KL(steered || unsteered) and the unsteered model's losses along texts. plain: the same answers without the prompt before them."""
        model, pad = self.run.host.model, self.run.host.pad_id
        if self.step.prompt is not None:
            return divergence.compared(model, lambda _: hooks.attach(model, []), texts, plain, pad)
        return divergence.told(model, self.steering, m, texts, pad, self.s.applied_positions, self.chat.prefix_length)

    def at_first_token(self, m: float) -> Iterator[Value]:
        """log_odds = log p(first token of matching) - log p(that of not matching); accuracy: is it above 0."""
        if not self.pairs:
            return
        scorer = self._first_tokens
        nats = score.losses(scorer, [m]).answer[0]
        for item in range(len(self.pairs)):
            first, other = (scorer.sequences[2 * item + k].input_ids[-1] for k in (0, 1))
            odds = float(nats[2 * item + 1] - nats[2 * item])
            why = "both answers have the same first token" if first == other else "" if math.isfinite(odds) else NOT_FINITE
            yield Value(item, 0, CHOICE[0], None if why else float(odds > 0), why)
            yield Value(item, 0, CHOICE[1], None if why else odds, why)

    def neutral(self, m: float) -> Iterator[Value]:
        """Loss of neutral text, nats per token."""
        if NEUTRAL not in self.step.data:
            return
        found = score.losses(self._neutral_texts, [m])
        for item, nats in enumerate((found.answer[0] / found.answer_tokens).tolist()):
            yield Value(item, 0, NEUTRAL_LOSS, *((nats, "") if math.isfinite(nats) else (None, NOT_FINITE)))


def _by_themselves(said: Sequence[texts.Row], pairs: Sequence[readers.Pair]) -> Iterator[Value]:
    """What needs neither model nor judge."""
    answers = {readable(pair.questions[0]): (pair.matching, pair.not_matching) for pair in pairs}
    for row in said:
        for response, text in enumerate(row.texts):
            for name, measure in offline.OFFLINE.items():
                value = measure(text)
                yield Value(row.number, response, name, value, offline.TOO_SHORT if value is None else "")
            if row.prompt in answers:
                value = offline.begins_with(text, *answers[row.prompt])
                yield Value(row.number, response, CHOICE[2], value, "" if value is not None else "begins with neither answer")


def _along(of: _Texts, said: Sequence[texts.Row], m: float, identity: str, unfinished: Unfinished, before: pd.DataFrame) -> Iterator[Value]:
    """Perplexity exp(mean -log p_base) and KL along each text; batches are decided by the texts alone, so a rerun finds the same bits."""
    asked = [(row, k) for row in said for k, text in enumerate(row.texts) if text.strip()]
    encoded = [of.encode(of.prompts[row.number].input, row.texts[k], row.number) for row, k in asked]
    plain = encoded
    if of.step.prompt is not None:
        plain = [of.plainly(of.prompts[row.number].input, row.texts[k], row.number) for row, k in asked]
    order = sorted(range(len(asked)), key=lambda i: -len(encoded[i].input_ids))
    known, concept, host = unfinished.read(identity), of.cell.concept or 0, of.run.host
    for key, own in before.groupby(["concept", "item", "response"]):
        values = own.set_index("measure")["value"].reindex(ALONG)
        known[key] = [None if math.isnan(value) else float(value) for value in values]
    together = divergence.at_once(host.model, encoded) if encoded else 1
    with of.run.progress.bar(total=len(asked), desc=f"evaluate {of.cell} m={m:g}", unit="text") as bar:
        for batch in (order[i : i + together] for i in range(0, len(order), together)):
            keys = [(concept, asked[i][0].number, asked[i][1]) for i in batch]
            if not all(key in known for key in keys):
                found = of.along(m, [encoded[i] for i in batch], [plain[i] for i in batch])
                known |= {key: _numbers(told) for key, told in zip(keys, found, strict=True)}
                unfinished.append([identity, *key, known[key]] for key in keys)
            bar.update(len(batch))
    for row in said:
        for k in range(len(row.texts)):
            values = known.get((concept, row.number, k), [None] * len(ALONG))
            why = NOT_FINITE if row.texts[k].strip() else NO_TEXT
            yield from (
                Value(row.number, k, name, value, "" if value is not None else why) for name, value in zip(ALONG, values, strict=True)
            )


def _numbers(told: divergence.Told) -> list[float | None]:
    kl, loss = told.kl.numpy(), told.loss.numpy()
    with np.errstate(over="ignore"):
        found = (float(np.exp(loss.mean())), float(kl.mean()), float(np.quantile(kl, WORST)))
    return [value if math.isfinite(value) else None for value in found]


def _judged(step: Step, judge: judges.Judge, of: _Texts, said: Sequence[texts.Row], run: Run) -> tuple[list[Value], int]:
    """The ratings of each rubric, and how many a rerun may still get."""
    rubrics = judges.rubrics_of(run.request.rubrics) if run.request.rubrics else judges.of_dataset(of.cell.dataset)
    limit = step.scoring.get("limit")
    asked = [(row, k, text) for row in said if limit is None or row.number < limit for k, text in enumerate(row.texts)]
    again, rated = 0, dict[str, list[Value]]()
    for rubric in rubrics:
        prompts = [
            rubric.messages(question=row.prompt, answer=text, concept=of.prompts[row.number].concept, reference=row.reference)
            for row, _, text in asked
        ]
        with run.progress.bar(total=len(prompts), desc=f"judge {rubric.name} {of.cell}", unit="text") as bar:
            replies = judge.replies(prompts, rubric.parameters, bar.update)
        rated[rubric.name] = [_rated(rubric, row, k, reply) for (row, k, _), reply in zip(asked, replies, strict=True)]
        again += sum(reply.again for reply in replies)
    out = [value for values in rated.values() for value in values]
    if rated.keys() >= set(PARTS):
        out += [_overall(parts) for parts in zip(*(rated[name] for name in PARTS), strict=True)]
    return out, again


def _rated(rubric: Rubric, row: texts.Row, response: int, reply: judges.Reply) -> Value:
    rating = None if reply.text is None else rubric.rating(reply.text)
    return Value(row.number, response, rubric.name, rating, reply.why or ("" if rating is not None else UNPARSABLE))


def _overall(parts: Sequence[Value]) -> Value:
    ratings = [part.value for part in parts if part.value is not None]
    whole_one = len(ratings) == len(parts)
    return parts[0]._replace(
        measure=HARMONIC, value=harmonic_mean(ratings) if whole_one else None, reason="" if whole_one else "one of its ratings is missing"
    )
