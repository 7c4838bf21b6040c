"""The prefix cache: activations of the original model below a trial's first edited layer, for all evaluation prompts.

Layers below the first edited one compute the same as in the original. Their keys, values and hidden states are recorded when the baseline
is measured, and a trial's prefill starts at its first edited layer with the recorded hidden states. Valid only for passes of exactly the
same rows (same tokens, same shared prefix, same padding); other passes are computed in full.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..device import free_memory
from .blocks import Blocks

# The share of the initially free memory that recordings may take.
BUDGET_SHARE = 0.2

# A pass: the length of the shared prefix, which it does not compute, and all tokens of its rows, in order.
Key = tuple[int, tuple[tuple[int, ...], ...]]


@dataclass
class _Recording:
    """One pass of the original: each layer's input `(row, token, d)` and its cache entries."""

    inputs: list[Tensor] = field(default_factory=list)
    keys_values: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)


class PrefixCache:
    """Recordings of the original's passes over `layers`, within a memory budget; recorded only while `recording` is set.

    `bytes_per_token` is the size of one hidden state.
    """

    def __init__(self, layers: Sequence[nn.Module], bytes_per_token: int, device: torch.device) -> None:
        self.layers = list(layers)
        self.bytes_per_token = bytes_per_token
        self.recording = False
        self.budget = int(free_memory(device) * BUDGET_SHARE)
        self._recordings: dict[Key, _Recording] = {}
        self._returns_tuple = False

    def has(self, key: Key, with_cache: bool) -> bool:
        """Whether a pass was recorded (with its keys and values)."""
        recording = self._recordings.get(key)
        return recording is not None and (bool(recording.keys_values) or not with_cache)

    def record(self, key: Key, cache: Blocks | None) -> AbstractContextManager[None]:
        """Context that records the pass in it, if `recording` is set and the budget allows."""
        n_skipped, rows = key
        n_tokens = len(rows) * (max(map(len, rows)) - n_skipped)
        fits = n_tokens * self.bytes_per_token * len(self.layers) <= self.budget
        return self._record(key, cache) if self.recording and fits else nullcontext()

    @contextmanager
    def _record(self, key: Key, cache: Blocks | None) -> Iterator[None]:
        recording = _Recording()

        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            recording.inputs.append(args[0] if args else kwargs["hidden_states"])
            self._returns_tuple = isinstance(output, tuple)

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.register_forward_hook(note, with_kwargs=True))
            yield
        if cache is not None:
            recording.keys_values = [(block.keys.clone(), block.values.clone()) if block.is_initialized else None for block in cache.blocks]
        tensors = [*recording.inputs, *(tensor for pair in recording.keys_values if pair for tensor in pair)]
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if n_bytes <= self.budget and len(recording.inputs) == len(self.layers):
            self.budget -= n_bytes
            self._recordings[key] = recording

    @contextmanager
    def begin_at(self, key: Key, first_layer: int, cache: Blocks | None) -> Iterator[None]:
        """Context in which a pass of the recorded rows starts at `first_layer`, using the recording of the layers below."""
        recording = self._recordings[key]
        first_layer = min(first_layer, len(self.layers) - 1)

        def skip(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            return (hidden_states,) if self._returns_tuple else hidden_states

        def substitute(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]]:
            hidden = recording.inputs[first_layer]
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        with ExitStack() as stack:
            for layer in self.layers[:first_layer]:
                stack.enter_context(_forward_replaced(layer, skip))
            if first_layer:
                stack.enter_context(self.layers[first_layer].register_forward_pre_hook(substitute, with_kwargs=True))
            yield
        # Not earlier: the mask is created for the length of the cache's first layer when the pass starts.
        if cache is not None:
            for block, pair in zip(cache.blocks[:first_layer], recording.keys_values[:first_layer], strict=True):
                if pair is not None:
                    block.adopt(*pair)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Context in which `forward` replaces the module's own."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
