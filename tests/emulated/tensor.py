"""Tensors on an emulated device, and what an operation on them does."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .counts import Counts
from .memory import Memory

aten = torch.ops.aten
KIND = "cuda"
# Take tensors of any two devices.
_COPIES = {aten._to_copy.default, aten.copy_.default}
# Take indices of the CPU as well.
_INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index_put.default,
    aten._index_put_impl_.default,
}
# Take a number in a CPU tensor, as all element by element operations do.
_TAKE_SCALARS = {
    aten.fill.Tensor,
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
    aten.isin.Tensor_Tensor,
}


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on a device; `inner` is the CPU tensor with its numbers, `memory` what it takes there."""

    inner: Tensor
    memory: Any

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device | None = None, memory: Any = None, requires_grad: bool = True) -> Any:
        if device is None:  # somebody makes another parameter of this one's type, which PyTorch's parameters would be
            return nn.Parameter(inner, requires_grad)
        # Made in inference mode, a view of an ordinary tensor is an ordinary tensor.
        with torch.inference_mode(inner.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=device,
            )
        made.inner, made.memory = inner, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """An operation in a thread in which no emulation was entered."""
        raise RuntimeError(f"{function} on an emulated device outside of its emulation")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner!r}, device='{self.device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTensor":
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Arguments or results with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        parts = [mapped(part, function) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def inner_of(tensor: Tensor) -> Tensor:
    """What is computed with."""
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


def common_device(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where an operation is computed; None if there is no tensor. Raises what PyTorch raises where tensors of two devices meet."""
    found = list(tensors_in((args, kwargs)))
    if not found or function in _COPIES:
        return found[0].device if found else None
    if function in _INDEXING:
        own = found[0].device
        indices = list(tensors_in(args[1]))
        if any(index.device not in (own, torch.device("cpu")) for index in indices):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({own})")
        rest = [tensor for tensor in found if not any(tensor is index for index in indices)]
    else:
        rest = found
    takes_scalars = torch.Tag.pointwise in function.tags or function in _TAKE_SCALARS or function in _INDEXING
    devices = {}
    for tensor in rest:
        if not (takes_scalars and tensor.dim() == 0 and tensor.device.type == "cpu"):
            devices.setdefault(tensor.device)
    if len(devices) > 1:
        first, second = list(devices)[:2]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}!")
    return next(iter(devices), found[0].device)


class Computer:
    """Computes operations whose tensors may be on emulated devices."""

    def __init__(self, memory: Memory, counts: Counts) -> None:
        self.memory = memory
        self.counts = counts
        self.current = 0
        self._is_made_of_others: dict[Any, bool] = {}

    def resolved(self, device: Any) -> torch.device:
        """A device as asked for, with its number. Raises what PyTorch raises for one that is not there."""
        device = torch.device(device)
        if device.type == KIND and device.index is None:
            return torch.device(KIND, self.current)
        if device.type == KIND and device.index >= len(self.memory.totals):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return device

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation, NotImplemented for one that is made of others."""
        if function not in self._is_made_of_others:
            key = torch._C._dispatch_has_kernel_for_dispatch_key
            self._is_made_of_others[function] = key(function.name(), "CompositeImplicitAutograd")
        if self._is_made_of_others[function]:
            return NotImplemented
        asked = kwargs.get("device")
        target = common_device(function, args, kwargs)
        if asked is not None:
            target = self.resolved(asked)
            if target.type == KIND:
                kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False} if "pin_memory" in kwargs else kwargs
                kwargs = {**kwargs, "device": torch.device("cpu")}
        if function is aten._pin_memory.default:
            pinned = args[0].clone()
            self.counts.pinned.add(pinned)
            return pinned
        if function is aten.is_pinned.default:
            return args[0] in self.counts.pinned
        own = {id(tensor.inner): tensor for tensor in tensors_in((args, kwargs)) if isinstance(tensor, DeviceTensor)}
        if not own and (target is None or target.type != KIND):
            return function(*args, **kwargs)
        storages = {tensor.inner.untyped_storage()._cdata for tensor in own.values()}
        if function is aten.histc.default and not args[0].is_floating_point():  # devices count integers, the CPU does not
            args = (inner_of(args[0]).float(), *args[1:])
        result = function(*mapped(args, inner_of), **{name: mapped(value, inner_of) for name, value in kwargs.items()})
        self.counts.note(function, args, kwargs, result, target, storages)
        if target is None or target.type != KIND:
            return result

        def placed(inner: Tensor) -> Tensor:
            known = own.get(id(inner))
            if known is None:
                return DeviceTensor(inner, target, self.memory.of(inner, target.index))
            if known.shape != inner.shape:
                raise NotImplementedError(f"{function} changes the shape of a tensor in place")
            return known

        return mapped(result, placed)
