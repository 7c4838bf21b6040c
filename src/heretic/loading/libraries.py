"""Preparation of libraries before they are imported."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_libraries(debug: bool) -> None:
    """Set environment variables that libraries read on import: how threads wait and, except with `--debug`, no output of their own."""
    # OpenMP's threads spin for milliseconds while they wait. That is as fast as a short spin on an idle machine (see bench/LOG.md), but
    # if other programs run, threads then wait for threads that have no core: many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stdout.isatty() else "1")
    if not sys.stdout.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its log messages are contained in our own errors
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.simplefilter("ignore")
    # The latter warns if a model has no licence files, which is common.
    for name in ("bitsandbytes", "huggingface_hub._snapshot_download"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Context without garbage collection: imports create many objects, none of which are garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
