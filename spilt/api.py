"""The Python face: `import spilt` gives these functions. No global side effects: threads, seeds, log levels stay the caller's.

model, tokenizer = spilt.load("models/my-model")
steering = spilt.fit(model, tokenizer, pairs, layer=14, method="spilt", intervention="vector")
with spilt.steer(model, steering, 2.0):
    model.generate(...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from spilt import plan
from spilt.analysis import calibrate as calibrated
from spilt.analysis import odds
from spilt.data.chat import Chat, Conversation, Encoded, Question, readable
from spilt.data.readers import ASKED, PAIR_FIELDS, PAIRS, DatasetFormat, Pair, Row, pairs_of
from spilt.data.sources import Record
from spilt.engine import activations, choice, sampling, scopes, score, whole
from spilt.engine import decode as generation
from spilt.engine import train as training
from spilt.engine.divergence import along_path, rests_at_0, while_decoding
from spilt.errors import NotFinite, UserError, unknown
from spilt.methods import METHODS
from spilt.model import host
from spilt.model.identity import model_hash
from spilt.settings import FitSettings
from spilt.settings.fields import DTYPE_ALIASES, DTYPES, STRONGEST, GenerationParams, intervention_name, method_name
from spilt.settings.keys import KEY_ALIASES
from spilt.settings.values import SCOPES
from spilt.steering import inplace, original
from spilt.steering.interventions import INTERVENTIONS, Multiplier
from spilt.steering.steering import SCOPE, Steering, base_model
from spilt.tasks.context import check_context, texts_at_once
from spilt.verbs import fit as fit_verb
from spilt.verbs import measure as measure_verb
from spilt.weights import adapters
from spilt.weights import training as weights

if TYPE_CHECKING:
    import pandas as pd

WORST = 0.95  # of the tokens: what a calibration looks at

Pairs = Iterable[Pair | Mapping[str, Any] | tuple[str, str, str]]
Prompt = str | Sequence[Mapping[str, str]] | Conversation  # text, or a list of {"role": ..., "content": ...}
NO_FILE = DatasetFormat("pairs", "train", Path("pair"), {}, False)  # of pairs that are handed over
NO_PROMPTS = DatasetFormat("prompts", "test", Path("prompt"), {}, False)


class Loaded(NamedTuple):
    """A model in evaluation mode with frozen weights, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load(path: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", anatomy: str = "") -> Loaded:
    """A checkpoint folder of the Hugging Face layout, from local files only; no code from it is run. Raises UserError.

    anatomy: where its parts are, as in `blocks=model.layers,mlp=mlp`; left out, they are found by structure.
    """
    name = DTYPE_ALIASES.get(str(dtype), str(dtype))  # also torch.bfloat16
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    found = host.load(Path(path), name, device, anatomy)
    return Loaded(found.model, found.tokenizer)


@contextmanager
def steer(model: nn.Module, steering: Steering, multiplier: Multiplier = 1.0) -> Iterator[nn.Module]:
    """Inside the `with` every forward of the model is steered at every position, as apply does; after it the model is as before.

    multiplier: strength m, a number or a tensor [B] with one for each row of the batch. Works with `model.generate` and pipelines.
    """
    if not isinstance(steering, Steering):
        raise UserError(f"steering is a {type(steering).__name__}; wanted a Steering (spilt.fit gives one, spilt.Steering.load reads one)")
    strengths = _strengths(multiplier)
    one = isinstance(multiplier, int | float) or not getattr(multiplier, "ndim", len(strengths))
    with whole.steer(model, steering.to(model), strengths[0] if one else torch.tensor(strengths, dtype=torch.float32)):
        yield model


@contextmanager
def in_place(model: nn.Module, steering: Steering, multiplier: float = 1.0) -> Iterator[nn.Module]:
    """As `steer` at one strength, in the weights: faster, the same logits up to rounding; the weights are given back bit by bit.

    For what can be weights: changes of linear maps, and constants. Raises UserError for the rest, before any weight is touched.
    """
    one = getattr(multiplier, "ndim", 0 if isinstance(multiplier, int | float) else 1) == 0  # also a number of numpy or torch
    with inplace.in_place(model, steering, _strengths(multiplier)[0] if one else multiplier):
        yield model


def read_adapter(model: nn.Module, folder: str | Path) -> Steering:
    """A PEFT adapter of any kind (lora, dora, pissa, delora, oft, boft, ia3 ...) as the change of its base model's weights.

    The difference of two, `read_adapter(model, a) - read_adapter(model, b)`, is weight steering (arXiv 2511.05408).
    """
    with frozen(model):
        found = adapters.read(model, folder)
    return Steering(found, {**found.about, "base_model": _base_model(model)})


def read_post_block(
    model: nn.Module, path: str | Path, *, nonlinearity: str | None = None, scope: str | None = None, alpha: float = 1.0
) -> Steering:
    """A checkpoint of the public post-block code (pytorch_model.bin, adapter_steerer.pt) as a Steering. It says neither its activation
    (silu, relu, gelu, tanh, linear) nor its scope (all, last), so both are asked for: UserError.
    """
    with frozen(model):
        return original.read(Path(path), model, nonlinearity=nonlinearity, scope=scope, alpha=alpha)


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
    layers = tuple(_whole("layer", n, 0) for n in (layer if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]))
    s = _settings(method, intervention, layers, settings)
    fit_verb.refuse_without_effect(s)
    rows = _pairs(pairs)
    if why := fit_verb.refuses(METHODS[s.method], s, rows[0].kind):
        raise UserError(f"the pairs are {rows[0].kind}: {why}")
    chat = Chat.of(tokenizer, s.use_chat_template, s.system_prompt)
    with frozen(model), torch.random.fork_rng(devices=[]):
        found = _find(model, tokenizer, rows, chat, s, joint, engine, neutral, progress)
    for site, made in found if not METHODS[s.method].adapters else ():
        training.check_usable(made, f"{s.method} {s.intervention_method} layer {site.layer}")
    scope = {SCOPE: s.steer_positions} if s.steer_positions in SCOPES[1:] else {}
    return Steering(found, {"method": s.method, "base_model": _base_model(model), "settings": s.as_dict(), **scope})


