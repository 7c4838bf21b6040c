"""Greedy decoding of many rows at once, where a row is one prompt under one trial's ablation.

Waiting rows are queued; a forward pass takes as many as fit. A row leaves as soon as it is finished, and waiting rows replace it. Keys and
values are in preallocated blocks: a step writes one column in place, a finished row is overwritten by the last one, and new rows are
prefilled separately and copied in so that all rows end in the same column. Every row has its own positions and mask, so its tokens do not
depend (up to rounding) on the other rows in the pass.

Where it breaks: models whose cache has more than keys and values (state-space and linear-attention layers) are rejected by `supports`;
they are decoded by transformers' own `generate`.
"""

import inspect
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..device import embedding_weight, empty_cache, free_memory, input_device, is_out_of_memory
from .blocks import Blocks, Prefix
from .compiled import CompiledStep, can_compile
from .pool import Pool
from .prefix_cache import Key, PrefixCache
from .rows import Row, padded_on

# The share of free memory that keys and values may take.
MEMORY_SHARE = 0.6
# Tokens in one prefill pass, which limits the memory of its hidden states.
PREFILL_TOKENS = {"cpu": 8192}
PREFILL_TOKENS_ACCELERATOR = 65536
# Padding tokens allowed in one prefill pass: a separate pass for the shorter rows costs about as much.
PADDING_TOKENS = {"cpu": 128}
PADDING_TOKENS_ACCELERATOR = 1024
# A common prefix is computed once per trial if it has at least this many tokens and rows: otherwise the extra pass costs more.
MIN_PREFIX_TOKENS = 4
MIN_PREFIX_ROWS = 8


# Bytes that the logits of a pass with several positions may take.
LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class Optimizations:
    """Optimizations of the decoder; changed only to measure or test one.

    `shared_prefix`: compute the common prefix of the prompts once per trial. `prefix_cache`: unedited lower layers once per run.
    """

    shared_prefix: bool = True
    prefix_cache: bool = True


Done = TypeVar("Done")


