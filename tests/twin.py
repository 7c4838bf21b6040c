"""Tiny twins: a configuration of the same structure as another with every width made small, for looking at what is too large to run.

The names of modules and parameters, the kinds of layers and their order are those of the original; widths, numbers of heads and
experts and vocabularies are not. What a width is called differs between model types; `SIZES` says it by pattern, and a type for which
no pattern is right has its exceptions in `EXCEPTIONS`.
"""

import re
from dataclasses import replace
from typing import Any

from heretic.editing.architecture import Architecture
from heretic.editing.discovery import discover
from heretic.loading.load import auto_class

HIDDEN = 64
HEADS = 4


def _at_most(limit: int) -> Any:
    return lambda value: min(value, limit)


# The first pattern that matches the whole name decides. A callable gets the original value.
SIZES: list[tuple[str, Any]] = [
    (r"(.*_)?vocab_size(_per_layer_input|_base)?|encoder_hash_byte_group_vocab", 128),
    (r"moe_hidden_size|moe_latent_size|expert_hidden_size", 48),
    (r"(audio_|vision_)?hidden_size_per_layer_input|ple_embed_dim", 16),
    (r"hc_lowrank|.*lora_rank|gated_norm_rank|laurel_rank|adapter_rank|d_rel|router_hidden_size|time_step_rank|(mamba_)?dt_rank", 8),
    (r"qk_rope_head_dim|rope_head_dim|rotary_dim|qk_rope_dim", 8),
    (r"qk_head_dim", 24),
    (r"index_n_heads", 2),
    (r"attention_hidden_size|attention_output_size", HIDDEN),
    (r".*head_dim|.*dim_head|.*_d_head|mamba_headdim|d_head|d_kv|kv_channels|(attention_)?head_size|head_width", HIDDEN // HEADS),
    (r"linear_num_key_heads", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*(key_value_heads|kv_heads|query_groups|kv_head|n_head_kv)", lambda value: 1 if value == 1 else 2),
    (r"(.*_)?num_(.*_)?heads(_per_layer)?|.*attention_heads|n_heads?|num_heads|resampler_heads|heads", HEADS),
    (r"(.*_)?(ssm_state_size|state_size|d_state)", 16),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"moe_(.*_)?intermediate_size|expert_ffn_hidden_size|shared_experts?_(intermediate_size|dim)|share_expert_dim", 48),
    (r"shared_experts_intermediate_size|shared_intermediate_size", _at_most(48)),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|dff|d_ff|d_inner|feed_forward_size|intermediate_size_mlp)", 96),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|top_k_experts|experts_per_token", _at_most(2)),
    (r"n_group|topk_group|num_expert_group|n_expert_groups", 1),
    (r"zero_expert_num|n_zero_experts", 2),
    (r"(.*_)?(n|num)_shared_experts", _at_most(1)),
    (r"(.*_)?(n|num)_(routed_|local_)?experts|num_routed_experts|ffn_num_experts", _at_most(4)),
    (r"index_topk|index_topk_blocks|index_block_size|index_kpool", _at_most(16)),
    (r"(mamba_)?chunk_size|attention_chunk_size|block_size", _at_most(16)),
    (r"(.*_)?(hidden_size|n_embd|d_model|embed_dim|embedding_dim|dim_model|embedding_size|emb_dim|word_embed_proj_dim)", HIDDEN),
    (r"lru_width|projection_dim|proj_dim|d_embed|model_dim|hidden_dim|output_dim|output_size|cross_attn_dim", HIDDEN),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", _at_most(256)),
]
LAYERS = r"num_hidden_layers|n_layers?|num_layers|num_layers_per_stack|num_blocks|((num_)?(decoder|encoder)_)?layers|depth"

# What is equal in the original stays equal.
EQUAL = (
    ("head_dim", "qk_rope_head_dim"),
    ("num_key_value_heads", "num_attention_heads"),
    ("num_kv_heads", "num_attention_heads"),
)
# By model type of the (sub-)configuration: what no pattern can know.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
}