def _base_model(model: nn.Module) -> dict[str, Any]:
    """Kind, width and depth; of a checkpoint folder its name and hash too."""
    folder = Path(str(getattr(model.config, "name_or_path", "") or "nowhere"))
    return {**base_model(model), **({"name": folder.name, "checkpoint": model_hash(folder)} if (folder / "config.json").is_file() else {})}


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
    _check_context(model, "fit", tokens)
    if METHODS[s.method].adapters:
        made = weights.train(model, tokens, s, host.pad_id(tokenizer), progress=progress).made
        weights.check(made, s.method)
        return made
    whole_one = Steering.of({n: training.new_intervention(model, n, s) for n in layers})
    pad, method = host.pad_id(tokenizer), METHODS[s.method]
    joint = joint or s.joint
    for steering in [whole_one] if joint else [whole_one.on(n) for n in layers]:
        if choice.why_plain(steering.places, "fit", family=_family(model), engine=engine, joint=joint, positions=s.fitted_positions):
            training.fit(whole.Fit(model, steering, tokens, s, method, chat.prefix_length, pad), progress=progress)
            continue
        base, read = score.recorded_at(steering)
        cache = activations.record(model, base, tokens, [read] if read else [], pad, together=2)
        training.fit(training.Fit(model, steering, cache, s, method, chat.prefix_length), progress=progress)
    return Steering((site, made.eval().requires_grad_(False)) for site, made in whole_one)


def _family(model: Any) -> str:
    return str(model.config.model_type)


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


