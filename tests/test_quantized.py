"""4-bit search on the CPU: maps against the explicit edit of what the 4-bit modules compute, export from the full weights."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from heretic.editing.ablation import Ablation, ComponentParameters, RowNormalization
from heretic.editing.hooks import dense_weight
from heretic.errors import ModelError
from heretic.model import Model
from heretic.prompts import Prompt
from heretic.saving.export import save
from heretic.saving.record import Result
from heretic.utils import SilentProgress
from test_export import tensors_of
from tiny import build, explicit_bias, explicit_weight, load, settings, unit_directions
from tiny import save as save_original

MODES = ["none", "pre", "full"]
# nf4 comes in blocks of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PARAMETERS = {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(1.3, 1.0, 0.5, 1.0)}
STRENGTHS = {"self_attn.o_proj": (0.4, 1.0), "mlp.down_proj": (0.5, 1.3)}
ABLATION = Ablation(0.3, PARAMETERS)
DIRECTIONS = unit_directions(3, 64)
TOKENS = torch.arange(6, 30).reshape(2, 12)
PROMPTS = [Prompt("", text) for text in ("how do i bake bread ?", "hello", "fix my bike and the mat", "the cat")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("llama") / "m", build("llama", attention_bias=True, mlp_bias=True, **SIZES))


def load_4bit(folder: Path, **changes: Any) -> Model:
    return load(folder, quantization="bnb_4bit", **changes)


def what_it_computes(module: Any) -> Tensor:
    """The weight of a linear module from what it gives for the identity: no knowledge of its storage."""
    with torch.no_grad():
        zero = module(torch.zeros(1, module.in_features))
        return (module(torch.eye(module.in_features)) - zero).T.contiguous()


@pytest.fixture(scope="module")
def quantized_plain(folder: Path) -> Any:
    """A float32 model whose weights are those that the 4-bit model computes with."""
    quantized = load_4bit(folder).model
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    n_replaced = 0
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(what_it_computes(module))
            n_replaced += 1
    assert n_replaced == 14
    return plain


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def test_loaded_in_4_bits(folder: Path) -> None:
    model = load_4bit(folder)
    assert model.loaded.quantized
    assert model.loaded.dtype == torch.float32
    assert model.architecture.components == {"attn.o_proj": 2, "mlp.down_proj": 2}
    for writer in model.architecture.writers:
        assert isinstance(writer.module, bitsandbytes.nn.Linear4bit)
        assert writer.module.weight.dtype == torch.uint8
        assert writer.module.weight.quant_state.quant_type == "nf4"
        assert writer.module.weight.quant_state.nested
    config = model.model.config.quantization_config
    assert (config.load_in_4bit, config.bnb_4bit_compute_dtype) == (True, torch.float32)
    assert not load(folder).loaded.quantized


def test_dense_weight_is_what_the_module_computes_with(folder: Path) -> None:
    for writer in load_4bit(folder).architecture.writers:
        dense = dense_weight(writer.module)
        assert dense.dtype == torch.float32
        torch.testing.assert_close(dense, what_it_computes(writer.module), rtol=0, atol=1e-6)
        original = tensors_of(folder)[f"{writer.name}.weight"]
        assert 0.01 < (dense - original).std() / original.std() < 0.2  # rounded to 4 bits, and no more than that


def test_weights_are_not_repacked_for_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU multiplies bfloat16 itself, bitsandbytes would put the weights in another order at the first forward pass."""
    if not hasattr(bitsandbytes.nn.modules, "has_avx512bf16"):
        pytest.skip("this version of bitsandbytes never repacks weights")
    expected = [dense_weight(writer.module) for writer in load_4bit(folder).architecture.writers]
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert bitsandbytes.nn.Linear4bit(2, 2).support_avx512bf16_for_cpu
    for writer, weight in zip(load_4bit(folder).architecture.writers, expected, strict=True):
        assert torch.equal(dense_weight(writer.module), weight)
        assert not getattr(writer.module.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ablation", [ABLATION, Ablation(None, PARAMETERS)], ids=["global", "per layer"])
def test_maps_are_the_explicit_edit_of_the_dequantized_weights(
    folder: Path, quantized_plain: Any, mode: RowNormalization, ablation: Ablation
) -> None:
    model = load_4bit(folder)
    original = logits(model.model)
    torch.testing.assert_close(original, logits(quantized_plain), rtol=0, atol=1e-4)
    stored = {writer.name: writer.module.weight.data.clone() for writer in model.architecture.writers}
    model.use_directions(DIRECTIONS, mode)
    edited = AutoModelForCausalLM.from_config(quantized_plain.config)
    edited.load_state_dict(quantized_plain.state_dict())
    edited.eval()
    for path, strengths in STRENGTHS.items():
        for layer, strength in enumerate(strengths):
            r = (DIRECTIONS[1] + 0.3 * (DIRECTIONS[2] - DIRECTIONS[1]) if ablation.direction_index else DIRECTIONS[layer + 1]).numpy()
            r = r / np.linalg.norm(r)
            module = edited.get_submodule(f"model.layers.{layer}.{path}")
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(explicit_weight(module.weight, r, strength, mode)))
                module.bias.copy_(torch.from_numpy(explicit_bias(module.bias, r, strength)))
    with model.hooks.active([ablation]):
        torch.testing.assert_close(logits(model.model), logits(edited), rtol=0, atol=1e-4)
    assert (logits(edited) - original).abs().max() > 0.1
    assert torch.equal(logits(model.model), original)
    assert all(torch.equal(writer.module.weight.data, stored[writer.name]) for writer in model.architecture.writers)


