"""Measures on the model, layer by layer, whether an ablation reaches everything that writes to the residual stream.

If a direction is removed from all writers at full strength, and is not in a layer's input, it cannot be in the layer's output, unless a
writer or bias was missed, or the layer changes its residual stream in a way that edits of weights cannot reproduce: it normalizes it,
scales its channels, or applies a gate or convolution after a writer.

Rounding must not look like either. In most trained models, a few channels of the stream are enormous, and in bfloat16 its sums are rounded
to steps that are larger than the outputs of some writers. So the direction is limited to a few other channels, in which each layer's input
is replaced.

- Missed writers are detected along a single channel, with zero input. Removing a channel from an output sets it to zero, which is exact in
  every dtype: any remainder shows a missed writer.
- Operations that edits cannot reproduce are detected along a direction of many channels, since a scaled zero is still zero. The input is as
  large as the layer's outputs, equal in these channels except for the sign, and orthogonal to the direction: rounding is relative to it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .ablation import Ablation, ComponentParameters
from .architecture import Architecture, first_tensor
from .hooks import AblationHooks
from .probe import probe_tokens, run_probe

# Channels of the direction: few, so that the layers' inputs are nearly the usual ones.
CHANNELS_SHARE = 0.125
# Limits of rounding, along a direction and along a channel. Measured on 200 decoder types: at most 7e-7, 0.015 and 0.002 along a direction,
# while operations that edits cannot reproduce leave at least 0.029; along a channel 0, while a missed writer leaves at least 0.004.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CHANNEL_ROUNDING = 1e-6


@dataclass(frozen=True)
class Remainder:
    """What an ablation of strength 1 of all writers leaves, relative to what a layer writes along a direction on average; the maximum over
    layers. Along a channel it is 0 if no writer was missed; along a random direction it is 0, up to rounding, if edits are also exact.
    """

    channel: float
    direction: float

    def is_missed(self) -> bool:
        """Whether a writer was missed."""
        return self.channel > CHANNEL_ROUNDING

    def is_inexact(self, dtype: torch.dtype) -> bool:
        """Whether a model that computes in `dtype` has operations that edits cannot reproduce, or a writer was missed."""
        return self.direction > ROUNDING.get(dtype, ROUNDING[torch.float32])


def full_ablation(architecture: Architecture) -> Ablation:
    """An ablation of strength 1 of all writers in all layers."""
    return Ablation(None, {component: ComponentParameters(1.0, 0.0, 1.0, 2.0) for component in architecture.components})


def remainder(model: PreTrainedModel, architecture: Architecture) -> Remainder:
    """Measure the remainder in four passes of a few tokens."""
    channels = _usual_channels(model, architecture)
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(channels),), generator=draw) * 2.0 - 1
    sizes = torch.randn(len(channels), generator=draw)
    direction = nn.functional.normalize(signs * (sizes - sizes.mean()), dim=0)
    channel = torch.zeros(len(channels))
    channel[0] = 1

    zeros = [torch.zeros(len(channels))] * len(architecture.layers)
    usual = [float(h.square().mean().sqrt()) for h in _written(model, architecture, channels, zeros)]
    shares = []
    for r, inputs in ((channel, zeros), (direction, [size * signs for size in usual])):
        whole = torch.zeros(len(architecture.layers) + 1, architecture.hidden_size)
        whole[:, channels] = r
        hooks = AblationHooks(architecture, whole, "none")
        try:
            with hooks.active([full_ablation(architecture)]):
                after = _written(model, architecture, channels, inputs)
        finally:
            hooks.remove()
        left = [float(torch.linalg.vector_norm(h @ r)) / (h.numel() / len(r)) ** 0.5 for h in after]
        shares.append(max(a / max(b, 1e-9) for a, b in zip(left, usual, strict=True)))
    return Remainder(*shares)


def _usual_channels(model: PreTrainedModel, architecture: Architecture) -> Tensor:
    """Some channels `(channel,)` in which the stream is not unusually large anywhere."""
    largest = torch.zeros(architecture.hidden_size)

    def note(module: nn.Module, args: object, output: object) -> None:
        hidden = first_tensor(output).float().unflatten(-1, (-1, architecture.hidden_size))
        rms = hidden.square().flatten(end_dim=-2).mean(dim=0).sqrt().cpu()
        torch.maximum(largest, rms / rms.median().clamp(min=1e-12), out=largest)

    with ExitStack() as stack, torch.no_grad():
        for layer in architecture.layers:
            stack.enter_context(layer.register_forward_hook(note))
        run_probe(model, probe_tokens(model))
    n_channels = max(4, int(CHANNELS_SHARE * architecture.hidden_size))
    usual = torch.nonzero(largest <= largest.median()).flatten()
    chosen = torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))[:n_channels]
    return usual[chosen]


def _written(model: PreTrainedModel, architecture: Architecture, channels: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's output in the channels `(..., channel)` for the input `inputs (channel,)`; zeros for a layer that does not run."""
    written = [torch.zeros(1, len(channels))] * len(inputs)

    def note(i: int, output: object) -> None:
        hidden = first_tensor(output).unflatten(-1, (-1, architecture.hidden_size))
        written[i] = hidden[..., channels.to(hidden.device)].float().cpu()

    with ExitStack() as stack, torch.no_grad():
        for i, (layer, values) in enumerate(zip(architecture.layers, inputs, strict=True)):
            stack.enter_context(layer.register_forward_hook(lambda m, args, output, i=i: note(i, output)))
            stack.enter_context(_replaced(channels, architecture.hidden_size, values, layer))
        run_probe(model, probe_tokens(model))
    return written


def _replaced(channels: Tensor, hidden_size: int, values: Tensor, layer: nn.Module) -> RemovableHandle:
    """A hook by which the layer's input is `values (channel,)` in these channels, until it is removed."""

    def replace(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        streams = hidden.unflatten(-1, (-1, hidden_size)).clone()
        streams[..., channels.to(hidden.device)] = values.to(streams)
        hidden = streams.flatten(-2)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return layer.register_forward_pre_hook(replace, with_kwargs=True)
