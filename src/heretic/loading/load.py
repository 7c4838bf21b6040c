"""Loads a model, its tokenizer and its processor through transformers' auto classes, in the first dtype that works."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import get_max_memory
from huggingface_hub import utils as hub_utils
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..config import Settings
from ..device import empty_cache, free_memory, input_device, is_out_of_memory, memory_limits
from ..errors import ModelError
from ..utils import Progress, first_line, some_of
from .explain import explain, refuse_encoder_decoder
from .files import check_indexes
from .gguf import dequantized_source
from .quantized import cast_dequantized, loading_arguments, refuse_method, stored_method
from .source import ModelSource

PROCESSORS_TEMPLATE = "chat_template.json"
# How often the speeds of number formats are compared before one is chosen.
TRIES = 20
# Their matrices are as wide as the model, up to here: what is faster does not change any more.
MEASURED_WIDTH = 512
# How many times as fast float32 must be. Where both are about as fast, chance would choose, and the next run would have other results.
FASTER = 1.25


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its tokenizer and processor. `generation_config` is the original's; the model's is set to greedy decoding."""

    source: ModelSource
    model: PreTrainedModel
    tokenizer: Any
    config: PreTrainedConfig
    generation_config: GenerationConfig
    dtype: torch.dtype
    stored_dtype: torch.dtype
    quantized: bool

    @property
    def dtype_name(self) -> str:
        """`float32` and the like."""
        return str(self.dtype).removeprefix("torch.")


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration. It is loaded first, so its errors are those of a mistyped name."""
    try:
        return AutoConfig.from_pretrained(source.path, **source.arguments)
    except Exception as error:  # the hub's client, a damaged file and a model's own code raise what they like
        raise ModelError(explain(source, error)) from error


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class for a configuration: image-text-to-text if text is one of several modalities, causal, or any that generates text."""
    has_parts = config.get_text_config(decoder=True) is not config
    if has_parts and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def _refuse_kernels(source: ModelSource, config: PreTrainedConfig) -> None:
    """Raise `ModelError` if a configuration names a kernel from the hub (which is code) for attention or experts."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("_attn_implementation", "_experts_implementation"):
            kernel = getattr(part, name, None)
            if isinstance(kernel, str) and "/" in kernel and not source.trust_remote_code:
                raise ModelError(
                    f"The configuration of {source.name} names code from the hub, the kernel {kernel}. Read it, and if you trust it, add "
                    "--trust-remote-code."
                )


def load_model(settings: Settings, source: ModelSource, progress: Progress) -> LoadedModel:
    """Load the model in the first of `settings.dtypes` whose one-token test run gives finite logits.

    Raises `ModelError`, which lists why each dtype failed.
    """
    source = dequantized_source(source, progress)
    config = load_config(source)
    refuse_encoder_decoder(config)
    refuse_method(source.name, config)
    _refuse_kernels(source, config)
    if source.is_local:
        check_indexes(Path(source.path), getattr(config, "transformers_weights", None))
    source = source.pinned()
    tokenizer = _load_tokenizer(source)
    stored = stored_dtype(config)
    failures: list[str] = []
    lacks_memory = False
    tried: set[torch.dtype] = set()
    model: PreTrainedModel | None
    for name in settings.dtypes:
        dtype = _choose_dtype(name, config, settings, progress)
        if dtype in tried:
            continue
        tried.add(dtype)
        label = str(dtype).removeprefix("torch.")
        try:
            with progress.task(f"Loading {source.name} ({label})"):
                model = _load_weights(settings, source, config, dtype, progress)
                generation_config = _take_generation_config(model, tokenizer)
                _test_run(model, tokenizer)
        except Exception as error:  # drivers and kernels raise what they like; the next format may work
            failures.append(f"{label}: {first_line(error).rstrip('.')}")
            lacks_memory |= is_out_of_memory(error)
            progress.warning(f"Loading in {label} failed: {first_line(error)}")
            if settings.debug:
                progress.message(repr(error))
        else:
            if method := stored_method(config):
                saved_in = str(stored).removeprefix("torch.")
                progress.message(
                    f"{source.name} is stored in {method.upper()}. Its weights are dequantized: the search computes in {label}, and the "
                    f"saved model is in {saved_in}."
                )
            quantized = settings.quantization == "bnb_4bit"
            return LoadedModel(source, model, tokenizer, config, generation_config, dtype, stored, quantized)
        model = None
        empty_cache()
    hint = " Try --quantization bnb_4bit, or --max-memory." if lacks_memory else ""
    raise ModelError(f"The model {source.name} could not be loaded in any dtype. {'; '.join(failures)}.{hint}")


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    except Exception as error:  # tokenizers' own error is a plain `Exception`
        raise ModelError(f"The tokenizer of {source.name} cannot be loaded: {first_line(error)}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processors_template(source)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"The tokenizer of {source.name} has neither a padding nor an end token; add one to its files.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # so that the last position is the last prompt token in every row
    return tokenizer


def _processors_template(source: ModelSource) -> str | None:
    """The template in the file that transformers reads with processors only, which take images, too; None if there is no such file."""
    try:
        path = cached_file(source.path, PROCESSORS_TEMPLATE, revision=source.revision)
    except OSError:  # not there, and not to be had
        return None
    try:
        template: str = json.loads(Path(path or "").read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"The chat template of {source.name} cannot be read: {PROCESSORS_TEMPLATE} is not valid ({first_line(error)})."
        ) from error
    return template


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a model's files; for dequantized ones, the dtype it computes in."""
    for part in (config, config.get_text_config(decoder=True)):
        dtype = getattr(part, "dtype", None)
        if dtype is not None:
            return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
    return torch.float32