def _whole(name: str, value: Any, least: int) -> int:
    """A whole number, also of numpy or torch. Raises UserError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; wanted a whole number, at least {least}")
    return number


def _strengths(given: Any) -> list[float]:
    """One strength or several, of Python, numpy or torch, as the command line takes them. Raises UserError."""
    try:
        values = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        values = []
    if not values or not all(abs(m) <= STRONGEST for m in values):  # nan is not
        raise UserError(f"multipliers are {str(given)[:80]}; wanted one finite number or several, within +-{STRONGEST:g}")
    return [m + 0.0 for m in values]


def _questions(prompts: Prompt | Sequence[Prompt]) -> list[Question]:
    """One prompt or several, checked as those of a file are."""
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if given and all(isinstance(turn, Mapping) for turn in given):
        given = [given]
    turns = [[dict(zip(("role", "content"), t, strict=True)) for t in p] if isinstance(p, tuple) else p for p in given]
    return [Row(NO_PROMPTS, Record(number, f"{number}", {"question": asked})).asked("question") for number, asked in enumerate(turns)]


def _pairs(pairs: Pairs) -> list[Pair]:
    """Pairs of any kind as Pair, numbered in their order."""
    out = []
    for row, given in enumerate(pairs):
        if isinstance(given, Pair):
            out.append(given)
            continue
        if isinstance(given, Mapping) and (isinstance(given.get("question"), list) or not set(ASKED).isdisjoint(given)):
            out += pairs_of([Row(NO_FILE, Record(row, f"{row}", {**dict.fromkeys(PAIR_FIELDS[1:]), **given}))])
            continue
        values = [given.get(name) for name in PAIR_FIELDS] if isinstance(given, Mapping) else list(given)
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


def _check_context(model: nn.Module, what: str, tokens: Sequence[Encoded]) -> None:
    lengths = [(i // 2, len(sequence.input_ids)) for i, sequence in enumerate(tokens)]  # two answers of each pair
    check_context(model, f"{what}, questions with their answers", lengths, "shorten them or lower output_length")


def _closed_form(model: nn.Module, tokenizer: Any, chat: Chat, pairs: Sequence[Pair], s: FitSettings, neutral: Sequence[str]) -> Steering:
    tokens = [chat.encode_caa(question, text, p.row, not s.multiple_choice) for p in pairs for question, text in p.sides]
    _check_context(model, "fit", tokens)
    texts = [Encoded(tuple(tokenizer(text)["input_ids"][: s.output_length]), 1, 0) for text in neutral]  # all but the first token
    if METHODS[s.method].against_neutral and not (texts and all(len(text.input_ids) > 1 for text in texts)):
        raise UserError(f"{s.method} subtracts the mean of ordinary text: give neutral=[...], each of two tokens or more")
    return training.closed_form(model, s.layers, tokens, s, METHODS[s.method], host.pad_id(tokenizer), texts)


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
    out: as many as memory allows.
    """
    import pandas as pd

    questions = _questions(prompts)
    strengths = _strengths(multipliers)
    for name, value in (("num_responses", num_responses), ("batch_size", 1 if batch_size is None else batch_size)):
        _whole(name, value, 1)
    chat = Chat.of(tokenizer, use_chat_template, system_prompt)
    placed = steering.to(model)
    asked = [(i, m, k) for i in range(len(questions)) for m in strengths for k in range(num_responses)]
    ids = [chat.prompt_ids(question) for question in questions]
    rows = [generation.Row(tuple(ids[i]), m, f"{seed}/{first + i}/{k}") for i, m, k in asked]
    known = {field.name for field in fields(GenerationParams)}
    for name in params:
        if name not in known:
            raise unknown("generation parameter", name, known)
    how = sampling.decoding(GenerationParams(**params).as_kwargs(), model, tokenizer)
    made = new_tokens(model, placed, rows, how, engine, batch_size)
    out = [
        {"prompt": readable(questions[i]), "multiplier": m, "response": k, "text": tokenizer.decode(made[n], skip_special_tokens=True)}
        for n, (i, m, k) in enumerate(asked)
    ]
    return pd.DataFrame(out, columns=["prompt", "multiplier", "response", "text"])


def _fits(model: nn.Module, prompts: Sequence[Sequence[int]], new: int) -> None:
    check_context(model, "generate, prompts", [*enumerate(map(len, prompts))], "shorten them or lower max_new_tokens", new)


def new_tokens(
    model: nn.Module, steering: Steering, rows: Sequence[generation.Row], how: sampling.Decoding, engine: str, batch_size: int | None
) -> dict[int, list[int]]:
    """Row number -> new token ids, by the engine that runs it."""
    return dict(token_stream(model, steering, rows, how, engine, batch_size))


