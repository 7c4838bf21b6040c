"""Models whose files hold quantized weights: which can be edited, and their tensors as numbers.

FP8 with a scale for each block (`fp8`, as DeepSeek publishes it) and MXFP4 (`mxfp4`, gpt-oss) are dequantized, by transformers' own
functions, for the search and for the export, which is then larger than its original. Of other methods transformers cannot give
the weights back on every machine, or not exactly.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ..errors import ModelError
from ..saving.stored import Shard, StoredModel, StoredTensor, made, make_index

METHODS = ("fp8", "mxfp4")
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


def stored_method(config: Any) -> str | None:
    """The method by which a model's files are quantized (`fp8`, `gptq`, ...); None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def refuse_method(name: str, config: Any) -> None:
    """Raise `ModelError` for a model that is stored by a method whose weights cannot be edited."""
    method = stored_method(config)
    if method is not None and method not in METHODS:
        raise ModelError(
            f"The files of {name} hold weights quantized by {method}, which cannot be edited. Give the model that they were made from "
            "(its card names it); --quantization bnb_4bit searches it in as little memory, and what is saved has its full precision."
        )


def loading_arguments(config: Any) -> dict[str, Any]:
    """What `from_pretrained` is given so that a quantized model is dequantized; nothing for others."""
    if stored_method(config) is None:
        return {}
    config = deepcopy(config)
    # A configuration of ours beside the model's would undo what else the model's says.
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    return {"config": config}


def unify(model: Any, dtype: torch.dtype) -> None:
    """Give dequantized weights the number format of the rest of a loaded model: transformers leaves them in bfloat16."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def dequantized(stored: StoredModel, method: str, dtype: torch.dtype) -> StoredModel:
    """The same model with numbers of `dtype` in place of quantized weights and their scales; nothing is read before it is asked for.

    Raises `ModelError` where a quantized weight has no scale.
    """
    tensors = stored.tensors
    made_of, consumed = {}, set()
    for name, tensor in tensors.items():
        if method == "fp8" and name.endswith(_SCALE) and (weight := tensors.get(name.removesuffix(_SCALE))) is not None:
            made_of[weight.name] = _from_fp8(weight, tensor, dtype)
            consumed.add(name)
        elif method == "mxfp4" and name.endswith(_BLOCKS) and (scales := tensors.get(name.removesuffix(_BLOCKS) + _SCALES)) is not None:
            made_of[name] = _from_mxfp4(tensor, scales, dtype)
            consumed.add(scales.name)
    for name, tensor in tensors.items():
        if name not in made_of and name not in consumed and tensor.dtype.startswith("F8_E"):
            raise ModelError(f"{name} is stored as {tensor.dtype}, and its scale was not found (looked for {name}{_SCALE}).")
    shards = tuple(
        Shard(shard.name, tuple(made_of.get(t.name, t) for t in shard.tensors if t.name not in consumed)) for shard in stored.shards
    )
    return replace(stored, shards=shards, index=None if stored.index is None else make_index(shards))


def _from_fp8(weight: StoredTensor, scale: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    def make() -> Tensor:
        # In float32, the scales' format here, so that an edit of it is rounded once.
        found = Fp8Dequantize(None).convert({"weight": [weight.read()], "weight_scale_inv": [scale.read().float()]})["weight"]
        tensor = found[0] if isinstance(found, list) else found  # a list in older versions of transformers
        assert isinstance(tensor, Tensor)
        return tensor

    return made(weight.name, dtype, weight.shape, make)


def _from_mxfp4(blocks: StoredTensor, scales: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    def make() -> Tensor:
        return convert_moe_packed_tensors(blocks.read(), scales.read(), dtype=dtype).contiguous()

    *experts, rows, groups, packed = blocks.shape
    return made(blocks.name.removesuffix(_BLOCKS), dtype, (*experts, groups * packed * 2, rows), make)
