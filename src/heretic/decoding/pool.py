"""The rows being decoded: adding and removing rows, and the columns of their keys and values."""

from collections import deque
from collections.abc import Callable, Sequence, Set
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..device import upload
from .blocks import Blocks, Prefix
from .compiled import rounded_columns, rounded_rows
from .rows import Row

Done = TypeVar("Done")

# New rows are prefilled if this share of the pass is free, or if all waiting rows fit: prefills of single rows are inefficient.
REFILL_SHARE = 0.25
# Finished rows are removed when they make up this share of the pass.
COMPACT_SHARE = 0.1
# Spare columns: blocks start with this many and grow by as many, up to the longest row and as many more,
# so that they do not have to be shifted at every step.
SLACK_COLUMNS = 48


class DecoderInterface(Protocol):
    """The interface of a decoder that a pool uses: forward passes and memory limits. See `Decoder`."""

    device: torch.device
    n_layers: int
    end_tokens: frozenset[int]
    padding_tokens: int
    max_rows: int | None
    bytes_per_row: int | None
    assign_rows: Callable[[Sequence[int]], None]

    def rows_that_fit(self) -> int | None: ...

    def take(self, waiting: "deque[Row]", n_rows: int, padding_tokens: int | None) -> list[Row]: ...

    def retry(self, waiting: "deque[Row]", chunk: list[Row], work: Callable[[list[Row]], Done]) -> Done | None: ...

    def prefill(self, rows: Sequence[Row], cache: Blocks | None, prefix: Prefix | None) -> tuple[Tensor, Tensor]: ...

    @property
    def has_fixed_shapes(self) -> bool: ...

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Blocks, length: int) -> Tensor: ...


