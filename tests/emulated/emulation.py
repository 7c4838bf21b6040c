"""Entering and leaving the emulation: what is replaced in PyTorch while it is at work."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import backward
from .counts import Counts
from .memory import Memory
from .tensor import KIND, Computer, DeviceTensor


class Emulation(contextlib.ExitStack):
    """Within, there are as many accelerators as `memory` has sizes (in bytes). Threads that are started within have them, too.

    `fails` is that of `Memory`.
    """

    def __init__(self, memory: Sequence[int] = (2**34,), fails: Callable[[int], bool] = lambda n_bytes: False) -> None:
        super().__init__()
        self.memory = Memory(memory, fails)
        self.counts = Counts()
        self.computer = Computer(self.memory, self.counts)

    def __enter__(self) -> "Emulation":
        # PyTorch's engine of gradients begins at the first use, with a thread for every device. It has to begin before there are some:
        # no process with such threads can be forked, and other tests fork theirs.
        torch.ones((), requires_grad=True).backward()
        torch._C._ensureCUDADeviceGuardSet()
        self.enter_context(_replaced(torch.cuda, self._cuda()))
        self.enter_context(_replaced(torch.accelerator, self._accelerator()))
        self.enter_context(_replaced(torch.autograd, {"backward": backward.backward, "grad": backward.grad}))
        # Modules are moved by exchanging whole tensors, since a tensor's data is not all that one of ours has.
        before = torch.__future__.get_swap_module_params_on_conversion()
        self.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.enter_context(self._in_threads())
        self.enter_context(self._modes())
        return self

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        with _Dispatch(self.computer), _Functions(self.computer):
            yield

    @contextlib.contextmanager
    def _in_threads(self) -> Iterator[None]:
        run = threading.Thread.run
        emulation = self

        def run_emulated(thread: threading.Thread) -> None:
            with emulation._modes():
                run(thread)

        with mock.patch.object(threading.Thread, "run", run_emulated):
            yield

    def _index(self, device: Any = None) -> int:
        """The number of a device in any of the ways it can be said."""
        if device is None:
            return self.computer.current
        return device if isinstance(device, int) else int(self.computer.resolved(device).index)

    def _select(self, device: Any) -> None:
        self.computer.current = self._index(device)

    def _memory_info(self, device: Any = None) -> tuple[int, int]:
        i = self._index(device)
        return self.memory.totals[i] - self.memory.reserved[i], self.memory.totals[i]

    def _memory(self) -> dict[str, Any]:
        memory = self.memory

        def reset_peak(device: Any = None) -> None:
            memory.peak[self._index(device)] = memory.allocated[self._index(device)]

        return {
            "memory_allocated": lambda device=None: memory.allocated[self._index(device)],
            "memory_reserved": lambda device=None: memory.reserved[self._index(device)],
            "max_memory_allocated": lambda device=None: memory.peak[self._index(device)],
            "reset_peak_memory_stats": reset_peak,
            "empty_cache": memory.empty_cache,
            "is_available": lambda: True,
            "device_count": lambda: len(memory.totals),
            "synchronize": lambda device=None: self.counts.wait("synchronize"),
        }

    def _cuda(self) -> dict[str, Any]:
        def properties(device: Any = None) -> SimpleNamespace:
            total = self.memory.totals[self._index(device)]
            return SimpleNamespace(name="Emulated", total_memory=total, major=9, minor=0, multi_processor_count=8, is_integrated=False)

        return self._memory() | {
            "_lazy_init": lambda: None,
            "is_initialized": lambda: True,
            "current_device": self._index,
            "set_device": self._select,
            "mem_get_info": self._memory_info,
            "get_device_properties": properties,
            "get_device_name": lambda device=None: "Emulated",
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *_, **__: True,
            "is_current_stream_capturing": lambda: False,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
        }

    def _accelerator(self) -> dict[str, Any]:
        return self._memory() | {
            "current_accelerator": lambda check_available=False: torch.device(KIND),
            "current_device_index": self._index,
            "set_device_index": self._select,
            "get_memory_info": self._memory_info,
        }


@contextlib.contextmanager
def _replaced(module: Any, replacements: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


class _Dispatch(TorchDispatchMode):
    """Every operation goes to the emulation."""

    def __init__(self, computer: Computer) -> None:
        super().__init__()
        self.computer = computer

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = self.computer(function, args, kwargs or {})
        if result is NotImplemented:
            with self:
                return function.decompose(*args, **(kwargs or {}))
        return result


class _Functions(TorchFunctionMode):
    """What PyTorch does before it comes to operations, and cannot do for a device that is not there."""

    def __init__(self, computer: Computer) -> None:
        super().__init__()
        self.computer = computer
        self.replaced: dict[Any, Callable[..., Any]] = {
            torch.tensor: self._tensor,
            torch.as_tensor: self._as_tensor,
            torch.Tensor.new_tensor: self._new_tensor,
            torch.Tensor.tolist: lambda tensor: tensor.cpu().tolist(),
            torch.Tensor.numpy: self._numpy,
            torch.Tensor.__array__: self._numpy,
            torch.Tensor.data.__set__: self._set_data,
            torch.nn.functional.scaled_dot_product_attention: self._attention,
            torch.Tensor.__getitem__: lambda tensor, index: tensor[_with_tensors(index, tensor)],
            torch.Tensor.__setitem__: self._set_item,
        }

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        replaced = self.replaced.get(function)
        return function(*args, **(kwargs or {})) if replaced is None else replaced(*args, **(kwargs or {}))

    def _tensor(self, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        requires_grad = kwargs.pop("requires_grad", False)
        made = torch.tensor(data.detach().cpu() if isinstance(data, DeviceTensor) else data, **kwargs)
        target = device if device is not None else data.device if isinstance(data, Tensor) else None
        return (made if target is None else made.to(target)).requires_grad_(requires_grad)

    def _as_tensor(self, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        made = data if isinstance(data, Tensor) else torch.as_tensor(data, dtype=dtype)
        return made.to(device=made.device if device is None else device, dtype=made.dtype if dtype is None else dtype)

    def _new_tensor(self, own: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        return self._tensor(data, dtype=dtype or own.dtype, device=own.device if device is None else device, **kwargs)

    def _attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(query, DeviceTensor):
            return torch.nn.functional.scaled_dot_product_attention(query, *args, **kwargs)
        with self.computer.counts.as_one("scaled_dot_product_attention"):
            return torch.nn.functional.scaled_dot_product_attention(query, *args, **kwargs)

    def _numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, DeviceTensor):
            raise TypeError(
                f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return tensor.numpy(*args, **kwargs)

    def _set_item(self, tensor: Tensor, index: Any, value: Any) -> None:
        tensor[_with_tensors(index, tensor)] = value

    def _set_data(self, tensor: Tensor, value: Tensor) -> None:
        if not isinstance(tensor, DeviceTensor) and not isinstance(value, DeviceTensor):
            torch.Tensor.data.__set__(tensor, value)
            return
        if not isinstance(tensor, DeviceTensor) or not isinstance(value, DeviceTensor):
            raise NotImplementedError("data of another device")
        torch.Tensor.data.__set__(tensor, value)
        tensor.inner, tensor.memory = value.inner, value.memory


def _with_tensors(index: Any, tensor: Tensor) -> Any:
    """An index whose lists are tensors on the indexed one's device, as PyTorch makes them."""
    if not isinstance(tensor, DeviceTensor):
        return index
    parts = index if isinstance(index, tuple) else (index,)
    made = tuple(
        torch.tensor(part, dtype=None if part else torch.long).to(tensor.device) if isinstance(part, list) else part for part in parts
    )
    return made if isinstance(index, tuple) else made[0]
