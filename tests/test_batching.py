"""The automatic number of trials per pass."""

from collections.abc import Callable

import pytest
import torch

from heretic.study.batching import BatchSize, automatic_trials_per_batch


@pytest.mark.parametrize(
    ("accelerator", "n_prompts", "n_trials", "rows_that_fit", "expected"),
    [
        (False, 100, 200, None, 4),
        (False, 100, 200, 10**6, 4),
        (False, 100, 200, 399, 2),  # a power of two, so that 399 and 200 are the same
        (False, 100, 200, 200, 2),
        (False, 100, 200, 5, 1),
        (False, 1000, 200, None, 1),
        (False, 3, 200, None, 16),
        (False, 3, 159, None, 8),  # a tenth of the trials asked for
        (False, 3, 48, None, 4),
        (False, 3, 19, None, 1),
        (False, 3, 1, None, 1),
        (True, 100, 200, None, 16),
        (True, 100, 200, 900, 8),
        (True, 100, 40, None, 4),
    ],
)
def test_as_many_as_rows_memory_and_trials_allow(
    accelerator: bool, n_prompts: int, n_trials: int, rows_that_fit: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert automatic_trials_per_batch(n_prompts, n_trials, rows_that_fit) == expected


def batches(rate: Callable[[int], float], value: int, n_random: int, n_trials: int) -> tuple[list[int], list[int]]:
    """Trials in each batch if `rate` gives tokens per second, every trial has 100 tokens, and the first batch is slow."""
    computed, settled = 0, list[int]()
    size = BatchSize(value, lambda: computed, n_random, settled.append)
    sizes, n_done = [], 0
    while n_done < n_trials:
        sizes.append(size.value)
        computed += 100 * size.value
        n_done += size.value
        size.note(n_done, 100 * size.value / rate(size.value) * (10 if len(sizes) == 1 else 1))
    return sizes, settled


def test_what_gives_most_stays() -> None:
    assert batches(lambda n: n, 8, 60, 40) == ([8, 8, 4, 8, 8, 8], [8])
    assert batches(lambda n: 1 / n, 8, 60, 24) == ([8, 8, 4, 2, 1, 1], [1])
    assert batches(lambda n: {8: 1, 4: 2, 2: 1, 1: 5}[n], 8, 60, 34) == ([8, 8, 4, 2, 4, 4, 4], [4])


def test_a_little_faster_is_not_clearly_faster() -> None:
    assert batches(lambda n: 1.1 if n < 8 else 1.0, 8, 60, 40) == ([8, 8, 4, 8, 8, 8], [8])


def test_nothing_is_tried_once_the_sampler_learns() -> None:
    assert batches(lambda n: 1 / n, 8, 19, 40) == ([8, 8, 8, 8, 8], [8])
    assert batches(lambda n: 1 / n, 8, 20, 40) == ([8, 8, 4, 4, 4, 4, 4, 4], [4])


def test_a_value_that_was_asked_for_stays() -> None:
    size = BatchSize(8)
    for i in range(5):
        size.note(8 * i, 1.0)
    assert size.value == 8
