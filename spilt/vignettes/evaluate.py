"""Asking a model about vignettes: the probability of true beside false, right after the beginning of a JSON answer.

Two frames, is_wrong and is_acceptable, so that a liking for `true` cancels (summary.cells). p_true = p(true) / (p(true) + p(false)) and
mass = p(true) + p(false), over all tokens of the vocabulary that say the word. No text is generated (design/weight_steering.md 2.6).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from spilt.data.chat import Chat, Conversation
from spilt.engine import choice, next_token
from spilt.engine.prompts import Row
from spilt.errors import UserError
from spilt.model import host
from spilt.steering import anatomy
from spilt.steering.steering import Steering
from spilt.vignettes.files import Vignette
from spilt.vignettes.questions import BEGUN, COLUMNS, FRAMES, turns

WORDS = (("true", "1"), ("false", "0"))
AROUND = " \t\r\n\"'`*#"  # what may stand beside a word in its token


class Verdicts(NamedTuple):
    """Token ids that say true, and that say false."""

    true: Tensor
    false: Tensor


def verdicts(tokenizer: Any, vocabulary: int) -> Verdicts:
    """All tokens whose text is true or 1, false or 0, whatever quotes and blanks are around it. vocabulary: ids that the model has."""
    texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), vocabulary))])
    said = [text.strip(AROUND).lower() for text in texts]
    return Verdicts(*(torch.tensor([i for i, text in enumerate(said) if text in words], dtype=torch.long) for words in WORDS))


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    vignettes: Iterable[Vignette],
    steering: Steering | None = None,
    multiplier: float | Sequence[float] = 0.0,
    *,
    batch_size: int = 16,
    system_prompt: str = "",
    engine: str = choice.FAST,
) -> pd.DataFrame:
    """A row for each multiplier, vignette, condition and frame: COLUMNS. One forward per row; several multipliers share the lower blocks.

    steering None: the unsteered model (or one that is steered by the caller, as by spilt.in_place). A steering acts at multiplier 0 too.
    system_prompt: of every question, as a baseline. Raises UserError where the tokenizer has no single tokens for true and false, or a
    text is longer than the model's context: nothing is cut.
    """
    scenes = list(vignettes)
    strengths = np.atleast_1d(np.asarray(multiplier, float)).tolist()
    if not scenes or not strengths:
        raise UserError(f"{len(scenes)} vignettes at {len(strengths)} multipliers: nothing is to be asked")
    if len(set(strengths)) < len(strengths) or (steering is None and len(strengths) > 1):
        raise UserError(f"multipliers {strengths}: each once, and of the unsteered model one")
    training = [module for module in model.modules() if module.training]
    if training:
        raise UserError(f"the model is in training mode ({type(training[0]).__name__}): dropout would decide verdicts; call model.eval()")
    chat = Chat.of(tokenizer, True)
    said = verdicts(tokenizer, anatomy.vocabulary(model))
    ids = {}
    for scene in scenes:
        for frame in FRAMES:
            ids[scene.id, scene.condition, frame] = tuple(chat.begun(turns(scene, frame, system_prompt), BEGUN.format(frame=frame)))
    for frame in FRAMES:
        _check_words(chat, turns(scenes[0], frame, system_prompt), BEGUN.format(frame=frame), said)
    context = anatomy.context(model)
    longest = max(ids, key=lambda key: len(ids[key]))
    if context and len(ids[longest]) > context:
        raise UserError(
            f"vignette {longest[0]}: {len(ids[longest])} tokens, beyond the model's context of {context}; leave it out (a text that is cut "
            "would lose the beginning of its answer)"
        )
    placed = None if steering is None else steering.to(model)
    asked = [(scene, frame, m) for m in strengths for scene in scenes for frame in FRAMES]
    rows = [Row(ids[scene.id, scene.condition, frame], m, "") for scene, frame, m in asked]
    found: dict[int, tuple[float, float]] = {}
    for number, logp in next_token.logprobs(model, placed, rows, host.pad_id(tokenizer), batch_size, engine):
        true, false = (logp[some].double().logsumexp(0) for some in said)
        found[number] = float(torch.sigmoid(true - false)), float(true.exp() + false.exp())
    out = [
        (scene.id, scene.condition, scene.foundation, frame, m, *found[i], len(rows[i].prompt)) for i, (scene, frame, m) in enumerate(asked)
    ]
    return pd.DataFrame(out, columns=COLUMNS)


def _check_words(chat: Chat, asked: Conversation, begun: str, said: Verdicts) -> None:
    """true and false must each be one token behind the beginning, which itself stays as it is. Raises UserError."""
    before = chat.begun(asked, begun)
    for (word, _), tokens in zip(WORDS, said, strict=True):
        ways = [chat.begun(asked, begun + space + word) for space in (" ", "")]
        if not any(way[:-1] == before and way[-1] in tokens.tolist() for way in ways):
            pieces = " ".join(repr(chat.tokenizer.decode([i])) for i in ways[0][len(before) :])
            raise UserError(
                f"behind {begun} this tokenizer writes {word!r} as {pieces or 'nothing'}: no single token whose probability one forward "
                "gives; verdicts of this model cannot be read this way"
            )
