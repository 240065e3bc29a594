"""--inspect: the first pairs and prompts as the model will see them: tokens, what is scored and steered, lengths. No weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from spilt.artifacts.losses import NEUTRAL
from spilt.data import entries, own, readers
from spilt.data.batches import position_mask
from spilt.data.chat import Chat, Encoded
from spilt.data.prompt_baseline import behind
from spilt.methods import METHODS
from spilt.model.host import tokenizer_of
from spilt.plan import Plan
from spilt.terminal import say
from spilt.verbs import VERBS, Request, Step

AVERAGED = "averaged"  # in place of positions: the answer's tokens, of which a closed form takes the mean
# of a row's sides where they are not two answers
NAMES = {readers.ONE_SIDED: ("matching",), readers.CONTRASTS: readers.SIDES, readers.BARE_CONTRASTS: readers.SIDES}
NOWHERE = "none"  # behind a prompt nothing is steered
WHOLE = 10**6  # tokens: to score texts nothing is cut
FIRST = 2  # rows shown of each file
PARTS = {"prefix": "-", "prompt": "q", "answer": "A", "suffix": "s"}  # of a sequence -> its mark in the masks


def inspected(made: Plan, request: Request) -> list[dict[str, Any]]:
    """An entry for each file and way of encoding that the steps use. Files of the user's own need not be taken over yet."""
    tokenizer = tokenizer_of(made.steps[0].model)
    found: dict[Any, dict[str, Any]] = {}
    for step in made.steps:
        s: Any = step.settings
        chat = Chat.of(tokenizer, s.use_chat_template, s.system_prompt or None)
        for purpose in (purpose for purpose in step.data if purpose != NEUTRAL):
            section, closed = VERBS[step.verb].sections[purpose], step.verb == "fit" and METHODS[step.cells[0].method].estimate is not None
            as_fitted = step.verb == "fit" or step.verb == "measure" and step.released
            where = AVERAGED if closed else NOWHERE if step.prompt else s.fitted_positions if as_fitted else s.applied_positions
            key = (
                section,
                step.cells[0].concept,
                step.verb == "generate",
                closed,
                where,
                s.use_chat_template,
                s.system_prompt,
                step.prompt,
            )
            if key not in found:
                rows: Sequence[Any]
                if request.own is not None:
                    rows = own.section(request.own, request.dataset, section)
                else:
                    fmt = entries.dataset_format(request.base_dir, request.dataset, section)
                    rows = readers.read_entry(fmt, step.cells[0].concept if fmt.multi_concept else None, request.limit)
                found[key] = _entry(step, purpose, chat, rows[: request.limit], closed, where)
    return list(found.values())


def _entry(step: Step, purpose: str, chat: Chat, rows: Sequence[Any], closed: bool, where: str) -> dict[str, Any]:
    s: Any = step.settings
    turns = step.prompt.turns if step.prompt else ()
    sequences: list[tuple[int, str, Encoded]] = []
    for row in rows:
        if isinstance(row, readers.Prompt):
            question = behind(turns, row.input, s.system_prompt) if turns else row.input
            ids = tuple(chat.prompt_ids(question))
            sequences.append((row.row, "prompt", Encoded(ids, len(ids), 0, chat.prefix_of(question))))
            continue
        named = NAMES.get(row.kind, ("matching", "not_matching"))
        for name, (question, text) in zip(named, row.sides, strict=False):
            if closed:
                made = chat.encode_caa(question, text, row.row, not s.multiple_choice)
            else:
                question = behind(turns, question, s.system_prompt) if turns else question
                made = chat.encode(question, text, getattr(s, "output_length", WHOLE), row.row)
            sequences.append((row.row, name, made))
    lengths = [len(one.input_ids) for *_, one in sequences]
    answers = [len(one.input_ids) - one.prompt_length - one.suffix_length for *_, one in sequences]
    shown = sequences[: FIRST * len(sequences) // len(rows)]
    positions = "all_generation" if closed else "all" if where == NOWHERE else where
    masks = position_mask([one for *_, one in shown], positions, chat.prefix_length).tolist()
    if where == NOWHERE:
        masks = [[False] * len(mask) for mask in masks]
    if closed and s.multiple_choice:
        masks = [[k == len(one.input_ids) - 2 for k in range(len(mask))] for (*_, one), mask in zip(shown, masks, strict=True)]
    return {
        "step": str(step), "purpose": purpose, "file": step.data[purpose], "rows": len(rows), "positions": where,
        "tokens": [min(lengths), median(lengths), max(lengths)], "answer_tokens": [min(answers), median(answers), max(answers)],
        "cut": 0 if closed or step.verb == "generate" else sum(one.suffix_length < len(chat.suffix_ids) for *_, one in sequences),
        "shown": [
            {"row": row, "text": name, **_tokens(chat, one, mask)} for (row, name, one), mask in zip(shown, masks, strict=True)
        ],
    }  # fmt: skip


def _tokens(chat: Chat, one: Encoded, mask: Sequence[bool]) -> dict[str, Any]:
    """Each part's tokens as text, and which of them are steered, or averaged."""
    n, prefix = len(one.input_ids), min(one.prefix(chat.prefix_length), one.prompt_length)
    ends = dict(zip(PARTS, (prefix, one.prompt_length, n - one.suffix_length, n), strict=True))
    starts = dict(zip(PARTS, (0, *ends.values()), strict=False))
    words = [chat.tokenizer.decode([token], skip_special_tokens=False) for token in one.input_ids]
    parts = {part: words[starts[part] : ends[part]] for part in PARTS}
    roles = "".join(PARTS[part] * len(parts[part]) for part in PARTS)
    return {"length": n, "parts": parts, "roles": roles, "marked": "".join("x" if on else "." for on in mask[:n])}


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """For people."""
    for entry in found:
        say(f"{entry['step']}: {entry['rows']} rows of {entry['file']} ({entry['purpose']})")
        low, middle, high = entry["tokens"]
        answers = "" if entry["answer_tokens"][2] == 0 else "; of the answer {} to {}, median {:g}".format(*_ranged(entry["answer_tokens"]))
        say(f"   tokens   {low} to {high}, median {middle:g}{answers}" + (f"; {entry['cut']} are cut" if entry["cut"] else ""))
        for one in entry["shown"]:
            acts, where = (AVERAGED, "") if entry["positions"] == AVERAGED else ("steered", f" ({entry['positions']})")
            say(f"   row {one['row']}, {one['text']}: {one['length']} tokens, {one['marked'].count('x')} {acts}{where}")
            for part, words in one["parts"].items():
                if words:
                    say(f"      {part:7}  {'|'.join(words)}")
            say(f"      tokens   {one['roles']}")
            say(f"      {acts:8} {one['marked']}")
    marks = ", ".join(f"{mark} {part}" for part, mark in PARTS.items())
    say(f"{marks} (A is scored); x is steered, or averaged; | is between tokens. Nothing was run or written")


def _ranged(values: Sequence[float]) -> tuple[float, float, float]:
    return values[0], values[2], values[1]
