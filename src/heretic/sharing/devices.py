"""Assignment of accelerators to workers: as few per worker as a copy of the model needs, and as many workers as fit."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedConfig

from ..config import Settings
from ..device import free_memory
from ..errors import UsageError
from ..loading.load import stored_dtype
from ..loading.source import ModelSource
from ..utils import JsonObject
from .preparation import snapshot_folder

# Memory of a copy besides its weights: keys and values, activations, the logits of a batch, the libraries themselves.
BESIDES_WEIGHTS = 1.2
LIBRARY_BYTES = 2 * 2**30
# nf4 with double quantization takes 0.516 bytes per parameter; embeddings and norms are not quantized.
BYTES_IN_4_BIT = 0.6


@dataclass(frozen=True)
class WorkerPlace:
    """The devices of a worker: indices of accelerators (none: the CPU), and number of threads."""

    devices: tuple[int, ...]
    threads: int

    @property
    def settings(self) -> JsonObject:
        """The settings that place a model there: a single device by its index, several by a memory limit for each."""
        if not self.devices:
            return {}
        if len(self.devices) == 1:
            return {"device_map": {"": self.devices[0]}}
        return {"device_map": "auto", "max_memory": {str(i): str(free_memory(torch.device(_kind(), i))) for i in self.devices}}


def _kind() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def stored_bytes(source: ModelSource) -> int:
    """Size of the model's weight files in bytes, without downloading them; 0 if unknown."""
    folder = snapshot_folder(source)
    files = [] if folder is None else [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin")]
    if source.is_local or files:
        return sum(path.stat().st_size for path in files)
    try:
        info = HfApi().model_info(source.path, revision=source.revision, files_metadata=True)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return 0
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    of_kind = [[size for name, size in sizes.items() if "/" not in name and name.endswith(kind)] for kind in (".safetensors", ".bin")]
    return sum(of_kind[0] or of_kind[1])


def copy_bytes(n_stored: int, config: PreTrainedConfig, settings: Settings) -> int:
    """Memory in bytes that a running copy of a model with `n_stored` bytes of weight files needs."""
    stored = stored_dtype(config)
    n_parameters = n_stored / stored.itemsize
    if settings.quantization == "bnb_4bit":
        weights = n_parameters * BYTES_IN_4_BIT
    elif settings.dtypes[0] == "auto" or getattr(config, "quantization_config", None) is not None:
        weights = float(n_stored)
    else:
        weights = n_parameters * getattr(torch, settings.dtypes[0]).itemsize
    return int(weights * BESIDES_WEIGHTS) + LIBRARY_BYTES


def group_accelerators(need: int, free: list[int], workers: int | str) -> list[tuple[int, ...]]:
    """The accelerators of each worker, by index. `need`: bytes of a copy; `free`: free bytes on each accelerator.

    A copy gets as few accelerators as it fits on, or all of them if it fits on none (parts are then offloaded to the CPU). If more workers
    are requested than there are such groups, they share groups. Raises `UsageError` if there is not enough memory for that.
    """
    n_devices = next((k for k in range(1, len(free)) if k * min(free) >= need), len(free))
    groups = [tuple(range(i, i + n_devices)) for i in range(0, len(free) - n_devices + 1, n_devices)]
    if workers == "auto":
        return groups
    n_sharing = math.ceil(int(workers) / len(groups))
    if n_sharing > 1 and n_sharing * need > n_devices * min(free):
        possible = max(1, n_devices * min(free) // max(need, 1)) * len(groups)
        raise UsageError(
            f"--workers {workers}: a copy of the model needs about {need / 2**30:.1f} GiB, and the accelerators have "
            f"{', '.join(f'{n / 2**30:.1f}' for n in free)} GiB free, which is room for {possible}. Use --workers {possible} or auto."
        )
    return [groups[i % len(groups)] for i in range(int(workers))]


def place_workers(settings: Settings, source: ModelSource, config: PreTrainedConfig) -> list[WorkerPlace]:
    """The devices of the workers of `settings.workers`. On a CPU, they divide its threads, and `auto` is one worker."""
    workers = settings.workers or 1
    if not torch.accelerator.is_available() or settings.device_map == "cpu":
        n = 1 if workers == "auto" else workers
        return [WorkerPlace((), max(1, torch.get_num_threads() // n))] * n
    free = [free_memory(torch.device(_kind(), i)) for i in range(torch.accelerator.device_count())]
    groups = group_accelerators(copy_bytes(stored_bytes(source), config, settings), free, workers)
    return [WorkerPlace(devices, max(1, torch.get_num_threads() // len(groups))) for devices in groups]
