"""Finds the decoder's layers and every module in them that writes to the residual stream.

By structure and measurement, not by a list of model types:

*Layers* are the children of the `ModuleList` with the most parameters, at least half of which take and give
`(batch, token, hidden_size)` in a forward pass.

*Writers* are found with one forward and one backward pass of a dozen tokens. Each candidate's output and each layer's output is
replaced by a detached leaf, and the gradient of `sum_l <r, h_l>` is taken for a random direction `r`. Only additions, norms and
elementwise scalings then stand between a leaf and the stream: a writer's leaf receives a gradient along `r` (along `g * r` where
a norm with gain `g` follows), every other leaf exactly zero. No gradient of a weight is needed, so 4-bit weights do no harm.

Where it breaks: a writer that the probe's tokens do not reach (an expert that is not routed to), and a layer
that mixes its writers' outputs by something other than additions, norms and scalings. What is found but cannot be edited is an error.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError

PROBE_TOKENS = 12
# Writers measured 0.68 and more, mostly 1; everything else 0, with one exception at 0.31 (219 decoder types).
ALIGNMENT = 0.5

# The first part of a writer's path inside its layer says which component it belongs to.
COMPONENT_BY_PATH = {
    "attn.o_proj": ("att",),
    "mlp.down_proj": ("mlp", "ffn", "feed_forward", "ff", "fc2", "fc_out"),
}


@dataclass(frozen=True)
class Writer:
    """A linear module that writes to the residual stream. `gain (d_out,)` is that of a norm between it and the stream."""

    name: str
    layer: int
    component: str
    module: nn.Linear
    gain: Tensor | None


@dataclass(frozen=True)
class Architecture:
    """What an ablation needs to know of a model."""

    hidden_size: int
    layers: tuple[nn.Module, ...]
    writers: tuple[Writer, ...]

    @property
    def components(self) -> dict[str, int]:
        """How many writers each component has, in the order of the layers."""
        counts: dict[str, int] = {}
        for writer in self.writers:
            counts[writer.component] = counts.get(writer.component, 0) + 1
        return counts


def discover(model: Any) -> Architecture:
    """The architecture of a loaded transformers model.

    Raises `UnsupportedModelError`, which names the model's type and the module, where something that writes to the residual
    stream cannot be edited, and where no layers or writers are found at all.
    """
    model_type = model.config.model_type
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=device if device.type != "meta" else None)[None] % vocabulary

    layers_name, layers = _find_layers(model, tokens, hidden_size)
    prefix = f"{layers_name}."
    names = {module: name for name, module in model.named_modules()}
    writers = []
    for layer_index, module, gain, flat in _find_writers(model, layers, tokens, hidden_size):
        name = names[module]
        path = name.removeprefix(prefix).partition(".")[2]
        component = next((c for c, starts in COMPONENT_BY_PATH.items() if _belongs(path, starts)), None)
        if not isinstance(module, nn.Linear) or component is None or flat:
            raise UnsupportedModelError(
                f"Models of type {model_type} are not supported: {name} ({type(module).__name__}) writes to the residual stream "
                "and cannot be edited. Dense decoders with linear attention and MLP projections are."
            )
        writers.append(Writer(name, layer_index, component, module, gain))
    bare = sorted(set(range(len(layers))) - {writer.layer for writer in writers})
    if bare:
        raise UnsupportedModelError(
            f"Models of type {model_type} are not supported: in layer {bare[0]} of {layers_name} nothing was found that writes to the "
            "residual stream."
        )
    return Architecture(hidden_size, tuple(layers), tuple(writers))


def _belongs(path: str, starts: tuple[str, ...]) -> bool:
    head = path.partition(".")[0]
    return any(head == start or (len(start) > 2 and start in head) for start in starts)


def first_tensor(output: Any) -> Any:
    """A module's main result: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _run(model: Any, tokens: Tensor) -> None:
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


def _find_layers(model: Any, tokens: Tensor, hidden_size: int) -> tuple[str, list[nn.Module]]:
    expected = (1, PROBE_TOKENS, hidden_size)
    passes: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        result = first_tensor(output)
        if isinstance(result, Tensor) and result.shape == expected and any(t.shape == expected for t in tensors):
            passes.add(module)

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    with ExitStack() as stack, torch.no_grad():
        for child in {child for children in lists.values() for child in children}:
            stack.enter_context(_removed(child.register_forward_hook(note, with_kwargs=True)))
        _run(model, tokens)
    found = {name: m for name, m in lists.items() if sum(child in passes for child in m) * 2 >= len(m)}
    outer = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    if not outer:
        raise UnsupportedModelError(
            f"Models of type {model.config.model_type} are not supported: no list of decoder layers was found that take and give "
            f"hidden states of size {hidden_size}."
        )
    name = max(outer, key=lambda n: sum(p.numel() for p in outer[n].parameters()))
    return name, list(outer[name])


