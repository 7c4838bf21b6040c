"""Small things that several parts need and that belong to none: progress, durations, back-off, memory."""

import contextlib
import gc
import platform
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import psutil
import torch


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


def format_size(n_bytes: int) -> str:
    """`512 B`, `2.4 MB`, `4.9 GB`: powers of 1000, as the hub counts."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size = n_bytes / 1000
    for unit in ("kB", "MB"):
        if size < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's allocator, or the CPU's, found no room."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def empty_cache() -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def input_device(model: Any) -> torch.device:
    """Where a model takes token ids: where the weight of its embedding is, or comes to for a pass where Accelerate keeps it elsewhere."""
    module = model.get_input_embeddings()
    hook = getattr(module, "_hf_hook", None)
    device = module.weight.device
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, what this process's allocator keeps in reserve included."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.accelerator.get_memory_info(device)
    reserve = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free + reserve)


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


def hardware() -> dict[str, Any]:
    """What results may depend on beyond versions, and nothing that tells whose machine it is."""
    devices: list[str] = []
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        name_of = getattr(torch.get_device_module(device), "get_device_name", None)
        devices = [name_of(i) if name_of else str(device) for i in range(torch.accelerator.device_count())]
    return {
        "devices": devices,
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f}"