class Pool:
    """The rows being decoded, with their keys and values. Row `i` of every tensor belongs to `rows[i]`."""

    def __init__(
        self, decoder: DecoderInterface, n_rows: int, n_columns: int, max_new_tokens: int, is_finished: Callable[[Row], bool]
    ) -> None:
        self.decoder = decoder
        self.limit = min(n_rows, decoder.max_rows or n_rows)
        self.n_columns = 0
        self.most_columns = self._rounded(n_columns + SLACK_COLUMNS)
        self.max_new_tokens = max_new_tokens
        self.is_finished = is_finished
        self.rows: list[Row] = []
        self.cache: Blocks | None = None
        self.length = 0  # columns in use
        self._starts: list[int] = []  # each row's first column
        self._gone: set[int] = set()
        # Rows whose latest token `is_finished` has not seen: on an accelerator texts are checked during the next step.
        self._unchecked: list[int] = []
        self._finished: list[Row] = []
        self._entering: list[Row] = []
        self._assigned = False

    @property
    def active_rows(self) -> list[Row]:
        """The rows that are not finished, including those that are just being added."""
        return [row for i, row in enumerate(self.rows) if i not in self._gone] + self._entering

    def advance(self, waiting: "deque[Row]", prefix: Prefix | None) -> None:
        """One step: add waiting rows if there is room, or decode one token of every row."""
        room = self.limit - len(self.rows) + len(self._gone)
        if waiting and (room >= min(len(waiting), self.limit * REFILL_SHARE) or len(self._gone) == len(self.rows)):
            self._compact()
            self._admit(waiting, self.limit - len(self.rows), prefix)
            return
        if len(self._gone) > len(self.rows) * COMPACT_SHARE:
            self._compact()
        if self.rows:
            self._step()

    def finished(self) -> list[Row]:
        """The rows that finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def drop(self, trials: Set[int]) -> None:
        """Remove the rows of some trials."""
        self._gone.update(i for i, row in enumerate(self.rows) if row.trial in trials)

    def _rounded(self, n_columns: int) -> int:
        return rounded_columns(n_columns) if self.decoder.has_fixed_shapes else n_columns

    def _allocate(self, fresh: Blocks) -> Blocks:
        """Allocate as many rows as fit in memory, now that the size of a row is known."""
        decoder = self.decoder
        decoder.bytes_per_row = max(1, fresh.bytes_per_position * self.most_columns)
        fitting = decoder.rows_that_fit() or 0
        if decoder.has_fixed_shapes and fitting < self.limit:
            fitting = rounded_rows(fitting + 1) // 2  # not another number whenever another amount of memory is free
        self.limit = max(1, fresh.n_rows, min(self.limit, fitting))
        self.n_columns = min(self._rounded(fresh.blocks[0].n_columns + SLACK_COLUMNS), self.most_columns)
        self.mask = torch.zeros(self.limit, self.n_columns, dtype=torch.bool, device=decoder.device)
        self.next_tokens = torch.zeros(self.limit, dtype=torch.long, device=decoder.device)
        self.positions = torch.zeros(self.limit, dtype=torch.long, device=decoder.device)
        return Blocks(decoder.n_layers, self.limit, self.n_columns)

    def _admit(self, waiting: "deque[Row]", room: int, prefix: Prefix | None) -> None:
        decoder = self.decoder
        chunk = decoder.take(waiting, room, decoder.padding_tokens)
        fresh = Blocks(decoder.n_layers, len(chunk), max(row.length for row in chunk))
        prefilled = decoder.retry(waiting, chunk, lambda part: decoder.prefill(part, fresh, prefix))
        if prefilled is None:
            return
        logits, mask = prefilled
        self._entering = chunk
        if self.cache is None:
            self.cache = self._allocate(fresh)
        width = mask.shape[1]
        first, end = len(self.rows), len(self.rows) + len(chunk)
        if first == 0:
            self.length = width
        if width > self.length or width > self.n_columns:
            self._widen(max(0, width - self.length))
        self.cache.put(fresh, first, self.length)
        self.mask[first:end] = False
        self.mask[first:end, self.length - width : self.length] = mask
        self.positions[first:end] = mask.sum(dim=1)
        self.rows += chunk
        self._starts += [self.length - width + (0 if prefix else width - row.length) for row in chunk]
        self._entering = []
        self._assigned = False
        self._note(first, self._choose(first, logits))

    def _step(self) -> None:
        n = len(self.rows)
        if self.length == self.n_columns:
            self._make_room()
            n = len(self.rows)
        assert self.cache is not None
        computed = min(rounded_rows(n), self.limit) if self.decoder.has_fixed_shapes else n
        if not self._assigned:
            self.decoder.assign_rows([row.trial for row in self.rows] + [self.rows[0].trial] * (computed - n))
            self._assigned = True
        self.mask[:computed, self.length] = True
        inputs = self.next_tokens[:computed, None], self.mask[:computed], self.positions[:computed, None]
        logits = self.decoder.step(*inputs, self.cache, self.length)[:n]
        self.length += 1
        self.positions[:n] += 1
        chosen = self._choose(0, logits)
        self.check_texts()  # while an accelerator computes the step
        self._note(0, chosen)

    def _choose(self, first: int, logits: Tensor) -> Tensor:
        """The likeliest token of each row from `first` on (-1 if logits are not finite), which is also its next input."""
        chosen = _likeliest(logits)
        torch.clamp(chosen, min=0, out=self.next_tokens[first : first + len(chosen)])
        return chosen

    def _note(self, first: int, chosen: Tensor) -> None:
        """Append the chosen token to each row from `first` on. On an accelerator its text is checked during the next step."""
        for i, token in enumerate(chosen.tolist(), first):
            if i in self._gone:
                continue
            if self._append(self.rows[i], token):
                self._finish(i)
            else:
                self._unchecked.append(i)
        if self.decoder.device.type == "cpu":
            self.check_texts()

    def check_texts(self) -> None:
        """Ask `is_finished` about the rows whose latest token it has not seen."""
        for i in self._unchecked:
            if i not in self._gone and self.is_finished(self.rows[i]):
                self._finish(i)
        self._unchecked.clear()

    def _finish(self, i: int) -> None:
        self._gone.add(i)
        self._finished.append(self.rows[i])

    def _append(self, row: Row, token: int) -> bool:
        """Append a token (-1: logits were not finite) to a row. Returns whether it is then finished, whatever its text."""
        row.begun = True
        row.finite = token >= 0
        if not row.finite or token in self.decoder.end_tokens:
            return True
        row.generated.append(token)
        return len(row.generated) >= self.max_new_tokens

    def _compact(self) -> None:
        """Move the last active rows to the places of finished ones."""
        if not self._gone or self.cache is None:
            return
        n_left = len(self.rows) - len(self._gone)
        holes = sorted(i for i in self._gone if i < n_left)
        movers = [i for i in range(n_left, len(self.rows)) if i not in self._gone]
        if holes:
            targets, sources = upload(torch.tensor([holes, movers]), self.decoder.device)
            self.cache.move_rows(sources, targets)
            for values in (self.mask, self.next_tokens, self.positions):
                values[targets] = values[sources]
            for target, source in zip(holes, movers, strict=True):
                self.rows[target], self._starts[target] = self.rows[source], self._starts[source]
        moved = dict(zip(movers, holes, strict=True))
        self._unchecked = [moved.get(i, i) for i in self._unchecked if i not in self._gone]
        del self.rows[n_left:], self._starts[n_left:]
        self._gone.clear()
        self._assigned = False

    def _make_room(self) -> None:
        """Make room for another column, by growing the blocks or, once they have their full size, by dropping unused columns."""
        if self.n_columns < self.most_columns:
            self._grow(min(self.n_columns + SLACK_COLUMNS, self.most_columns))
        else:
            self._shift()

    def _grow(self, n_columns: int) -> None:
        """Make blocks have so many columns."""
        assert self.cache is not None
        n_new = self._rounded(n_columns) - self.n_columns
        self.cache.grow(n_new)
        self.mask = nn.functional.pad(self.mask, (0, n_new))
        self.n_columns += n_new

    def _widen(self, n_columns: int) -> None:
        """Move all rows to the right, so that a longer one can end in the same column."""
        assert self.cache is not None
        if self.length + n_columns > self.n_columns:
            self._grow(self.length + n_columns)
        self.cache.widen(n_columns, len(self.rows))
        self.mask = self.mask.roll(n_columns, dims=1)
        self._starts = [start + n_columns for start in self._starts]
        self.length += n_columns

    def _shift(self) -> None:
        """Drop the columns that no active row uses."""
        self._compact()
        assert self.cache is not None
        n_unused = min(self._starts)
        self._starts = [start - n_unused for start in self._starts]
        self.cache.shift(n_unused, len(self.rows))
        self.length -= n_unused
        self.mask = self.mask.roll(-n_unused, dims=1)
        self.mask[:, self.length :] = False


def _likeliest(logits: Tensor) -> Tensor:
    """The most likely token of each row; -1 if logits are not finite."""
    best, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), tokens, -1)
