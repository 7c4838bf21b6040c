"""Decoding by transformers' own `generate`, for models whose cache has more than keys and values."""

import inspect
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import groupby
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from ..device import empty_cache, input_device, is_out_of_memory
from .rows import Row, left_padded

Done = TypeVar("Done")


class PlainDecoder:
    """Like `Decoder`, but by `generate`: all rows of a batch end together.

    Unless `pads`, only rows of one length share a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_tokens: frozenset[int],
        rows_per_trial: int,
        assign_rows: Callable[[Sequence[int]], None] = lambda trials: None,
    ) -> None:
        self.model = model
        self.end_tokens = end_tokens
        self.batch_size = rows_per_trial
        self.assign_rows = assign_rows
        self.first_layers: Sequence[int] = ()
        self.pads = True
        self.device = input_device(model)

    def first_logits(self, rows: Sequence[Row], in_order: bool = False) -> Iterator[tuple[list[Row], Tensor]]:
        """Like `Decoder.first_logits`, always in the given order."""
        for part, output in self._batches(rows, max_new_tokens=1, output_logits=True):
            yield part, output.logits[0]

    def last_logits(self, rows: Sequence[Row], n: int) -> Iterator[tuple[list[Row], Tensor]]:
        """Like `Decoder.last_logits`, in any order, by forward passes over rows of equal length, without padding."""
        ordered = sorted(rows, key=lambda row: -row.length)
        return self._parts(ordered, lambda part: self._last_logits(part, n), same_length=True)

    def _last_logits(self, rows: list[Row], n: int) -> Tensor:
        self.assign_rows([row.trial for row in rows])
        return self.logits_at_end([row.tokens for row in rows], n)

    def logits_at_end(self, rows: Sequence[Sequence[int]], n: int) -> Tensor:
        """Logits `(row, n, vocabulary)` at the last `n` tokens of rows of equal length, in one pass."""
        tokens = torch.tensor([list(row) for row in rows], device=self.device)
        kept = {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **kept).logits[:, -n:]
        return logits

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
        return self._parts(rows, lambda part: self._generate(part, is_finished, arguments), same_length=not self.pads)

    def _parts(self, rows: Sequence[Row], work: Callable[[list[Row]], Done], same_length: bool) -> Iterator[tuple[list[Row], Done]]:
        start = 0
        while start < len(rows):
            part = list(rows[start : start + self.batch_size])
            if same_length:
                part = next(list(group) for _, group in groupby(part, key=lambda row: row.length))
            try:
                output = work(part)
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
            row.text, row.finite, row.begun = "", True, True
        criteria = [] if is_finished is None else [_RowCriteria(rows, tokens.shape[1], self.end_tokens, is_finished)]
        self.assign_rows([row.trial for row in rows])
        return cast(Any, self.model).generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            return_dict_in_generate=True,
            stopping_criteria=criteria,
            logits_processor=[_note_finite(rows)],
            **arguments,
        )


class _RowCriteria(StoppingCriteria):
    """Appends each new token to its row, and ends rows according to `is_finished`."""

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
