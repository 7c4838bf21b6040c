"""Whether an ablation reaches everything that writes to the residual stream, measured on the model itself.

A direction that is taken out of all writers at full strength, and out of what goes into the first layer, cannot be in the stream of any
layer, unless a writer or bias was missed or the model does something to its stream that no edit of weights can follow:
normalizes it, weighs its channels, or puts a gate or convolution behind a writer.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ablation import Ablation, ComponentParameters, RowNormalization
from .architecture import Architecture, first_tensor
from .hooks import AblationHooks
from .probe import probe_direction, probe_tokens

# What rounding leaves, by the bytes of the model's numbers: float32 measured 1e-7, bfloat16 3e-3.
ROUNDING = {4: 1e-5, 2: 2e-2}


def everything(architecture: Architecture) -> Ablation:
    """An ablation of strength 1 of all writers in all layers."""
    return Ablation(None, {component: ComponentParameters(1.0, 0.0, 1.0, 2.0) for component in architecture.components})


def remaining_share(model: Any, architecture: Architecture, mode: RowNormalization = "none") -> float:
    """What is left of a random direction in the stream after an ablation of strength 1 of all writers: the largest share of a layer's
    hidden states that lies along it, relative to the same share in the original. 0 to rounding where nothing was missed.
    """
    direction = probe_direction(architecture.hidden_size)
    hooks = AblationHooks(architecture, direction.expand(len(architecture.layers) + 1, -1).clone(), mode)
    try:
        before = _share_of_stream(model, architecture, direction)
        with hooks.active([everything(architecture)]):
            after = _share_of_stream(model, architecture, direction)
    finally:
        hooks.remove()
    return max(a / max(b, 1e-9) for a, b in zip(after, before, strict=True))


def _share_of_stream(model: Any, architecture: Architecture, direction: Tensor) -> list[float]:
    shares: list[float] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        hidden = first_tensor(output).float().unflatten(-1, (-1, len(direction)))
        shares.append(float(torch.linalg.vector_norm(hidden @ direction.to(hidden.device)) / torch.linalg.vector_norm(hidden)))

    with torch.no_grad(), _without(direction, architecture.layers[0]), ExitStack() as stack:
        for layer in architecture.layers:
            stack.callback(layer.register_forward_hook(note).remove)
        tokens = probe_tokens(model)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return shares


@contextmanager
def _without(direction: Tensor, first_layer: nn.Module) -> Iterator[None]:
    """Within, what goes into the first layer has no component along the direction."""

    def project(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        streams = hidden.float().unflatten(-1, (-1, len(direction)))
        r = direction.to(streams)
        streams = streams - (streams @ r)[..., None] * r
        hidden = streams.flatten(-2).to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = first_layer.register_forward_pre_hook(project, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