def _find_writers(
    model: Any, layers: list[nn.Module], tokens: Tensor, hidden_size: int
) -> list[tuple[int, nn.Module, Tensor | None, bool]]:
    """Layer index, module, gain of a following norm, and whether tokens are flattened or routed, in order of execution."""
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    generator = torch.Generator().manual_seed(0)
    direction = nn.functional.normalize(torch.randn(hidden_size, generator=generator), dim=0)
    leaves: list[tuple[nn.Module, Tensor, Tensor]] = []  # with the copy that the model goes on with
    # By address of the copy, which stays alive. Another norm's input does not: a later copy may take its place, and then starts anew.
    norm_of: dict[int, nn.Module | None] = {}
    stream: list[Tensor] = []

    def leaf_of(output: Any) -> tuple[Tensor, Tensor, Any]:
        leaf = first_tensor(output).detach().requires_grad_()
        copy = leaf.clone()  # some models add to an output in place, which a leaf does not allow
        return leaf, copy, (type(output)((copy, *output[1:])) if isinstance(output, (tuple, list)) else copy)

    def cut_candidate(module: nn.Module, args: Any, output: Any) -> Any:
        result = first_tensor(output)
        if not isinstance(result, Tensor) or result.shape[-1] != hidden_size or not result.is_floating_point():
            return output
        leaf, copy, output = leaf_of(output)
        leaves.append((module, leaf, copy))
        norm_of[copy.data_ptr()] = None
        return output

    def cut_layer(module: nn.Module, args: Any, output: Any) -> Any:
        stream.append(first_tensor(output))
        return leaf_of(output)[2]

    def note_norm(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            norm_of[args[0].data_ptr()] = module

    with ExitStack() as stack, torch.enable_grad():
        for module in layer_of:
            if module in layers:
                stack.enter_context(_removed(module.register_forward_hook(cut_layer)))
            elif _owns_matrix(module, hidden_size):
                stack.enter_context(_removed(module.register_forward_hook(cut_candidate)))
            elif _is_norm(module, hidden_size):
                stack.enter_context(_removed(module.register_forward_pre_hook(note_norm)))
        _run(model, tokens)
        loss = torch.stack([(h.float().cpu() @ direction).sum() for h in stream]).sum()
        if not leaves or not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, [leaf for _, leaf, _ in leaves], allow_unused=True)

    found = []
    for (module, leaf, copy), gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        norm = norm_of[copy.data_ptr()]
        gain = None if norm is None else measure_gain(norm, hidden_size)
        wanted = direction if gain is None else nn.functional.normalize(gain.cpu() * direction, dim=0)
        G = gradient.float().cpu().reshape(-1, hidden_size)
        total = torch.linalg.vector_norm(G)
        if total > 0 and torch.linalg.vector_norm(G @ wanted) / total > ALIGNMENT:
            found.append((layer_of[module], module, gain, leaf.shape[:-1] != (1, PROBE_TOKENS)))
    return found


def _owns_matrix(module: nn.Module, hidden_size: int) -> bool:
    own = list(module.parameters(recurse=False))
    return getattr(module, "out_features", None) == hidden_size or any(p.dim() >= 2 and hidden_size in p.shape for p in own)


def _is_norm(module: nn.Module, hidden_size: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (hidden_size,)


def measure_gain(norm: nn.Module, hidden_size: int) -> Tensor:
    """The gain `g (hidden_size,)` of a norm module in float32, whether it stores `g` or `g - 1`, up to a common factor.

    A vector of alternating signs has mean zero and root mean square one, so RMS and layer norms alike give `g * v + b` for it.
    """
    weight: Any = norm.weight
    # An offloaded norm has no weight to look at; its hook brings it, and takes the input to where it computes.
    signs = torch.ones(hidden_size, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device)
    signs[1::2] = -1
    with torch.no_grad():
        difference = norm(signs[None])[0].float() - norm(-signs[None])[0].float()
    return difference / 2 * signs.to(difference)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
