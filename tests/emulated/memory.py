"""The memory of emulated devices: what tensors take, and how much there is."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Allocation:
    """Memory of a device, given back with the last tensor that lies in it."""

    def __init__(self, memory: "Memory", device: int, n_bytes: int) -> None:
        self.memory, self.device, self.n_bytes = memory, device, n_bytes
        memory.allocated[device] += n_bytes
        memory.peak[device] = max(memory.peak[device], memory.allocated[device])
        memory.reserved[device] = max(memory.reserved[device], memory.allocated[device])

    def __del__(self) -> None:
        self.memory.allocated[self.device] -= self.n_bytes


class Memory:
    """`totals`: bytes of each device. `fails(n_bytes)` may say that an allocation finds no room whatever is free.

    Like PyTorch's allocator it keeps what was given back in reserve until `empty_cache`, and uses that before it fails.
    """

    def __init__(self, totals: Sequence[int], fails: Callable[[int], bool] = lambda n_bytes: False) -> None:
        self.totals = list(totals)
        self.fails = fails
        self.n_failed = 0
        self.allocated = [0] * len(totals)
        self.reserved = [0] * len(totals)
        self.peak = [0] * len(totals)
        self._by_storage: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()

    def of(self, inner: Tensor, device: int) -> Allocation:
        """What a tensor lies in: what its base was given, or newly allocated. Raises `OutOfMemoryError`."""
        storage = inner.untyped_storage()
        known = self._by_storage.get(storage._cdata)
        if known is not None:
            return known
        n_bytes = storage.nbytes()
        free = self.totals[device] - self.allocated[device]
        if n_bytes > free or self.fails(n_bytes):
            self.n_failed += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {n_bytes / 2**20:.2f} MiB. GPU {device} has a total capacity of "
                f"{self.totals[device] / 2**20:.2f} MiB of which {free / 2**20:.2f} MiB is free."
            )
        self._by_storage[storage._cdata] = made = Allocation(self, device, n_bytes)
        return made

    def empty_cache(self) -> None:
        """Give the reserve back."""
        self.reserved = list(self.allocated)
