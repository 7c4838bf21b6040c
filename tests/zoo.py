"""Every type that transformers' own mappings call a language model, built tiny and with random weights."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

from heretic.twin import shrink

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MULTIMODAL = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
TYPES = sorted({*CAUSAL, *IMAGE, *MULTIMODAL})

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
    "ministral": {"rope_parameters": _ROPE, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 12},
    **{t: _sections([8, 12, 12], 0.5) for t in ("glm4v", "glm46v", "glmga")},
    "glm_ocr": _sections([4, 6, 6], 0.5),
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]}, "head_dim": 128}},
    "step3p7": {"text_config": {"sliding_window": 512}},
    **{t: _sections([16, 24, 24]) for t in ("paddleocr_vl", "qwen2_vl", "qwen2_5_vl")},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_hidden_layers": 12, "num_experts_per_tok": 2}},
    "cohere_compass": {"text_config": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [22, 22, 20]}}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
}


LAYERS: dict[str, int | None] = {"zamba": None, "zamba2": None}


def build(model_type: str, max_layers: int | None = 4) -> Any:
    config = CONFIG_MAPPING[model_type](**ARGUMENTS.get(model_type, {}))
    if model_type in CAUSAL:
        auto: Any = AutoModelForCausalLM
    else:
        auto = AutoModelForImageTextToText if model_type in IMAGE else modeling_auto.AutoModelForMultimodalLM
    torch.manual_seed(0)
    model = auto.from_config(shrink(config, LAYERS.get(model_type, max_layers))).float().eval()
    with torch.no_grad():  # gains that are not 1 and biases that are not 0, as in trained models
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
