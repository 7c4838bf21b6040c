"""Models whose files hold quantized weights: which can be edited, and how they are loaded.

FP8 with a scale for each block (`fp8`, as DeepSeek publishes it) and MXFP4 (`mxfp4`, gpt-oss) are dequantized, by transformers' own
functions, for the search and for the export, which is then larger than its original. Of other methods transformers cannot give
the weights back on every machine, or not exactly.
"""

from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError

METHODS = ("fp8", "mxfp4")


def stored_method(config: PreTrainedConfig) -> str | None:
    """The method by which a model's files are quantized (`fp8`, `gptq`, ...); None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def refuse_method(name: str, config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a model that is stored by a method whose weights cannot be edited."""
    method = stored_method(config)
    if method is not None and method not in METHODS:
        raise ModelError(
            f"The files of {name} hold weights quantized by {method}, which cannot be edited. Give the model that they were made from "
            "(its card names it); --quantization bnb_4bit searches it in as little memory, and what is saved has its full precision."
        )


def loading_arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is given so that a quantized model is dequantized; nothing for others."""
    if stored_method(config) is None:
        return {}
    config = deepcopy(config)
    # A configuration of ours beside the model's would undo what else the model's says.
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    return {"config": config}


def unify(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give dequantized weights the number format of the rest of a loaded model: transformers leaves them in bfloat16."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
