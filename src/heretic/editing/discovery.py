"""Finds the decoder's layers and all modules in them that write to the residual stream.

By structure and measurement, without a list of model types:

*Layers* are the children of the `ModuleList` with the most parameters, at least half of which take and return hidden states of the same
shape in a forward pass. Several residual streams may have a separate axis or be concatenated in the last one.

*Writers* are found with one forward and one backward pass of two dozen tokens. Candidates are the innermost modules that own a matrix
and return hidden states. Each candidate's output and each layer's output is replaced by a detached leaf, and the gradient of
`sum_l <r, h_l>` is computed for a random direction `r`. Then there are only additions, norms and elementwise scalings between a leaf and
the stream: a writer's leaf gets a gradient along `r` (along `g * r` if a norm with gain `g` follows), all other leaves get none. No
gradient of a weight is needed, so this works with 4-bit weights.

*Storage*: a linear module's weight is known. In any other module (fused experts, transposed weights), one more backward pass through
that module shows which of its parameters is the last one before its output, and along which axis.

Where it breaks: a layer that combines its writers' outputs by other operations than additions, norms and scalings. A writer that cannot be
edited is an error. `Writer.alignment` shows if a gate or convolution follows an edited writer.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..device import embedding_weight
from ..errors import UnsupportedModelError
from ..loading.explain import refuse_encoder_decoder
from .architecture import Architecture, Storage, Writer, first_tensor, with_first_tensor
from .probe import PROBE_TOKENS, is_norm, measure_gain, probe_direction, probe_tokens, run_probe, share_along
from .storage import Found, find_storage, is_sum, takes_gates

# Writers measured at least 0.68, mostly 1; all other modules 0, with one exception at 0.31 (219 decoder types).
ALIGNMENT = 0.5
# Relative change of earlier hidden states with the last token: encoders measured at least 5e-4, decoders at most 4e-7.
LOOKS_AHEAD, LOOKS_AHEAD_HALF = 1e-4, 2e-2
# A norm counts as following if it explains this much more of the gradient.
GAIN_MARGIN = 0.001
# Words that determine the component of a writer: in its path inside the layer, outermost first, then in the names of its parent classes.
# All others are small extra branches besides the MLP.
COMPONENT_WORDS = {
    "mixer.out_proj": ("mamba", "conv", "ssm", "recurrent", "linear_att", "delta", "lightning", "retention", "lstm", "rglru", "kda"),
    "mlp.down_proj": ("mlp", "ffn", "feed_forward", "feedforward", "moe", "expert", "fc2", "fc_out", "ff."),
    "attn.o_proj": ("att", "self_"),
}


def discover(model: PreTrainedModel) -> Architecture:
    """The architecture of a loaded transformers model.

    Raises `UnsupportedModelError`, which names the model's type and what was found, if it is not a decoder, if a writer cannot be edited,
    or if no layers or writers are found.
    """
    model_type = model.config.model_type
    refuse_encoder_decoder(model.config)
    hidden_size = _hidden_size(model)
    tokens = probe_tokens(model)
    layers_name, layers, shapes = _find_layers(model, tokens, hidden_size)
    ran = set(shapes)
    _check_causality(model, [layers[i] for i in sorted(ran)], tokens)

    names = {module: name for name, module in model.named_modules()}
    writers = []
    for found in _with_siblings(_find_writers(model, layers, tokens, hidden_size), layers):
        name = names[found.module]
        storage = find_storage(model, found, tokens, hidden_size)
        if storage is None:
            raise UnsupportedModelError(
                f"Models of type {model_type} are not supported: {name} ({type(found.module).__name__}) writes to the residual stream, "
                "and none of its parameters was identified as the last one before its output."
            )
        component = _component(name.removeprefix(f"{layers_name}.").partition(".")[2], layers[found.layer])
        writers.append(
            Writer(
                name,
                found.layer,
                component,
                found.module,
                found.gain,
                storage,
                found.alignment,
                found.keeps_rows,
                takes_gates=storage.n_experts is not None and takes_gates(found),
                is_sum=storage.n_experts is None or is_sum(found, storage),
            )
        )
    writers += _find_biases(model, layers_name, layers, writers, tokens, hidden_size)
    bare = sorted(ran - {writer.layer for writer in writers})
    if bare:
        raise UnsupportedModelError(
            f"Models of type {model_type} are not supported: in layer {bare[0]} of {layers_name}, no module was found that writes to the "
            "residual stream."
        )
    shape = next(iter(shapes.values()))
    stream_axis = None if len(shape) == 3 else 0 if shape[-2] == PROBE_TOKENS else 2
    return Architecture(hidden_size, layers_name, tuple(layers), tuple(writers), stream_axis)


def _hidden_size(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    size: int | None = getattr(config, "hidden_size", None)
    return embedding_weight(model).shape[1] if size is None else size


def _find_layers(model: PreTrainedModel, tokens: Tensor, hidden_size: int) -> tuple[str, list[nn.Module], dict[int, torch.Size]]:
    """The path of the list of layers, the layers, and the shape of the hidden states of layers that text runs through."""
    passes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        result = first_tensor(output)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not isinstance(result, Tensor) or not result.is_floating_point() or all(t.shape != result.shape for t in tensors):
            return
        if result.dim() >= 3 and result.shape[-1] % hidden_size == 0 and result.numel() >= tokens.numel() * hidden_size:
            passes[module] = result.shape

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    with ExitStack() as stack, torch.no_grad():
        for child in {child for children in lists.values() for child in children}:
            stack.enter_context(child.register_forward_hook(note, with_kwargs=True))
        run_probe(model, tokens)
    found = {name: m for name, m in lists.items() if sum(child in passes for child in m) * 2 >= len(m)}
    outer = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    if outer:
        name = max(outer, key=lambda n: sum(p.numel() for p in outer[n].parameters()))
        layers = list(outer[name])
        return name, layers, {i: passes[layer] for i, layer in enumerate(layers) if layer in passes}
    raise UnsupportedModelError(
        f"Models of type {model.config.model_type} are not supported: no list of decoder layers was found that take and return "
        f"hidden states of size {hidden_size}."
    )


def _check_causality(model: PreTrainedModel, layers: list[nn.Module], tokens: Tensor) -> None:
    """Raise `UnsupportedModelError` if earlier positions see the last token, except in the prompts of image models."""
    if hasattr(model.config, "vision_config"):
        return

    def hidden_states(tokens: Tensor) -> Tensor:
        kept: list[Tensor] = []
        with torch.no_grad(), layers[-1].register_forward_hook(lambda m, a, output: kept.append(first_tensor(output))):
            run_probe(model, tokens)
        return kept[0].float()

    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0]
    before, after = hidden_states(tokens), hidden_states(changed)
    axis = next((i for i, size in enumerate(before.shape) if size >= PROBE_TOKENS), 1)
    before, after = (h.narrow(axis, 0, h.shape[axis] - 1) for h in (before, after))
    noise = LOOKS_AHEAD if embedding_weight(model).dtype == torch.float32 else LOOKS_AHEAD_HALF
    if torch.linalg.vector_norm(after - before) > noise * torch.linalg.vector_norm(before):
        raise UnsupportedModelError(
            f"Models of type {model.config.model_type} are not supported: this is an encoder, in which tokens attend to later ones; only "
            "decoders, which generate text from left to right, can be edited."
        )


def _find_writers(model: PreTrainedModel, layers: list[nn.Module], tokens: Tensor, hidden_size: int) -> list[Found]:
    """The writers in order of execution. Outer modules are candidates only in layers whose inner modules have no writer."""
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules() if module is not layer}
    owners = {module for module in layer_of if _owns_matrix(module, hidden_size)}
    emitting = _emitting(model, owners, tokens, hidden_size)
    found: list[Found] = []
    candidates = emitting
    while candidates:
        inner = {m for m in candidates if not any(other is not m and other in candidates for other in m.modules())}
        found += _probe(model, layers, inner, layer_of, tokens, hidden_size)
        writing = {f.module for f in found}
        candidates = {m for m in candidates - inner if not any(other in writing for other in m.modules())}
    return found


def _emitting(model: PreTrainedModel, owners: set[nn.Module], tokens: Tensor, hidden_size: int) -> set[nn.Module]:
    emitting: set[nn.Module] = set()

    def note(module: nn.Module, args: object, output: object) -> None:
        result = first_tensor(output)
        if isinstance(result, Tensor) and result.shape[-1:] == (hidden_size,) and result.is_floating_point():
            emitting.add(module)

    with ExitStack() as stack, torch.no_grad():
        for module in owners:
            stack.enter_context(module.register_forward_hook(note))
        run_probe(model, tokens)
    return emitting


def _probe(
    model: PreTrainedModel,
    layers: list[nn.Module],
    candidates: set[nn.Module],
    layer_of: dict[nn.Module, int],
    tokens: Tensor,
    hidden_size: int,
) -> list[Found]:
    """The `candidates` (none inside another) that write to the stream."""
    direction = probe_direction(hidden_size)
    leaves: list[tuple[nn.Module, Tensor, tuple[object, ...], dict[str, object]]] = []  # with the call's arguments
    stream: list[Tensor] = []

    def leaf_of(output: object) -> tuple[Tensor, object]:
        leaf = first_tensor(output).detach().requires_grad_()
        copy = leaf.clone()  # some models add to an output in place, which is not allowed for a leaf
        return leaf, with_first_tensor(output, copy)

    def cut_candidate(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        if not isinstance(first_tensor(output), Tensor):
            return output
        leaf, output = leaf_of(output)
        leaves.append((module, leaf, args, kwargs))
        return output

    def cut_layer(module: nn.Module, args: object, output: object) -> object:
        stream.append(first_tensor(output))
        return leaf_of(output)[1]

    with ExitStack() as stack, torch.enable_grad():
        for module in candidates:
            stack.enter_context(module.register_forward_hook(cut_candidate, with_kwargs=True))
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(cut_layer))
        run_probe(model, tokens)
        loss = _sum_along(direction, stream)
        if not leaves or not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, [leaf for _, leaf, *_ in leaves], allow_unused=True)

    found: dict[nn.Module, Found] = {}
    for (module, leaf, args, kwargs), gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        gain, alignment = _gain(gradient.float().cpu(), direction, layers[layer_of[module]])
        if alignment > ALIGNMENT:
            keeps_rows = leaf.shape[:2] == tokens.shape or leaf.shape[:-1] == (tokens.numel(),)
            found.setdefault(module, Found(layer_of[module], module, gain, alignment, keeps_rows, args, kwargs))
    return list(found.values())


def _sum_along(direction: Tensor, stream: Sequence[Tensor]) -> Tensor:
    """The sum of what hidden states of any shape `(..., d)`, or `(..., streams * d)`, hold along `direction (d,)`."""
    return torch.stack([(h.float().cpu().unflatten(-1, (-1, len(direction))) @ direction).sum() for h in stream]).sum()


def _gain(gradient: Tensor, direction: Tensor, layer: nn.Module) -> tuple[Tensor | None, float]:
    """The gain of the norm between a writer and the stream (None: there is none), and the gradient's share along it.

    The gradient through a norm with gain `g` is along `g * direction`, so the right norm of the layer is the one that matches it
    best. If the direction itself matches it, there is none.
    """
    gain, share = None, share_along(gradient, direction, -1)
    for norm in (module for module in layer.modules() if is_norm(module, len(direction))):
        if share > 1 - GAIN_MARGIN:
            break
        other = measure_gain(norm, len(direction))
        through = share_along(gradient, nn.functional.normalize(other.cpu() * direction, dim=0), -1)
        if through > share + (GAIN_MARGIN if gain is None else 0):
            gain, share = other, through
    return gain, share


def _find_biases(
    model: PreTrainedModel, layers_name: str, layers: list[nn.Module], writers: list[Writer], tokens: Tensor, hidden_size: int
) -> list[Writer]:
    """Biases that layers add to the stream outside of known modules, as writers without a weight."""
    known = {getattr(w.module, w.storage.bias) for w in writers if w.storage.bias is not None}
    places = [
        (i, module, name, p)
        for i, layer in enumerate(layers)
        for module in layer.modules()
        if not isinstance(module, nn.Linear) and not is_norm(module, hidden_size)
        for name, p in module.named_parameters(recurse=False)
        if p.shape == (hidden_size,) and p not in known and p.is_floating_point()
    ]
    if not places:
        return []
    direction = probe_direction(hidden_size)
    stream: list[Tensor] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        stream.append(first_tensor(output))

    def cut(module: nn.Module, args: object, output: object) -> object:
        return with_first_tensor(output, first_tensor(output).detach())

    parameters = [p for *_, p in places]
    required = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with ExitStack() as stack, torch.enable_grad():
            for layer in layers:
                stack.enter_context(layer.register_forward_hook(note))
            for module in [*layers, *(w.module for w in writers)]:
                stack.enter_context(module.register_forward_hook(cut))
            run_probe(model, tokens)
            loss = _sum_along(direction, stream)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)
    finally:
        for p, value in zip(parameters, required, strict=True):
            p.requires_grad_(value)
    names = {module: name for name, module in model.named_modules()}
    found = []
    for (i, module, name, _), gradient in zip(places, gradients, strict=True):
        if gradient is not None and share_along(gradient.float().cpu(), direction, -1) > 1 - GAIN_MARGIN:
            path = f"{names[module]}.{name}".removeprefix(f"{layers_name}.").partition(".")[2]
            found.append(Writer(names[module], i, _component(path, layers[i]), module, None, Storage(None, bias=name)))
    return found


def _with_siblings(found: list[Found], layers: list[nn.Module]) -> list[Found]:
    """Add the same modules in the other children of their lists: experts that no token of the probe was routed to."""
    result: dict[nn.Module, Found] = {}
    for writer in found:
        result.setdefault(writer.module, writer)
        layer = layers[writer.layer]
        for children in (m for m in layer.modules() if isinstance(m, nn.ModuleList)):
            path = next((name for child in children for name, m in child.named_modules() if m is writer.module), None)
            for child in children if path is not None else ():
                module = dict(child.named_modules()).get(path)
                if module is not None and type(module) is type(writer.module) and not _same_shape(module, writer.module):
                    continue
                if module is not None and type(module) is type(writer.module) and module not in {f.module for f in found}:
                    result.setdefault(module, Found(writer.layer, module, writer.gain, writer.alignment, writer.keeps_rows, (), {}))
    return list(result.values())


def _same_shape(module: nn.Module, other: nn.Module) -> bool:
    return [p.shape for p in module.parameters()] == [p.shape for p in other.parameters()]


def _component(path: str, layer: nn.Module) -> str:
    """The component of a writer by its path inside the layer."""
    classes = []
    module = layer
    for part in path.split(".")[:-1]:
        module = getattr(module, part)
        name = type(module).__name__
        classes.append(name.removeprefix(_common_prefix(type(layer).__name__, name)))
    mixers = COMPONENT_WORDS["mixer.out_proj"]
    if any(word in name.lower() for name in classes for word in mixers):
        return "mixer.out_proj"
    for text in (*(part + "." for part in path.split(".")), *classes):
        for component, words in COMPONENT_WORDS.items():
            if any(word in text.lower() for word in words):
                return component
    return "mixer.out_proj" if "mixer" in path else "mlp.down_proj"


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def _owns_matrix(module: nn.Module, hidden_size: int) -> bool:
    own = list(module.parameters(recurse=False))
    return getattr(module, "out_features", None) == hidden_size or any(
        sum(size > 1 for size in p.shape) >= 2 and hidden_size in p.shape for p in own
    )
