"""What steering buys and costs: preference and utility, KL along the steered path, and the strengths of equal KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from spilt.analysis import calibrate as calibrated
from spilt.analysis import odds
from spilt.api.given import (
    Pairs,
    Prompt,
    check_lengths,
    check_prompts,
    family,
    frozen,
    pairs_of,
    questions_of,
    steering_of,
    strengths_of,
    whole_number,
)
from spilt.api.texts import new_tokens
from spilt.data.chat import Chat, Encoded
from spilt.data.readers import PAIRS
from spilt.engine import activations, choice, decode, prepacked, sampling, score, whole
from spilt.engine.divergence import along_path, rests_at_0, while_decoding
from spilt.errors import NotFinite, UserError
from spilt.model import host
from spilt.steering.steering import Steering
from spilt.tasks.context import texts_at_once
from spilt.verbs import measure as measure_verb

if TYPE_CHECKING:
    import pandas as pd

WORST = 0.95  # of the tokens: what a calibration looks at


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
    strengths = strengths_of(multipliers)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "engine": engine, "batch_size": batch_size}
    how |= {"use_chat_template": use_chat_template, "system_prompt": system_prompt}
    return divergences(model, tokenizer, steering, prompts, **how)(strengths)


def divergences(
    model: nn.Module,
    tokenizer: Any,
    steering: Steering,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 50,
    engine: str = choice.FAST,
    batch_size: int | None = None,
    use_chat_template: bool = True,
    system_prompt: str = "",
) -> Callable[[Sequence[float]], pd.DataFrame]:
    """`divergence` as a function of the multipliers: what is the same at all of them is looked at once."""
    import pandas as pd

    chat, placed = Chat.of(tokenizer, use_chat_template, system_prompt), steering_of(model, steering)
    ids = [tuple(chat.prompt_ids(question)) for question in questions_of(prompts)]
    how = sampling.decoding({"do_sample": False, "max_new_tokens": whole_number("max_new_tokens", max_new_tokens, 1)}, model, tokenizer)
    pad = host.pad_id(tokenizer)
    check_prompts(model, ids, how.max_new_tokens)
    with frozen(model):
        plain = choice.why_plain(placed.places, "generate", family=family(model), engine=engine, positions=placed.scope)
        beside = not plain and rests_at_0(model, placed, Encoded(ids[0], len(ids[0]), 0), pad)

    def at(strengths: Sequence[float]) -> pd.DataFrame:
        rows = [decode.Row(prompt, m, "") for m in strengths for prompt in ids]
        nats = _nats(model, placed, rows, how, pad, engine, batch_size, beside)
        out = []
        for k, m in enumerate(strengths):
            kl = torch.cat(nats[k * len(ids) : (k + 1) * len(ids)]).numpy()
            out.append((m, len(kl), float(kl.mean()), float(np.quantile(kl, WORST)), float(kl.max())))
        return pd.DataFrame(out, columns=["multiplier", "tokens", "kl_mean", "kl_p95", "kl_max"])

    return at


def _nats(
    model: nn.Module,
    steering: Steering,
    rows: Sequence[decode.Row],
    how: sampling.Decoding,
    pad: int,
    engine: str,
    batch_size: int | None,
    beside: bool,
) -> list[torch.Tensor]:
    """KL at each token of each row's greedy answer: while it is decoded, beside an unsteered row, or read again afterwards."""
    # at 0 the answer is read twice in the same way, so that the KL is 0 to the bit
    fast = [i for i, row in enumerate(rows) if beside and row.multiplier]
    at_once = texts_at_once(model, batch_size, list(dict.fromkeys(row.prompt for row in rows)), how.max_new_tokens).texts
    tokens = len(fast) * how.max_new_tokens if engine == choice.FAST else 0
    with frozen(model), prepacked.weights(model, tokens):
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

    begin, high = reach(steering_of(model, steering))
    checked = divergences(model, tokenizer, steering, audit, **how) if audit else None
    return both_sides(divergences(model, tokenizer, steering, prompts, **how), checked, budget, start or begin, high)


def reach(steering: Steering) -> tuple[float, float]:
    """Where a search for a strength begins, the end of the range in which the form is trained, and the largest that it means."""
    return max(map(abs, steering.entries[0][1].factors)), min(calibrated.HIGH, *(made.furthest() for _, made in steering))


def both_sides(
    at: Callable[[Sequence[float]], pd.DataFrame],
    audit: Callable[[Sequence[float]], pd.DataFrame] | None,
    budget: float,
    start: float,
    high: float = calibrated.HIGH,
) -> pd.DataFrame:
    """The table of `calibrate`, of any way to measure. at(multipliers), audit: a row for each as of `divergence`, or NotFinite."""
    import pandas as pd

    told = at([0.0]).assign(side="none")
    rest = told["kl_max"][0] != 0
    tried, rows = [told], []
    signs = {"positive": 1.0, "negative": -1.0}

    def p95(sizes: dict[str, float]) -> list[float]:
        """At a size of each side, together; alone where one breaks down."""
        try:
            found = at([signs[side] * size for side, size in sizes.items()])
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
        if audit is not None:
            try:
                other = dict(audit([m]).iloc[0])
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

    positions: which tokens are steered, a word of `steer_positions`; left out, `Steering.scope`, as `generate` does: every token, unless
    it was fitted for last, last_cached, prompt or generated. What else it was fitted at (f5+l5, all_prompt ...) says where the fit trains,
    and is asked for here by its word; skip_prefix is as the released losses.
    multipliers: left out, 11 points over the range in which the form is trained. 0, the unsteered model, is always among them.
    """
    import pandas as pd

    rows = pairs_of(pairs)
    if rows[0].kind != PAIRS:
        raise UserError(f"the pairs are {rows[0].kind}: preference and utility compare two answers to one question; give such pairs")
    chat = Chat.of(tokenizer, use_chat_template, system_prompt)
    tokens = [chat.encode(question, text, output_length, p.row) for p in rows for question, text in p.sides]
    check_lengths(model, "measure", tokens)
    placed, pad = steering_of(model, steering), host.pad_id(tokenizer)
    positions = positions or placed.scope
    if multipliers is None:
        multipliers = measure_verb.sweep_multipliers(placed.entries[0][1].factors, 11)
    strengths = sorted({0.0, *strengths_of(multipliers)})
    prefix = chat.prefix_length
    read_in_all = sum(len(s.input_ids) for s in tokens) * len(strengths) if engine == choice.FAST else 0
    with frozen(model), prepacked.weights(model, read_in_all):
        if choice.why_plain(placed.places, "measure", family=family(model), engine=engine, positions=positions):
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
