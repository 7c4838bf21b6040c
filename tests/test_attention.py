"""Attention of single tokens by products of matrices, against the definition in float64 and against transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
from heretic.decoding import attention
from heretic.decoding.attention import NAME, attend, use_products
from heretic.decoding.decoder import Decoder


def states(n_heads: int, n_key_heads: int, n_tokens: int, dim: int, value_dim: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and mask of 5 rows and 7 columns; one row sees a single column."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, n_heads, n_tokens, dim, generator=generator)
    key, value = (torch.randn(5, n_key_heads, 9, size, generator=generator)[:, :, :7] for size in (dim, value_dim))
    mask = torch.rand(5, 1, n_tokens, 7, generator=generator) < 0.6
    mask[..., 6] = True
    mask[3, ..., :6] = False
    return query, key, value, mask


class Module(torch.nn.Module):
    """What transformers' function asks of an attention layer."""

    def __init__(self, n_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = n_groups


def defined(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Softmax of scaled products in float64, head by head, `(row, token, head, dim)`."""
    n_groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(n_groups, dim=1), value.double().repeat_interleave(n_groups, dim=1)
    scores = torch.einsum("rhtd,rhcd->rhtc", q, k) * scaling
    return torch.einsum("rhtc,rhcd->rthd", scores.where(mask, -torch.inf).softmax(dim=-1), v)


@pytest.mark.parametrize(("n_heads", "n_key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_definition(n_heads: int, n_key_heads: int, scaling: float | None) -> None:
    query, key, value, mask = states(n_heads, n_key_heads, 1, 16)
    before = query.clone()
    found, weights = attend(Module(n_heads // n_key_heads), query, key, value, mask, scaling=scaling)
    expected = defined(query, key, value, mask, 0.25 if scaling is None else scaling)
    assert weights is None and found.shape == (5, 1, n_heads, 8)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(query, before)


@pytest.mark.parametrize(("n_tokens", "dim", "more"), [(3, 16, {}), (1, 72, {}), (1, 16, {"position_bias": torch.ones(5, 4, 1, 7)})])
def test_what_it_is_not_made_for_is_left_to_transformers(
    n_tokens: int, dim: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (Module(2), *states(4, 2, n_tokens, dim, dim))
    expected, _ = sdpa_attention_forward(*arguments, **more)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *_, **__: pytest.fail("own products"))
    found, _ = attend(*arguments, **more)
    assert torch.equal(found, expected)


def decoder_of(folder: Path, dtype: str = "float32") -> Decoder:
    tiny.save(folder, tiny.build("llama"))
    decoder = tiny.load(folder, dtypes=[dtype]).decoder
    assert isinstance(decoder, Decoder)
    return decoder


def logits_of_a_step(decoder: Decoder) -> Tensor:
    """Logits of a token after a prompt, with a mask."""
    tokens, mask = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]]), torch.tensor([[False, True, True, True], [True] * 4])
    with torch.inference_mode():
        cache = decoder.model(input_ids=tokens, attention_mask=mask, use_cache=True).past_key_values
        more = torch.nn.functional.pad(mask, (0, 1), value=True)
        return decoder.model(input_ids=tokens[:, :1], attention_mask=more, past_key_values=cache).logits  # type: ignore[no-any-return]


def test_a_model_computes_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tmp_path / "m")
    before = logits_of_a_step(decoder)
    use_products(decoder)
    assert decoder.model.config._attn_implementation == NAME
    calls = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: calls.append(a[1].shape[2]) or sdpa_attention_forward(*a, **k))
    torch.testing.assert_close(logits_of_a_step(decoder), before, rtol=0, atol=1e-5)
    assert set(calls) == {4}, "the prompt by transformers' function, the token by products"


def test_other_formats_and_other_attention_are_left_alone(tmp_path: Path) -> None:
    half = decoder_of(tmp_path / "half", "bfloat16")
    use_products(half)
    assert half.model.config._attn_implementation == "sdpa"
    eager = decoder_of(tmp_path / "eager")
    eager.model.set_attn_implementation("eager")
    use_products(eager)
    assert eager.model.config._attn_implementation == "eager"


def test_where_it_comes_to_something_else_it_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tmp_path / "m")
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *a, **k: 2 * softmax(*a, **k))
    use_products(decoder)
    assert decoder.model.config._attn_implementation == "sdpa"