def token_stream(
    model: nn.Module, steering: Steering, rows: Sequence[generation.Row], how: sampling.Decoding, engine: str, batch_size: int | None
) -> Iterator[tuple[int, list[int]]]:
    """(row number, new token ids) as texts are finished, by the engine that runs them."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    _fits(model, prompts, how.max_new_tokens)
    with frozen(model):
        at_once = texts_at_once(model, batch_size, prompts, how.max_new_tokens).texts
        if steering.scope != "all":
            yield from scopes.generate(model, steering, rows, how, at_once)
            return
        plain = choice.why_plain(steering.places, "generate", family=_family(model), engine=engine)
        yield from whole.texts(model, steering, rows, how) if plain else generation.generate(model, steering, rows, how, at_once)


def divergence(
    model: nn.Module,
    tokenizer: Any,
    steering: Steering,
    prompts: Prompt | Sequence[Prompt],
    multipliers: float | Sequence[float] = 1.0,
    *,
    max_new_tokens: int = 50,
    engine: str = choice.FAST,
    batch_size: int | None = None,
    use_chat_template: bool = True,
    system_prompt: str = "",
) -> pd.DataFrame:
    """KL(steered || base), nats per token along the steered model's own greedy answers.

    Columns multiplier, tokens, kl_mean, kl_p95, kl_max. All tokens of all prompts are pooled; p95: what the worst twentieth reaches.
    """
    import pandas as pd

    chat, placed = Chat.of(tokenizer, use_chat_template, system_prompt), steering.to(model)
    ids = [tuple(chat.prompt_ids(question)) for question in _questions(prompts)]
    if not ids:
        raise UserError("there are no prompts; give at least one")
    how = sampling.decoding({"do_sample": False, "max_new_tokens": _whole("max_new_tokens", max_new_tokens, 1)}, model, tokenizer)
    out = []
    strengths = _strengths(multipliers)
    rows = [generation.Row(prompt, m, "") for m in strengths for prompt in ids]
    nats = _nats(model, placed, rows, how, host.pad_id(tokenizer), engine, batch_size)
    for k, m in enumerate(strengths):
        kl = torch.cat(nats[k * len(ids) : (k + 1) * len(ids)]).numpy()
        out.append((m, len(kl), float(kl.mean()), float(np.quantile(kl, WORST)), float(kl.max())))
    return pd.DataFrame(out, columns=["multiplier", "tokens", "kl_mean", "kl_p95", "kl_max"])


def _nats(
    model: nn.Module,
    steering: Steering,
    rows: Sequence[generation.Row],
    how: sampling.Decoding,
    pad: int,
    engine: str,
    batch_size: int | None,
) -> list[torch.Tensor]:
    """KL at each token of each row's greedy answer: while it is decoded, or read again afterwards where that cannot be done."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    _fits(model, prompts, how.max_new_tokens)
    with frozen(model):
        plain = choice.why_plain(steering.places, "generate", family=_family(model), engine=engine, positions=steering.scope)
        beside = not plain and rests_at_0(model, steering, Encoded(prompts[0], len(prompts[0]), 0), pad)
        # at 0 the answer is read twice in the same way, so that the KL is 0 to the bit
        fast = [i for i, row in enumerate(rows) if beside and row.multiplier]
        at_once = texts_at_once(model, batch_size, prompts, how.max_new_tokens).texts
        found = dict(zip(fast, while_decoding(model, steering, [rows[i] for i in fast], how, at_once), strict=True))
    rest = [i for i in range(len(rows)) if i not in found]
    made = new_tokens(model, steering, [rows[i] for i in rest], how, engine, batch_size) if rest else {}
    for m in dict.fromkeys(rows[i].multiplier for i in rest):
        of_m = [(k, i) for k, i in enumerate(rest) if rows[i].multiplier == m]
        told = [Encoded((*rows[i].prompt, *made[k]), len(rows[i].prompt), 0) for k, i in of_m]
        with frozen(model):
            found.update(zip((i for _, i in of_m), along_path(model, steering, m, told, pad), strict=True))
    return [found[i] for i in range(len(rows))]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    steering: Steering,
    prompts: Prompt | Sequence[Prompt],
    budget: float = 1.0,
    *,
    start: float | None = None,
    audit: Prompt | Sequence[Prompt] = (),
    **how: Any,
) -> pd.DataFrame:
    """The multipliers at which steering disturbs as much as `budget`: `kl_p95` of `divergence` in nats, to 5%, on either side of 0.

    One row for each side: multiplier, status (converged, below budget, above budget, jumps over the budget, not monotone, not the
    identity at 0), the numbers of `divergence` there and, on other prompts, those named audit_. attrs["probes"]: all that was tried.
    kl_floor: kl_p95 at m = 0, of what is not the identity there.
    start: a first guess; left out, the end of the range in which the form is trained. how: as for `divergence`.
    """
    if not 0 < budget < float("inf"):  # nan is not
        raise UserError(f"budget is {budget}; wanted nats above 0")

    def at(strengths: Sequence[float], asked: Any) -> pd.DataFrame:
        return divergence(model, tokenizer, steering, asked, strengths, **how)

    begin, high = reach(steering)
    return both_sides(at, prompts, audit, budget, start or begin, high)


def reach(steering: Steering) -> tuple[float, float]:
    """Where a search for a strength begins, the end of the range in which the form is trained, and the largest that it means."""
    return max(map(abs, steering.entries[0][1].factors)), min(calibrated.HIGH, *(made.furthest() for _, made in steering))


