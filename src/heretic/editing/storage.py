"""The layout of a writer's weight in its module, found by a backward pass through that module.

A linear module's weight is known. In any other module (fused experts, transposed weights), the gradient shows which of its parameters is
the last one before its output, and along which axis.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import Storage, as_pairs, first_tensor
from .probe import probe_direction, run_probe, share_along

# The share is 1 for a parameter whose product is the module's output; operations after it reduce the share.
OWN_ALIGNMENT = 0.9


@dataclass
class Found:
    """What the probe recorded of a writer."""

    layer: int
    module: nn.Module
    gain: Tensor | None
    alignment: float
    keeps_rows: bool
    args: tuple[object, ...]
    kwargs: dict[str, object]


def find_storage(model: PreTrainedModel, found: Found, tokens: Tensor, hidden_size: int) -> Storage | None:
    """The parameters that produce the module's output; None if none was found."""
    if isinstance(found.module, nn.Linear):
        return Storage(bias=None if found.module.bias is None else "bias")
    with resident(found.module):
        return _find_stored(model, found, tokens, hidden_size)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Context in which a module has its parameters, and a call leaves them in place. Accelerate loads those that it offloads anew for each
    call, and so the ones that are there before it are not those that it uses."""
    hook: Any = getattr(module, "_hf_hook", None)
    if not getattr(hook, "offload", False):
        yield
        return
    own: Any = module
    loading, device = own.forward, hook.execution_device
    with align_module_device(module):
        own.forward = lambda *args, **kwargs: own._old_forward(*send_to_device(args, device), **send_to_device(kwargs, device))
        try:
            yield
        finally:
            own.forward = loading


def _find_stored(model: PreTrainedModel, found: Found, tokens: Tensor, hidden_size: int) -> Storage | None:
    module = found.module
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
    """Whether it is a bias per expert `(expert, d_out)` of a three-dimensional weight."""
    return own[name].dim() == 2 and any(p.dim() == 3 and len(p) == len(own[name]) and hidden_size in p.shape for p in own.values())


def _stacked_experts(module: nn.Module, weight: Tensor, axis: int) -> int | None:
    """How many experts are stacked in a two-dimensional weight, if the module says so."""
    counts = {getattr(module, name, None) for name in ("num_experts", "moe_num_experts", "n_experts")} - {None}
    count = next(iter(counts), None)
    return count if isinstance(count, int) and count > 1 and weight.shape[1 - axis] % count == 0 else None


def _parameter_shares(
    model: PreTrainedModel, found: Found, own: Mapping[str, Tensor], tokens: Tensor, hidden_size: int
) -> list[tuple[str, int]]:
    """Parameters, with the axis, whose gradient for `<r, output>` is along `r`, by a backward pass through the module alone.

    If the parent module passes the module's own weights to it, the complete model is run.
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
    """Whether a call with every pair of token and expert as a separate token returns the terms of the weighted sum."""
    given = [*found.args, *found.kwargs.values()]
    values = [value for value in given if isinstance(value, Tensor)]
    if len(given) != 3 or len(values) != 3 or values[1].is_floating_point() or values[1].dim() != 2:
        return False
    hidden, index, gates = values
    if gates.shape != index.shape or hidden.shape[:-1] != index.shape[:1]:
        return False
    try:
        with torch.no_grad(), resident(found.module):
            whole = found.module(hidden, index, gates)
            pairs = found.module(*as_pairs(hidden, index, gates))
    except (RuntimeError, ValueError, IndexError):  # some only work with their own number of experts per token
        return False
    summed = (pairs.view(*index.shape, -1) * gates[..., None]).sum(dim=1)
    return bool(torch.allclose(summed.float(), whole.float(), rtol=0.05, atol=0.02 * float(whole.float().abs().max())))


def is_sum(found: Found, storage: Storage) -> bool:
    """Whether the module's output is zero if its last weight and bias are zero."""
    with resident(found.module):
        return _is_zero_without(found, storage)


def _is_zero_without(found: Found, storage: Storage) -> bool:
    parameters = [getattr(found.module, name) for name in (storage.weight, storage.bias) if name]
    kept = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = torch.zeros_like(p.data)
        with torch.no_grad():
            output = first_tensor(found.module(*found.args, **found.kwargs))
        # A module that is passed its own weights got the old ones here; its output depends on nothing else.
        return not bool(output.any()) or any(_shares_memory(value, kept) for value in found.args)
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def _shares_memory(value: object, tensors: list[Tensor]) -> bool:
    return isinstance(value, Tensor) and any(value.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in tensors)
