"""Several processes of one thread each score a batch of trials, where the model is so small that threads mostly wait for one another.

They are forked when the baseline has been taken, so they share the model's memory and all that was found out, and know nothing of the
study: the run asks for trials and tells them as ever, and results do not depend, up to rounding, on how many there are.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from .ablation import Ablation
from .evaluator import Evaluator, Score
from .generation import Decoder
from .launch import world_size
from .search import Limit, ScoreTrials
from .utils import Progress

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Matrix products of models with more parameters keep all threads busy.
MAX_PARAMETERS = 30_000_000


def most_lanes(evaluator: Evaluator) -> int:
    """How many processes could score a batch that is large enough: one for every thread, or this one alone."""
    model = evaluator.model
    is_small = sum(p.numel() for p in model.model.parameters()) <= MAX_PARAMETERS
    may_fork = sys.platform == "linux" and world_size() == 1 and not torch.accelerator.is_available()
    is_plain = isinstance(model.decoder, Decoder) and not model.loaded.quantized and not evaluator.settings.print_responses
    return torch.get_num_threads() if may_fork and is_small and is_plain else 1


def n_lanes(evaluator: Evaluator, trials_per_batch: int) -> int:
    """How many processes to score batches in; 1 is this one alone."""
    return min(most_lanes(evaluator), trials_per_batch)


@contextlib.contextmanager
def scoring(evaluator: Evaluator, trials_per_batch: int, progress: Progress) -> Iterator[ScoreTrials]:
    """What scores trials as `evaluator.score_trials` does: that, or lanes, which are gone afterwards."""
    n = n_lanes(evaluator, trials_per_batch)
    if n == 1:
        yield evaluator.score_trials
        return
    with Lanes(evaluator, n, progress) as lanes:
        yield lanes.score_trials


class Lanes:
    """`n` processes that score trials as `evaluator` does. Use as a context manager; none is left afterwards."""

    def __init__(self, evaluator: Evaluator, n: int, progress: Progress) -> None:
        self.evaluator = evaluator
        self.n = n
        self.progress = progress
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Lanes":
        context = multiprocessing.get_context("fork")
        for _ in range(self.n):
            here, there = context.Pipe()
            self._pipes.append(here)
            # A child has these ends as well, and closes them, so that it sees when this process is gone.
            process = context.Process(target=_serve, args=(self.evaluator, self.n, there, list(self._pipes)), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()

    def score_trials(self, ablations: list[Ablation], limit: Limit) -> Sequence[Score | Exception]:
        """See `Evaluator.score_trials`. Where a process was ended from outside, as for want of memory, this one goes on alone."""
        if not self._pipes:
            return self.evaluator.score_trials(ablations, limit)
        try:
            return self._score(ablations, limit)
        except (EOFError, OSError):
            self.__exit__()
            self.progress.warning(
                "A process that scored trials was ended, perhaps for want of memory. The run goes on in this one alone, more slowly."
            )
            return self.evaluator.score_trials(ablations, limit)

    def _score(self, ablations: list[Ablation], limit: Limit) -> list[Score | Exception]:
        parts = [ablations[i :: self.n] for i in range(self.n)]
        at_work = [(i, pipe) for i, (pipe, part) in enumerate(zip(self._pipes, parts, strict=True)) if part]
        for i, pipe in at_work:
            pipe.send((parts[i], limit))
        answers = [(i, *pipe.recv()) for i, pipe in at_work]  # all, before one of them is looked at
        results: list[Any] = [None] * len(ablations)
        for i, found, n_tokens in answers:
            if isinstance(found, Exception):
                raise found
            results[i :: self.n] = found
            self._decoder.n_tokens += n_tokens
        return results

    @property
    def _decoder(self) -> Decoder:
        decoder = self.evaluator.model.decoder
        assert isinstance(decoder, Decoder)
        return decoder


def _keep_memory() -> None:
    """Keep what is freed for the next batch. Giving it back to the system and getting it anew, page by page, took a tenth of the time."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _serve(evaluator: Evaluator, n: int, pipe: Connection, others: Sequence[Connection]) -> None:
    """Score what comes, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when to stop
    for other in others:
        other.close()
    torch.set_num_threads(1)
    _keep_memory()
    decoder = evaluator.model.decoder
    assert isinstance(decoder, Decoder)
    decoder.memory_share /= n
    with contextlib.suppress(EOFError, OSError):
        while True:
            ablations, limit = pipe.recv()
            before = decoder.n_tokens
            try:
                found: Any = evaluator.score_trials(ablations, limit)
            except Exception as error:  # told by the run
                found = error
            pipe.send((found, decoder.n_tokens - before))
    os._exit(0)  # what is left to be done at an exit is the run's