def supports(model: PreTrainedModel) -> bool:
    """Whether the model's cache consists only of keys and values by position, and the model accepts position ids."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class Decoder:
    """Greedy decoding for one model. Before each pass, `assign_rows` is called with the trial of each row.

    `end_tokens` end a response. The number of rows is chosen by free memory, and permanently halved whenever memory runs out.
    With a `prefix_cache`, passes of the original (`first_layers` empty) are recorded, and a pass of trial `t` begins at `first_layers[t]`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_tokens: frozenset[int],
        rows_per_trial: int,
        assign_rows: Callable[[Sequence[int]], None] = lambda trials: None,
        optimizations: Optimizations | None = None,
    ) -> None:
        self.model = model
        self.end_tokens = end_tokens
        self.rows_per_trial = rows_per_trial
        self.assign_rows = assign_rows
        self.optimizations = optimizations or Optimizations()
        self.prefix_cache: PrefixCache | None = None
        self.first_layers: Sequence[int] = ()
        self.device = input_device(model)
        config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        self.n_layers = len(layers)
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        if "local" in getattr(config, "attention_layers", ()):
            windows.append(0)  # GPT-Neo's layers mask distant columns by themselves: rows can neither have a gap nor be packed
        self.allows_holes = not windows
        self.window = min(windows, default=sys.maxsize)  # a row this long is seen as a whole by every layer
        # transformers synchronizes to find out whether a mask is needed. With this the decoder always makes one, for SDPA attention.
        self.makes_mask = self.allows_holes and self.device.type != "cpu" and config._attn_implementation == "sdpa"
        self.can_compile = can_compile(model, self.allows_holes)
        self.compiled: CompiledStep | None = None
        self.max_rows: int | None = None
        self.bytes_per_row: int | None = None  # for the keys and values of a full response, once one was decoded
        self.n_tokens = 0  # computed so far, padding included
        self.prefill_tokens = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS_ACCELERATOR)
        self.padding_tokens = PADDING_TOKENS.get(self.device.type, PADDING_TOKENS_ACCELERATOR)

    def first_logits(self, rows: Sequence[Row], in_order: bool = False) -> Iterator[tuple[list[Row], Tensor]]:
        """Logits `(row, vocabulary)` after each row's last token, for as many rows of similar length at a time as fit.

        With `in_order`, rows of any length share a pass, in the given order.
        """
        waiting = deque(rows if in_order else sorted(rows, key=self._order))
        prefix = self._share_prefix(rows)
        while waiting:
            chunk = self.take(waiting, self._row_limit(rows), None if in_order else self.padding_tokens)
            logits = self.retry(waiting, chunk, lambda part: self.prefill(part, None, prefix)[0])
            if logits is not None:
                yield chunk, logits

    def last_logits(self, rows: Sequence[Row], n: int) -> Iterator[tuple[list[Row], Tensor]]:
        """Logits `(row, n, vocabulary)` at the last `n` tokens of each row, for as many rows of similar length at a time as fit."""
        waiting = deque(sorted(rows, key=self._order))
        prefix = self._share_prefix(rows, n)
        vocabulary, size = embedding_weight(self.model).shape[0], self.model.dtype.itemsize
        limit = min(self._row_limit(rows), max(1, LOGITS_BYTES // (n * vocabulary * size)))
        while waiting:
            chunk = self.take(waiting, limit, self.padding_tokens)
            logits = self.retry(waiting, chunk, lambda part: self.prefill(part, None, prefix, n)[0])
            if logits is not None:
                yield chunk, logits

    def run(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        is_finished: Callable[[Row], bool],
        cancelled: Set[int] = frozenset(),
    ) -> Iterator[Row]:
        """Decode. Each row is yielded when it is finished: by `is_finished` (called after every token), an end token, or its length.

        The end token is not part of `generated`. A row whose logits are not finite is yielded at once, with `finite` false.
        `cancelled` may grow meanwhile: rows of trials in it are dropped and not yielded.
        """
        waiting = deque(sorted(rows, key=self._order))
        limit = self._row_limit(rows)
        prefix = self._share_prefix(rows)

        def empty_pool() -> Pool:
            # Rows that share a prefix and a prefill span as many columns, so the shortest may still need all new ones after the longest.
            n_columns = max((row.length for row in waiting), default=0) + max_new_tokens
            return Pool(self, limit, n_columns, max_new_tokens, is_finished)

        pool = empty_pool()
        while waiting or pool.rows:
            try:
                pool.advance(waiting, prefix)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(pool.active_rows) <= 1:
                    raise
                self.max_rows = max(1, len(pool.active_rows) // 2)
            else:
                yield from pool.finished()
                if cancelled:
                    waiting = deque(row for row in waiting if row.trial not in cancelled)
                    pool.drop(cancelled)
                continue
            # Generated tokens are kept: the rows are prefilled again, in smaller batches.
            pool.check_texts()
            yield from pool.finished()
            waiting = deque(sorted([*pool.active_rows, *waiting], key=self._order))
            pool = empty_pool()
            empty_cache()

    def _order(self, row: Row) -> tuple[int, int]:
        """Long rows first, so that padding is small; with a prefix cache, trial after trial."""
        return (0 if self.prefix_cache is None else row.trial, -row.length)

    def _row_limit(self, rows: Sequence[Row]) -> int:
        n_trials = len({row.trial for row in rows})
        return min(len(rows), n_trials * self.rows_per_trial)

    def rows_that_fit(self) -> int | None:
        """Number of rows whose keys and values fit in free memory; None before anything was decoded."""
        return None if self.bytes_per_row is None else int(free_memory(self.device) * MEMORY_SHARE / self.bytes_per_row)

    def take(self, waiting: "deque[Row]", n_rows: int, padding_tokens: int | None) -> list[Row]:
        """The next rows, as many as fit in a prefill pass with limited padding (None: any); with a prefix cache, of one trial only."""
        chunk: list[Row] = []
        width = padding = 0
        while waiting and len(chunk) < n_rows and (not chunk or self.prefix_cache is None or waiting[0].trial == chunk[0].trial):
            width = max(width, waiting[0].length)
            padding += width - waiting[0].length
            too_wide = width * (len(chunk) + 1) > self.prefill_tokens or (padding_tokens is not None and padding > padding_tokens)
            if chunk and too_wide:
                break
            chunk.append(waiting.popleft())
        return chunk

    def retry(self, waiting: "deque[Row]", chunk: list[Row], work: Callable[[list[Row]], Done]) -> Done | None:
        """`work(chunk)`. If memory runs out, the rows are queued again, prefills are permanently smaller, and None is returned."""
        try:
            return work(chunk)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chunk) == 1:
                raise
        waiting.extendleft(reversed(chunk))
        self.prefill_tokens = max(row.length for row in chunk) * (len(chunk) // 2)
        empty_cache()
        return None

    def _share_prefix(self, rows: Sequence[Row], n_logits: int = 1) -> "Prefix | None":
        """Compute the common prefix of all prompts (system prompt, template) once per trial, if that is worth a pass.

        None if that does not fit into memory. The last `n_logits` tokens of a row, whose logits are needed, are never part of it. Not used
        if layers have a sliding window, which would count the gap between prefix and prompt of shorter rows.
        """
        if not (self.optimizations.shared_prefix and self.allows_holes) or len(rows) < MIN_PREFIX_ROWS:
            return None
        tokens = os.path.commonprefix([list(row.tokens[:-n_logits]) for row in rows])
        if len(tokens) < MIN_PREFIX_TOKENS:
            return None
        trials = sorted({row.trial for row in rows})
        cache: Blocks | None = Blocks(self.n_layers, len(trials), len(tokens))
        try:
            self.prefill([Row(trial, tokens) for trial in trials], cache, None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cache = None
        if cache is None:
            empty_cache()
            return None
        return Prefix(len(tokens), {trial: i for i, trial in enumerate(trials)}, cache)

    def prefill(
        self, rows: Sequence[Row], cache: Blocks | None, prefix: "Prefix | None", n_logits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits `(row, vocabulary)` at the rows' last tokens, and the rows' mask `(row, column)`; keys and values go into `cache`.

        With `n_logits` they are `(row, n_logits, vocabulary)`.
        With a prefix, the columns are the prefix, a gap if a row is shorter, and the rest of the row.
        """
        skipped = 0 if prefix is None else prefix.length
        sequences = [(*row.tokens, *row.generated) for row in rows]
        tokens, mask, positions = padded_on(self.device, [own[skipped:] for own in sequences])
        if prefix is not None:
            cache = cache or Blocks(self.n_layers, len(rows), skipped + tokens.shape[1])
            prefix.begin(cache, rows)
            mask = nn.functional.pad(mask, (skipped, 0), value=True)
            positions = positions + skipped
        self.assign_rows([row.trial for row in rows])
        with self._reuse((skipped, tuple(sequences)), rows[0].trial, cache):
            logits = self.forward(tokens, mask, positions, cache, n_logits or 1)
        return logits[:, -1] if n_logits is None else logits, mask

    def _reuse(self, key: Key, trial: int, cache: Blocks | None) -> AbstractContextManager[None]:
        """Record the pass, or start it at the trial's first edited layer."""
        if self.prefix_cache is None:
            return nullcontext()
        known = self.prefix_cache.has(key, cache is not None)
        if self.first_layers:
            return self.prefix_cache.begin_at(key, self.first_layers[trial], cache) if known else nullcontext()
        return nullcontext() if known else self.prefix_cache.record(key, cache)

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether a step's shapes are to be among few."""
        return self.compiled is not None

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Blocks, length: int) -> Tensor:
        """Logits `(row, vocabulary)` after one more token `(row, 1)` of each row, which comes into column `length`."""
        if self.compiled is None:
            return self.forward(tokens, mask[:, : length + 1], positions, cache)[:, -1]
        self.n_tokens += tokens.numel()
        return self.compiled(tokens, mask, positions, cache, length)

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Blocks | None, n_logits: int = 1) -> Tensor:
        """Logits `(row, position, vocabulary)` at the last `n_logits` positions."""
        self.n_tokens += tokens.numel()
        if self.makes_mask:
            n, width = tokens.shape[1], mask.shape[1]
            earlier = torch.ones(n, width, dtype=torch.bool, device=mask.device).tril(width - n) if n > 1 else None
            mask = mask[:, None, None] if earlier is None else earlier & mask[:, None, None]
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=n_logits,
        )
        logits: Tensor = output.logits[:, -n_logits:]
        return logits
