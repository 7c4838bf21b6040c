"""From residuals at the last prompt position to one refusal direction per layer.

Plain tensor functions; sources: Arditi et al. 2024 (arXiv 2406.11717, section 2.3) for the difference of means.
Layer axis: index 0 is the embedding output, so decoder layer `i` has its own direction at index `i + 1`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Share of the largest relative distance of the means at which they count as separated.
SEPARATED = 0.6


@dataclass(frozen=True)
class LayerMix:
    """A direction interpolated between two neighbouring layers: `(1 - fraction) * r_lower + fraction * r_upper`."""

    lower: int
    upper: int
    fraction: float


def winsorize(residuals: Tensor, quantile: float) -> Tensor:
    """Clamp each prompt's residual, per layer, to plus or minus the quantile of its absolute values.

    `residuals (prompt, layer, d)`; `quantile` in (0, 1], off at 1. Tames the few enormous coordinates that some models
    have, which otherwise dominate the mean. Prompt by prompt, because `torch.quantile` limits the size of its input.
    """
    if quantile >= 1.0:
        return residuals
    clamped = torch.empty_like(residuals)
    for i, residual in enumerate(residuals):  # (layer, d)
        limit = torch.quantile(residual.float().abs(), quantile, dim=-1, keepdim=True).to(residual.dtype)
        clamped[i] = residual.clamp(-limit, limit)
    return clamped


def mean_residual(batches: Iterable[Tensor], quantile: float = 1.0) -> Tensor:
    """Mean over all prompts of residual batches `(prompt, layer, d)`, as `(layer, d)` float64 on the CPU.

    float64, because the difference of two nearly equal means loses digits; on the CPU, because not every accelerator
    has float64. Raises `ValueError` if there are no prompts.
    """
    total: Tensor | None = None
    count = 0
    for batch in batches:
        batch_sum = winsorize(batch, quantile).cpu().double().sum(dim=0)
        total = batch_sum if total is None else total + batch_sum
        count += len(batch)
    if total is None:
        raise ValueError("no residuals to average")
    return total / count


def refusal_directions(good_mean: Tensor, bad_mean: Tensor, orthogonalize: bool = False) -> Tensor:
    """Unit directions `(layer, d)` from the means `(layer, d)` of harmless and harmful prompts, in their dtype.

    With `orthogonalize`, each direction's component along the harmless mean is removed ("projected abliteration").
    A layer whose means coincide gets the zero vector (index 0 regularly does: all prompts end in the same token),
    and so an edit with it changes nothing.
    """
    directions = F.normalize(bad_mean - good_mean, dim=-1)
    if orthogonalize:
        good = F.normalize(good_mean, dim=-1)
        directions = F.normalize(directions - (directions * good).sum(dim=-1, keepdim=True) * good, dim=-1)
    return directions


def separating_layer(good_mean: Tensor, bad_mean: Tensor) -> int:
    """The first decoder layer in whose output the two sets of prompts are separated.

    `good_mean`, `bad_mean` `(layer + 1, d)`. Separated means `SEPARATED` of the largest distance of any layer. Distances are relative to
    the mean length of the two means, since the stream grows from layer to layer. 0 if they never separate. From this layer on there is
    something to remove, which does not mean that it is best removed there.
    """
    lengths = (torch.linalg.vector_norm(good_mean, dim=-1) + torch.linalg.vector_norm(bad_mean, dim=-1)) / 2
    distance = (torch.linalg.vector_norm(bad_mean - good_mean, dim=-1) / lengths.clamp(min=1e-12))[1:]
    return int((distance >= SEPARATED * distance.max()).nonzero()[0])


def mix_at(direction_index: float, n_layers: int) -> LayerMix:
    """The interpolation for a fractional decoder layer index `direction_index` in [0, n_layers - 1].

    The offset of one skips the embedding output. At the very last layer both neighbours are the same.
    """
    if not 0 <= direction_index <= n_layers - 1:
        raise ValueError(f"direction_index {direction_index} is outside layers 0 to {n_layers - 1}")
    lower = int(direction_index)
    return LayerMix(lower + 1, min(lower + 2, n_layers), direction_index - lower)


def mix(vectors: Tensor, layers: LayerMix) -> Tensor:
    """`vectors (layer, d)` interpolated, `(d,)`, not normalized."""
    return torch.lerp(vectors[layers.lower], vectors[layers.upper], layers.fraction)
