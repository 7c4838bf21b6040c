"""Several processes of one thread each score batches of trials, where the model is so small that threads mostly wait for one another.

They are forked when the baseline has been taken, so they share the model's memory and all that was found out, and know nothing of the
study: the run asks for trials and tells them as ever, and results do not depend, up to rounding, on how many there are.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from .decoding.attention import use_products
from .decoding.decoder import Decoder
from .editing.ablation import Ablation
from .evaluator import Evaluator, Score
from .study.batches import Limit, Scores, Scoring, Wait
from .study.batching import MAX_TRIALS_AT_WORK
from .utils import Progress

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# From Linux's prctl.h: a signal that comes when the parent is gone.
PR_SET_PDEATHSIG = 1

# Matrix products of models with more parameters keep all threads busy.
MAX_PARAMETERS = 30_000_000


def most_lanes(evaluator: Evaluator) -> int:
    """How many processes could score a batch that is large enough: one for every thread, or this one alone."""
    model = evaluator.model
    is_small = sum(p.numel() for p in model.model.parameters()) <= MAX_PARAMETERS
    may_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    is_plain = isinstance(model.decoder, Decoder) and not model.loaded.quantized and not evaluator.settings.print_responses
    return torch.get_num_threads() if may_fork and is_small and is_plain else 1


def n_lanes(evaluator: Evaluator, trials_per_batch: int) -> int:
    """How many processes to score batches in; 1 is this one alone. Each has a batch, and one more waits."""
    return max(1, min(most_lanes(evaluator), MAX_TRIALS_AT_WORK // trials_per_batch - 1))


@contextlib.contextmanager
def scoring(evaluator: Evaluator, trials_per_batch: int, progress: Progress) -> Iterator[Scoring]:
    """What scores trials as `evaluator.score_trials` does: that, or lanes, which are gone afterwards."""
    n = n_lanes(evaluator, trials_per_batch)
    if n == 1:
        yield Scoring(evaluator.score_trials)
        return
    with Lanes(evaluator, n, progress) as lanes:
        yield lanes


class Lanes(Scoring):
    """`n` processes that score batches as `evaluator` does. Use as a context manager; none is left afterwards."""

    def __init__(self, evaluator: Evaluator, n: int, progress: Progress) -> None:
        super().__init__(evaluator.score_trials)
        self.n_processes = n
        self.progress = progress
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self._pool: ProcessPoolExecutor | None = None
        self._evaluator = evaluator

    def __enter__(self) -> "Lanes":
        before = multiprocessing.active_children()
        context = multiprocessing.get_context("fork")
        # A fork takes the evaluator along as it is; only what is submitted is sent.
        self._pool = ProcessPoolExecutor(self.n_processes, context, _begin, (self._evaluator, self.n_processes, os.getpid()))
        self._pool.submit(os.getpid).result()
        self.processes = [process for process in multiprocessing.active_children() if process not in before]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def begin(self, ablations: list[Ablation], limit: Limit) -> Wait:
        """See `Scoring.begin`. Where a process was ended from outside, as for want of memory, this one goes on alone."""
        alone = super().begin(ablations, limit)
        if self._pool is None:
            return alone
        try:
            future = self._pool.submit(_score, ablations, limit)
        except BrokenProcessPool:
            self._give_up()
            return alone

        def wait() -> Scores:
            try:
                return future.result()
            except BrokenProcessPool:
                self._give_up()
                return alone()

        return wait

    def _give_up(self) -> None:
        if self._pool is not None:
            self.__exit__()
            self.progress.warning(
                "A process that scored trials was ended, perhaps for want of memory. The run goes on in this one alone, more slowly."
            )


# A lane's own evaluator.
_own: list[Evaluator] = []


def _begin(evaluator: Evaluator, n: int, parent: int) -> None:
    """What a lane does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when to stop
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):
        _call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    # What is freed is kept for the next batch. Giving it back to the system and getting it anew, page by page, took a tenth of the time.
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        _call_libc("mallopt", M_MMAP_MAX, 0)
        _call_libc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)
    decoder = evaluator.model.decoder
    assert isinstance(decoder, Decoder)
    decoder.memory_share /= n
    use_products(decoder)
    _own.append(evaluator)


def _call_libc(name: str, *arguments: int) -> None:
    getattr(ctypes.CDLL(None), name)(*arguments)


def _score(ablations: list[Ablation], limit: Limit) -> list[Score | Exception]:
    return list(_own[0].score_trials(ablations, limit))
