"""The residual stream between the layers, recorded while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .architecture import Architecture, first_tensor


@contextmanager
def recorded_residuals(architecture: Architecture) -> Iterator[Callable[[], Tensor]]:
    """Context that yields a function: the residual stream at the last position of the latest pass, `(row, layer + 1, d)` in float32.

    Index 0 is the embedding output, the input of the first layer; index `i + 1` is the output of layer `i`, before any final norm.
    If the model has several residual streams, this is their mean. A layer that text skips repeats its input.
    """
    layers = architecture.layers
    kept: dict[int, Tensor] = {}

    def keep(index: int, hidden: Tensor) -> None:
        streams = hidden if architecture.stream_axis is None else hidden.mean(dim=architecture.stream_axis)
        kept[index] = streams[:, -1].float().unflatten(-1, (-1, architecture.hidden_size)).mean(dim=-2)

    def before_first(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        kept.clear()
        keep(0, args[0] if args else kwargs["hidden_states"])

    def stacked() -> Tensor:
        for index in range(1, len(layers) + 1):
            kept.setdefault(index, kept[index - 1])
        return torch.stack([kept[index].to(kept[0].device) for index in range(len(layers) + 1)], dim=1)

    with ExitStack() as stack:
        stack.enter_context(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
        for i, layer in enumerate(layers, 1):
            stack.enter_context(layer.register_forward_hook(lambda m, a, output, i=i: keep(i, first_tensor(output))))
        yield stacked
