"""What Python users hand over, checked as files and words of the command line are; and their model, lent."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spilt.data import readers
from spilt.data.chat import Conversation, Encoded, Question
from spilt.data.readers import ASKED, PAIR_FIELDS, PAIRS, DatasetFormat, Pair, Row
from spilt.data.sources import Record
from spilt.errors import UserError
from spilt.settings.fields import STRONGEST
from spilt.steering.steering import Steering
from spilt.tasks.context import check_context

Pairs = Iterable[Pair | Mapping[str, Any] | tuple[str, str, str]]
Prompt = str | Sequence[Mapping[str, str]] | Conversation  # text, or a list of {"role": ..., "content": ...}
NO_FILE = DatasetFormat("pairs", "train", Path("pair"), {}, False)  # of pairs that are handed over
NO_PROMPTS = DatasetFormat("prompts", "test", Path("prompt"), {}, False)


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number, also of numpy or torch. Raises UserError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; wanted a whole number, at least {least}")
    return number


def strengths_of(given: Any) -> list[float]:
    """One strength or several, of Python, numpy or torch, as the command line takes them. Raises UserError."""
    try:
        array = np.array(given) if hasattr(given, "__array__") and not isinstance(given, torch.Tensor) else given  # pandas, any index
        values = torch.as_tensor(array, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        values = []
    if not values or not all(abs(m) <= STRONGEST for m in values):  # nan is not
        raise UserError(f"multipliers are {str(given)[:80]}; wanted one finite number or several, within +-{STRONGEST:g}")
    return [m + 0.0 for m in values]


def steering_of(model: nn.Module, steering: Any) -> Steering:
    """At this model's blocks. Raises UserError, also for what is no Steering."""
    if not isinstance(steering, Steering):
        raise UserError(f"steering is a {type(steering).__name__}; wanted a Steering (spilt.fit gives one, spilt.Steering.load reads one)")
    return steering.to(model)


def several(name: str, given: Any, wanted: str) -> list[Any]:
    """Of anything that can be gone through. Raises UserError."""
    if isinstance(given, str | bytes | Mapping | Steering) or not isinstance(given, Iterable):
        raise UserError(f"{name} are a {type(given).__name__}; wanted {wanted}")
    return list(given)


def questions_of(prompts: Prompt | Sequence[Prompt]) -> list[Question]:
    """One prompt or several, checked as those of a file are."""
    given = [prompts] if isinstance(prompts, str) else several("prompts", prompts, "texts, or conversations as lists of role and content")
    if given and (all(isinstance(turn, Mapping) for turn in given) or all(map(_turn, given))):
        given = [given]
    if not given:
        raise UserError("there are no prompts; give at least one")
    turns = [[{"role": t[0], "content": t[1]} if _turn(t) else t for t in p] if isinstance(p, list | tuple) else p for p in given]
    return [Row(NO_PROMPTS, Record(number, f"{number}", {"question": asked})).asked("question") for number, asked in enumerate(turns)]


def _turn(given: Any) -> bool:
    """Is it (role, content), as a Conversation has them?"""
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(text, str) for text in given)


def pairs_of(pairs: Pairs) -> list[Pair]:
    """Pairs of any kind as Pair, numbered in their order."""
    out = []
    for row, given in enumerate(several("pairs", pairs, f"a list of ({', '.join(PAIR_FIELDS)})")):
        if isinstance(given, Pair):
            out.append(given)
            continue
        if isinstance(given, Mapping) and (isinstance(given.get("question"), list) or not set(ASKED).isdisjoint(given)):
            out += readers.pairs_of([Row(NO_FILE, Record(row, f"{row}", {**dict.fromkeys(PAIR_FIELDS[1:]), **given}))])
            continue
        values = (
            [given.get(name) for name in PAIR_FIELDS] if isinstance(given, Mapping) else [*given] if isinstance(given, Iterable) else []
        )
        if len(values) != len(PAIR_FIELDS) or not all(isinstance(value, str) for value in values):
            raise UserError(f"pair {row} is {str(given)[:80]}; wanted the texts {', '.join(PAIR_FIELDS)}, as a dict or in this order")
        question, matching, not_matching = map(str, values)
        if not matching.strip() or not not_matching.strip():
            raise UserError(f"pair {row} has an empty answer; write an answer or leave the pair out")
        out.append(Pair(question, matching, not_matching, None, None, row))
    if not out:
        raise UserError("there are no pairs; give at least one (question, matching, not_matching)")
    if kinds := sorted({pair.kind for pair in out} - {out[0].kind}):
        raise UserError(f"the pairs are of several kinds: {out[0].kind}, {', '.join(kinds)}; give those of one kind")
    if out[0].kind == PAIRS and all(pair.matching == pair.not_matching for pair in out):
        raise UserError(f"each of the {len(out)} pairs has the same answer twice, so neither is preferred")
    return out


def family(model: Any) -> str:
    """`model_type` of config.json."""
    return str(model.config.model_type)


def check_lengths(model: nn.Module, what: str, tokens: Sequence[Encoded]) -> None:
    """Of both answers of pairs. Raises UserError as check_context."""
    lengths = [(i // 2, len(sequence.input_ids)) for i, sequence in enumerate(tokens)]  # two answers of each pair
    check_context(model, f"{what}, questions with their answers", lengths, "shorten them or lower output_length")


def check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raises UserError as check_context. new: tokens after each."""
    check_context(model, "generate, prompts", [*enumerate(map(len, prompts))], "shorten them or lower max_new_tokens", new)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, weights without gradient. After it: as before, module by module."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training_mode = [module for module in model.modules() if module.training]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for module in training_mode:
            module.training = False
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training_mode:
            module.training = True
