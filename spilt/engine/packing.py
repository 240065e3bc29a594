"""What sequences share is computed once: the beginning common to all, and the prompt common to the answers of a question.

    sequence 0   |-- prefix --|-- shared --|-- own 0 --|
    sequence 1   |-- prefix --|-- shared --|-- own 1 --|

Attention is causal, so the keys and values of the prefix are the same for all sequences at one multiplier: they are
computed once and handed over in a cache. The rest of a question is one row, a pack: the shared tokens, then each
answer's own. A mask lets an own token see the prefix, the shared tokens and its own branch; positions restart at each branch.

For the template `<u> .. <a>`, the question `why ?` and the answers `yes .` and `no`:

    in the cache   <u>         the prefix, at position 0
    the pack       why  ?   <a>  yes  .    <a>  no    padding
    position       1    2   3    4    5    3    4     0
    branch         S    S   0    0    0    1    1     P         S: SHARED, P: PADDING
    scores                  yes  .         no                   the label of its logits: the next token of its branch, if an answer's

    sees           <u>  why  ?   <a>  yes  .    <a>  no    P
    why            x    x
    ?              x    x    x
    <a>  (0)       x    x    x   x
    yes            x    x    x   x    x
    .              x    x    x   x    x    x
    <a>  (1)       x    x    x                  x
    no             x    x    x                  x    x
    P              x                                       x    itself, so that no row of attention scores is empty

The last prompt token <a> belongs to the branches: its logits score the first answer token, which differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from spilt.data.chat import Encoded

SHARED, PADDING = -1, -2  # of `branch`
KeysValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values [B, H, T, d]


class Pack(NamedTuple):
    """One row: sequences of a question without the common prefix."""

    members: tuple[int, ...]  # sequence numbers
    ids: tuple[int, ...]
    positions: tuple[int, ...]  # place of each token in its own sequence
    branch: tuple[int, ...]  # SHARED, or which member the token belongs to
    places: tuple[tuple[int, ...], ...]  # per member: where its tokens after the prefix are in the row, in order


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # the lexicographic extremes differ first
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))


def prefix_length(sequences: Sequence[Encoded]) -> int:
    """Leading tokens that all sequences share, the last prompt token of the shortest prompt excluded."""
    return min(_common([s.input_ids for s in sequences]), min(s.prompt_length for s in sequences) - 1)


def pack(sequences: Sequence[Encoded], members: Sequence[int], prefix: int) -> Pack:
    """The members as one row; a single member is its own row without branches."""
    rows = [sequences[i].input_ids for i in members]
    shared = max(prefix, min(_common(rows), *(sequences[i].prompt_length - 1 for i in members)))
    ids = list(rows[0][prefix:shared])
    positions, branch = list(range(prefix, shared)), [SHARED] * len(ids)
    places = []
    for k, row in enumerate(rows):
        start = len(ids)
        ids += row[shared:]
        positions += range(shared, len(row))
        branch += [k] * (len(row) - shared)
        places.append((*range(shared - prefix), *range(start, len(ids))))
    return Pack(tuple(members), tuple(ids), tuple(positions), tuple(branch), tuple(places))


class Rows(NamedTuple):
    """Packs, right-padded to one length T."""

    input_ids: Tensor  # [B, T] long
    positions: Tensor  # [B, T] long
    branch: Tensor  # [B, T] long


def pad_packs(packs: Sequence[Pack], pad_id: int) -> Rows:
    width = max(len(p.ids) for p in packs)

    def filled(values: Sequence[Sequence[int]], padding: int) -> Tensor:
        return torch.tensor([[*row, *[padding] * (width - len(row))] for row in values])

    return Rows(filled([p.ids for p in packs], pad_id), filled([p.positions for p in packs], 0), filled([p.branch for p in packs], PADDING))


def visible(rows: Rows, prefix: int, window: int | None = None) -> Tensor:
    """[B, T, prefix + T] bool: which keys each token sees; keys are the prefix, then the row itself."""
    device = rows.positions.device
    own = rows.branch[:, None, :] == rows.branch[:, :, None]
    row = ((rows.branch[:, None, :] == SHARED) | own) & (rows.positions[:, None, :] <= rows.positions[:, :, None])
    # padding sees itself, so that no row of attention scores is empty
    row = torch.where((rows.branch == PADDING)[:, :, None], torch.eye(row.shape[1], dtype=torch.bool, device=device), row)
    seen = torch.cat([torch.ones(*row.shape[:2], prefix, dtype=torch.bool, device=device), row], -1)
    if window is None:
        return seen
    keys = torch.cat([torch.arange(prefix, device=device).expand(len(row), -1), rows.positions], -1)
    return seen & ((keys[:, None, :] > rows.positions[:, :, None] - window) | (rows.branch == PADDING)[:, :, None])


def attention_inputs(model: nn.Module, rows: Rows, prefix: int, copies: int = 1) -> dict[str, Any]:
    """position_ids and attention_mask for a library forward. copies: the whole batch stands that many times one after the other
    (once per multiplier)."""
    mask = attention_masks(model, lambda window: visible(rows, prefix, window).repeat(copies, 1, 1))
    return {"position_ids": rows.positions.repeat(copies, 1), "attention_mask": mask, "use_cache": True}


def attention_masks(model: nn.Module, visible: Callable[[int | None], Tensor]) -> Any:
    """What is added to attention scores [B, 1, queries, keys], per kind of layer where the model has two.

    visible: [B, queries, keys] bool, for layers that see so many tokens back (None: all).
    """
    config: Any = model.config
    text = config.get_text_config()
    dtype = next(model.parameters()).dtype

    def additive(window: int | None) -> Tensor:
        seen = visible(window)
        return torch.zeros((), dtype=dtype, device=seen.device).where(seen, torch.finfo(dtype).min)[:, None]

    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" in kinds:
        return {"full_attention": additive(None), "sliding_attention": additive(window)}
    return additive(None if kinds else window)  # one kind: with a window everywhere (Mistral), or without


def alike(pairs: KeysValues, rows: int) -> KeysValues:
    """Keys and values [1, H, T, d] before each of so many rows: views of the one."""
    return {layer: tuple(t.expand(rows, -1, -1, -1) for t in pair) for layer, pair in pairs.items()}  # type: ignore[misc]


class BegunKV(DynamicLayer):  # type: ignore[misc]
    """The library's layer, which begins with these keys and values; they are not copied."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.dtype, self.device, self.is_initialized = keys, values, keys.dtype, keys.device, True


class ReadOnlyKV(BegunKV):
    """Keys and values that are read and never grow: a block that runs twice (checkpointed) finds the same ones."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


def cache_of(pairs: KeysValues, kind: type[BegunKV] = BegunKV) -> DynamicCache:
    """The library's cache with these keys and values; other layers stay empty."""
    cache = DynamicCache()
    cache.layers = [kind(*pairs[i]) if i in pairs else DynamicLayer() for i in range(max(pairs, default=-1) + 1)]
    return cache


def given(pairs: KeysValues, rows: int) -> DynamicCache:
    """`cache_of` before so many rows, read only."""
    return cache_of(alike(pairs, rows), ReadOnlyKV)


def pairs_of(cache: DynamicCache) -> KeysValues:
    """Keys and values of the layers that were computed."""
    layers: list[Any] = cache.layers
    return {i: (layer.keys, layer.values) for i, layer in enumerate(layers) if layer.keys is not None}
