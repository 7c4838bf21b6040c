"""The accelerator or the CPU: memory, out-of-memory errors, and description."""

import errno
import gc
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from .utils import JsonObject

# Lowercase parts of out-of-memory messages of all vendors' allocators, drivers and libraries.
_OUT_OF_MEMORY = (
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "out_of_device_memory",
    "out_of_host_memory",
    "alloc_failed",
    "allocfailed",
    "allocate memory",
    "not enough memory",
    "memory_error",
    "invalid buffer size",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an accelerator or the CPU ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, (RuntimeError, SafetensorError)) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def empty_cache() -> None:
    """Release unused memory to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding `(vocabulary, d)`."""
    return model.get_input_embeddings().get_parameter("weight")


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for token ids: that of the embedding weight or, if Accelerate offloads it, the device where it is executed."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = embedding_weight(model).device
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. On CUDA it is copied from pinned memory, so that the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, including what this process's allocator has reserved."""
    if device.type == "cpu":
        return min(int(psutil.virtual_memory().available), *(limit - used for limit, used in memory_limits()), sys.maxsize)
    free, _ = torch.accelerator.get_memory_info(device)
    reserve = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free + reserve)


def memory_limits(process: Path = Path("/proc/self")) -> list[tuple[int, int]]:
    """Limits of a container or batch system (Linux control groups, versions 1 and 2) on this process's main memory, in bytes, each with the
    memory used. Inactive file cache is not counted."""
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for fields in mounts:
        kind, *source = fields[fields.index("-", 6) + 1 :]
        if kind == "cgroup2":
            controller, limits, files = "", ["memory.max", "memory.high"], ("memory.current", "inactive_file")
        elif kind == "cgroup" and "memory" in source[-1].split(","):
            controller, limits, files = "memory", ["memory.limit_in_bytes"], ("memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = next((path for _, controllers, path in groups if controller in controllers.split(",")), "/")
        found += _limits_above(Path(fields[4]), own.removeprefix(fields[3].rstrip("/")).strip("/"), limits, *files)
    return found


def _limits_above(top: Path, group: str, names: Sequence[str], usage: str, cached: str) -> list[tuple[int, int]]:
    """The limits of a group and of all its visible parent groups."""
    found = []
    folder = top / group
    for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]:
        try:
            limits = [text for name in names if (text := (place / name).read_text().strip()).isdecimal()]
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            used = int((place / usage).read_text()) - int(statistics.get(cached, 0))
        except (OSError, ValueError):  # the root group has none
            continue
        found += [(int(text), used) for text in limits if int(text) < psutil.virtual_memory().total]  # larger values mean no limit
    return found


def describe_device() -> str:
    """The accelerators and their memory, or the CPU's, in one line."""
    if not torch.accelerator.is_available():
        free = free_memory(torch.device("cpu"))
        total = min(int(psutil.virtual_memory().total), *(limit for limit, _ in memory_limits()), sys.maxsize)
        return f"CPU, {torch.get_num_threads()} threads, {_gib(free)} of {_gib(total)} GiB memory free"
    device = torch.accelerator.current_accelerator()
    kind = "accelerator" if device is None else device.type
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    parts = []
    for i in range(torch.accelerator.device_count()):
        name = name_of(i) if name_of else kind
        try:
            free, total = torch.accelerator.get_memory_info(i)
        except (RuntimeError, NotImplementedError):  # not supported by every backend
            parts.append(f"{name} ({kind}:{i})")
        else:
            parts.append(f"{name} ({kind}:{i}), {_gib(free)} of {_gib(total)} GiB memory free")
    return "; ".join(parts)


def hardware() -> JsonObject:
    """Hardware that results may depend on, without anything that identifies the machine."""
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
