"""Hooked models against copies whose weights were edited explicitly in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heretic.editing.ablation import Ablation, ComponentParameters, RowNormalization
from heretic.editing.architecture import Architecture, Writer
from heretic.editing.discovery import discover
from heretic.editing.hooks import AblationHooks, dense_weight
from tiny import build, explicit_bias, explicit_weight, unit_directions

MODES = ["none", "pre", "full"]
N_LAYERS = 4
# On four layers (positions of 3): layers 1 to 3 for attention with strengths 0.6, 1.2, 0.6; layers 0 to 2 for the MLP, 1.5, 1.0, 0.5.
PARAMETERS = {"attn.o_proj": ComponentParameters(1.2, 2 / 3, 0.6, 1 / 3), "mlp.down_proj": ComponentParameters(1.5, 0.0, 0.5, 2 / 3)}
STRENGTHS = {"attn.o_proj": [0, 0.6, 1.2, 0.6], "mlp.down_proj": [1.5, 1.0, 0.5, 0]}
OWN = Ablation(None, PARAMETERS)
GLOBAL = Ablation(0.45, PARAMETERS)  # 1.35 of 3: between the directions of layers 1 and 2, nearer to the first
WEAK = Ablation(1.0, {"mlp.down_proj": ComponentParameters(0.5, 1.0, 0.5, 1.0)})
TYPES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "phi": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "llava": {},
}
TOKENS = torch.arange(6, 30).reshape(2, 12)


def direction_of(ablation: Ablation, directions: np.ndarray, layer: int) -> np.ndarray:
    """As the definition says, in float64. Layer `i` has its direction at `i + 1`."""
    if ablation.direction_index is None:
        return directions[layer + 1]
    position = ablation.direction_index * (N_LAYERS - 1)
    lower = int(np.floor(position))
    upper = min(lower + 1, N_LAYERS - 1)
    return directions[lower + 1] + (position - lower) * (directions[upper + 1] - directions[lower + 1])


def strength_of(ablation: Ablation, writer: Writer) -> float:
    return 0.5 * (writer.component == "mlp.down_proj") if ablation is WEAK else STRENGTHS[writer.component][writer.layer]


def stored_gain(model_type: str, writer: Writer, model: Any) -> np.ndarray:
    """The gain of the norm behind a writer, from its weight: what the type's norm multiplies with."""
    names = {
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }.get(model_type)
    if names is None:
        return np.ones(32)
    norm = model.get_submodule(f"model.layers.{writer.layer}.{names[writer.component == 'mlp.down_proj']}")
    return norm.weight.detach().double().numpy() + (1 if model_type.startswith("gemma") else 0)


def edited_copy(model_type: str, model: Any, architecture: Architecture, ablation: Ablation, directions: Tensor, mode: str) -> Any:
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for writer in architecture.writers:
            strength = strength_of(ablation, writer)
            if not strength:
                continue
            r = stored_gain(model_type, writer, model) * direction_of(ablation, directions.numpy(), writer.layer)
            r = r / np.linalg.norm(r)
            module = edited.get_submodule(writer.name)
            module.weight.copy_(torch.from_numpy(explicit_weight(module.weight, r, strength, mode)))
            if module.bias is not None:
                module.bias.copy_(torch.from_numpy(explicit_bias(module.bias, r, strength)))
    return edited


@pytest.fixture(scope="module", params=TYPES)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Architecture]:
    model_type = request.param.partition(" ")[0]
    model = build(model_type, num_hidden_layers=N_LAYERS, **TYPES[request.param])
    return model_type, model, discover(model)


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("mode", MODES)
def test_hooks_compute_what_edited_weights_would(case: tuple[str, Any, Architecture], mode: RowNormalization) -> None:
    """One trial with a direction for each layer, one with a direction for all; then both and a third in one batch, row by row."""
    model_type, model, architecture = case
    directions = unit_directions(N_LAYERS + 1, 32)
    original = logits(model)
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    expected = [logits(edited_copy(model_type, model, architecture, a, directions, mode)) for a in (OWN, GLOBAL, WEAK)]
    scale = float(original.std())
    assert min(float((e - original).abs().max()) for e in expected) > 0.1 * scale
    assert float((expected[0] - expected[1]).abs().max()) > 0.1 * scale

    hooks = AblationHooks(architecture, directions, mode)
    assert torch.equal(logits(model), original)  # nothing before a trial is active
    for ablation, wanted in zip((OWN, GLOBAL), expected, strict=False):
        with hooks.active([ablation]):
            torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4 * scale)
        assert torch.equal(logits(model), original)
    rows = [(2, 0), (0, 1), (1, 1), (0, 0)]  # trial, prompt
    with hooks.active([OWN, GLOBAL, WEAK]):
        hooks.assign_rows([trial for trial, _ in rows])
        together = logits(model, TOKENS[[prompt for _, prompt in rows]])
        hooks.assign_rows([1, 1])
        torch.testing.assert_close(logits(model), expected[1], rtol=0, atol=1e-4 * scale)
    for row, (trial, prompt) in zip(together, rows, strict=True):
        torch.testing.assert_close(row, expected[trial][prompt], rtol=0, atol=1e-4 * scale)

    hooks.remove()
    assert torch.equal(logits(model), original)
    assert not any(writer.module._forward_hooks for writer in architecture.writers)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("mode", MODES)
