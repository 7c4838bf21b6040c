"""Dequantizes stored weights (`loading.quantized`) with transformers' own functions."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ..errors import ModelError
from .stored import Shard, StoredModel, StoredTensor, computed_tensor, make_index

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


def dequantized(stored: StoredModel, method: str, dtype: torch.dtype) -> StoredModel:
    """The same model with weights of `dtype` in place of quantized weights and their scales. Tensors are read lazily.

    Raises `ModelError` if a quantized weight has no scale.
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
        # In float32, like the scales, so that an edited weight is rounded only once.
        found = Fp8Dequantize(None).convert({"weight": [weight.read()], "weight_scale_inv": [scale.read().float()]})["weight"]
        tensor = found[0] if isinstance(found, list) else found  # a list in older versions of transformers
        assert isinstance(tensor, Tensor)
        return tensor

    return computed_tensor(weight.name, dtype, weight.shape, make)


def _from_mxfp4(blocks: StoredTensor, scales: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    def make() -> Tensor:
        return convert_moe_packed_tensors(blocks.read(), scales.read(), dtype=dtype).contiguous()

    *experts, rows, groups, packed = blocks.shape
    return computed_tensor(blocks.name.removesuffix(_BLOCKS), dtype, (*experts, groups * packed * 2, rows), make)
