"""An accelerator that is not there: tensors that say `cuda:0` and hold a CPU tensor, so that every path of a device runs without one.

Within `Emulation()` factories and copies go to the device asked for, and operations are computed by the CPU on what the tensors hold. An
operation that mixes devices raises what PyTorch raises. `torch.cuda` and `torch.accelerator` answer for as many devices as asked for, each
with so much memory, and raise `OutOfMemoryError` where it does not suffice. Synchronizations and launches are counted.

What it does not tell: how fast anything is, what other rounding does, and whether a kernel exists for a number format.
"""

from .counts import Counts
from .emulation import Emulation
from .memory import Memory
from .tensor import DeviceTensor

__all__ = ["Counts", "DeviceTensor", "Emulation", "Memory"]
