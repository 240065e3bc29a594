"""Which tokens a Steering acts on, obeyed in one forward and in decoding (`values.SCOPES`, arXiv 2603.00425: intervene on the last token).

`last` steers position t when the logits at t are made, and nothing else: every key and value of earlier tokens is unsteered. So no mask
of one forward says it, but attention is causal, and two streams do:

    unsteered   x_0  x_1  ...  x_T       one pass; its keys and values are kept
    steered     x_s  for each scored s   queries; each sees the unsteered keys before s and its own steered one

which is exact for any number of steered layers and places. A text is made the same way: the cache holds unsteered tokens alone; each step
runs [the token before, unsteered; the newest, steered] and takes the steered one's keys and values out of the cache again.
`last_cached` is what plain cached decoding gives instead: the newest token is steered, and stays so in the cache. It is a scope of its
own (from the last prompt token on), fitted and used alike.

Families with a recurrent state, and those that no row of `anatomy` names, run each prefix by itself: slow, and the definition.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spilt import in_step, memory
from spilt.engine import decode, packing, sampling, suffix
from spilt.engine.prompts import Row
from spilt.engine.sampling import Decoding
from spilt.errors import unknown
from spilt.settings.values import SCOPES
from spilt.steering import anatomy, hooks
from spilt.steering.interventions import Multiplier
from spilt.steering.steering import Steering, per_row

log = logging.getLogger("spilt")
LAST = "last"
PREFIX_TOKENS = 4096  # of prefixes that are run side by side


def why_prefixes(model: nn.Module) -> str:
    """Why `last` runs every prefix by itself; '' where two streams do."""
    return anatomy.family(model).plain


def places(attention_mask: Tensor) -> Tensor:
    """[B, T] long: the place of each real token in its own sequence, on either side of padding; 0 on padding before it."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def last_attended(attention_mask: Tensor) -> Tensor:
    """[B] long: the column of each row's last real token, whichever side is padded."""
    return attention_mask.shape[1] - 1 - attention_mask.long().flip(1).argmax(1)


def positions(scope: str, attention_mask: Tensor, prompt_length: Tensor) -> Tensor:
    """[B, T] bool: the tokens that a scope steers in one forward; padding may be on either side. prompt_length [B]: real tokens.

    Raises UserError for a word that is none, ValueError for `last`, which no mask says.
    """
    prompt = prompt_length.to(attention_mask.device)[:, None]
    return attention_mask.bool() & _acts(scope, places(attention_mask), prompt)


def _acts(scope: str, place: Tensor, prompt: Tensor) -> Tensor:
    """[B, T] bool: whether a scope steers the token at this place [B, T] behind so long a prompt [B, 1]."""
    if scope == LAST:
        raise ValueError("scope last is no mask of one forward")
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if scope == "prompt":
        return place < prompt
    least = {"all": torch.zeros_like(prompt), "generated": prompt, "last_cached": prompt - 1}[scope]
    return place >= least


def logits(
    model: nn.Module,
    steering: Steering,
    multiplier: Multiplier,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_length: Tensor,
    keep: Tensor,
    scope: str | None = None,
) -> Tensor:
    """Logits [n, V] at the tokens `keep` [B, T] bool, row by row, with the graph down to the steering's parameters.

    input_ids, attention_mask [B, T], padded on either side; prompt_length [B]; multiplier: a number or [B]. scope: else the steering's own.
    """
    scope = scope or steering.scope
    if scope != LAST:
        where = positions(scope, attention_mask, prompt_length)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(type(model).forward).parameters:
            inputs["position_ids"] = places(attention_mask)
        with hooks.attach(model, steering.at(per_row(multiplier), where)), suffix.head_rows(model, keep):
            return model(**inputs).logits[0]
    return last_logits(model, steering, multiplier, input_ids, attention_mask, keep)


def last_logits(
    model: nn.Module, steering: Steering, multiplier: Multiplier, input_ids: Tensor, attention_mask: Tensor, keep: Tensor
) -> Tensor:
    """`logits` of scope last."""
    made = _by_prefixes if why_prefixes(model) else _two_streams
    return made(model, steering, multiplier, input_ids, attention_mask, keep)


