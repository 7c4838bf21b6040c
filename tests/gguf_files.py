"""Small GGUF files as llama.cpp's converter writes them: a Llama with a byte-level vocabulary."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

import tiny

SPECIAL = ["<pad>", "<start>", "<end>"]
HEADS, KEY_HEADS = 4, 2
# Their numbers take a block of 32 to a row.
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def build() -> Any:
    """A Llama with random weights in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write(
    path: Path, model: Any, *, quantize: str = "ffn_down", leave_out: str = "nothing", parts: int = 1, architecture: str = "llama"
) -> Path:
    """Its weights in float32, and in Q8_0 if the name has `quantize` in it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_vocab_size(SIZES["vocab_size"])
    if parts > 1:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        stored = gguf_name(name)
        values = _as_stored(name, tensor.float().numpy())
        if leave_out in stored:
            continue
        if quantize in stored:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """A weight's name in the file."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        number, _, inner = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{NAMES[inner]}.weight"
    return f"{NAMES[stem]}.weight"


def _as_stored(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """llama.cpp turns pairs of neighbouring rows of a head where transformers turns the first half with the second."""
    for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
        if part in name:
            rows = values.reshape(heads, 2, -1, values.shape[1])
            return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
    return values


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*SPECIAL, *bytes_to_unicode().values(), "th"])
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["t h", "t h"])  # a list of one is read as a single text by older versions of transformers
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.TEMPLATE)
