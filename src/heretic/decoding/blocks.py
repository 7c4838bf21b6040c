"""Keys and values of many rows in preallocated blocks: a transformers cache whose rows can be added and removed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..device import upload
from .rows import Row


class BlockLayer(DynamicLayer):
    """Keys and values of one layer in blocks `(row, head, column, dim)` of fixed size; `length` columns are used, the others are unset."""

    # Lets transformers make a mask for every step of one token, without a synchronization to find out whether one is needed.
    is_compileable = True
    keys: Tensor
    values: Tensor

    def __init__(self, n_rows: int, n_columns: int) -> None:
        super().__init__()
        self.n_rows, self.n_columns, self.length = n_rows, n_columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

        def block(states: Tensor) -> Tensor:
            return states.new_empty(self.n_rows, states.shape[1], self.n_columns, states.shape[3])

        self.keys, self.values = block(key_states), block(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, end = len(key_states), self.length + key_states.shape[2]
        self.keys[:n, :, self.length : end] = key_states
        self.values[:n, :, self.length : end] = value_states
        self.length = end
        return self.keys[:n, :, :end], self.values[:n, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def begin_with(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        """Begin each row with the columns of the row of `keys` and `values` that `rows (row,)` names."""
        self.lazy_initialization(keys, values)
        self.length = keys.shape[2]
        for block, columns in ((self.keys, keys), (self.values, values)):
            torch.index_select(columns, 0, rows, out=block[: len(rows), :, : self.length])

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Use complete blocks that were computed before."""
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def grow(self, n_columns: int) -> None:
        """Make room for more columns."""
        self.n_columns += n_columns
        if self.is_initialized:
            self.keys, self.values = (nn.functional.pad(block, (0, 0, 0, n_columns)) for block in (self.keys, self.values))


class Blocks(Cache):
    """A cache of `BlockLayer`s, and the operations that keep it filled with active rows."""

    def __init__(self, n_layers: int, n_rows: int, n_columns: int) -> None:
        self.blocks = [BlockLayer(n_rows, n_columns) for _ in range(n_layers)]
        super().__init__(layers=list(self.blocks))
        self.n_rows = n_rows

    @property
    def used(self) -> Iterator["BlockLayer"]:
        """Layers that are not empty: some models share keys and values between layers."""
        return (layer for layer in self.blocks if layer.is_initialized)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        for layer in self.used:
            here, there = sources.to(layer.device), targets.to(layer.device)
            for block in (layer.keys, layer.values):
                used = block[:, :, : layer.length]
                used.index_copy_(0, there, used.index_select(0, here))

    def put(self, other: "Blocks", first_row: int, length: int) -> None:
        """Copy the rows of `other` to rows from `first_row` on, so that they end in column `length` like all rows."""
        for own, new in zip(self.blocks, other.blocks, strict=True):
            if not new.is_initialized:
                continue
            if not own.is_initialized:
                own.lazy_initialization(new.keys, new.values)
            rows, start = slice(first_row, first_row + new.n_rows), length - new.length
            for block, columns in ((own.keys, new.keys), (own.values, new.values)):
                block[rows] = 0  # masked values get weight zero, but must be finite
                block[rows, :, start:length] = columns
            own.length = length

    def shift(self, n_columns: int, n_rows: int) -> None:
        """Drop the first columns."""
        for layer in self.used:
            for block in (layer.keys, layer.values):
                block[:n_rows, :, : layer.length - n_columns] = block[:n_rows, :, n_columns : layer.length].clone()
            layer.length -= n_columns

    def grow(self, n_columns: int) -> None:
        """Make room for more columns."""
        for layer in self.blocks:
            layer.grow(n_columns)

    def widen(self, n_columns: int, n_rows: int) -> None:
        """Move all columns to the right, leaving empty columns on the left."""
        for layer in self.used:
            for block in (layer.keys, layer.values):
                block[:n_rows, :, n_columns : layer.length + n_columns] = block[:n_rows, :, : layer.length].clone()
            layer.length += n_columns

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one token of one row in all layers."""
        return sum(2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size() for layer in self.used)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens that all rows start with, one row per trial."""

    length: int
    row_of_trial: dict[int, int]
    cache: Blocks

    def begin(self, cache: Blocks, rows: Sequence[Row]) -> None:
        """Initialize every row of an empty cache with the prefix."""
        sources = torch.tensor([self.row_of_trial[row.trial] for row in rows])
        on_device: dict[torch.device, Tensor] = {}
        for own, new in zip(self.cache.blocks, cache.blocks, strict=True):
            if own.is_initialized:
                if own.device not in on_device:
                    on_device[own.device] = upload(sources, own.device)
                new.begin_with(own.keys, own.values, on_device[own.device])
