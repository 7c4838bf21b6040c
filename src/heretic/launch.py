"""Whether this process is one of several that `torchrun` started. Imports nothing."""

import os


def world_size() -> int:
    """How many processes share one copy of the model."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this one is; 0 leads."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0
