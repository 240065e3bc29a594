"""Stage data: the unsteered model answers each question under both personas of a pair. Tokens as drawn, end of turn kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spilt.artifacts.manifest import digest, identity
from spilt.artifacts.weights import SIDES
from spilt.errors import UserError
from spilt.weight_steering import personas
from spilt.weight_steering.stage import Context

log = logging.getLogger("spilt")
STAGE = "data"
EXAMPLE = ("behavior", "split", "cat", "topic_idx", "persona_idx", "sample_idx", "prompt", "sys_prompt_pos", "sys_prompt_neg")
ANSWER = ("response", "tokens", "ended")  # of either side, as response_pos


class Asked(NamedTuple):
    """What is to be answered, and what decides the result."""

    name: str
    questions: list[personas.Question]
    pairs: Sequence[personas.Pair]
    places: list[Place]
    parts: dict[str, Any]


class Place(NamedTuple):
    """Which answer: of a question, a pair of personas, a sample, a side."""

    topic: int
    persona: int
    sample: int
    side: str


def make(run: Context) -> None:
    """personas.json (what is asked, of whom) and answers.jsonl (a row for each pair of answers); the answers are dealt out."""
    asked = run.team.on_main(lambda: _asked(run))
    if asked is None:
        return
    answers: dict[Place, list[int]] = {}
    for part in run.team.gather(lambda: _answers(run, asked)):
        answers |= part
    run.team.on_main(lambda: _store(run, asked, answers))


def _asked(run: Context) -> Asked | None:
    """personas.json is stored; None where the answers are too."""
    words = run.words
    told = personas.behaviour(run.behaviour, words["personas"])
    every = personas.questions(words["questions"], words["seed"])
    pairs = told.pairs[: words["n_personas"]]
    for split in (personas.TRAIN, personas.AUDIT):
        if not personas.of_split(every, split):
            raise UserError(
                f"there is no question of the split {split}; a file of questions wants some of each: {', '.join(personas.SPLITS)}"
            )
    asked = {"behavior": told.name, "about": told.about, "intent": dict(told.intent), "pairs": pairs, "questions": every}
    content = json.dumps(asked, indent=1, ensure_ascii=False) + "\n"
    settings = run.settings(STAGE) | {
        "personas": digest(json.dumps([told.about, pairs, dict(told.intent)]).encode()),
        "judge": _judge_name(run),
    }
    settings["questions"] = digest(json.dumps(every).encode())
    parts = run.parts(STAGE, (), settings)
    if run.wanted(run.folder.personas, parts):
        run.store(run.folder.personas, content, parts)
    parts = run.parts(STAGE, [run.folder.personas], settings)
    if not run.wanted(run.folder.answers, parts):
        run.finished(STAGE)
        return None
    run.begin(STAGE)
    places, questions = _places(words, every, pairs)
    return Asked(told.name, questions, pairs, places, parts)


def _store(run: Context, asked: Asked, answers: Mapping[Place, list[int]]) -> None:
    kept, notes = _sound(_rows(run, asked, answers), run)
    gate(kept, str(run.folder.answers))
    run.store(run.folder.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), asked.parts, notes)
    run.finished(STAGE)


def _places(
    words: Mapping[str, Any], every: Sequence[personas.Question], pairs: Sequence[personas.Pair]
) -> tuple[list[Place], list[personas.Question]]:
    train = personas.of_split(every, personas.TRAIN, words["n_topics"])
    audit = personas.of_split(every, personas.AUDIT, words["n_audit"])
    questions = [*train, *audit]
    return [
        Place(topic, persona, sample, side)
        for topic in range(len(questions))
        for persona in range(len(pairs))
        for sample in range(words["n_samples" if topic < len(train) else "n_audit_samples"])
        for side in SIDES
    ], questions


def _answers(run: Context, asked: Asked) -> dict[Place, list[int]]:
    """New tokens of those dealt to this process; what an earlier run has made is taken from the journals."""
    own, journal, mine = identity(asked.parts), run.journal(STAGE), run.team.shard(asked.places)
    known = {Place(*line[1]): line[2] for line in journal.whole() if isinstance(line, list) and len(line) == 3 and line[0] == own}
    found = {place: known[place] for place in mine if place in known}
    todo = [place for place in mine if place not in found]
    if not todo:
        return found
    from spilt.engine import sampling
    from spilt.engine.prompts import Row
    from spilt.weight_steering import arms

    words, host, chat = run.words, run.host, run.chat
    how = {"do_sample": words["temperature"] > 0, "max_new_tokens": words["max_new_tokens"]}
    if how["do_sample"]:
        how |= {name: words[name] for name in ("temperature", "top_p", "top_k")}
    rows = []
    for place in todo:
        system = getattr(asked.pairs[place.persona], place.side)
        ids = tuple(chat.prompt_ids((("system", system), ("user", asked.questions[place.topic].text))))
        rows.append(Row(ids, 0.0, f"{words['seed']}/{place.topic}/{place.persona}/{place.sample}/{place.side}"))
    for number, tokens in arms.tokens(host, rows, sampling.decoding(how, host.model, host.tokenizer), words["batch_size"]):
        found[todo[number]] = tokens
        journal.append([[own, list(todo[number]), tokens]])
    journal.close()
    return found


def _rows(run: Context, asked: Asked, answers: Mapping[Place, list[int]]) -> list[dict[str, Any]]:
    tokenizer, ends = run.host.tokenizer, _ends(run)
    rows = []
    for place in asked.places[:: len(SIDES)]:
        question, pair = asked.questions[place.topic], asked.pairs[place.persona]
        row: dict[str, Any] = dict(zip(EXAMPLE, (asked.name, question.split, question.cat, *place[:3], question.text, *pair), strict=True))
        for side in SIDES:
            tokens = answers[place._replace(side=side)]
            text = tokenizer.decode(tokens, skip_special_tokens=True).rstrip()
            row |= dict(zip((f"{one}_{side}" for one in ANSWER), (text, tokens, tokens[-1] in ends), strict=True))
        rows.append(row)
    return rows


def _ends(run: Context) -> tuple[int, ...]:
    from spilt.engine import sampling

    return sampling.decoding({}, run.host.model, run.host.tokenizer).eos


def _sound(rows: list[dict[str, Any]], run: Context) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that are kept, and what is told of the others."""
    kept = [row for row in rows if row["response_pos"].strip() and row["response_neg"].strip()]
    unended = sum(not row[f"ended_{side}"] for row in kept for side in SIDES)
    notes: dict[str, Any] = {"rows": len(rows), "empty": len(rows) - len(kept), "without_end": unended}
    if notes["empty"]:
        log.warning("%d of %d pairs have an empty answer and are left out", notes["empty"], len(rows))
    if unended:
        log.warning("%d of %d answers do not end within --max-new-tokens %d", unended, 2 * len(kept), run.words["max_new_tokens"])
    if run.words["judge"] is not None:
        kept, more = _judged(kept, run)
        notes |= more
    return kept, notes | {"kept": len(kept)}


