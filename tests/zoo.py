"""Every type that transformers' own mappings call a language model, built tiny and with random weights."""

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from heretic.loading.load import auto_class
from twin import shrink

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MULTIMODAL = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
# Types that transformers 5.17 builds in another way than later versions, or does not build for another reason.
CHANGED = {"diffusion_gemma", "doge", "gemma4_assistant", "gemma4_unified_assistant", "granite4_vision", "musicgen", "musicgen_melody"}
CHANGED |= {"vision-encoder-decoder"}
TYPES = sorted({*CAUSAL, *IMAGE, *MULTIMODAL} - (CHANGED if Version(transformers.__version__) < Version("5.18") else set()))

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16, "indexer_compress_ratio": 4}


def _sections(sections: list[int], partial: float = 1.0) -> dict[str, Any]:
    return {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": sections, "partial_rotary_factor": partial}}}


# What the configurations' own defaults leave out.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE, "head_dim": 128},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE, "head_dim": 128},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]}, "head_dim": 128}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64},
    },
    "chameleon": {"vocabulary_map": {"<image>": 4}, "vq_config": {"base_channels": 32, "num_embeddings": 128}},
    "emu3": {"vocabulary_map": {"<image>": 4}, "vq_config": {"base_channels": 32, "codebook_size": 128}},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 128}},
    "muse_spark": {"audio_config": {"hidden_sizes": [16, 16, 32, 32]}},
    "vibevoice_asr": {f"{part}_tokenizer_encoder_config": {"num_filters": 2} for part in ("acoustic", "semantic")},
    "ministral": {"rope_parameters": _ROPE, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "bamba": {"attn_layer_indices": [2]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "nemotron": {"num_key_value_heads": 12},
    **{t: _sections([8, 12, 12], 0.5) for t in ("glm4v", "glm46v", "glmga")},
    "glm_ocr": _sections([4, 6, 6], 0.5),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]}, "head_dim": 128}},
    "step3p7": {"text_config": {"sliding_window": 512}},
    **{t: _sections([16, 24, 24]) for t in ("paddleocr_vl", "qwen2_vl", "qwen2_5_vl")},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_hidden_layers": 12, "num_experts_per_tok": 2}},
    "cohere_compass": {"text_config": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [22, 22, 20]}}},
    "zamba": {"num_hidden_layers": 8},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
}


LAYERS: dict[str, int | None] = {"zamba": None, "zamba2": None, "jamba": 6}


def build(model_type: str, max_layers: int | None = 4) -> Any:
    config = CONFIG_MAPPING[model_type](**ARGUMENTS.get(model_type, {}))
    torch.manual_seed(0)
    model = auto_class(config).from_config(shrink(config, LAYERS.get(model_type, max_layers))).float().eval()
    with torch.no_grad():  # gains that are not 1 and biases that are not 0, as in trained models
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# What no edit of weights can follow: the ablation works on these types, but only approximately.
_NORMALIZES = "the stream itself is normalized, with a gain and a bias"
INEXACT = {
    "doge": "the stream's channels are scaled",
    "gemma3n_text": "the normalized stream is added to the stream",
    "git": _NORMALIZES,
    "inkling2": "a convolution follows the writers",
    "inkling2_text": "a convolution follows the writers",
    "inkling_mm_model": "a convolution follows the writers",
    "inkling_text": "a convolution follows the writers",
    "longcat_flash": "some experts pass their input on",
    "minimax": "the normalized stream is added to the stream",
    "muse_spark": "a gate follows the writers",
    "openai-gpt": _NORMALIZES,
    "roc_bert": _NORMALIZES,
    "rwkv": "a gate follows the feed-forward's writer",
    "trocr": _NORMALIZES,
    "zaya": "the stream's channels are scaled",
}

# What `uv run pytest` builds of the types; .ci/run builds all.
COMMON = {"gemma2", "gpt2", "gpt_oss", "llama", "mamba", "mistral", "mixtral", "phi3", "qwen2", "qwen3_moe"}
# `generate` itself fails on these, as they are built here.
NOT_GENERATED = {"hrm_text", "xlstm"}

# Types that transformers does not build from its own default configuration made small, and words from what it says.
NOT_BUILT = {
    "diffusion_gemma": "argument 'size'",
    "dots3_note": "SWA head_dim",
    "dots3_note_text": "SWA head_dim",
    "evolla": "Unrecognized configuration class",
    "fast_vlm": "requires the PIL library",
    "fun_asr_nano": "intermediate_size",
    "gemma3n": "requires the PIL library",
    "gemma4_assistant": "hidden_size_per_layer_input",
    "gemma4_unified_assistant": "layer types",
    "granite4_vision": "NoneType",
    "kyutai_speech_to_text": "in_channels",
    "molmo2": "vision_feature_layer",
    "musicgen": "dropout",
    "musicgen_melody": "dropout",
    "perception_lm": "requires the PIL library",
    "qwen3_omni_moe": "shared_expert_intermediate_size",
    "reformer": "is_decoder",
}
# Types that do not run on text alone, as they are built here, and words from what they say.
NOT_RUN = {
    "blip": "pixel_values",
    "blip-2": "pixel_values",
    "instructblip": "pixel_values",
    "instructblipvideo": "pixel_values",
    "kosmos-2": "pixel_values",
    "idefics": "pixel_values",
    "pi0": "state",
    "voxtral_realtime": "input_features",
    "qwen2_5_omni": "get_input_embeddings",
    "qwen2_5_omni_thinker": "vision_start_token_id",
    "qwen3_omni_moe_thinker": "vision_start_token_id",
    "xmod": "Input language unknown",
    "blt": "cannot be multiplied",
}
# In these every token sees those after it.
ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "cpmant",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "prophetnet",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
]


# Older versions of transformers lack the newest types.
STALE = sorted({*INEXACT, *NOT_BUILT, *NOT_RUN, *ENCODERS} - {*TYPES})
for names in (INEXACT, NOT_BUILT, NOT_RUN):
    for name in names.keys() & {*STALE}:
        del names[name]
ENCODERS = [t for t in ENCODERS if t in TYPES]


def _is_encoder_decoder(model_type: str) -> bool:
    try:
        return bool(getattr(CONFIG_MAPPING[model_type](), "is_encoder_decoder", False))
    except ValueError:  # in older versions of transformers its two parts have to be given
        return True


ENCODER_DECODERS = [t for t in TYPES if t not in {*NOT_BUILT, *ENCODERS} and _is_encoder_decoder(t)]
# A classifier of pictures on top of a decoder, which transformers does not load again from what it saves.
NOT_TEXT = ["shieldgemma2"]
DECODERS = [t for t in TYPES if t not in {*NOT_BUILT, *NOT_RUN, *NOT_TEXT, *ENCODERS, *ENCODER_DECODERS}]
