"""Attention of one new token per row as two batched products of matrices, which on one thread of a CPU cost less than torch's kernel.

It comes to the same up to rounding: the softmax of scaled dot products. Whatever it is not made for is left to transformers' `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .decoder import Decoder
from .selfcheck import decodes_well

NAME = "products_for_single_tokens"
# Products of larger heads take as long as the kernel.
MAX_HEAD_DIM = 64


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """`query (row, head, token, dim)` on `key`, `value` `(row, key head, column, dim)`: `(row, token, head, dim)`, as transformers' `sdpa`.

    `attention_mask (row, 1, token, column)` is true where a token may look.
    """
    n_rows, n_heads, n_tokens, dim = query.shape
    n_key_heads = key.shape[1]
    is_plain = (
        n_tokens == 1 and dim <= MAX_HEAD_DIM and not any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    )
    if not is_plain or attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    query = query * (dim**-0.5 if scaling is None else scaling)
    # Heads that share a key head are the rows of one product.
    scores = query.view(n_rows, n_key_heads, n_heads // n_key_heads, dim) @ key.mT
    scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(dim=-1) @ value).view(n_rows, 1, n_heads, value.shape[-1]), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_products(decoder: Decoder) -> None:
    """Have the decoder's model attend so, where it attends by `sdpa` in float32 and this comes to the same."""
    model = decoder.model
    if model.config._attn_implementation != "sdpa" or model.dtype != torch.float32:
        return
    model.set_attn_implementation(NAME)
    if not decodes_well(decoder):
        model.set_attn_implementation("sdpa")
