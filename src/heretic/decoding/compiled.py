"""The decode step compiled by `torch.compile`, in few shapes.

A step has as many rows and columns as the pool has, which changes all the time, and every shape is compiled anew. So rows are rounded up to
a power of two and columns to a multiple of 64: rows beyond the pool's compute numbers that nobody reads, and columns beyond those in use
are masked. The column that a step writes is a tensor, since a number would be compiled in.

Where it breaks: attention that takes no mask of our choice, sliding windows, a model on several devices (`can_compile`). A model that
cannot be compiled as a whole is decoded without, and a warning says why.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .blocks import BlockLayer, Blocks

LEAST_ROWS = 8
COLUMNS = 64
# Shapes that may be compiled, each for some number of trials: far more than a study has. PyTorch's limit is 8.
MOST_SHAPES = 128


def rounded_rows(n: int) -> int:
    """The number of rows of a step that has to compute `n`."""
    return max(LEAST_ROWS, 1 << (n - 1).bit_length())


def rounded_columns(n: int) -> int:
    """The number of columns of blocks that have to hold `n`."""
    return -(-n // COLUMNS) * COLUMNS


def is_supported() -> bool:
    """Whether this version of PyTorch can compile the same code separately for other hooks."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def can_compile(model: PreTrainedModel, allows_holes: bool) -> bool:
    """Whether a step of the model can be given fixed shapes: every layer sees all columns, under our mask, on one device."""
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return allows_holes and attention == "sdpa" and len({parameter.device for parameter in model.parameters()}) == 1


class StepLayer(BlockLayer):
    """A layer's blocks in one step: all columns of the first rows, of which `column (1,)` is written."""

    def __init__(self, block: BlockLayer, n_rows: int, column: Tensor) -> None:
        super().__init__(n_rows, block.n_columns)
        self.column = column
        self.is_initialized = block.is_initialized
        if block.is_initialized:
            self.keys, self.values = block.keys[:n_rows], block.values[:n_rows]

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.column[0]  # type: ignore[return-value]  # a tensor, as transformers' own static layers have it


class CompiledStep:
    """A model's decode step, compiled for every shape that it meets. Hooks that the model gets or loses later are not noticed.

    `warn` is told if that fails; the step is then computed in the same shapes without being compiled.
    """

    def __init__(self, model: PreTrainedModel, warn: Callable[[str], None], backend: str = "inductor") -> None:
        self.warn = warn

        def step(tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
            output = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits: Tensor = output.logits[:, -1]
            return logits

        self._plain = step
        compile_step: Any = torch.compile  # whose stubs do not know all arguments
        # Isolated: an earlier compilation of the same code, with other hooks, must not be found.
        self._step: Callable[..., Tensor] = compile_step(
            step, fullgraph=True, dynamic=False, backend=backend, recompile_limit=MOST_SHAPES, isolate_recompiles=True
        )

    def __call__(self, tokens: Tensor, mask: Tensor, positions: Tensor, blocks: Blocks, length: int) -> Tensor:
        """Logits `(row, vocabulary)` of a step that writes column `length`; `mask (row, column)` of all columns."""
        column = torch.full((1,), length, device=tokens.device)
        cache = Cache(layers=[StepLayer(block, len(tokens), column) for block in blocks.blocks])
        arguments = tokens, mask[:, None, None], positions, cache
        try:
            logits = self._step(*arguments)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            self.warn(f"The decode step of this model could not be compiled ({type(error).__name__}: {reason}). It is run as it is.")
            self._step = self._plain
            logits = self._step(*arguments)
        for layer in blocks.used:
            layer.length = length + 1
        return logits