def both_sides(
    at: Callable[[Sequence[float], Any], pd.DataFrame],
    prompts: Any,
    audit: Any,
    budget: float,
    start: float,
    high: float = calibrated.HIGH,
) -> pd.DataFrame:
    """The table of `calibrate`, of any way to measure. at(multipliers, prompts): a row for each as of `divergence`, or NotFinite."""
    import pandas as pd

    told = at([0.0], prompts).assign(side="none")
    rest = told["kl_max"][0] != 0
    tried, rows = [told], []
    signs = {"positive": 1.0, "negative": -1.0}

    def p95(sizes: dict[str, float]) -> list[float]:
        """At a size of each side, together; alone where one breaks down."""
        try:
            found = at([signs[side] * size for side, size in sizes.items()], prompts)
        except NotFinite:
            return [float("inf")] if len(sizes) == 1 else [p95({side: size})[0] for side, size in sizes.items()]
        tried.append(found.assign(side=list(sizes)))
        return found["kl_p95"].tolist()

    for side, found in calibrated.solve_together(p95, list(signs), budget, start, high=high).items():
        m = signs[side] * found.size
        there = [one for one in pd.concat(tried).to_dict("records") if one["multiplier"] == m]
        row = {"side": side, "status": calibrated.NOT_ZERO if rest else found.status}
        row |= {**(there[0] if there else {**told.iloc[0], "multiplier": m, "kl_p95": np.inf}), "side": side}  # not finite there
        row["kl_floor"] = float(told["kl_p95"].iloc[0])
        if audit:
            try:
                other = dict(at([m], audit).iloc[0])
            except NotFinite:  # as a probe that breaks down
                other = dict.fromkeys(told, np.inf)
            row |= {f"audit_{name}": other[name] for name in ("kl_mean", "kl_p95", "kl_max")}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs["probes"] = pd.concat(tried, ignore_index=True)
    return table


def measure(
    model: nn.Module,
    tokenizer: Any,
    steering: Steering,
    pairs: Pairs,
    multipliers: float | Sequence[float] | None = None,
    *,
    positions: str | None = None,
    output_length: int = 512,
    engine: str = choice.FAST,
    seed: int = 0,
    use_chat_template: bool = True,
    system_prompt: str = "",
) -> pd.DataFrame:
    """Preference and utility log-odds (nats) at each multiplier, means over the pairs with 95% bootstrap intervals: odds.SUMMARY.

    positions: which tokens are steered; left out, those it was fitted for (`Steering.scope`), as `generate` does; skip_prefix is as the
    released losses.
    multipliers: left out, 11 points over the range in which the form is trained. 0, the unsteered model, is always among them.
    """
    import pandas as pd

    rows = _pairs(pairs)
    if rows[0].kind != PAIRS:
        raise UserError(f"the pairs are {rows[0].kind}: preference and utility compare two answers to one question; give such pairs")
    chat = Chat.of(tokenizer, use_chat_template, system_prompt)
    tokens = [chat.encode(question, text, output_length, p.row) for p in rows for question, text in p.sides]
    _check_context(model, "measure", tokens)
    placed, pad = steering.to(model), host.pad_id(tokenizer)
    positions = positions or placed.scope
    if multipliers is None:
        multipliers = measure_verb.sweep_multipliers(steering.entries[0][1].factors, 11)
    strengths = sorted({0.0, *_strengths(multipliers)})
    prefix = chat.prefix_length
    with frozen(model):
        if choice.why_plain(placed.places, "measure", family=_family(model), engine=engine, positions=positions):
            scorer: score.Scorer = whole.Scorer(model, placed, tokens, pad, positions, prefix)
        else:
            base, read = score.recorded_at(placed)
            cache = activations.record(model, base, tokens, [read] if read else [], pad, together=2)
            scorer = score.Recorded(model, placed, cache, positions, prefix)
        answer = score.losses(scorer, strengths).answer
    counts = [len(s.input_ids) - s.prompt_length - s.suffix_length for s in tokens]
    mean = answer / counts
    frames = []
    for k, m in enumerate(strengths):
        l_p, l_n = mean[k, 0::2], mean[k, 1::2]
        frame = pd.DataFrame({"split": "pairs", "example": range(len(rows)), "multiplier": m})
        frame["loss_matching"], frame["loss_not_matching"] = l_p, l_n
        frame["preference"], frame["utility"] = odds.preference_log_odds(l_p, l_n), odds.utility_log_odds(l_p, l_n)
        frames.append(frame)
    return odds.summarise(pd.concat(frames, ignore_index=True), seed).drop(columns="split")
