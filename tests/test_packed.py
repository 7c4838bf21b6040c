"""Rows packed into one sequence: the same logits and gradients as each row alone, and found out if a model does something else."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heretic.decoding import packed
from heretic.decoding.packed import packed_logits
from heretic.decoding.selfcheck import packs_well
from zoo import build

KINDS = ("llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss")
ROWS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20, 21], [5, 6, 7, 8, 30, 31, 32, 33, 34, 35]]
COUNTS = [3, 1, 4]


class Words:
    """A tokenizer of one number for each word."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [3 + i for i, _ in enumerate(text.split())]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_each_row_alone(kind: str) -> None:
    model = build(kind)
    model = model if kind in ("qwen3_moe", "gpt_oss") else model.double()  # fused experts have no product in float64

    def gradient(logits: list[Tensor]) -> list[Tensor]:
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        loss = sum(torch.log_softmax(own, dim=-1)[:, 3].sum() for own in logits)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]

    alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -n:] for row, n in zip(ROWS, COUNTS, strict=True)]
    together = packed_logits(model, ROWS, COUNTS)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradient(together), gradient(alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1e-3))


@pytest.mark.parametrize("plain_length", [256, 0])
@pytest.mark.parametrize("rows", [ROWS, [[1, 2, 3], [4, 5]], [[1, 2, 3]]], ids=["prefix", "no prefix", "one row"])
def test_attention_of_rows_is_that_of_the_mask(rows: list[list[int]], plain_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask alone, and the products of each row, with several queries for a key."""
    monkeypatch.setattr(packed, "PLAIN_LENGTH", plain_length)
    generator = torch.Generator().manual_seed(0)
    shared = len(os.path.commonprefix(rows)) if len(rows) > 1 else 2
    total = shared + sum(len(row) - shared for row in rows)
    query, key, value = (torch.randn(1, n, total, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    owner = torch.tensor([-1] * shared + [i for i, row in enumerate(rows) for _ in row[shared:]])
    mask = ((owner[:, None] == owner) | (owner == -1)).tril()[None, None]
    inputs = [states.requires_grad_() for states in (query, key, value)]
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    with packed.RowAttention(shared, [len(row) - shared for row in rows]):
        found = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True)
        other = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)  # no mask: not ours
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), expected_gradients)
    torch.testing.assert_close(other, F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True))


def test_what_all_rows_begin_with_is_computed_once() -> None:
    model = build("llama")
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    packed_logits(model, ROWS, COUNTS)
    packed_logits(model, [[1, 2, 3], [1, 2, 3]], [3, 1])  # the last tokens are each row's own: their logits are asked for
    packed_logits(model, [[1, 2, 3]], [1])
    assert lengths == [3 + 4 + 2 + 7, 6, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_can_be_packed(kind: str) -> None:
    assert packs_well(build(kind), Words())


def test_a_model_that_looks_elsewhere_is_found() -> None:
    """One whose attention does not take the mask, and one that does not take the positions."""
    for name in ("attention_mask", "position_ids"):
        model = build("llama")
        assert packs_well(model, Words())

        def without(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> object:
            return args, {**kwargs, name: None}

        model.register_forward_pre_hook(without, with_kwargs=True)
        assert not packs_well(model, Words())
