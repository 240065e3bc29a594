"""Texts of a steered model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from spilt.api.given import Prompt, check_prompts, family, frozen, questions_of, steering_of, strengths_of, whole_number
from spilt.data.chat import Chat, readable
from spilt.engine import choice, decode, prepacked, sampling, scopes, whole
from spilt.errors import unknown
from spilt.settings.fields import GenerationParams
from spilt.steering import anatomy
from spilt.steering.steering import Steering
from spilt.tasks.context import texts_at_once

if TYPE_CHECKING:
    import pandas as pd


def generate(
    model: nn.Module,
    tokenizer: Any,
    steering: Steering,
    prompts: Prompt | Sequence[Prompt],
    multipliers: float | Sequence[float] = 1.0,
    *,
    num_responses: int = 1,
    seed: int = 42,
    batch_size: int | None = None,
    engine: str = choice.FAST,
    decode_step: str = choice.PLAIN_STEP,
    use_chat_template: bool = True,
    system_prompt: str = "",
    first: int = 0,
    **params: Any,
) -> pd.DataFrame:
    """A text for every prompt, multiplier and response: columns prompt, multiplier, response (number), text.

    prompts: texts, or conversations as lists of {"role": ..., "content": ...}; one or several. The column has turns by their roles.
    params: generation parameters (max_new_tokens 128, do_sample true, temperature, top_p ...), else the checkpoint's.
    A prompt's random numbers are its own: the same at every multiplier, whatever else is asked for. first: the number of the first
    prompt, which decides them: that of its row in a file gives the text of the command line. batch_size: texts made side by side; left
    out: as many as memory allows. decode_step: as --decode_step.
    """
    import pandas as pd

    questions = questions_of(prompts)
    strengths = strengths_of(multipliers)
    for name, value in (("num_responses", num_responses), ("batch_size", 1 if batch_size is None else batch_size)):
        whole_number(name, value, 1)
    chat = Chat.of(tokenizer, use_chat_template, system_prompt)
    placed = steering_of(model, steering)
    asked = [(i, m, k) for i in range(len(questions)) for m in strengths for k in range(num_responses)]
    ids = [chat.prompt_ids(question) for question in questions]
    rows = [decode.Row(tuple(ids[i]), m, f"{seed}/{first + i}/{k}") for i, m, k in asked]
    known = {field.name for field in fields(GenerationParams)}
    for name in params:
        if name not in known:
            raise unknown("generation parameter", name, known)
    how = sampling.decoding(GenerationParams(**params).as_kwargs(), model, tokenizer)
    made = new_tokens(model, placed, rows, how, engine, batch_size, decode_step)
    out = [
        {"prompt": readable(questions[i]), "multiplier": m, "response": k, "text": tokenizer.decode(made[n], skip_special_tokens=True)}
        for n, (i, m, k) in enumerate(asked)
    ]
    return pd.DataFrame(out, columns=["prompt", "multiplier", "response", "text"])


def new_tokens(
    model: nn.Module,
    steering: Steering,
    rows: Sequence[decode.Row],
    how: sampling.Decoding,
    engine: str,
    batch_size: int | None,
    decode_step: str = choice.PLAIN_STEP,
) -> dict[int, list[int]]:
    """Row number -> new token ids, by the engine that runs it."""
    return dict(token_stream(model, steering, rows, how, engine, batch_size, decode_step))


def token_stream(
    model: nn.Module,
    steering: Steering,
    rows: Sequence[decode.Row],
    how: sampling.Decoding,
    engine: str,
    batch_size: int | None,
    decode_step: str = choice.PLAIN_STEP,
) -> Iterator[tuple[int, list[int]]]:
    """(row number, new token ids) as texts are finished, by the engine that runs them."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    check_prompts(model, prompts, how.max_new_tokens)
    # a compiler lays weights out by itself; the plain engine is the model as it is
    tokens = len(rows) * how.max_new_tokens if engine == choice.FAST and decode_step == choice.PLAIN_STEP else 0
    with frozen(model), prepacked.weights(model, tokens):
        at_once = texts_at_once(model, batch_size, prompts, how.max_new_tokens).texts
        plain = choice.why_plain(steering.places, "generate", family=family(model), engine=engine)
        scoped = "" if steering.scope == "all" else f"scope = {steering.scope}"
        choice.refuse_step(decode_step, {"this text": scoped or plain}, str(anatomy.input_device(model)))
        if scoped:
            yield from scopes.generate(model, steering, rows, how, at_once)
        elif plain:
            yield from whole.texts(model, steering, rows, how)
        else:
            yield from decode.generate(model, steering, rows, how, at_once, step=decode_step)
