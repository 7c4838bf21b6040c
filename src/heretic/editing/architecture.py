"""The architecture of a model as ablation needs it: layers, modules that write to the residual stream, and weight layouts."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

COMPONENTS = ("attn.o_proj", "mixer.out_proj", "mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_experts.down_proj")


@dataclass(frozen=True)
class Storage:
    """The layout of a writer's weight: the parameter's name, the axis of its outputs, and its bias, if any.

    Without a `weight`, the writer is a bias that the layer adds directly. With `n_experts`, the weight contains a matrix for each expert,
    along its first axis or (two-dimensional) stacked.
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
    """A module that writes to the residual stream, with the layout of its weight (`storage`).

    `gain (d_out,)` is that of a norm between the module and the stream. `alignment`: how much of a direction removed from its output is
    removed from the stream; 1 if only a norm follows. `keeps_rows`: its output has the tokens of the batch in their order.
    `takes_gates`: called with `(hidden_states, expert indices, expert weights)`, it returns the weighted sum of its experts' outputs.
    `is_sum`: its output depends only on its weight and bias, without a bypass of its input.
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
    """The architecture of a model. `layers_name` is the path of the list of layers.

    `stream_axis` is the axis of several residual streams in a layer's output: 0 before the rows, 2 after the tokens; None: one stream, or
    all concatenated in the last axis.
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
        """The number of weights of each component, in a fixed order; each expert counts as one."""
        counts = dict.fromkeys((c for c in COMPONENTS if any(w.component == c for w in self.writers)), 0)
        for writer in self.writers:
            counts[writer.component] += writer.storage.n_experts or 1
        return counts


def split_experts(architecture: Architecture) -> Architecture:
    """The same with separate components for routed and shared experts: `mlp.experts.down_proj`, `mlp.shared_experts.down_proj`."""

    def component(writer: Writer) -> str:
        if writer.component != "mlp.down_proj" or "expert" not in writer.name:
            return writer.component
        return "mlp.shared_experts.down_proj" if "shared" in writer.name else "mlp.experts.down_proj"

    writers = tuple(replace(writer, component=component(writer)) for writer in architecture.writers)
    return replace(architecture, writers=writers)


def as_pairs(hidden: Tensor, index: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of an experts module with every pair of token and expert as a separate token with weight 1."""
    return hidden.repeat_interleave(index.shape[1], dim=0), index.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1)


def first_tensor(output: object) -> Any:
    """A module's main output: the tensor itself, or the first element of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_first_tensor(output: object, tensor: Tensor) -> object:
    """A module's output with another main result."""
    return type(output)((tensor, *output[1:])) if isinstance(output, (tuple, list)) else tensor
