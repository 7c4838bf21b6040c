"""Intervals against SciPy's bootstrap and exact binomial answers."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap

from heretic.scoring.figures import Figure


def test_values_by_hand() -> None:
    assert Figure.count([True, False, True]).value == 2
    assert Figure.mean([1.0, 2.0, 6.0]).value == 3
    assert Figure.ratio([1.0, 5.0], [1, 2]).value == 2
    assert Figure(0.5).interval() is None


@pytest.mark.parametrize("n", [20, 100])
def test_a_mean_has_scipys_interval(n: int) -> None:
    values = np.random.default_rng(1).exponential(size=n)
    own = Figure.mean(values).interval()
    scipys = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(2)).confidence_interval
    width = scipys.high - scipys.low
    assert own == pytest.approx((scipys.low, scipys.high), abs=0.03 * width)


def test_a_ratio_has_scipys_interval() -> None:
    generator = np.random.default_rng(3)
    weights = generator.integers(1, 17, 60).astype(float)
    parts = generator.exponential(size=60) * weights
    own = Figure.ratio(parts, weights).interval(confidence=0.9)
    scipys = bootstrap(
        (parts, weights),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=0.9,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert own == pytest.approx((scipys.low, scipys.high), abs=0.03 * (scipys.high - scipys.low))


@pytest.mark.parametrize(("n", "count"), [(100, 7), (100, 50), (40, 39)])
def test_a_count_has_the_binomials_quantiles(n: int, count: int) -> None:
    """Resampled outcomes are draws of a binomial distribution, whose quantiles are known exactly."""
    interval = Figure.count([i < count for i in range(n)]).interval()
    assert interval is not None
    assert interval == pytest.approx(tuple(binom.ppf([0.025, 0.975], n, count / n)), abs=1)


@pytest.mark.parametrize("n", [1, 20, 100])
def test_none_and_all_have_the_exact_interval(n: int) -> None:
    """Resamples would all be the same, as if nothing were left to luck."""
    for count in (0, n):
        exact = binomtest(count, n).proportion_ci(confidence_level=0.95, method="exact")
        own = Figure.count([i < count for i in range(n)]).interval()
        assert own == pytest.approx((n * exact.low, n * exact.high))


def test_intervals_repeat() -> None:
    figure = Figure.mean(np.random.default_rng(1).exponential(size=30))
    assert figure.interval() == figure.interval()
    assert figure.interval(seed=1) != figure.interval()
    low, high = figure.interval(confidence=0.5) or (0, 0)
    wide_low, wide_high = figure.interval() or (0, 0)
    assert wide_low < low < figure.value < high < wide_high


def test_a_divergence_of_zeros_is_no_count() -> None:
    assert Figure.mean([0.0, 0.0]).interval() == (0, 0)
    assert Figure.mean([0.0]).interval() == (0, 0)
