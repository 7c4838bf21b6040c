"""How many trials share a pass where nothing is said: as many as memory holds, fewer where the first batches show that to be faster."""

from collections.abc import Callable

import torch

# Rows that keep a device busy; more only make the sampler wait longer for results.
CPU_ROWS = 400
ACCELERATOR_ROWS = 1600
MAX_TRIALS_PER_BATCH = 16
# Of the trials asked for: asking for many before one is told makes a short search a random one.
SHARE_OF_TRIALS = 10
# Half of the trials per batch must give so many times the tokens per second to be preferred: timings vary by less.
CLEARLY_FASTER = 1.2


def automatic_trials_per_batch(n_prompts: int, n_trials: int, rows_that_fit: int | None = None) -> int:
    """Trials per batch before anything has been measured: a power of two, so that a little more or less free memory changes nothing.

    `n_trials` are asked for in all. `rows_that_fit`: responses whose keys and values memory holds (None: unknown).
    """
    rows = ACCELERATOR_ROWS if torch.accelerator.is_available() else CPU_ROWS
    if rows_that_fit is not None:
        rows = min(rows, rows_that_fit)
    most = max(1, min(MAX_TRIALS_PER_BATCH, n_trials // SHARE_OF_TRIALS, rows // n_prompts))
    return 1 << (most.bit_length() - 1)


class BatchSize:
    """Trials per batch, `value`, and the trying of fewer while trials are drawn at random and nothing depends on it.

    `tokens()` counts the tokens computed so far (None: nothing is measured), the first `n_random` trials are drawn at random, and `settle`
    is told the value that stays. Halving goes on as long as each half is clearly faster.
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
        self._rate_before = 0.0  # tokens per second with twice as many trials

    def note(self, n_done: int, seconds: float) -> None:
        """A batch is over: `n_done` trials are done in all, the batch took `seconds`."""
        if self._tokens is None:
            return
        n_tokens, self._n_tokens = self._tokens() - self._n_tokens, self._tokens()
        self._n_batches += 1
        if self._n_batches == 1:  # allocators and kernels warm up in it
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
