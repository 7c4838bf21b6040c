"""Greedy decoding of many rows at once, where a row is one prompt under one trial's ablation.

All rows that wait form one pool; a forward pass takes as many as fit. A row leaves as soon as it is finished, and the rows that wait
take its place. Keys and values lie in blocks allocated once: a step writes one column in place, a row that leaves is replaced by
the last one, and new rows are prefilled aside and copied in so that all rows end in the same column. Every row has its own
positions and its own mask, so a row's tokens do not depend (up to rounding) on what else is in the pass.

Where it breaks: models whose cache holds more than keys and values (state-space and linear-attention layers) are refused by
`supports`; they are decoded by transformers' own `generate`.
"""

import inspect
import os.path
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .trunk import Trunk, pass_key
from .utils import empty_cache, free_memory, is_out_of_memory

# New rows are prefilled when at least this share of the pass is free: prefills of single rows are inefficient.
REFILL_SHARE = 0.25
# Rows that have left are replaced when they make up this share of the pass.
COMPACT_SHARE = 0.1
# Columns beyond what the rows need at present: blocks begin with so many and grow by as many, up to the longest row and as many more,
# so that they are not shifted at every step.
SLACK_COLUMNS = 48
# Tokens in one prefill pass, which bounds the memory of its hidden states.
PREFILL_TOKENS = {"cpu": 8192}
PREFILL_TOKENS_ACCELERATOR = 65536
# A common beginning is computed once per trial if it has so many tokens and rows: below that the extra pass costs more.
MIN_PREFIX_TOKENS = 4
MIN_PREFIX_ROWS = 8
# Characters of a response's end in which a marker is looked for when a token is added: more than any marker has.
OVERLAP = 120
# The share of free memory that keys and values may take; the rest is for everything else.
MEMORY_SHARE = 0.6


Done = TypeVar("Done")


@dataclass(eq=False)
class Row:
    """One response in the making. `tokens` is prompt number `prompt`; `trial` says which ablation of the batch it is computed under."""

    trial: int
    tokens: Sequence[int]
    prompt: int = 0
    generated: list[int] = field(default_factory=list)
    finite: bool = True
    begun: bool = False
    tail: str = ""

    @property
    def length(self) -> int:
        return len(self.tokens) + len(self.generated)


