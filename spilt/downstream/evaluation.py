"""Greedy answers to a split, and how many are right: by the fast decoder where it applies, else by the library's.

What was generated is the tokens after the prompt's own, never a part of a text that is searched for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from spilt.analysis import intervals
from spilt.artifacts.journal import Journal
from spilt.data.batches import by_length
from spilt.downstream.answers import Extractor
from spilt.downstream.encode import Prompted
from spilt.downstream.rows import Example
from spilt.engine import choice, decode, scopes, whole
from spilt.engine.decode import Row
from spilt.engine.sampling import Decoding
from spilt.errors import UserError
from spilt.steering.steering import Steering
from spilt.tasks.context import check_context, texts_at_once

MOST = 64  # rows that `generate` reads side by side


class Asked(NamedTuple):
    """What is decoded and how. multiplier 0: the model as it is. scope: which tokens are steered."""

    model: nn.Module
    steering: Steering
    multiplier: float
    how: Decoding
    scope: str = "all"
    engine: str = choice.FAST
    batch_size: int | None = None

    @property
    def why_plain(self) -> str:
        """Why the fast decoder does not apply; '' where it does."""
        family = str(getattr(self.model.config, "model_type", ""))
        if self.scope != "all":
            return f"scope {self.scope}"
        return choice.why_plain(self.steering.places, "generate", family=family, engine=self.engine)


def tokens(asked: Asked, prompts: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its new tokens), each as it is finished."""
    model, how = asked.model, asked.how
    if not prompts:
        return
    lengths = [*enumerate(map(len, prompts))]
    check_context(model, "tasks, prompts", lengths, "lower --max-length or --max-new-tokens", how.max_new_tokens)
    rows = [Row(prompt, asked.multiplier, "") for prompt in prompts]
    at_once = texts_at_once(model, asked.batch_size, prompts, how.max_new_tokens).texts
    if not asked.why_plain:
        yield from decode.generate(model, asked.steering, rows, how, at_once)
    elif asked.scope != "all":
        yield from scopes.generate(model, asked.steering, rows, how, at_once, asked.scope)
    elif how.processors:
        yield from whole.texts(model, asked.steering, rows, how)
    else:
        greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": how.max_new_tokens}
        if how.eos:
            greedy["eos_token_id"] = list(how.eos)
        for numbers in by_length([len(prompt) for prompt in prompts], 1 << 30, min(at_once, MOST)):
            strengths = [asked.multiplier] * len(numbers)
            made = whole.generate(model, asked.steering, strengths, [prompts[i] for i in numbers], how.pad, **greedy)
            yield from zip(numbers, made, strict=True)


def answers(asked: Asked, prompts: Sequence[tuple[int, ...]], journal: Journal, identity: str) -> list[list[int]]:
    """New tokens of every prompt; those that a killed run had made are not made again."""
    known: dict[int, list[int]] = {}
    for line in journal.whole():
        if isinstance(line, list) and len(line) == 3 and line[0] == identity and isinstance(line[1], int) and 0 <= line[1] < len(prompts):
            known[line[1]] = line[2]
    todo = [i for i in range(len(prompts)) if i not in known]
    for place, new in tokens(asked, [prompts[i] for i in todo]):
        known[todo[place]] = new
        journal.append([[identity, todo[place], new]])
    return [known[i] for i in range(len(prompts))]


class Scored(NamedTuple):
    """One split: a row for each example, and the summary."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def lines(self) -> str:
        return "".join(json.dumps(row) + "\n" for row in self.rows)


def score(
    examples: Sequence[Example], prompted: Prompted, made: Sequence[Sequence[int]], how: Decoding, extract: Extractor, tokenizer: Any
) -> Scored:
    """Right or wrong of every example; one whose prompt was left out as too long is wrong, and counted.

    no_answer: texts without an answer, which are wrong too. cut_off: texts that reached max_new_tokens before their end. commonest: share
    of the commonest label, which is what always saying it would get right.
    """
    if len(made) != len(prompted.ids):
        raise ValueError(f"{len(made)} texts for {len(prompted.ids)} prompts")
    new = dict(zip(prompted.rows, made, strict=True))
    rows, none, cut = [], 0, 0
    for number, example in enumerate(examples):
        ids = list(new.get(number, ()))
        output = tokenizer.decode(ids, skip_special_tokens=True)
        right = extract.score(output, example.label) if number in new else False
        none += right is None
        cut += bool(ids) and ids[-1] not in how.eos
        rows.append({"prompt": example.prompt, "output": output, "label": example.label, "eval": bool(right)})
    found = intervals.share([row["eval"] for row in rows])
    ((_, most),) = Counter(extract.label(example.label) for example in examples).most_common(1)
    summary = {
        "accuracy": found.value, "low": found.low, "high": found.high, "n": found.n, "commonest": most / len(rows),
        "no_answer": none, "cut_off": cut, "prompts_truncated": prompted.truncated, "prompts_left_out": len(prompted.dropped),
    }  # fmt: skip
    return Scored(rows, summary)


def greedy(max_new_tokens: int, ends: Sequence[int], pad: int, processors: Sequence[Any] = ()) -> Decoding:
    """The likeliest token each time, to an end token or max_new_tokens."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: wanted 1 or more")
    return Decoding(max_new_tokens, False, tuple(ends), pad, list(processors), [])
