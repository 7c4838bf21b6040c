"""Scores of one model with their contributions per prompt, and bootstrap intervals over prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0  # makes intervals reproducible
# Resamples drawn at once: limits memory.
SLICE = 1000


@dataclass(frozen=True)
class Figure:
    """A score `value = sum(parts) / sum(weights)`, to which each prompt contributes a part and a weight.

    Without `parts`, the contributions are unknown, and there is no interval.
    """

    value: float
    parts: np.ndarray | None = None
    weights: np.ndarray | None = None
    is_count: bool = False

    @classmethod
    def count(cls, outcomes: Sequence[bool] | np.ndarray) -> "Figure":
        """The number of true outcomes."""
        parts = np.asarray(outcomes, dtype=np.float64)
        return cls(float(parts.sum()), parts, np.full(len(parts), 1 / len(parts)), is_count=True)

    @classmethod
    def mean(cls, parts: Sequence[float] | np.ndarray) -> "Figure":
        """The mean over prompts."""
        return cls.ratio(parts, np.ones(len(parts)))

    @classmethod
    def ratio(cls, parts: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> "Figure":
        """The mean over units (such as tokens) whose number differs between prompts: `weights`."""
        above, below = np.asarray(parts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
        return cls(float(above.sum() / below.sum()), above, below)

    def interval(self, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[float, float] | None:
        """Percentile bootstrap over prompts (Efron 1979): the central share `confidence` of the figure over resampled prompts.

        If all prompts contribute the same, so do all resamples, and the interval would have zero width. For counts (none or all), the exact
        interval of Clopper and Pearson (1934) is used instead. None without parts.
        """
        if self.parts is None or self.weights is None:
            return None
        n, tail = len(self.parts), (1 - confidence) / 2
        if self.is_count and self.value in (0, n):
            # One end is the count itself; at the other, a count this extreme has the probability of the tail.
            share = tail ** (1 / n)
            return (0.0, n * (1 - share)) if self.value == 0 else (n * share, float(n))
        generator = np.random.default_rng(seed)
        figures = []
        for start in range(0, resamples, SLICE):
            drawn = generator.integers(0, n, (min(SLICE, resamples - start), n))
            figures.append(self.parts[drawn].sum(axis=1) / self.weights[drawn].sum(axis=1))
        low, high = np.percentile(np.concatenate(figures), [100 * tail, 100 * (1 - tail)])
        return float(low), float(high)


def intervals(figures: Mapping[str, Figure]) -> dict[str, tuple[float, float]]:
    """The intervals of the scores that have one, by name."""
    return {name: interval for name, figure in figures.items() if (interval := figure.interval())}
