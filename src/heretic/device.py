"""The accelerator, or the CPU: memory, what lacks it, and how it is described."""

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

# What allocators, drivers and libraries of all vendors say where memory is lacking, in small letters.
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
    """Whether an accelerator's allocator, or the CPU's, found no room."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, (RuntimeError, SafetensorError)) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def empty_cache() -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The weight `(vocabulary, d)` by which a model looks up token ids."""
    return model.get_input_embeddings().get_parameter("weight")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes token ids: where the weight of its embedding is, or comes to for a pass where Accelerate keeps it elsewhere."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = embedding_weight(model).device
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, what this process's allocator keeps in reserve included."""
    if device.type == "cpu":
        return min(int(psutil.virtual_memory().available), *(limit - used for limit, used in memory_limits()), sys.maxsize)
    free, _ = torch.accelerator.get_memory_info(device)
    reserve = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free + reserve)


def memory_limits(process: Path = Path("/proc/self")) -> list[tuple[int, int]]:
    """Limits that a container or a batch system (Linux's control groups, versions 1 and 2) sets to this process's main memory, in bytes,
    each with what is used of it; files that the system would drop from its cache are not counted."""
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
    """The limits of a group and of all groups above it, as far as they can be seen here."""
    found = []
    folder = top / group
    for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]:
        try:
            limits = [text for name in names if (text := (place / name).read_text().strip()).isdecimal()]
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            used = int((place / usage).read_text()) - int(statistics.get(cached, 0))
        except (OSError, ValueError):  # the topmost group has none
            continue
        found += [(int(text), used) for text in limits if int(text) < psutil.virtual_memory().total]  # else it is none
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
        except (RuntimeError, NotImplementedError):  # not every backend tells
            parts.append(f"{name} ({kind}:{i})")
        else:
            parts.append(f"{name} ({kind}:{i}), {_gib(free)} of {_gib(total)} GiB memory free")
    return "; ".join(parts)


def hardware() -> JsonObject:
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
