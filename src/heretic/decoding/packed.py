"""Rows packed into a single sequence, without padding: what they all begin with once, and then what is each row's own.

Every token sees the shared beginning and its own row, which a mask says, and has the position that it has in its row. For short rows that
begin with the same system prompt this is a third of the tokens of a padded batch. The mask has the square of the length, which bounds it.

Where it breaks: attention that takes no mask of our choice, layers that are recurrent, windows shorter than the whole. `packs_well`
measures that.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..device import input_device, upload


def packed_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Tensor]:
    """Logits `(n, vocabulary)` at the last `counts[i]` tokens of each row of token ids, in one pass. Gradients flow if they are enabled."""
    prefix = os.path.commonprefix([list(row[: len(row) - n]) for row, n in zip(rows, counts, strict=True)])
    tokens, positions, owners = [*prefix], [*range(len(prefix))], [-1] * len(prefix)
    kept: list[int] = []
    for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
        tokens += row[len(prefix) :]
        positions += range(len(prefix), len(row))
        owners += [i] * (len(row) - len(prefix))
        kept += range(len(tokens) - n, len(tokens))
    device = input_device(model)
    ids, position_ids, owner = upload(torch.tensor([tokens, positions, owners]), device)
    sees = ((owner[:, None] == owner) | (owner == -1)).tril()
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=device).masked_fill(~sees, torch.finfo(model.dtype).min)
    logits: Tensor = model(
        input_ids=ids[None],
        attention_mask=mask[None, None],
        position_ids=position_ids[None],
        use_cache=False,
        logits_to_keep=upload(torch.tensor(kept), device),
    ).logits
    return list(logits[0].split(list(counts)))
