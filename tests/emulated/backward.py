"""Gradients on an emulated device.

PyTorch's engine asks the driver about the device of every gradient, and finds none. So the graph that PyTorch has made is walked here.
Tensors' own hooks and double backward are not supported; nothing in the program has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge


def gradients(outputs: Sequence[Tensor], given: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `outputs`, weighted by `given` (None: a loss), with respect to `inputs`; those of leaves are added to `.grad` if
    there are no `inputs`."""
    wanted = [get_gradient_edge(tensor) for tensor in inputs]
    found: dict[tuple[Any, int], Tensor | None] = {(edge.node, edge.output_nr): None for edge in wanted}
    roots = [get_gradient_edge(output) for output in outputs]
    n_waiting = _uses([edge.node for edge in roots])
    received: dict[Any, dict[int, Tensor]] = {edge.node: {} for edge in roots}
    for edge, output, gradient in zip(roots, outputs, given, strict=True):
        _add(received[edge.node], edge.output_nr, torch.ones_like(output) if gradient is None else gradient)
    ready = [node for node in received if not n_waiting[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            own = received.pop(node)
            for number, gradient in own.items():
                if (node, number) in found:
                    found[node, number] = gradient
            results = _apply(node, own, accumulates=not inputs) if own else ()
            for i, (following, number) in enumerate(node.next_functions):
                if following is None:
                    continue
                gradient = results[i] if i < len(results) else None
                into = received.setdefault(following, {})
                if gradient is not None:
                    _add(into, number, _fitting(gradient, following._input_metadata[number]))
                n_waiting[following] -= 1
                if not n_waiting[following]:
                    ready.append(following)
    return [found[edge.node, edge.output_nr] for edge in wanted]


def _uses(nodes: list[Any]) -> dict[Any, int]:
    """How many nodes give a gradient to each node that is reached from some."""
    counts = dict.fromkeys(nodes, 0)
    waiting = list(counts)
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is None:
                continue
            if following not in counts:
                counts[following] = 0
                waiting.append(following)
            counts[following] += 1
    return counts


def _apply(node: Any, own: dict[int, Tensor], accumulates: bool) -> tuple[Any, ...]:
    """What a node makes of the gradients that it was given."""
    if hasattr(node, "variable") and not node.next_functions and not accumulates:
        return ()
    function = node.apply if isinstance(node, BackwardCFunction) else node
    results = function(*(own.get(i) for i in range(len(node._input_metadata))))
    return results if isinstance(results, tuple) else (results,)


def _fitting(gradient: Tensor, metadata: Any) -> Tensor:
    """A gradient as the node takes it: summed over what was broadcast, in its number format, and never from another device."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    if gradient.device != metadata.device:
        raise RuntimeError(f"Function returned an invalid gradient: expected device {metadata.device} but got {gradient.device}")
    return gradient.to(metadata.dtype)


def _add(received: dict[int, Tensor], number: int, gradient: Tensor) -> None:
    received[number] = received[number] + gradient if number in received else gradient


def backward(tensors: Any, grad_tensors: Any = None, *_: Any, inputs: Any = None, **__: Any) -> None:
    """In place of `torch.autograd.backward`."""
    if inputs is not None:
        raise NotImplementedError("backward with inputs")
    outputs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = [None] * len(outputs) if grad_tensors is None else [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors)
    gradients(outputs, given, [])


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, allow_unused: bool = False, **__: Any) -> tuple[Tensor | None, ...]:
    """In place of `torch.autograd.grad`."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = [None] * len(outputs) if grad_outputs is None else [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
    found = gradients(outputs, given, inputs)
    if not allow_unused and any(gradient is None for gradient in found):
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph.")
    return tuple(found)
