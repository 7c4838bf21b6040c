"""Rows packed into a single sequence, without padding: what they all begin with once, and then what is each row's own.

Every token sees the shared beginning and its own row, which a mask says, and has the position that it has in its row. For short rows that
begin with the same system prompt this is a third of the tokens of a padded batch. Attention would take the square of the whole length;
PyTorch's own is therefore replaced by one of each row with the shared beginning (`RowAttention`).

Where it breaks: attention that takes no mask of our choice, layers that are recurrent, windows shorter than the whole. `packs_well`
measures that.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..device import input_device, upload

# Rows up to this length are attended to by plain products on a CPU, whose fused attention takes five times as long for their gradients.
PLAIN_LENGTH = 256


def packed_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], counts: Sequence[int], by_row: bool = True) -> list[Tensor]:
    """Logits `(n, vocabulary)` at the last `counts[i]` tokens of each row of token ids, in one pass. Gradients flow if they are enabled.

    `by_row=False` leaves attention as it is, for passes that compute layers again for their gradients, which this context has left by then.
    """
    prefix = os.path.commonprefix([list(row[: len(row) - n]) for row, n in zip(rows, counts, strict=True)])
    tokens, positions, owners = [*prefix], [*range(len(prefix))], [-1] * len(prefix)
    kept: list[int] = []
    for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
        tokens += row[len(prefix) :]
        positions += range(len(prefix), len(row))
        owners += [i] * (len(row) - len(prefix))
        kept += range(len(tokens) - n, len(tokens))
    owner, device = torch.tensor(owners), input_device(model)
    sees = ((owner[:, None] == owner) | (owner == -1)).tril()
    mask = _mask(sees, model.dtype)
    with RowAttention(len(prefix), [len(row) - len(prefix) for row in rows]) if by_row else nullcontext():
        logits: Tensor = model(
            input_ids=upload(torch.tensor([tokens]), device),
            attention_mask=upload(mask[None, None], device),
            position_ids=upload(torch.tensor([positions]), device),
            use_cache=False,
            logits_to_keep=upload(torch.tensor(kept), device),
        ).logits
    return list(logits[0].split(list(counts)))


class RowAttention(TorchFunctionMode):
    """Within, PyTorch's attention over a packed sequence is that of its rows, of `lengths` after a shared `prefix`.

    Attention without a mask, over other lengths, or not by PyTorch's function is left alone.
    """

    def __init__(self, prefix: int, lengths: Sequence[int]) -> None:
        super().__init__()
        self.prefix, self.n_rows, self.length = prefix, len(lengths), max(lengths)
        self.total = prefix + sum(lengths)
        starts = torch.tensor([*accumulate(lengths, initial=prefix)][:-1])
        columns = torch.arange(self.length)
        is_own = columns < torch.tensor(lengths)[:, None]
        # Where each row's tokens are in the sequence, the first token filling up short rows; and where the sequence's are among those.
        self._places = torch.where(is_own, starts[:, None] + columns, 0).flatten()
        self._back = is_own.flatten().nonzero()[:, 0]
        self._sees = torch.ones(self.length, prefix + self.length, dtype=torch.bool).tril(prefix)
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None and args[0].shape[-2] == self.total:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        """Attention `(1, head, token, dim)` of the shared beginning, and of every row."""
        places, back, mask = self._tensors(query)

        def rows(states: Tensor) -> Tensor:
            return states[0].index_select(1, places).unflatten(1, (self.n_rows, self.length)).transpose(0, 1)

        def with_prefix(states: Tensor) -> Tensor:
            return torch.cat([states[:, :, : self.prefix].expand(self.n_rows, -1, -1, -1), rows(states)], dim=2)

        attend = _attention if query.device.type == "cpu" and self.length <= PLAIN_LENGTH else F.scaled_dot_product_attention
        own = attend(rows(query), with_prefix(key), with_prefix(value), attn_mask=mask, **options)
        own = own.transpose(0, 1).flatten(1, 2).index_select(1, back)[None]
        if not self.prefix:
            return own
        query, key, value = (states[:, :, : self.prefix] for states in (query, key, value))
        first = F.scaled_dot_product_attention(query, key, value, **{**options, "is_causal": True})
        return torch.cat([first, own], dim=2)

    def _tensors(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places, places back, and mask, uploaded once for each device."""
        kind = (query.device, query.dtype)
        if kind not in self._on_device:
            mask = _mask(self._sees, query.dtype)
            places, back, mask = (upload(own, query.device) for own in (self._places, self._back, mask))
            self._on_device[kind] = places, back, mask
        return self._on_device[kind]


def _mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores of attention."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What PyTorch's function of these arguments gives, by plain products, without dropout."""
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale) + attn_mask
    return scores.softmax(dim=-1).to(value.dtype) @ value
