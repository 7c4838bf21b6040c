"""How a writer's weight lies in its module, found by a backward pass through that module alone.

A linear module's weight is known. In any other module (fused experts, transposed weights) the gradient tells which of its parameters lies
last before its output, and along which axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import Storage, as_pairs, first_tensor
from .probe import probe_direction, run_probe, share_along

# A parameter whose module's output is its own product with something has 1; what follows it inside the module makes it less.
OWN_ALIGNMENT = 0.9


@dataclass
class Found:
    """What the probe saw of a writer."""

    layer: int
    module: nn.Module
    gain: Tensor | None
    alignment: float
    keeps_rows: bool
    args: tuple[object, ...]
    kwargs: dict[str, object]


def find_storage(model: PreTrainedModel, found: Found, tokens: Tensor, hidden_size: int) -> Storage | None:
    """Which parameters of the module make its output; None where none was found to."""
    module = found.module
    if isinstance(module, nn.Linear):
        return Storage(bias=None if module.bias is None else "bias")
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.is_floating_point() and p.dim() <= 3}
    shares = _parameter_shares(model, found, own, tokens, hidden_size)
    weights = [(name, axis) for (name, axis) in shares if own[name].dim() >= 2 and not _is_bias(own, name, hidden_size)]
    if len(weights) != 1:
        return None
    ((weight, axis),) = weights
    if own[weight].dim() == 3 and axis == 0:
        return None
    biases = [name for name, _ in shares if name != weight]
    n_experts = own[weight].shape[0] if own[weight].dim() == 3 else None
    if n_experts is None and (count := _stacked_experts(module, own[weight], axis)):
        n_experts = count
    return Storage(weight, axis, biases[0] if biases else None, n_experts)


def _is_bias(own: Mapping[str, Tensor], name: str, hidden_size: int) -> bool:
    """A bias per expert `(expert, d_out)` beside a weight of three axes."""
    return own[name].dim() == 2 and any(p.dim() == 3 and len(p) == len(own[name]) and hidden_size in p.shape for p in own.values())


def _stacked_experts(module: nn.Module, weight: Tensor, axis: int) -> int | None:
    """How many experts lie one below the other in a weight of two axes, where the module says so."""
    counts = {getattr(module, name, None) for name in ("num_experts", "moe_num_experts", "n_experts")} - {None}
    count = next(iter(counts), None)
    return count if isinstance(count, int) and count > 1 and weight.shape[1 - axis] % count == 0 else None


def _parameter_shares(
    model: PreTrainedModel, found: Found, own: Mapping[str, Tensor], tokens: Tensor, hidden_size: int
) -> list[tuple[str, int]]:
    """Parameters, with the axis, whose gradient for `<r, output>` lies along `r`: a backward pass through the module alone.

    Where the module is handed its own weights by the one around it, the whole model is run.
    """
    direction = probe_direction(hidden_size)
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        outputs.append(first_tensor(output))

    required = {name: p.requires_grad for name, p in own.items()}
    try:
        for p in own.values():
            p.requires_grad_(True)
        with torch.enable_grad(), found.module.register_forward_hook(note):
            found.module(*_detached(found.args), **_detached(found.kwargs))
            if not outputs[0].requires_grad:
                outputs.clear()
                run_probe(model, tokens)
        loss = torch.stack([(output.float().cpu() @ direction).sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    finally:
        for name, p in own.items():
            p.requires_grad_(required[name])
    found_at = []
    for name, gradient in zip(own, gradients, strict=True):
        for axis in range(0 if gradient is None else gradient.dim()):
            if gradient.shape[axis] == hidden_size and share_along(gradient.float().cpu(), direction, axis) > OWN_ALIGNMENT:
                found_at.append((name, axis))
    return found_at


def _detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_detached(value) for value in values)
    return values.detach() if isinstance(values, Tensor) else values


def takes_gates(found: Found) -> bool:
    """Whether a call with every pair of token and expert as a token of its own gives what the weighted sum is made of."""
    given = [*found.args, *found.kwargs.values()]
    values = [value for value in given if isinstance(value, Tensor)]
    if len(given) != 3 or len(values) != 3 or values[1].is_floating_point() or values[1].dim() != 2:
        return False
    hidden, index, gates = values
    if gates.shape != index.shape or hidden.shape[:-1] != index.shape[:1]:
        return False
    try:
        with torch.no_grad():
            whole = found.module(hidden, index, gates)
            pairs = found.module(*as_pairs(hidden, index, gates))
    except (RuntimeError, ValueError, IndexError):  # some are written for the number of experts per token that they have
        return False
    summed = (pairs.view(*index.shape, -1) * gates[..., None]).sum(dim=1)
    return bool(torch.allclose(summed.float(), whole.float(), rtol=0.05, atol=0.02 * float(whole.float().abs().max())))


def is_sum(found: Found, storage: Storage) -> bool:
    """Whether nothing comes out of the module once its last weight and bias are zero."""
    parameters = [getattr(found.module, name) for name in (storage.weight, storage.bias) if name]
    kept = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = torch.zeros_like(p.data)
        with torch.no_grad():
            output = first_tensor(found.module(*found.args, **found.kwargs))
        # A module that is handed its own weights got the old ones here; it is made of nothing else.
        return not bool(output.any()) or any(_shares_memory(value, kept) for value in found.args)
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def _shares_memory(value: object, tensors: list[Tensor]) -> bool:
    return isinstance(value, Tensor) and any(value.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in tensors)
