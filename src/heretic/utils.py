"""Small things that several parts need and that belong to none: progress, durations, back-off, memory."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import psutil
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress(Protocol):
    """How the core tells what it is doing. The console implements it; tests and library users pass `SilentProgress`."""

    def message(self, text: str) -> None:
        """Say something that the user should read."""

    def warning(self, text: str) -> None:
        """Say something that the user may have to act on."""

    def task(self, description: str, total: int | None = None) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A long step: the value entered is called with the number of units done since the last call."""


class SilentProgress:
    """Says nothing."""

    def message(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda _: None


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's allocator, or the CPU's, found no room."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def empty_cache() -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class BatchSize:
    """How many prompts a forward pass takes: starts at the limit, is halved whenever memory runs out, and remembers it."""

    def __init__(self, batch_size: int, max_batch_size: int) -> None:
        self.value = batch_size or max_batch_size

    def batches(self, items: Sequence[Item], function: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        """`function` of consecutive slices of `items`, each as large as memory allows.

        Raises the out-of-memory error itself only where a single item does not fit.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.value]
            try:
                result = function(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                self.value = max(1, len(batch) // 2)
            else:
                start += len(batch)
                yield result
                continue
            empty_cache()  # outside the handler, which keeps the failed pass's tensors alive


def describe_device() -> str:
    """The accelerators and their memory, or the CPU's, in one line."""
    if not torch.accelerator.is_available():
        memory = psutil.virtual_memory()
        return f"CPU, {torch.get_num_threads()} threads, {_gib(memory.available)} of {_gib(memory.total)} GiB memory free"
    device = torch.accelerator.current_accelerator()
    kind = "accelerator" if device is None else device.type
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    parts = []
    for i in range(torch.accelerator.device_count()):
        name = name_of(i) if name_of else kind
        try:
            free, total = torch.accelerator.get_memory_info(i)
        except (RuntimeError, NotImplementedError):  # not every backend tells
            parts.append(f"{name} ({kind}:{i})")
        else:
            parts.append(f"{name} ({kind}:{i}), {_gib(free)} of {_gib(total)} GiB memory free")
    return "; ".join(parts)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f}"
