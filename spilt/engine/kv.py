"""Keys and values of the rows that are being decoded, in stores that are made once and never move.

The library's DynamicLayer joins old and new keys at every token, which copies the whole cache each time. Here each row has a
place with a column for every token that it may get. Its next token is written behind its own last one; a row that ends leaves its
place to another.

    row 0   |------------- tokens -----------|..........|
    row 1   |--- tokens ---|...........                 |
    free    |                                           |
            0                              width  columns
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class PreallocatedKV(DynamicLayer):  # type: ignore[misc]
    """One layer: keys and values [rows, H, width, d] are views into stores [capacity, H, columns, d].

    What lies right of a row's own tokens is masked, so it need only be finite: stores begin as zeros.
    """

    def __init__(self, capacity: int, columns: int) -> None:
        super().__init__()
        self.capacity, self.columns = capacity, columns
        self.stores: tuple[Tensor, ...] = ()

    def join(self, keys: Tensor, values: Tensor, rows: int) -> None:
        """Others [B, H, T, d], padded on the right, take the places after the first `rows`."""
        if not self.stores:
            shape = self.capacity, keys.shape[1], self.columns
            self.stores = tuple(new.new_zeros(*shape, new.shape[3]) for new in (keys, values))
        for store, new in zip(self.stores, (keys, values), strict=True):
            store[rows : rows + len(new), :, : new.shape[2]] = new

    def keep(self, holes: Tensor, movers: Tensor, width: int) -> None:
        """Rows `movers` go to the places of rows `holes`, with their first `width` columns."""
        for store in self.stores:
            to, source = holes.to(store.device), movers.to(store.device)
            view = store[:, :, :width]
            view.index_copy_(0, to, view.index_select(0, source))

    def begin(self, lengths: Tensor, width: int) -> None:
        """The next tokens come, behind lengths [rows] tokens; then the longest row is `width` long."""
        like = self.stores[0]
        self.at = torch.arange(len(lengths), device=like.device), lengths.to(like.device)
        keys, values = (store[: len(lengths), :, :width] for store in self.stores)
        self.keys, self.values, self.shown = keys, values, (keys, values)
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The next token of each row [rows, H, 1, d], as the library's attention hands them over."""
        rows, lengths = self.at
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[rows, :, lengths] = new[:, :, 0]
        return self.shown