class _BlockLayer(DynamicLayer):
    """Keys and values of one layer in blocks `(row, head, column, dim)` of fixed size; `length` columns are in use."""

    keys: Tensor
    values: Tensor

    def __init__(self, n_rows: int, n_columns: int) -> None:
        super().__init__()
        self.n_rows, self.n_columns, self.length = n_rows, n_columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

        def block(states: Tensor) -> Tensor:
            return states.new_zeros(self.n_rows, states.shape[1], self.n_columns, states.shape[3])

        self.keys, self.values = block(key_states), block(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, end = len(key_states), self.length + key_states.shape[2]
        self.keys[:n, :, self.length : end] = key_states
        self.values[:n, :, self.length : end] = value_states
        self.length = end
        return self.keys[:n, :, :end], self.values[:n, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def begin_with(self, keys: Tensor, values: Tensor, n_rows: int) -> None:
        """Take the same few columns `(1 or row, head, column, dim)` as the beginning of every row."""
        self.lazy_initialization(keys, values)
        self.update(keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1))

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Take over full blocks that were computed before."""
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def grow(self, n_columns: int) -> None:
        """Make room for more columns."""
        self.n_columns += n_columns
        if self.is_initialized:
            self.keys, self.values = (nn.functional.pad(block, (0, 0, 0, n_columns)) for block in (self.keys, self.values))


class _Blocks(Cache):
    """A cache of `_BlockLayer`s, and the moves that keep it full of living rows."""

    def __init__(self, n_layers: int, n_rows: int, n_columns: int) -> None:
        self.blocks = [_BlockLayer(n_rows, n_columns) for _ in range(n_layers)]
        super().__init__(layers=list(self.blocks))
        self.n_rows = n_rows

    @property
    def used(self) -> Iterator["_BlockLayer"]:
        """Layers that hold anything: some models share keys and values between layers."""
        return (layer for layer in self.blocks if layer.is_initialized)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        for layer in self.used:
            here, there = sources.to(layer.device), targets.to(layer.device)
            layer.keys[there] = layer.keys[here]
            layer.values[there] = layer.values[here]

    def put(self, other: "_Blocks", first_row: int, length: int) -> None:
        """Copy the rows of `other`, from row `first_row` on, so that they end in column `length` as all rows do."""
        for own, new in zip(self.blocks, other.blocks, strict=True):
            if not new.is_initialized:
                continue
            if not own.is_initialized:
                own.lazy_initialization(new.keys, new.values)
            last_row, start = first_row + new.n_rows, length - new.length
            own.keys[first_row:last_row, :, start:length] = new.keys
            own.values[first_row:last_row, :, start:length] = new.values
            own.length = length

    def shift(self, n_columns: int, n_rows: int) -> None:
        """Forget the first columns."""
        for layer in self.used:
            for block in (layer.keys, layer.values):
                block[:n_rows, :, : layer.length - n_columns] = block[:n_rows, :, n_columns : layer.length].clone()
            layer.length -= n_columns

    def grow(self, n_columns: int) -> None:
        """Make room for more columns."""
        for layer in self.blocks:
            layer.grow(n_columns)

    def widen(self, n_columns: int, n_rows: int) -> None:
        """Move everything to the right, leaving empty columns on the left."""
        for layer in self.used:
            for block in (layer.keys, layer.values):
                block[:n_rows, :, n_columns : layer.length + n_columns] = block[:n_rows, :, : layer.length].clone()
            layer.length += n_columns

    @property
    def bytes_per_position(self) -> int:
        """What one token of one row takes over all layers."""
        return sum(2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.keys.element_size() for layer in self.used)


class TextWatch:
    """Whether a row's text so far is decided, looked for only in what is new and the overlap before it.

    A find in the tail is confirmed on the whole text; one that only the whole text shows (a long run of blanks inside a
    marker, say) costs nothing but the steps to the row's end.
    """

    def __init__(self, tokenizer: Any, is_decided: Callable[[str], bool], overlap: int = OVERLAP) -> None:
        self.tokenizer = tokenizer
        self.is_decided = is_decided
        self.overlap = overlap
        self._pieces: dict[int, str] = {}
        # A token's text depends on whether it stands at the beginning: some tokenizers drop the first blank.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode([*self._anchor, token])[len(self._anchor_text) :]
        return self._pieces[token]

    def __call__(self, row: Row) -> bool:
        row.tail = (row.tail + self._piece(row.generated[-1]))[-self.overlap :]
        return self.is_decided(row.tail) and self.is_decided(self._decode(row.generated))


def supports(model: Any) -> bool:
    """Whether the model's cache is nothing but keys and values by position, and it takes positions of our choice."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class Decoder:
    """Greedy decoding for one model. `assign_rows` is told, before each pass, which trial each row belongs to.

    `end_tokens` end a response. Memory: the number of rows is chosen from what is free, and halved for good whenever that was too many.
    With a `trunk`, passes of the original (`first_layers` empty) are recorded, and a pass of trial `t` begins at `first_layers[t]`.
    """

    def __init__(self, model: Any, end_tokens: frozenset[int], rows_per_trial: int, assign_rows: Callable[[Tensor], None]) -> None:
        self.model = model
        self.end_tokens = end_tokens
        self.rows_per_trial = rows_per_trial
        self.assign_rows = assign_rows
        self.trunk: Trunk | None = None
        self.first_layers: Sequence[int] = ()
        self.device: torch.device = model.get_input_embeddings().weight.device
        config = model.config.get_text_config(decoder=True)
        self.n_layers = len(DynamicCache(config=config).layers)
        self.shares_prefix = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        self.max_rows: int | None = None
        self.prefill_tokens = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS_ACCELERATOR)

    def first_logits(self, rows: Sequence[Row]) -> Iterator[tuple[list[Row], Tensor]]:
        """Logits `(row, vocabulary)` after each row's last token, for as many rows at a time as fit, in the order given."""
        waiting = deque(rows)
        prefix = self._share_prefix(rows)
        while waiting:
            chunk = self._take(waiting, self._row_limit(rows))
            logits = self._retry(waiting, chunk, lambda part: self._prefill(part, None, prefix)[0])
            if logits is not None:
                yield chunk, logits

    def run(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        is_finished: Callable[[Row], bool],
        cancelled: Set[int] = frozenset(),
    ) -> Iterator[Row]:
        """Decode; each row is given back when it is finished: by `is_finished` (asked after every token), an end token, or its length.

        The end token is not part of `generated`. A row whose logits are not finite is given back at once, its `finite` false.
        `cancelled` may grow meanwhile: rows of the trials in it are dropped and not given back.
        """
        waiting = deque(sorted(rows, key=self._order))
        n_columns = max((row.length for row in rows), default=0) + max_new_tokens
        limit = self._row_limit(rows)
        prefix = self._share_prefix(rows)
        pool = _Pool(self, limit, n_columns, max_new_tokens, is_finished)
        while waiting or pool.rows:
            try:
                done = pool.advance(waiting, prefix)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(pool.living) <= 1:
                    raise
                self.max_rows = max(1, len(pool.living) // 2)
            else:
                yield from done
                if cancelled:
                    waiting = deque(row for row in waiting if row.trial not in cancelled)
                    pool.drop(cancelled)
                continue
            # What has been generated is kept: the rows are prefilled again, in smaller company.
            waiting = deque(sorted([*pool.living, *waiting], key=self._order))
            pool = _Pool(self, limit, n_columns, max_new_tokens, is_finished)
            empty_cache()

    def _order(self, row: Row) -> tuple[int, int]:
        """Long rows first, so that padding is small; with a trunk, trial after trial."""
        return (0 if self.trunk is None else row.trial, -row.length)

    def _row_limit(self, rows: Sequence[Row]) -> int:
        n_trials = len({row.trial for row in rows})
        return min(len(rows), n_trials * self.rows_per_trial)

    def _take(self, waiting: "deque[Row]", n_rows: int) -> list[Row]:
        """The next rows, as many as a prefill pass holds; with a trunk, of one trial only."""
        chunk: list[Row] = []
        width = 0
        while waiting and len(chunk) < n_rows and (not chunk or self.trunk is None or waiting[0].trial == chunk[0].trial):
            width = max(width, waiting[0].length)
            if chunk and width * (len(chunk) + 1) > self.prefill_tokens:
                break
            chunk.append(waiting.popleft())
        return chunk

    def _retry(self, waiting: "deque[Row]", chunk: list[Row], work: Callable[[list[Row]], Done]) -> Done | None:
        """`work(chunk)`; where memory does not suffice, the rows go back, the prefill gets smaller for good, and None comes back."""
        try:
            return work(chunk)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chunk) == 1:
                raise
        waiting.extendleft(reversed(chunk))
        self.prefill_tokens = max(row.length for row in chunk) * (len(chunk) // 2)
        empty_cache()
        return None

    def _share_prefix(self, rows: Sequence[Row]) -> "_Prefix | None":
        """Compute what all prompts begin with (system prompt, template) once per trial, where that is worth a pass.

        Not where layers have a sliding window: rows then have a hole between prefix and prompt, which the window would count.
        """
        if not self.shares_prefix or len(rows) < MIN_PREFIX_ROWS:
            return None
        tokens = os.path.commonprefix([list(row.tokens[:-1]) for row in rows])
        if len(tokens) < MIN_PREFIX_TOKENS:
            return None
        trials = sorted({row.trial for row in rows})
        cache = _Blocks(self.n_layers, len(trials), len(tokens))
        self._prefill([Row(trial, tokens) for trial in trials], cache, None)
        return _Prefix(len(tokens), {trial: i for i, trial in enumerate(trials)}, cache)

    def _prefill(self, rows: Sequence[Row], cache: _Blocks | None, prefix: "_Prefix | None") -> tuple[Tensor, Tensor]:
        """Logits `(row, vocabulary)` at the rows' last tokens, and the rows' mask `(row, column)`; keys and values go into `cache`.

        With a prefix the columns are its own, a hole where a row is short, and the rest of the row.
        """
        skipped = 0 if prefix is None else prefix.length
        sequences = [[*row.tokens, *row.generated][skipped:] for row in rows]
        tokens, mask = left_padded(sequences)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + skipped
        if prefix is not None:
            cache = cache or _Blocks(self.n_layers, len(rows), skipped + tokens.shape[1])
            prefix.begin(cache, rows)
            mask = torch.cat([torch.ones(len(rows), skipped, dtype=torch.bool), mask], dim=1)
        self.assign_rows(self._trials(rows))
        mask = mask.to(self.device)
        with self._reuse(sequences, rows[0].trial, cache):
            return self._forward(tokens.to(self.device), mask, positions.to(self.device), cache), mask

    def _reuse(self, sequences: Sequence[Sequence[int]], trial: int, cache: _Blocks | None) -> AbstractContextManager[None]:
        """Record the pass, or begin it where the trial's edits begin."""
        if self.trunk is None:
            return nullcontext()
        key = pass_key(sequences)
        known = self.trunk.has(key, cache is not None)
        if self.first_layers:
            return self.trunk.begin_at(key, self.first_layers[trial], cache) if known else nullcontext()
        return nullcontext() if known else self.trunk.record(key, cache)

    def _trials(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.trial for row in rows], device=self.device)

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: _Blocks | None) -> Tensor:
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the tokens that all rows begin with, one row for each trial."""

    length: int
    row_of_trial: dict[int, int]
    cache: _Blocks

    def begin(self, cache: _Blocks, rows: Sequence[Row]) -> None:
        """Put the prefix at the beginning of every row of an empty cache."""
        sources = torch.tensor([self.row_of_trial[row.trial] for row in rows])
        for own, new in zip(self.cache.blocks, cache.blocks, strict=True):
            if own.is_initialized:
                there = sources.to(own.device)
                new.begin_with(own.keys[there], own.values[there], len(rows))


class _Pool:
    """The rows of a running decode and their keys and values. Row `i` of every tensor belongs to `rows[i]`."""

    def __init__(self, decoder: Decoder, n_rows: int, n_columns: int, max_new_tokens: int, is_finished: Callable[[Row], bool]) -> None:
        self.decoder = decoder
        self.limit = min(n_rows, decoder.max_rows or n_rows)
        self.n_columns = 0
        self.most_columns = n_columns + SLACK_COLUMNS
        self.max_new_tokens = max_new_tokens
        self.is_finished = is_finished
        self.rows: list[Row] = []
        self.cache: _Blocks | None = None
        self.length = 0  # columns in use
        self._starts: list[int] = []  # each row's first column
        self._gone: set[int] = set()
        self._entering: list[Row] = []
        self._assigned = False

    @property
    def living(self) -> list[Row]:
        """The rows that are not finished, those included that are just being let in."""
        return [row for i, row in enumerate(self.rows) if i not in self._gone] + self._entering

    def advance(self, waiting: "deque[Row]", prefix: _Prefix | None) -> list[Row]:
        """One step: let waiting rows in where there is room, or decode one token of every row. Returns the rows that finished."""
        room = self.limit - len(self.rows) + len(self._gone)
        if waiting and (room >= self.limit * REFILL_SHARE or len(self._gone) == len(self.rows)):
            self._compact()
            return self._admit(waiting, room, prefix)
        if len(self._gone) > len(self.rows) * COMPACT_SHARE:
            self._compact()
        return self._step() if self.rows else []

    def drop(self, trials: Set[int]) -> None:
        """Let the rows of some trials go."""
        self._gone.update(i for i, row in enumerate(self.rows) if row.trial in trials)

    def _allocate(self, fresh: _Blocks) -> _Blocks:
        """Room for as many rows as memory allows, now that it is known what a row takes."""
        decoder = self.decoder
        bytes_per_row = max(1, fresh.bytes_per_position * self.most_columns)
        fitting = int(free_memory(decoder.device) * MEMORY_SHARE / bytes_per_row)
        self.limit = max(1, fresh.n_rows, min(self.limit, fitting))
        self.n_columns = min(fresh.blocks[0].n_columns + SLACK_COLUMNS, self.most_columns)
        self.mask = torch.zeros(self.limit, self.n_columns, dtype=torch.bool, device=decoder.device)
        self.next_tokens = torch.zeros(self.limit, dtype=torch.long, device=decoder.device)
        self.positions = torch.zeros(self.limit, dtype=torch.long, device=decoder.device)
        return _Blocks(decoder.n_layers, self.limit, self.n_columns)

    def _admit(self, waiting: "deque[Row]", room: int, prefix: _Prefix | None) -> list[Row]:
        decoder = self.decoder
        chunk = decoder._take(waiting, room)
        width = max(row.length for row in chunk)
        fresh = _Blocks(decoder.n_layers, len(chunk), width)
        prefilled = decoder._retry(waiting, chunk, lambda part: decoder._prefill(part, fresh, prefix))
        if prefilled is None:
            return []
        logits, mask = prefilled
        self._entering = chunk
        if self.cache is None:
            self.cache = self._allocate(fresh)
        first, end = len(self.rows), len(self.rows) + len(chunk)
        if first == 0:
            self.length = width
        if width > self.length or width > self.n_columns:
            self._widen(max(0, width - self.length))
        self.cache.put(fresh, first, self.length)
        self.mask[first:end] = False
        self.mask[first:end, self.length - width : self.length] = mask
        self.positions[first:end] = torch.tensor([row.length for row in chunk], device=decoder.device)
        self.rows += chunk
        self._starts += [self.length - (width if prefix else row.length) for row in chunk]
        self._entering = []
        self._assigned = False
        return self._note(slice(first, end), logits)

    def _step(self) -> list[Row]:
        n = len(self.rows)
        if self.length == self.n_columns:
            self._make_room()
            n = len(self.rows)
        if not self._assigned:
            self.decoder.assign_rows(self.decoder._trials(self.rows))
            self._assigned = True
        self.mask[:n, self.length] = True
        self.length += 1
        logits = self.decoder._forward(self.next_tokens[:n, None], self.mask[:n, : self.length], self.positions[:n, None], self.cache)
        self.positions[:n] += 1
        return self._note(slice(0, n), logits)

    def _note(self, where: slice, logits: Tensor) -> list[Row]:
        """Take the likeliest token of each row; returns the rows that are finished with it."""
        best, tokens = logits.max(dim=-1)
        tokens = torch.where(torch.isfinite(best), tokens, -1).to(self.decoder.device)
        self.next_tokens[where] = tokens.clamp(min=0)
        done = []
        for i, token in enumerate(tokens.tolist(), start=where.start):
            row = self.rows[i]
            if i in self._gone:
                continue
            row.begun = True
            row.finite = token >= 0
            ended = not row.finite or token in self.decoder.end_tokens
            if not ended:
                row.generated.append(token)
            if ended or len(row.generated) >= self.max_new_tokens or self.is_finished(row):
                done.append(row)
                self._gone.add(i)
        return done

    def _compact(self) -> None:
        """Put the last living rows in the places of those that have left."""
        if not self._gone or self.cache is None:
            return
        n_left = len(self.rows) - len(self._gone)
        holes = sorted(i for i in self._gone if i < n_left)
        movers = [i for i in range(n_left, len(self.rows)) if i not in self._gone]
        if holes:
            targets = torch.tensor(holes, device=self.decoder.device)
            sources = torch.tensor(movers, device=self.decoder.device)
            self.cache.move_rows(sources, targets)
            for values in (self.mask, self.next_tokens, self.positions):
                values[targets] = values[sources]
            for target, source in zip(holes, movers, strict=True):
                self.rows[target], self._starts[target] = self.rows[source], self._starts[source]
        del self.rows[n_left:], self._starts[n_left:]
        self._gone.clear()
        self._assigned = False

    def _make_room(self) -> None:
        """Another column, by growing the blocks, or by forgetting what no living row uses once they are large enough for any."""
        if self.n_columns < self.most_columns:
            self._grow(min(SLACK_COLUMNS, self.most_columns - self.n_columns))
        else:
            self._shift()

    def _grow(self, n_columns: int) -> None:
        assert self.cache is not None
        self.cache.grow(n_columns)
        self.mask = nn.functional.pad(self.mask, (0, n_columns))
        self.n_columns += n_columns

    def _widen(self, n_columns: int) -> None:
        """Move all rows to the right, so that a longer one can end in the same column."""
        assert self.cache is not None
        if self.length + n_columns > self.n_columns:
            self._grow(self.length + n_columns - self.n_columns)
        self.cache.widen(n_columns, len(self.rows))
        self.mask = self.mask.roll(n_columns, dims=1)
        self._starts = [start + n_columns for start in self._starts]
        self.length += n_columns

    def _shift(self) -> None:
        """Forget the columns that no living row uses."""
        self._compact()
        assert self.cache is not None
        n_unused = min(self._starts)
        self._starts = [start - n_unused for start in self._starts]
        self.cache.shift(n_unused, len(self.rows))
        self.length -= n_unused
        self.mask = self.mask.roll(-n_unused, dims=1)
        self.mask[:, self.length :] = False


class PlainDecoder:
    """The same by transformers' own `generate`, for models whose cache holds more than keys and values: rows leave only together."""

    def __init__(self, model: Any, end_tokens: frozenset[int], rows_per_trial: int, assign_rows: Callable[[Tensor], None]) -> None:
        self.model = model
        self.end_tokens = end_tokens
        self.batch_size = rows_per_trial
        self.assign_rows = assign_rows
        self.first_layers: Sequence[int] = ()
        self.device: torch.device = model.get_input_embeddings().weight.device

    def first_logits(self, rows: Sequence[Row]) -> Iterator[tuple[list[Row], Tensor]]:
        """As `Decoder.first_logits`."""
        for part, output in self._batches(rows, max_new_tokens=1, output_logits=True):
            yield part, output.logits[0]

    def run(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        is_finished: Callable[[Row], bool],
        cancelled: Set[int] = frozenset(),
    ) -> Iterator[Row]:
        """As `Decoder.run`."""
        ordered = sorted(rows, key=lambda row: -row.length)
        for part, _ in self._batches(ordered, is_finished, max_new_tokens=max_new_tokens):
            yield from (row for row in part if row.trial not in cancelled)

    def _batches(
        self, rows: Sequence[Row], is_finished: Callable[[Row], bool] | None = None, **arguments: Any
    ) -> Iterator[tuple[list[Row], Any]]:
        start = 0
        while start < len(rows):
            part = list(rows[start : start + self.batch_size])
            try:
                output = self._generate(part, is_finished, arguments)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                self.batch_size = len(part) // 2
            else:
                start += len(part)
                yield part, output
                continue
            empty_cache()

    def _generate(self, rows: list[Row], is_finished: Callable[[Row], bool] | None, arguments: dict[str, Any]) -> Any:
        tokens, mask = left_padded([row.tokens for row in rows])
        for row in rows:
            row.generated.clear()
            row.tail, row.finite, row.begun = "", True, True
        criteria = [] if is_finished is None else [_RowCriteria(rows, tokens.shape[1], self.end_tokens, is_finished)]
        self.assign_rows(torch.tensor([row.trial for row in rows], device=self.device))
        return self.model.generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            return_dict_in_generate=True,
            stopping_criteria=criteria,
            logits_processor=[_note_finite(rows)],
            **arguments,
        )


