"""4-bit weights on an emulated device: bitsandbytes' own modules and operations, as the program uses them, with the CPU's results.

What cannot be emulated: `Params4bit`, a parameter type that PyTorch makes from a device's tensor without asking anybody. So weights are
quantized on the CPU and moved, with their state, as buffers; loading, and the CUDA kernels themselves, are not tested.
"""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState

import tiny
from emulated import DeviceTensor, Emulation
from heretic.editing.hooks import dense_weight
from heretic.loading.load import LoadedModel, load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.scoring.divergence import OriginalAnswers
from heretic.utils import SilentProgress
from test_quantized import ABLATION, DIRECTIONS, PROMPTS, SIZES


def moved(state: QuantState, device: str) -> QuantState:
    """A copy of a quantization state on a device."""
    arguments = {name: getattr(state, name) for name in ("shape", "dtype", "blocksize", "quant_type")}
    tensors = {name: getattr(state, name).to(device) for name in ("absmax", "code")}
    nested: dict[str, Any] = {"offset": state.offset.to(device), "state2": moved(state.state2, device)} if state.nested else {}
    return QuantState(**tensors, **arguments, **nested)


def to_device(network: Any, device: str) -> int:
    """Move a model, its 4-bit weights as buffers. Returns how many there are."""
    weights = {}
    for module in network.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[module] = module.weight
            del module.weight
    network._apply(lambda tensor: tensor.to(device))
    for module, weight in weights.items():
        module.register_buffer("weight", weight.data.to(device))
        module.weight.quant_state = moved(weight.quant_state, device)
    return len(weights)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_trials(tmp_path: Path, mode: Any) -> None:
    settings = tiny.settings(tiny.save(tmp_path, tiny.build(**SIZES)), quantization="bnb_4bit")

    def results(loaded: LoadedModel, kind: type) -> tuple[list[list[str | None]], Any]:
        model = Model(loaded, settings)
        model.use_directions(DIRECTIONS.float(), mode)
        assert {type(dense_weight(writer.module)) for writer in model.architecture.writers} == {kind}
        answers = OriginalAnswers(model, PROMPTS, 4)
        answers.record(model)
        texts = model.responses_by_trial(PROMPTS, 8, [ABLATION, ABLATION])
        return texts, answers.divergences(model, [ABLATION])[0].sums

    here, there = (load_model(settings, model_source(settings), SilentProgress()) for _ in range(2))
    expected, sums = results(here, torch.Tensor)
    with Emulation() as emulation:
        assert to_device(there.model, "cuda:0") == 14
        found, other = results(there, DeviceTensor)
        launched = {name for name in emulation.counts.launches if name.startswith("bitsandbytes::")}
    assert found == expected and sums.max() > 0.01
    assert other == pytest.approx(sums, rel=1e-4, abs=1e-6)
    dequantize = {"bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"}
    # Older versions multiply by the dequantized weight.
    assert launched in (dequantize, dequantize | {"bitsandbytes::gemm_4bit"})
