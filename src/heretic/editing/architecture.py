"""What an ablation needs to know of a model: its layers, the modules that write to the residual stream, how their weights lie."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

COMPONENTS = ("attn.o_proj", "mixer.out_proj", "mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_experts.down_proj")


@dataclass(frozen=True)
class Storage:
    """How a writer's weight lies in its module: the parameter's name, the axis of its outputs, and its bias, if any.

    Without a `weight` the writer is a bias that the layer adds by itself. With `n_experts` the weight holds a matrix for each expert,
    along its first axis or (two axes) one below the other.
    """

    weight: str | None = "weight"
    axis: int = 0
    bias: str | None = None
    n_experts: int | None = None

    def matrices(self, weight: Tensor) -> Tensor:
        """A view of the stored tensor as `(d_out, d_in)`, or `(expert, d_out, d_in)`."""
        if self.n_experts is not None and weight.dim() == 2:
            weight = weight.unflatten(1 - self.axis, (self.n_experts, -1)).movedim(1 - self.axis, 0)
            return weight if self.axis == 0 else weight.transpose(-2, -1)
        axis = self.axis - (0 if self.n_experts is None else 1)
        return weight if axis == 0 else weight.transpose(-2, -1)


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream by the weight that `storage` tells of.

    `gain (d_out,)` is that of a norm between it and the stream. `alignment` is how much of a direction taken from its output is taken
    from the stream: 1 if nothing but a norm follows. `keeps_rows`: its output's tokens are those of the batch, in their order.
    `takes_gates`: called with `(hidden_states, expert indices, expert weights)`, its output is the weighted sum of its experts'.
    `is_sum`: its output is made by its weight and bias alone, not also of what it passes on unchanged.
    """

    name: str
    layer: int
    component: str
    module: nn.Module
    gain: Tensor | None
    storage: Storage
    alignment: float = 1.0
    keeps_rows: bool = True
    takes_gates: bool = False
    is_sum: bool = True


@dataclass(frozen=True)
class Architecture:
    """What an ablation needs to know of a model. `layers_name` is the path of the list of layers.

    `stream_axis` is that of several residual streams in a layer's output: 0 before the rows, 2 after the tokens; None: one stream, or all
    side by side in the last axis.
    """

    hidden_size: int
    layers_name: str
    layers: tuple[nn.Module, ...]
    writers: tuple[Writer, ...]
    stream_axis: int | None = None

    @property
    def last_layer(self) -> int:
        """The number of the last layer; the first is 0."""
        return len(self.layers) - 1

    @property
    def components(self) -> dict[str, int]:
        """How many weights each component has, in a fixed order; an expert's counts as one."""
        counts = dict.fromkeys((c for c in COMPONENTS if any(w.component == c for w in self.writers)), 0)
        for writer in self.writers:
            counts[writer.component] += writer.storage.n_experts or 1
        return counts


def split_experts(architecture: Architecture) -> Architecture:
    """The same with routed and shared experts as components of their own: `mlp.experts.down_proj`, `mlp.shared_experts.down_proj`."""

    def component(writer: Writer) -> str:
        if writer.component != "mlp.down_proj" or "expert" not in writer.name:
            return writer.component
        return "mlp.shared_experts.down_proj" if "shared" in writer.name else "mlp.experts.down_proj"

    writers = tuple(replace(writer, component=component(writer)) for writer in architecture.writers)
    return replace(architecture, writers=writers)


def as_pairs(hidden: Tensor, index: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of an experts module with every pair of token and expert as a token of its own, whose weight is 1."""
    return hidden.repeat_interleave(index.shape[1], dim=0), index.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1)


def first_tensor(output: object) -> Any:
    """A module's main result: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_first_tensor(output: object, tensor: Tensor) -> object:
    """A module's output with another main result."""
    return type(output)((tensor, *output[1:])) if isinstance(output, (tuple, list)) else tensor
