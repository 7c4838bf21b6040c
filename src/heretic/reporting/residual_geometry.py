"""Geometry of the residuals of harmless and harmful prompts per layer: means, geometric medians, directions, separation.

Tensors in, tensors out, all in float64 on the CPU. One layer at a time; distances come from inner products of centered residuals,
so that a step costs `prompt^2` and not `prompt * d`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MEDIAN_STEPS = 1000
MEDIAN_TOLERANCE = 1e-10  # change of the points' weights, which sum to 1


@dataclass(frozen=True)
class LayerGeometry:
    """One layer, by means and (`_median`) by geometric medians; `direction` is harmful minus harmless, not normalized."""

    layer: int | None  # None: the embedding output
    cosine_good_bad: float
    cosine_good_bad_median: float
    cosine_good_direction: float
    cosine_good_direction_median: float
    cosine_bad_direction: float
    cosine_bad_direction_median: float
    norm_good: float
    norm_good_median: float
    norm_bad: float
    norm_bad_median: float
    norm_direction: float
    norm_direction_median: float
    silhouette: float


def residual_geometry(good: Tensor, bad: Tensor) -> list[LayerGeometry]:
    """The geometry of every layer, from residuals `(prompt, layer, d)` of harmless and harmful prompts; index 0 is the embedding output."""
    return [
        layer_geometry(
            good[:, i].double(), bad[:, i].double(), None if i == 0 else i - 1
        )  # float64, since means of nearly equal vectors lose digits
        for i in range(good.shape[1])
    ]


def layer_geometry(good: Tensor, bad: Tensor, layer: int | None) -> LayerGeometry:
    """The geometry of one layer from its residuals `(prompt, d)`."""
    g, b = good.mean(dim=0), bad.mean(dim=0)
    g_median, b_median = geometric_median(good), geometric_median(bad)
    r, r_median = b - g, b_median - g_median
    return LayerGeometry(
        layer=layer,
        cosine_good_bad=_cosine(g, b),
        cosine_good_bad_median=_cosine(g_median, b_median),
        cosine_good_direction=_cosine(g, r),
        cosine_good_direction_median=_cosine(g_median, r_median),
        cosine_bad_direction=_cosine(b, r),
        cosine_bad_direction_median=_cosine(b_median, r_median),
        norm_good=float(g.norm()),
        norm_good_median=float(g_median.norm()),
        norm_bad=float(b.norm()),
        norm_bad_median=float(b_median.norm()),
        norm_direction=float(r.norm()),
        norm_direction_median=float(r_median.norm()),
        silhouette=silhouette(good, bad),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def _distances(inner: Tensor) -> Tensor:
    """Euclidean distances between points, from their inner products."""
    squared = inner.diagonal()[:, None] + inner.diagonal() - 2 * inner
    return squared.clamp(min=0).sqrt()


def geometric_median(points: Tensor) -> Tensor:
    """The point with the least sum of distances to `points (n, d)`, `(d,)`; unlike the mean it is robust to outliers.

    Weiszfeld's algorithm. The median stays a weighted mean of the points, so only the weights are computed. If it coincides with a point,
    the step of Vardi and Zhang is used (2000, PNAS 97, 1423-1426).
    """
    n, mean = len(points), points.mean(dim=0)
    centered = points - mean  # inner products of points far from the origin would lose the digits that distinguish them
    inner = centered @ centered.mT
    scale = float(inner.diagonal().mean().sqrt())
    if scale == 0:
        return mean
    weights = torch.full((n,), 1 / n, dtype=points.dtype)
    for _ in range(MEDIAN_STEPS):
        cross = inner @ weights
        distances = (inner.diagonal() - 2 * cross + weights @ cross).clamp(min=0).sqrt()
        pulls = torch.where(distances > 1e-9 * scale, 1 / distances, 0)
        step = pulls / pulls.sum()
        hit = distances <= 1e-9 * scale
        if hit.any():
            # The pull of the other points against that of the points at this position.
            difference = pulls - pulls.sum() * weights
            force = float((difference @ inner @ difference).clamp(min=0).sqrt())
            stay = min(1.0, float(hit.sum()) / force) if force > 0 else 1.0
            step = (1 - stay) * step + stay * weights
        change = float((step - weights).abs().sum())
        weights = step
        if change < MEDIAN_TOLERANCE:
            break
    return mean + weights @ centered


def silhouette(first: Tensor, second: Tensor) -> float:
    """The mean silhouette coefficient of two groups `(n, d)`, `(m, d)` (Rousseeuw 1987): 1 separated, 0 mixed."""
    points = torch.cat([first, second])
    points = points - points.mean(dim=0)
    distances = _distances(points @ points.mT)
    n, m = len(first), len(second)
    in_first = torch.arange(n + m) < n
    to_first, to_second = distances[:, :n].sum(dim=1), distances[:, n:].sum(dim=1)
    within = torch.where(in_first, to_first / max(1, n - 1), to_second / max(1, m - 1))
    between = torch.where(in_first, to_second / m, to_first / n)
    greater = torch.maximum(within, between)
    values = torch.where(greater > 0, (between - within) / greater, 0)
    alone = torch.where(in_first, n == 1, m == 1)
    return float(torch.where(alone, 0, values).mean())