def test_scores_of_a_4_bit_model(folder: Path, quantized_plain: Any) -> None:
    """Residuals, log-probabilities and responses go the same way as ever."""
    model = load_4bit(folder)
    tokens = [model.tokenizer(model.render([{"role": "user", "content": prompt.user}]), add_special_tokens=False) for prompt in PROMPTS]
    residuals = torch.cat(list(model.residuals(PROMPTS)))
    logprobs, responses = model.first_token_logprobs(PROMPTS), model.responses(PROMPTS, 6)
    for i, row in enumerate(tokens):
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            output = quantized_plain(ids, output_hidden_states=True)
            generated = quantized_plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        torch.testing.assert_close(residuals[i, 1], output.hidden_states[1][0, -1], rtol=0, atol=1e-4)
        torch.testing.assert_close(logprobs[i], output.logits[0, -1].log_softmax(dim=-1), rtol=0, atol=1e-4)
        assert responses[i] == model.tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_export_is_made_from_the_full_weights(tmp_path: Path, mode: RowNormalization, dtype: torch.dtype) -> None:
    original = save_original(tmp_path / "m", build("llama", dtype, **SIZES))
    model = load_4bit(original, row_normalization=mode)
    model.use_directions(DIRECTIONS, mode)
    result = Result(settings(original, row_normalization=mode, quantization="bnb_4bit"), 0, ABLATION, 1, 0.1, 5, 10, "")
    target = save(model, result, "merge", str(tmp_path / "out"), False, SilentProgress())
    before, after = tensors_of(original), tensors_of(target)
    assert before.keys() == after.keys()
    r = (DIRECTIONS[1] + 0.3 * (DIRECTIONS[2] - DIRECTIONS[1])).numpy()
    n_edited = 0
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        layer, _, module = name.partition("layers.")[2].removesuffix(".weight").partition(".")
        if module in STRENGTHS:
            exact = explicit_weight(before[name], r / np.linalg.norm(r), STRENGTHS[module][int(layer)], mode)
            torch.testing.assert_close(tensor.double(), torch.from_numpy(exact), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=2e-6)
            n_edited += 1
        else:
            assert torch.equal(tensor, before[name])
    assert n_edited == 4
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert json.loads((target / "heretic.json").read_text())["settings"]["quantization"] == "bnb_4bit"


def test_a_model_that_is_quantized_already(tmp_path: Path) -> None:
    original = save_original(tmp_path / "m", build("llama", **SIZES))
    AutoModelForCausalLM.from_pretrained(
        original, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ).save_pretrained(original)
    with pytest.raises(ModelError) as caught:
        load_4bit(original)
    assert str(caught.value) == (
        f"The weights of {original} are quantized by bitsandbytes, which cannot be edited. Use the model that it was quantized from (see "
        "the card); --quantization bnb_4bit loads it in as little memory, and the saved model has full precision."
    )