def _two_streams(
    model: nn.Module, steering: Steering, multiplier: Multiplier, input_ids: Tensor, attention_mask: Tensor, keep: Tensor
) -> Tensor:
    """`last`: the unsteered pass, then every scored token's steered query in one forward."""
    place, real = places(attention_mask), attention_mask.bool()
    columns = keep.long().sort(dim=1, descending=True, stable=True).indices[:, : int(keep.sum(1).max())]  # [B, S] of the scored tokens
    valid, at = keep.gather(1, columns), place.gather(1, columns)
    diagonal = torch.eye(place.shape[1], dtype=torch.bool, device=place.device)

    def unsteered(window: int | None) -> Tensor:
        seen = _before(place, place, window, inclusive=True) & real[:, None, :]
        return seen | diagonal  # padding sees itself, so that no row of attention scores is empty

    def steered(window: int | None) -> Tensor:
        own = torch.eye(at.shape[1], dtype=torch.bool, device=at.device).expand(len(at), -1, -1)
        return torch.cat([_before(place, at, window, inclusive=False) & real[:, None, :], own], -1)

    cache = DynamicCache()  # every layer keeps all positions: windows are masks
    with torch.no_grad(), suffix.head_rows(model, torch.zeros_like(keep)):
        mask = packing.attention_masks(model, unsteered)
        model(input_ids=input_ids, position_ids=place, attention_mask=mask, past_key_values=cache, use_cache=True)
    known = packing.given(packing.pairs_of(cache), len(place))
    mask = packing.attention_masks(model, steered)
    with hooks.attach(model, steering.at(per_row(multiplier), valid)), suffix.head_rows(model, valid):
        out = model(input_ids=input_ids.gather(1, columns), position_ids=at, attention_mask=mask, past_key_values=known, use_cache=True)
    return out.logits[0]


def _before(keys: Tensor, queries: Tensor, window: int | None, inclusive: bool) -> Tensor:
    """[B, queries, keys] bool: which places come before each other, within a window that ends with the query's own place."""
    key, query = keys[:, None, :], queries[:, :, None]
    seen = key <= query if inclusive else key < query
    return seen if window is None else seen & (key > query - window)


