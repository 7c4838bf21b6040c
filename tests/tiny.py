"""Two-layer models with random weights and a word-level chat tokenizer, built in the test; and the edit written out in float64."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

WORDS = "the a cat dog sat on mat how do i bake bread and fix my bike hello you are helpful assistant . ? ! sorry yes no".split()
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
DROPS_SYSTEM_TEMPLATE = TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
NO_SYSTEM_TEMPLATE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
SPECIAL = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]

SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}

_VISION_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Types with a vision tower: the type of the text part, what it needs besides `SIZES`, the vision part, and the rest.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_QWEN_VISION = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 40}
VISION: dict[str, tuple[str | None, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ("llama", {}, {"model_type": "clip_vision_model", "projection_dim": 24, **_VISION_SIZES}, {"image_token_index": 5}),
    "gemma3": ("gemma3_text", {}, {"model_type": "siglip_vision_model", **_VISION_SIZES}, {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {}, {"model_type": "pixtral", "head_dim": 12, **_VISION_SIZES}, {}),
    "qwen2_5_vl": (None, _MROPE, _QWEN_VISION, {}),
}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    result.chat_template = template
    return result


def build(model_type: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of a type with random weights large enough that responses differ, and random norm gains and biases."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**_config_arguments(model_type, changes))
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model.to(dtype).eval()


def _config_arguments(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    if model_type not in VISION:
        return {**SIZES, **changes}
    text_type, text_extra, vision, rest = VISION[model_type]
    text = {**SIZES, **text_extra, **changes} | ({} if text_type is None else {"model_type": text_type})
    return {"text_config": text, "vision_config": dict(vision), **rest}


def save(folder: Path, model: Any, template: str | None = TEMPLATE) -> Path:
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def unit_directions(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """`(n, size)` random unit vectors in float64."""
    rows = np.random.default_rng(seed).normal(size=(n, size))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def explicit_weight(weight: Any, direction: Any, strength: float, mode: str) -> np.ndarray[Any, Any]:
    """`W'` as the definition says, with every matrix written out, in float64 and in NumPy."""
    W, r = _float64(weight), _float64(direction)
    projection = np.outer(r, r)
    if mode == "none":
        return W - strength * projection @ W
    norms = np.sqrt((W**2).sum(axis=1))
    normalized = np.stack([row / norm if norm else row for row, norm in zip(W, norms, strict=True)])
    if mode == "pre":
        return W - strength * np.diag(norms) @ projection @ normalized
    assert mode == "full"
    edited = normalized - strength * projection @ normalized
    lengths = np.sqrt((edited**2).sum(axis=1))
    return np.stack([norm * (row / length if length else row) for row, norm, length in zip(edited, norms, lengths, strict=True)])


def explicit_bias(bias: Any, direction: Any, strength: float) -> np.ndarray[Any, Any]:
    """`b'` as the definition says, in float64 and in NumPy."""
    b, r = _float64(bias), _float64(direction)
    return b - strength * np.outer(r, r) @ b


def _float64(values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def settings(folder: Path | str, **changes: Any) -> Any:
    """Settings for a model folder, with short responses and float32."""
    from heretic.config import Settings

    return Settings(**{"model": str(folder), "dtypes": ["float32"], "max_response_length": 12, **changes})


def load(folder: Path | str, progress: Any = None, **changes: Any) -> Any:
    """A saved model, loaded as the program does."""
    from heretic.loading.load import load_model
    from heretic.loading.source import model_source
    from heretic.model import Model
    from heretic.utils import SilentProgress

    chosen, progress = settings(folder, **changes), progress or SilentProgress()
    return Model(load_model(chosen, model_source(chosen), progress), chosen, progress)


def loud(model: Any) -> Any:
    """A model whose MLPs write so much that a strength of 1e38 takes float32 beyond its range, and no ordinary one does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.mul_(1000)
    return model


class Recorder:
    """A progress that keeps what is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.tasks: list[tuple[str, int | None, list[int]]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        units: list[int] = []
        self.tasks.append((description, total, units))
        yield units.append