def shrink(config: Any, max_layers: int | None = None) -> Any:
    """A configuration of the same class with small widths.

    With `max_layers` it has fewer layers too: the first of every kind that per-layer lists tell apart, and at least two.
    """
    return type(config).from_dict(_shrunk(config.to_dict(), max_layers))


def discover_by_twin(model: Any) -> Architecture:
    """The architecture of a model that cannot be run (on the meta device, or too large), found on its tiny twin.

    Gains are those of the model's own norms and cannot be measured without it: they are None. Raises as `discover` does.
    """
    found = discover(auto_class(model.config).from_config(shrink(model.config)).float().eval())
    layers = model.get_submodule(found.layers_name)
    writers = []
    for writer in found.writers:
        module, storage = model.get_submodule(writer.name), writer.storage
        if storage.n_experts is not None and storage.weight is not None and getattr(module, storage.weight).dim() == 3:
            storage = replace(storage, n_experts=len(getattr(module, storage.weight)))
        writers.append(replace(writer, module=module, storage=storage, gain=None))
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    return Architecture(hidden_size, found.layers_name, tuple(layers), tuple(writers), found.stream_axis)


def _shrunk(values: dict[str, Any], max_layers: int | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    n_layers = next((v for k, v in values.items() if re.fullmatch(LAYERS, k) and type(v) is int), None)
    if n_layers is None and "layers_block_type" in values:  # the only place where some types say how many there are
        n_layers = len(values["layers_block_type"])
    kept = None if max_layers is None or n_layers is None else _kept_layers(values, n_layers, max_layers)
    for name, value in values.items():
        if kept is not None and name == "per_layer_config":
            result[name] = {str(kept.index(int(i))): _shrunk(v, max_layers) for i, v in value.items() if int(i) in kept}
        elif isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            result[name] = _shrunk(value, max_layers)
        elif isinstance(value, dict) and "mrope_section" in value:
            result[name] = value | {"mrope_section": _small_sections(values, value["mrope_section"])}
        elif kept is not None and isinstance(value, list) and len(value) == n_layers:
            result[name] = [_small(name, value[i]) for i in kept]
        elif kept is not None and re.fullmatch(LAYERS, name):
            result[name] = len(kept)
        else:
            result[name] = _small(name, value)
    for name, other in EQUAL:
        if values.get(name) is not None and values[name] == values.get(other):
            result[name] = result[other]
    if kept is not None and len(kept) < (n_layers or 0):
        result |= dict.fromkeys(result.keys() & {"num_kv_shared_layers"}, 0)
    return result | EXCEPTIONS.get(str(values.get("model_type")), {})


def _small_sections(values: dict[str, Any], sections: list[int]) -> list[int]:
    """Rotary frequencies per axis, in the proportion to the head's size that they had."""
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    total = sum(sections) * (HIDDEN // HEADS) // head_dim
    twice = max(set(sections), key=sections.count)
    third = max(1, 3 * total // 8)
    return [third if section == twice else total - 2 * third for section in sections]


def _small(name: str, value: Any) -> Any:
    if type(value) is not int or value == 0:
        return value
    if name.endswith("token_id"):
        return value % 100
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return size(value) if callable(size) else size


def _kept_layers(values: dict[str, Any], n_layers: int, max_layers: int) -> list[int]:
    """The first layer of every kind, in order, and others to make two."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == n_layers]
    kinds: dict[Any, int] = {}
    for i in range(n_layers):
        kinds.setdefault(tuple(str(value[i]) for value in lists), i)
    firsts = sorted(kinds.values())[:max_layers] if lists else list(range(min(max_layers, n_layers)))
    others = [i for i in range(n_layers) if i not in firsts]
    return sorted(firsts + others[: max(0, 2 - len(firsts))])