def _by_prefixes(
    model: nn.Module, steering: Steering, multiplier: Multiplier, input_ids: Tensor, attention_mask: Tensor, keep: Tensor
) -> Tensor:
    """`last`, as it is defined: each prefix alone, its last token steered. Padding goes to the right."""
    rows, columns = keep.nonzero().unbind(1)
    texts = [row[real] for row, real in zip(input_ids, attention_mask.bool(), strict=True)]
    lengths = places(attention_mask)[rows, columns] + 1
    found = []
    for part in torch.arange(len(rows), device=rows.device).split(max(1, PREFIX_TOKENS // input_ids.shape[1])):
        width = int(lengths[part].max())
        index = torch.arange(width, device=input_ids.device)
        real = index < lengths[part, None]
        ids = torch.stack([nn.functional.pad(texts[row][:width], (0, max(0, width - len(texts[row])))) for row in rows[part].tolist()])
        last = index == lengths[part, None] - 1
        strength = multiplier[rows[part]] if isinstance(multiplier, Tensor) and multiplier.ndim else multiplier
        with hooks.attach(model, steering.at(per_row(strength), last)), suffix.head_rows(model, last):
            found.append(model(input_ids=ids * real, attention_mask=real.long(), use_cache=False).logits[0])
    return torch.cat(found)


# ---------------------------------------------------------------- texts


@torch.no_grad()
def generate(
    model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, batch_size: int, scope: str | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Yields (row number, new token ids), longest prompts first; ends, draws and strengths are those of each row, as in decode.generate.

    scope: else the steering's own. Out of memory: the rows under way begin again, half as many at once.
    """
    scope = scope or steering.scope
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if scope == "all" and not why_prefixes(model):
        yield from decode.generate(model, steering, rows, how, batch_size)
        return
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt))
    waiting = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    make = _uncached if why_prefixes(model) else _cached
    while waiting:
        numbers = waiting.pop(0)
        try:
            made = make(model, steering, [rows[i] for i in numbers], how, scope)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error) or len(numbers) == 1:
                raise
            half = len(numbers) // 2
            log.warning("out of memory: text from %d prompts at once; going on with %d", len(numbers), half)
            waiting[:0] = [numbers[:half], numbers[half:]]
            continue
        yield from zip(numbers, made, strict=True)


class _Texts:
    """What rows have so far, and how each goes on."""

    def __init__(self, model: nn.Module, rows: Sequence[Row], how: Decoding) -> None:
        self.model, self.rows, self.how = model, rows, how
        self.new: list[list[int]] = [[] for _ in rows]
        self.draws = [random.Random(row.seed) for row in rows]
        self.active = list(range(len(rows)))

    def add(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each active row from scores [A, V]; which rows of the batch go on [A'], and their tokens [A']."""
        decode.refuse_not_finite(scores, [self.rows[i] for i in self.active])
        uniform = torch.tensor([self.draws[i].random() for i in self.active], dtype=torch.float64) if self.how.sample else None
        ids = [[*self.rows[i].prompt, *self.new[i]] for i in self.active] if self.how.processors else []
        tokens = in_step.same(self.model, sampling.choose(scores, self.how, uniform, ids))
        going = []
        for place, (i, token) in enumerate(zip(self.active, tokens.tolist(), strict=True)):
            self.new[i].append(token)
            if token not in self.how.eos and len(self.new[i]) < self.how.max_new_tokens:
                going.append(place)
        self.active = [self.active[place] for place in going]
        index = torch.tensor(going, dtype=torch.long, device=scores.device)
        return index, tokens[index]


def _cached(model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, scope: str) -> list[list[int]]:
    """Prompts padded on the left, one cache. `last`: what is steered leaves the cache again, and is run once more unsteered."""
    device = anatomy.input_device(model)
    width, texts, cache = max(len(row.prompt) for row in rows), _Texts(model, rows, how), DynamicCache()
    start = torch.tensor([width - len(row.prompt) for row in rows], device=device)[:, None]
    strength = torch.tensor([row.multiplier for row in rows], dtype=torch.float32, device=device)
    ids = torch.tensor([[how.pad] * (width - len(row.prompt)) + list(row.prompt) for row in rows], device=device)
    held = 0  # columns in the cache
    while texts.active:
        columns = torch.arange(held + ids.shape[1], device=device)
        query = columns[held:]

        def visible(window: int | None, columns: Tensor = columns, query: Tensor = query, start: Tensor = start) -> Tensor:
            seen = _before(columns[None], query[None], window, inclusive=True) & (columns >= start)[:, None, :]
            return seen | (columns == query[:, None])

        acts = query == query[-1] if scope == LAST else _acts(scope, query - start, width - start)
        where = acts & (query >= start)
        with hooks.attach(model, steering.at(strength[:, None, None], where)):
            out = model(
                input_ids=ids,
                position_ids=(query - start).clamp(min=0),
                attention_mask=packing.attention_masks(model, visible),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        held = len(columns)
        if scope == LAST:
            held -= 1
            cache.crop(-1)
        going, tokens = texts.add(out.logits[:, -1].float().to(device))
        if 0 < len(going) < len(ids):
            cache.batch_select_indices(going)
        start, strength = start[going], strength[going]
        ids = torch.cat([ids[going, -1:], tokens[:, None]], 1) if scope == LAST else tokens[:, None]
    return texts.new


def _uncached(model: nn.Module, steering: Steering, rows: Sequence[Row], how: Decoding, scope: str) -> list[list[int]]:
    """Every token from the whole text so far, padded on the right: the definition."""
    device = anatomy.input_device(model)
    texts = _Texts(model, rows, how)
    while texts.active:
        so_far = [[*rows[i].prompt, *texts.new[i]] for i in texts.active]
        length = torch.tensor([len(text) for text in so_far], device=device)[:, None]
        index = torch.arange(int(length.max()), device=device)
        ids = torch.tensor([[*text, *[how.pad] * (len(index) - len(text))] for text in so_far], device=device)
        strength = torch.tensor([rows[i].multiplier for i in texts.active], dtype=torch.float32, device=device)
        prompt = torch.tensor([len(rows[i].prompt) for i in texts.active], device=device)
        real, last = index < length, index == length - 1
        scores = logits(model, steering, strength, ids, real, prompt, last, scope)
        texts.add(scores.float())
    return texts.new
