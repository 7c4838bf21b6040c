"""Probing a model with a few tokens: inputs, and gradients along a direction."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..device import embedding_weight, input_device

PROBE_ROWS, PROBE_TOKENS = 2, 12


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids `(row, token)` for probing a model."""
    device = input_device(model)
    tokens = torch.arange(1, PROBE_ROWS * PROBE_TOKENS + 1, device=device if device.type != "meta" else None)
    return tokens.view(PROBE_ROWS, PROBE_TOKENS) % min(len(embedding_weight(model)), 100)


def probe_direction(hidden_size: int) -> Tensor:
    """A fixed random unit vector `(hidden_size,)`."""
    return nn.functional.normalize(torch.randn(hidden_size, generator=torch.Generator().manual_seed(0)), dim=0)


def run_probe(model: PreTrainedModel, tokens: Tensor) -> None:
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


def share_along(gradient: Tensor, direction: Tensor, axis: int) -> float:
    """The share of the norm of `gradient` along `direction` on an axis."""
    total = torch.linalg.vector_norm(gradient)
    return float(torch.linalg.vector_norm(gradient.movedim(axis, -1) @ direction) / total) if total > 0 else 0.0


def is_norm(module: nn.Module, hidden_size: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (hidden_size,)


def measure_gain(norm: nn.Module, hidden_size: int) -> Tensor:
    """The gain `g (hidden_size,)` of a norm module in float32, whether it stores `g` or `g - 1`, up to a common factor.

    A vector of alternating signs has mean zero and root mean square one, so both RMS and layer norms return `g * v + b` for it.
    """
    weight: Any = norm.weight
    # The weight of an offloaded norm is on the meta device; its hook loads it, and moves the input to the right device.
    signs = torch.ones(hidden_size, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device)
    signs[1::2] = -1
    with torch.no_grad():
        difference = norm(signs[None])[0].float() - norm(-signs[None])[0].float()
    return difference / 2 * signs.to(difference)
