"""Figures of one model, and how much they owe to the luck of the prompts: bootstrap intervals over prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0  # the same figures get the same interval every time
# Draws `(resample, prompt)` made at once: bounds the memory.
SLICE = 1000


@dataclass(frozen=True)
class Figure:
    """A figure `value = sum(parts) / sum(weights)` to which each prompt contributes a part and a weight.

    Without `parts` it is a number of which nothing more is known, and it has no interval.
    """

    value: float
    parts: np.ndarray | None = None
    weights: np.ndarray | None = None
    is_count: bool = False

    @classmethod
    def count(cls, outcomes: Sequence[bool] | np.ndarray) -> "Figure":
        """How many outcomes are true."""
        parts = np.asarray(outcomes, dtype=np.float64)
        return cls(float(parts.sum()), parts, np.full(len(parts), 1 / len(parts)), is_count=True)

    @classmethod
    def mean(cls, parts: Sequence[float] | np.ndarray) -> "Figure":
        """The mean over prompts."""
        return cls.ratio(parts, np.ones(len(parts)))

    @classmethod
    def ratio(cls, parts: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> "Figure":
        """The mean over units (tokens, say) of which the prompts have different numbers: `weights`."""
        above, below = np.asarray(parts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
        return cls(float(above.sum() / below.sum()), above, below)

    def interval(self, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[float, float] | None:
        """Percentile bootstrap over prompts (Efron 1979): the central share `confidence` of the figure over resampled prompts.

        Where all prompts gave the same, resamples do too, and the interval would have no width. For a count (of none, or of all) the
        exact one of Clopper and Pearson (1934) stands in its place. None without parts.
        """
        if self.parts is None or self.weights is None:
            return None
        n, tail = len(self.parts), (1 - confidence) / 2
        if self.is_count and self.value in (0, n):
            # One end is the count itself; the other is where so extreme a count would still come up with the tail's probability.
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
    """The intervals of those figures that have one, by name."""
    return {name: interval for name, figure in figures.items() if (interval := figure.interval())}
