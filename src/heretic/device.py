"""The accelerator, or the CPU: memory, what lacks it, and how it is described."""

import gc
import platform
from typing import Any

import psutil
import torch


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
