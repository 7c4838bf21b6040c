"""Models with quantized weights in their files: which can be edited, and how they are loaded.

FP8 with block scales (`fp8`, as published by DeepSeek) and MXFP4 (`mxfp4`, gpt-oss) are dequantized by transformers' own functions for the
search and for the export, which is then larger than its original. Weights of other methods cannot be dequantized on every machine, or
not exactly.
"""

from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError

METHODS = ("fp8", "mxfp4")


def stored_method(config: PreTrainedConfig) -> str | None:
    """The quantization method of a model's files (`fp8`, `gptq`, ...); None if they are not quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def refuse_method(name: str, config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a quantization method whose weights cannot be edited."""
    method = stored_method(config)
    if method is not None and method not in METHODS:
        raise ModelError(
            f"The weights of {name} are quantized by {method}, which cannot be edited. Use the model that it was quantized from (see "
            "the card); --quantization bnb_4bit loads it in as little memory, and the saved model has full precision."
        )


def loading_arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that dequantize a quantized model; empty for others."""
    if stored_method(config) is None:
        return {}
    config = deepcopy(config)
    # A separate quantization configuration would override the other fields of the model's.
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    return {"config": config}


def cast_dequantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast dequantized weights to the dtype of the rest of the model: transformers leaves them in bfloat16."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
