"""What a program asks of a host with an accelerator: operations launched, and how often it waits until they are done."""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
# Need a number, or a shape, that only the device knows.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
_ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Counts:
    """`launches`: operations that compute something on a device. `waits`: synchronizations, by where they come from.

    Copies from memory that is not pinned, or that are not `non_blocking`, wait; so do all copies to the CPU.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        # Tensors are compared by identity, which weak references to them are not.
        self.pinned = _Pinned()

    def clear(self) -> None:
        """Begin anew."""
        self.launches.clear()
        self.waits.clear()

    @contextlib.contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Within, all launches are one: a device has a kernel for what is made of several operations here."""
        before = self.launches.copy()
        yield
        self.launches.clear()
        self.launches.update(before)
        self.launches[name] += 1

    def note(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, target: torch.device | None, storages: set[int]
    ) -> None:
        """Count an operation; `storages` are those of its arguments on devices."""
        if self._waits(function, args, kwargs, target):
            self.waits[f"{function.__name__.removesuffix('.default')} at {_origin()}"] += 1
        name = function._schema.name
        if name in _ALLOCATIONS:
            return
        results = result if isinstance(result, (tuple, list)) else [result]
        is_view = all(isinstance(r, Tensor) and r.untyped_storage()._cdata in storages for r in results)
        if not is_view or function._schema.is_mutable:
            self.launches[name.removeprefix("aten::")] += 1

    def _waits(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device | None) -> bool:
        if function in _WAITS:
            return True
        if function is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        if function in _INDEXED:
            indices = [index for index in args[1] if index is not None]
            from_cpu = args[0].device.type != "cpu" and any(index.device.type == "cpu" for index in indices)
            # A number put where a mask says so needs no count of how many that are.
            is_fill = function is not aten.index.Tensor and args[2].dim() == 0
            return from_cpu or (any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not is_fill)
        if function is aten.copy_.default:
            there, here, blocks = args[0].device, args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif function is aten._to_copy.default and target is not None:
            there, here, blocks = target, args[0], not kwargs.get("non_blocking", False)
        else:
            return False
        if there.type == here.device.type:
            return False
        return there.type == "cpu" or blocks or here not in self.pinned

    def wait(self, what: str) -> None:
        """Count a synchronization that was asked for."""
        self.waits[f"{what} at {_origin()}"] += 1


class _Pinned:
    """Tensors whose memory the device may read while the program goes on."""

    def __init__(self) -> None:
        self._by_identity: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def add(self, tensor: Tensor) -> None:
        self._by_identity[id(tensor)] = tensor

    def __contains__(self, tensor: Tensor) -> bool:
        return self._by_identity.get(id(tensor)) is tensor


def _origin() -> str:
    """The innermost line of code that is neither PyTorch's nor the emulation's, as `file:line`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/emulated/" not in file:
            return f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