def _choose_dtype(name: str, config: PreTrainedConfig, settings: Settings, progress: Progress) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    stored = stored_dtype(config)
    on_cpu = not torch.accelerator.is_available() or settings.device_map == "cpu"
    width = min(getattr(config.get_text_config(decoder=True), "hidden_size", MEASURED_WIDTH), MEASURED_WIDTH)
    if on_cpu and stored == torch.bfloat16 and _bfloat16_is_slower(width):
        progress.message("Computing in float32, which is faster on this CPU (the model is stored in bfloat16).")
        return torch.float32
    return stored


def _bfloat16_is_slower(width: int) -> bool:
    """Whether this CPU multiplies bfloat16 matrices slower than float32 ones.

    That depends on its instructions and on the model's width: narrow ones may be slower in bfloat16 even with them. Measured in
    CPU time of one thread, the best of several tries in turn: other programs take the caches away.
    """

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(32, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        torch.nn.functional.linear(x, weight)
        start = time.thread_time()
        for _ in range(5):
            torch.nn.functional.linear(x, weight)
        return time.thread_time() - start

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tries = [(seconds(torch.bfloat16), seconds(torch.float32)) for _ in range(TRIES)]
        return min(bfloat16 for bfloat16, _ in tries) > FASTER * min(float32 for _, float32 in tries)
    finally:
        torch.set_num_threads(n_threads)


def _load_weights(
    settings: Settings, source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, progress: Progress
) -> PreTrainedModel:
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": settings.device_map, **source.arguments}
    if settings.max_memory:
        arguments["max_memory"] = {int(k) if k.isdigit() else k: v for k, v in settings.max_memory.items()}
    elif settings.device_map == "auto" and memory_limits():
        # Accelerate sees the machine's main memory, not the limit of a container or a batch system.
        arguments["max_memory"] = {**get_max_memory(), "cpu": free_memory(torch.device("cpu"))}
    arguments |= loading_arguments(config)
    if settings.quantization == "bnb_4bit":
        if stored_method(config) is not None:
            raise ModelError("the model is already quantized; remove --quantization")
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    transformers_logging.disable_progress_bar()  # progress bars of weights; the console shows a task instead
    if sys.stdout.isatty():
        hub_utils.enable_progress_bars()  # progress bars of downloads, which the line above turned off too
    with _optional_warmup():
        model, report = auto_class(config).from_pretrained(source.path, output_loading_info=True, **arguments)
    if missing := sorted(report["missing_keys"]):
        progress.warning(
            f"Missing in the model's files and randomly initialized: {some_of(missing, 1)}. "
            "Check that the files are complete and the model type is right."
        )
    if stored_method(config) is not None:
        cast_dequantized(model, dtype)
    for module in model.modules():
        # On some CPUs, 4-bit weights would be repacked at the first pass, which works only for certain shapes and cannot be undone.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval()
    model.requires_grad_(False)
    return model


@contextmanager
def _optional_warmup() -> Iterator[None]:
    """Inside, a model is loaded even if transformers fails to allocate its memory in advance, which only saves time: on a device with less
    than 1.2 GiB it asks for a negative size."""
    warmup = modeling_utils.caching_allocator_warmup

    def tried(*arguments: Any) -> None:
        with suppress(RuntimeError):
            warmup(*arguments)

    modeling_utils.caching_allocator_warmup = tried  # type: ignore[assignment]
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warmup


def _take_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Set the model to plain greedy decoding, and return its original generation configuration.

    Sampling, penalties and the like in it would make responses depend on more than the weights.
    """
    original: GenerationConfig = model.generation_config
    end_tokens = original.eos_token_id if original.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=original.bos_token_id,
        eos_token_id=end_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return original


def _test_run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False).to(input_device(model))
    with torch.no_grad():
        output = cast(Any, model).generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    if not torch.isfinite(output.logits[0]).all():
        raise ModelError("the test run returned logits that are not finite")
