"""Keys and values of the rows that are being decoded, with room for more tokens and more rows.

The library's DynamicLayer joins old and new keys at every token, which copies the whole cache each time. Here a token
is written into free columns behind the old ones, a row that ends leaves its place to another, a row that comes takes a
free place; only when the columns run out is the layer copied.

    row 0   |..pad..|--------- tokens ---------|.. free ..|
    row 1   |.|------------- tokens -----------|.. free ..|
            first                             end
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

FREE = 16  # columns that a layer is given beyond what it holds: so many tokens until it is copied


class PreallocatedKV(DynamicLayer):  # type: ignore[misc]
    """One layer: keys and values [rows, H, end - first, d] are views into stores [capacity, H, columns, d].

    What lies left of a row's own tokens is masked, so it need only be finite: stores begin as zeros.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.rows, self.first, self.end = capacity, 0, 0, 0
        self.stores: tuple[Tensor, ...] = ()

    def join(self, keys: Tensor, values: Tensor, width: int) -> None:
        """Rows [B, H, T, d] come in, their last tokens beside those of the rows that are there; then all are `width` >= T wide."""
        if self.end < width:
            self._move((keys, values), width)
        self.first = self.end - width
        place = slice(self.rows, self.rows + len(keys))
        for store, new in zip(self.stores, (keys, values), strict=True):
            store[place, :, self.end - new.shape[2] : self.end] = new
        self.rows += len(keys)
        self._show()

    def keep(self, holes: Tensor, movers: Tensor, rows: int, dropped: int) -> None:
        """The first `rows` rows stay, rows `movers` in the places of rows `holes`; `dropped` columns on the left go."""
        self.first, self.rows = self.first + dropped, rows
        if len(holes):
            for store in self.stores:
                at = (t.to(store.device) for t in (holes, movers))
                view = store[:, :, self.first : self.end]
                view.index_copy_(0, next(at), view.index_select(0, next(at)))
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The next tokens [rows, H, t, d], as the library's attention hands them over."""
        more = key_states.shape[2]
        if self.end + more > self.stores[0].shape[2]:
            self._move((key_states, value_states), self.end - self.first)
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[: self.rows, :, self.end : self.end + more] = new
        self.end += more
        return self._show()

    def _move(self, like: tuple[Tensor, Tensor], width: int) -> None:
        """New stores with FREE columns after `width` (at least what is held); what is there comes to lie before them."""
        held = self.end - self.first
        end, free = max(held, width), max(FREE, like[0].shape[2])
        old, stores = self.stores, []
        for kind, new in enumerate(like):
            store = new.new_zeros(self.capacity, new.shape[1], end + free, new.shape[3])
            if held:
                store[: self.rows, :, end - held : end] = old[kind][: self.rows, :, self.first : self.end]
            stores.append(store)
        self.stores, self.first, self.end = tuple(stores), end - held, end

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (store[: self.rows, :, self.first : self.end] for store in self.stores)
        self.keys, self.values, self.dtype, self.device, self.is_initialized = keys, values, keys.dtype, keys.device, True
        return keys, values