def test_an_error_within_a_trial_leaves_no_trace(mode: RowNormalization) -> None:
    model = build("llama")
    hooks = AblationHooks(discover(model), unit_directions(3, 32), mode)
    original = logits(model)
    with pytest.raises(KeyError), hooks.active([Ablation(None, PARAMETERS)]):
        assert not torch.equal(logits(model), original)
        raise KeyError
    assert torch.equal(logits(model), original)


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_changes_nothing(mode: RowNormalization) -> None:
    model = build("phi")
    hooks = AblationHooks(discover(model), unit_directions(3, 32), mode)
    original = logits(model)
    nothing = Ablation(0.5, {name: ComponentParameters(0.0, 0.5, 0.0, 1.0) for name in PARAMETERS})
    with hooks.active([nothing]):
        assert torch.equal(logits(model), original)
    with hooks.active([Ablation(0.5, {})]):
        assert torch.equal(logits(model), original)
    # Beside a trial that does something it costs a rounding.
    with hooks.active([nothing, Ablation(0.5, PARAMETERS)]):
        hooks.assign_rows([0, 1])
        both = logits(model)
    torch.testing.assert_close(both[0], original[0], rtol=0, atol=1e-5)
    assert (both[1] - original[1]).abs().max() > 0.1


def test_several_trials_need_their_rows_assigned() -> None:
    model = build("llama")
    hooks = AblationHooks(discover(model), unit_directions(3, 32), "none")
    with hooks.active([OWN, GLOBAL]), pytest.raises(ValueError, match="rows of several ablations must be assigned before a forward pass"):
        logits(model)


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_direction_changes_nothing(mode: RowNormalization) -> None:
    """A layer whose harmless and harmful means coincide."""
    model = build("llama")
    hooks = AblationHooks(discover(model), torch.zeros(3, 32), mode)
    original = logits(model)
    with hooks.active([Ablation(None, PARAMETERS)]):
        torch.testing.assert_close(logits(model), original, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ablation", [OWN, GLOBAL], ids=["per layer", "global"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_edit_of_a_writer(model_type: str, ablation: Ablation) -> None:
    """What the export takes: direction and strength of each writer."""
    model = build(model_type, num_hidden_layers=N_LAYERS)
    architecture, directions = discover(model), unit_directions(N_LAYERS + 1, 32)
    hooks = AblationHooks(architecture, directions, "full")
    for writer in architecture.writers:
        r, strength = hooks.edit_of(writer, ablation)
        expected = stored_gain(model_type, writer, model) * direction_of(ablation, directions.numpy(), writer.layer)
        np.testing.assert_allclose(r.numpy(), expected / np.linalg.norm(expected), rtol=0, atol=1e-6)
        assert strength == pytest.approx(strength_of(ablation, writer), abs=1e-12)


def test_maps_follow_their_modules_dtype() -> None:
    """In bfloat16 the maps are computed in float32 and their result is rounded once."""
    model = build("llama", torch.bfloat16)
    architecture, directions = discover(model), unit_directions(3, 32)
    writer = architecture.writers[1]
    hooks = AblationHooks(architecture, directions, "none")
    x = torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad(), hooks.active([Ablation(None, {"mlp.down_proj": ComponentParameters(1.0, 0.0, 1.0, 1.0)})]):
        edited = writer.module(x)
    hooks.remove()
    y, r = writer.module(x).detach().double(), directions[1]
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited, (y - (y @ r)[..., None] * r).to(torch.bfloat16))


def test_dense_weight_is_float32_and_no_copy_where_none_is_needed() -> None:
    module = torch.nn.Linear(4, 3)
    assert dense_weight(module).data_ptr() == module.weight.data_ptr()
    assert dense_weight(module.to(torch.bfloat16)).dtype == torch.float32