class _RowCriteria(StoppingCriteria):
    """Writes each new token to its row, and ends rows as `is_finished` says."""

    def __init__(self, rows: list[Row], start: int, end_tokens: frozenset[int], is_finished: Callable[[Row], bool]) -> None:
        self.rows, self.start, self.end_tokens, self.is_finished = rows, start, end_tokens, is_finished
        self.done = [False] * len(rows)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        for i, (row, token) in enumerate(zip(self.rows, input_ids[:, -1].tolist(), strict=True)):
            if self.done[i]:
                continue
            if token not in self.end_tokens and row.finite:
                row.generated.append(token)
            self.done[i] = token in self.end_tokens or not row.finite or self.is_finished(row)
        return torch.tensor(self.done, device=input_ids.device)


def _note_finite(rows: list[Row]) -> Callable[[Tensor, Tensor], Tensor]:
    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, finite in zip(rows, torch.isfinite(scores.max(dim=-1).values).tolist(), strict=True):
            row.finite &= finite
        return scores

    return note


def left_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask `(row, column)` on the CPU, all rows ending in the last column."""
    width = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, ids in enumerate(sequences):
        tokens[i, width - len(ids) :] = torch.tensor(ids)
        mask[i, width - len(ids) :] = True
    return tokens, mask


def make_decoder(model: Any, tokenizer: Any, rows_per_trial: int, assign_rows: Callable[[Tensor], None]) -> Decoder | PlainDecoder:
    """The decoder that a model's cache allows. `rows_per_trial` bounds the prompts of one trial in a pass."""
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    end_tokens = frozenset([end] if isinstance(end, int) else end or [])
    decoder = Decoder if supports(model) else PlainDecoder
    return decoder(model, end_tokens, rows_per_trial, assign_rows)
