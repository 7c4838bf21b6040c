"""The automatic number of trials per pass: as many as fit in memory, or fewer if the first batches show that to be faster."""

from collections.abc import Callable

import torch

# Rows that keep a device busy; more would only delay the sampler's feedback.
CPU_ROWS = 400
ACCELERATOR_ROWS = 1600
MAX_TRIALS_PER_BATCH = 16
# Share of all trials: if a short search asks for many trials before it gets scores, it becomes a random search.
SHARE_OF_TRIALS = 10
# Half as many trials per batch are preferred if tokens per second grow by this factor, which exceeds timing noise.
CLEARLY_FASTER = 1.2


def automatic_trials_per_batch(n_prompts: int, n_trials: int, rows_that_fit: int | None = None) -> int:
    """Trials per batch before measuring: a power of two, so that small differences in free memory have no effect.

    `n_trials`: trials in total. `rows_that_fit`: responses whose keys and values fit in memory (None: unknown).
    """
    rows = ACCELERATOR_ROWS if torch.accelerator.is_available() else CPU_ROWS
    if rows_that_fit is not None:
        rows = min(rows, rows_that_fit)
    most = max(1, min(MAX_TRIALS_PER_BATCH, n_trials // SHARE_OF_TRIALS, rows // n_prompts))
    return 1 << (most.bit_length() - 1)


class BatchSize:
    """Trials per batch (`value`), tuned while trials are still drawn at random and do not depend on it.

    `tokens()` counts the tokens computed so far (None: no tuning), the first `n_random` trials are drawn at random, and `settle` is called
    with the final value. It is halved as long as that is clearly faster.
    """

    def __init__(
        self, value: int, tokens: Callable[[], int] | None = None, n_random: int = 0, settle: Callable[[int], None] = lambda value: None
    ) -> None:
        self.value = value
        self.n_random = n_random
        self._tokens = tokens
        self._settle = settle
        self._n_tokens = 0 if tokens is None else tokens()
        self._n_batches = 0
        self._rate_before = 0.0  # tokens per second with twice as many trials per batch

    def note(self, n_done: int, seconds: float) -> None:
        """Note that a batch ended after `seconds`, with `n_done` trials done in total."""
        if self._tokens is None:
            return
        n_tokens, self._n_tokens = self._tokens() - self._n_tokens, self._tokens()
        self._n_batches += 1
        if self._n_batches == 1:  # warm-up of allocators and kernels
            return
        rate = n_tokens / max(seconds, 1e-9)
        if self._rate_before and rate < CLEARLY_FASTER * self._rate_before:
            self._end(2 * self.value)
        elif self.value == 1 or n_done + self.value // 2 > self.n_random:
            self._end(self.value)
        else:
            self._rate_before = rate
            self.value //= 2

    def _end(self, value: int) -> None:
        self.value, self._tokens = value, None
        self._settle(value)
