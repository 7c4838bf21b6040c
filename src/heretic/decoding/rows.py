"""Rows (one prompt under one trial's ablation), and early verdicts on their text."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..device import upload


@dataclass(eq=False)
class Row:
    """A response being generated. `tokens` is prompt number `prompt`; `trial` is the index of its ablation in the batch."""

    trial: int
    tokens: Sequence[int]
    prompt: int = 0
    generated: list[int] = field(default_factory=list)
    finite: bool = True
    begun: bool = False
    text: str = ""

    @property
    def length(self) -> int:
        return len(self.tokens) + len(self.generated)


def decoded(tokenizer: Any, tokens: Sequence[int], shown: Set[int] = frozenset()) -> str:
    """The text of tokens, of the special ones only with those in `shown`."""
    parts = groupby(tokens, key=shown.__contains__)
    return "".join(tokenizer.decode(list(part), skip_special_tokens=not is_shown) for is_shown, part in parts)


class TextWatch:
    """Checks after each token whether a row's text is decided.

    The text is concatenated from decoded single tokens, which is fast, and a positive result is confirmed on the jointly decoded tokens. If
    only the latter would be decided, this only costs the steps to the row's end. `shown`: see `decoded`.
    """

    def __init__(self, tokenizer: Any, is_decided: Callable[[str], bool], shown: Set[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        self.is_decided = is_decided
        self.shown = shown
        self._pieces: dict[int, str] = {}
        # A token's text depends on whether it is the first one: some tokenizers drop the first blank.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def _decode(self, tokens: Sequence[int]) -> str:
        return decoded(self.tokenizer, tokens, self.shown)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode([*self._anchor, token])[len(self._anchor_text) :]
        return self._pieces[token]

    def __call__(self, row: Row) -> bool:
        row.text += self._piece(row.generated[-1])
        return self.is_decided(row.text) and self.is_decided(self._decode(row.generated))


def left_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask `(row, column)` on the CPU; all rows end in the last column."""
    width = max(map(len, sequences))
    tokens = torch.tensor([[*[0] * (width - len(ids)), *ids] for ids in sequences])
    lengths = torch.tensor([len(ids) for ids in sequences])
    return tokens, torch.arange(width) >= width - lengths[:, None]


def padded_on(device: torch.device, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions `(row, column)` on a device, copied there at once. All rows end in the last column."""
    width = max(map(len, sequences))
    ids = upload(torch.tensor([[*[-1] * (width - len(own)), *own] for own in sequences]), device)
    mask = ids >= 0
    return ids.clamp(min=0), mask, (mask.cumsum(dim=1) - 1).clamp(min=0)