def _judge_name(run: Context) -> str | None:
    from spilt import judges

    return None if run.words["judge"] is None else judges.name_of(run.words["judge"], run.base)


def _judged(rows: list[dict[str, Any]], run: Context) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pairs of which both answers show their own persona, as a judge rates them by the rubric `concept`.

    Raises UserError where ratings could not be had for now: who trains on what is left would never hear of the others.
    """
    from spilt import judges
    from spilt.artifacts.store import Store

    (rubric,) = judges.rubrics_of(["concept"])
    judge = judges.judge_of(run.words["judge"], run.base, Store(run.base).judged(), run.words["device"] or "cpu", run.words["dtype"])
    asked = [
        rubric.messages(question=row["prompt"], answer=row[f"response_{side}"], concept=row[f"sys_prompt_{side}"])
        for row in rows
        for side in SIDES
    ]
    replies = judge.replies(asked, rubric.parameters)
    if lost := sum(reply.again for reply in replies):
        raise UserError(f"{lost} of {len(replies)} ratings could not be had; the same command asks for these again; judge {judge.tally}")
    ratings = [None if reply.text is None else rubric.rating(reply.text) for reply in replies]
    both = list(zip(ratings[0::2], ratings[1::2], strict=True))
    rated = [(row, pair) for row, pair in zip(rows, both, strict=True) if None not in pair]
    kept = [row for row, pair in rated if min(rating for rating in pair if rating is not None) >= run.words["judge_at_least"]]
    missing = len(rows) - len(rated)
    log.warning("judge %s: %d of %d pairs kept, %d without a rating left out", judge.name, len(kept), len(rows), missing)
    return kept, {"judge": judge.name, "asked": str(judge.tally), "unrated": missing, "off_behaviour": len(rated) - len(kept)}


def gate(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises UserError for answers that teach nothing: none, an empty one, both sides the same throughout, a side all alike."""
    way_out = "look at the personas, another --seed, a higher --temperature, or a judge that keeps more"
    for split in (personas.TRAIN, personas.AUDIT):
        own = [row for row in rows if row["split"] == split]
        if not own:
            raise UserError(f"{where}: no rows of the split {split} are left; {way_out}")
        texts = {side: [row[f"response_{side}"] for row in own] for side in SIDES}
        if empty := sum(not text.strip() for side in SIDES for text in texts[side]):
            raise UserError(f"{where}: {empty} answers of the split {split} are empty; {way_out}")
        if texts["pos"] == texts["neg"]:
            raise UserError(f"{where}: each of the {len(own)} pairs of the split {split} has the same answer twice; {way_out}")
        for side in SIDES:
            if len(own) > 1 and len(set(texts[side])) == 1:
                raise UserError(f"{where}: all {len(own)} answers of the {side} side of the split {split} are the same; {way_out}")


def read(run: Context, split: str) -> list[dict[str, Any]]:
    """The stored rows of a split, looked at again."""
    path = run.use(run.folder.answers)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    gate(rows, str(path))
    return [row for row in rows if row["split"] == split]


def sequences(run: Context, rows: Sequence[Mapping[str, Any]], side: str, longest: int | None = None, system: str = "") -> list[Any]:
    """Question without persona, then the answer's own tokens: what is scored begins where the prompt ends, whatever a template does.

    A template that writes an assistant's turn otherwise than it asks for one (thinking blocks) has no say: nothing is rendered again.
    longest: cut there. system: a prompt before the question.
    """
    from spilt.data.chat import Encoded

    made = []
    for row in rows:
        question = (("system", system), ("user", row["prompt"])) if system else row["prompt"]
        prompt = run.chat.prompt_ids(question)
        ids = (*prompt, *row[f"tokens_{side}"])[:longest]
        if len(ids) <= len(prompt):
            raise UserError(
                f"the question {row['prompt'][:60]!r} of {len(prompt)} tokens leaves no room for an answer: raise --max-length {longest}"
            )
        made.append(Encoded(ids, len(prompt), 0))
    return made
