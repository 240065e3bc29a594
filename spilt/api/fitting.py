"""The intervention that a method finds from pairs that are handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from spilt import plan
from spilt.api.given import Pairs, check_lengths, family, frozen, pairs_of, whole_number
from spilt.api.models import base_model
from spilt.data.chat import Chat, Encoded
from spilt.data.readers import Pair
from spilt.engine import activations, choice, prepacked, score, whole
from spilt.engine import train as training
from spilt.engine.closed_form import closed_form
from spilt.errors import UserError, unknown
from spilt.methods import METHODS
from spilt.model import host
from spilt.settings import FitSettings
from spilt.settings.fields import intervention_name, method_name
from spilt.settings.keys import KEY_ALIASES
from spilt.settings.values import SCOPES
from spilt.steering.interventions import INTERVENTIONS
from spilt.steering.steering import SCOPE, Steering
from spilt.verbs import fit as fit_verb
from spilt.weights import training as weights


def fit(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    *,
    layer: int | Sequence[int],
    method: str = "spilt",
    intervention: str = "vector",
    joint: bool = False,
    neutral: Sequence[str] = (),
    engine: str = choice.FAST,
    progress: Callable[[int, int, float], None] | None = None,
    **settings: Any,
) -> Steering:
    """The intervention that a method finds from pairs (question, matching, not_matching), as a Steering.

    A pair as a dict may have what a row of a file may: a list of messages as question, system, system_positive ... (README).
    layer: 0-based decoder block, or several: each fitted alone (the released meaning), or all together (`joint`).
    neutral: ordinary texts, for mean_centred.
    settings: keys of the YAML files, such as lr, n_epochs, batch_size, rank; left out: the released defaults.
    Raises UserError for names and values that do not exist.
    """
    several = isinstance(layer, Iterable) and not isinstance(layer, str) and getattr(layer, "ndim", 1) > 0
    layers = tuple(whole_number("layer", n, 0) for n in (layer if several else [layer]))  # type: ignore[union-attr]
    s = _settings(method, intervention, layers, settings)
    fit_verb.refuse_without_effect(s)
    rows = pairs_of(pairs)
    if why := fit_verb.refuses(METHODS[s.method], s, rows[0].kind):
        raise UserError(f"the pairs are {rows[0].kind}: {why}")
    chat = Chat.of(tokenizer, s.use_chat_template, s.system_prompt)
    tokens = prepacked.TOKENS if engine == choice.FAST else 0
    with frozen(model), torch.random.fork_rng(devices=[]), prepacked.weights(model, tokens):
        found = _find(model, tokenizer, rows, chat, s, joint, engine, neutral, progress)
    for site, made in found if not METHODS[s.method].adapters else ():
        training.check_usable(made, f"{s.method} {s.intervention_method} layer {site.layer}")
    scope = {SCOPE: s.steer_positions} if s.steer_positions in SCOPES[1:] else {}
    return Steering(found, {"method": s.method, "base_model": base_model(model), "settings": s.as_dict(), **scope})


def _find(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Pair],
    chat: Chat,
    s: FitSettings,
    joint: bool,
    engine: str,
    neutral: Sequence[str],
    progress: Callable[[int, int, float], None] | None,
) -> Steering:
    """What the method finds at the layers of the settings."""
    layers, closed = s.layers, METHODS[s.method].estimate is not None
    if joint and (closed or len(layers) == 1):
        why = f"{s.method} has a closed form" if closed else f"there is one, {layers[0]}"
        raise UserError(f"joint: several layers are trained by one loss, but {why}; leave joint out")
    choice.why_plain([], "fit", engine=engine)  # a word that names no engine is refused for every method
    if closed:
        return _closed_form(model, tokenizer, chat, rows, s, neutral)
    tokens = [chat.encode(question, text, s.output_length, p.row) for p in rows for question, text in p.sides]
    check_lengths(model, "fit", tokens)
    if METHODS[s.method].adapters:
        made = weights.train(model, tokens, s, host.pad_id(tokenizer), progress=progress).made
        weights.check(made, s.method)
        return made
    whole_one = Steering.of({n: training.new_intervention(model, n, s) for n in layers})
    pad, method = host.pad_id(tokenizer), METHODS[s.method]
    joint = joint or s.joint
    for steering in [whole_one] if joint else [whole_one.on(n) for n in layers]:
        if choice.why_plain(steering.places, "fit", family=family(model), engine=engine, joint=joint, positions=s.fitted_positions):
            training.fit(whole.Fit(model, steering, tokens, s, method, chat.prefix_length, pad), progress=progress)
            continue
        base, read = score.recorded_at(steering)
        cache = activations.record(model, base, tokens, [read] if read else [], pad, together=2)
        training.fit(training.Fit(model, steering, cache, s, method, chat.prefix_length), progress=progress)
    return Steering((site, made.eval().requires_grad_(False)) for site, made in whole_one)


def _settings(method: str, intervention: str, layers: Sequence[int], given: Mapping[str, Any]) -> FitSettings:
    method, intervention = method_name(method), intervention_name(intervention)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if intervention not in INTERVENTIONS:
        raise unknown("intervention", intervention, INTERVENTIONS)
    plan.pairs_of(method, intervention)  # a pair that does not exist is refused with the reason
    known = {field.name for field in fields(FitSettings)} - {"method", "intervention_method", "layers"}
    named = {KEY_ALIASES.get(name, name): value for name, value in given.items()}
    for name in named:
        if name not in known:
            raise unknown("setting", name, known)
    return FitSettings(method=method, intervention_method=intervention, layers=tuple(layers), **named)


def _closed_form(model: nn.Module, tokenizer: Any, chat: Chat, pairs: Sequence[Pair], s: FitSettings, neutral: Sequence[str]) -> Steering:
    tokens = [chat.encode_caa(question, text, p.row, not s.multiple_choice) for p in pairs for question, text in p.sides]
    check_lengths(model, "fit", tokens)
    texts = [Encoded(tuple(tokenizer(text)["input_ids"][: s.output_length]), 1, 0) for text in neutral]  # all but the first token
    if METHODS[s.method].against_neutral and not (texts and all(len(text.input_ids) > 1 for text in texts)):
        raise UserError(f"{s.method} subtracts the mean of ordinary text: give neutral=[...], each of two tokens or more")
    return closed_form(model, s.layers, tokens, s, METHODS[s.method], host.pad_id(tokenizer), texts)
