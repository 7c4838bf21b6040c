"""What bench scripts need of the machine: a clock that waits for the device, its ceilings, and the heading of an entry in LOG.md."""

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from heretic.device import hardware
from heretic.utils import versions


def now(device: torch.device | None = None) -> float:
    """Seconds on a clock, once an accelerator has done all that it was asked to."""
    if torch.accelerator.is_available() if device is None else device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a product of large matrices, and bytes a second of a copy, both measured here and now."""
    n = 8192 if device.type != "cpu" else 1024

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            start = now(device)
            function()
            times.append(now(device) - start)
        return min(times[1:])

    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)
    flops = 2 * n**3 / best(lambda: a @ b)
    block = torch.empty(2**30 if device.type != "cpu" else 2**26, dtype=torch.uint8, device=device)
    return flops, 2 * block.numel() / best(block.clone)


def heading(what: str) -> str:
    """The first lines of an entry: date, machine, versions, commit and command."""
    found = hardware()
    devices = " and ".join(found["devices"]) or f"CPU ({found['machine']}, {found['cpu_capability']}, {found['cpu_threads']} threads)"
    libraries = ", ".join(f"{name} {version}" for name, version in versions(["torch", "transformers"]).items())
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    command = " ".join(["bench/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"## {date.today()}: {what}\n\n{devices}; {libraries}; commit {described.stdout.strip() or 'unknown'}; `{command}`.\n"
