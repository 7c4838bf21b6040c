"""GGUF files as originals: dequantized once into a folder that is then used as the model.

A GGUF file is a model converted for llama.cpp, usually with few bits per weight. Transformers can dequantize many architectures; the lost
precision stays lost. The folder contains the weights as safetensors in bfloat16, with configuration and tokenizer. It is in the hub's
cache, where the next run finds it. The rest of heretic does not need to know about GGUF.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils import logging

from ..errors import ModelError
from ..utils import JsonObject, Progress, first_line, some_of
from .explain import explain, refuse_encoder_decoder
from .source import ModelSource, sampled_hash

# Incremented when the written files change.
VERSION = 1


def dequantized_source(source: ModelSource, progress: Progress) -> ModelSource:
    """The folder that a GGUF source is dequantized to, created if it does not exist; other sources are returned unchanged.

    Raises `ModelError` for files that cannot be downloaded or read, and for architectures that transformers cannot read from GGUF.
    """
    if source.gguf is None or source.is_local:
        return source
    file, commit = _file_of(source, progress)
    folder = Path(HF_HOME) / "heretic" / "gguf" / f"{file.stem}-{sampled_hash(file)}-{VERSION}"
    with _errors(f"The folder {folder} cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
    with lock:
        if not folder.is_dir():
            _dequantize(source.name, file, folder, progress)
    progress.message(
        f"{source.name}: the weights of {file.name} are dequantized in {folder}. Saved models are made from these, in bfloat16."
    )
    return replace(source, path=str(folder), revision=commit)


def _file_of(source: ModelSource, progress: Progress) -> tuple[Path, str | None]:
    """The local file, and the commit if it is from the hub."""
    assert source.gguf is not None
    if Path(source.path).is_file():
        return Path(source.path), None
    try:
        with progress.task(f"Downloading {source.gguf} of {source.name}"):
            file = Path(hf_hub_download(source.path, source.gguf, revision=source.revision))
    except Exception as error:  # the hub's client raises many types
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"The model {source.name} has no file {source.gguf}. Check --gguf-file.") from error
        raise ModelError(explain(source, error)) from error
    return file, file.parts[file.parts.index("snapshots") + 1]


def _dequantize(name: str, file: Path, folder: Path, progress: Progress) -> None:
    with _reading(name, file):
        metadata, _ = read_gguf_metadata(str(file))
        _refuse_part(name, metadata)
    architecture = metadata["general.architecture"]
    with _reading(name, file):
        try:
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except ValueError as error:
            if "not supported" not in str(error):
                raise
            raise ModelError(
                f"{name} has the architecture {architecture}, which transformers cannot read from GGUF files. Use the model that it was "
                "converted from."
            ) from error
    refuse_encoder_decoder(config)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with progress.task(f"Dequantizing {file.name} (once)"), _reading(name, file), _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name} lacks weights of its architecture ({architecture}): {some_of(missing, 1)}. Use the model that it was converted from."
        )
    with _errors(f"The folder {folder} cannot be written"), _without_bars():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)


def _refuse_part(name: str, metadata: JsonObject) -> None:
    n_parts = metadata.get("split.count", 0)
    if n_parts > 1:
        raise ModelError(
            f"{name} is one of {n_parts} parts of a model. Join them with llama-gguf-split --merge, and use the resulting file."
        )


def _unreadable(name: str, file: Path, error: BaseException) -> ModelError:
    reason = first_line(error).rstrip(".").replace(f"{file} ", "it ", 1)  # the reader's messages start with the path
    return ModelError(f"{name} cannot be read as a GGUF file: {reason}. It may be incomplete: download it again.")


@contextmanager
def _reading(name: str, file: Path) -> Iterator[None]:
    """Context that turns any exception of reading a damaged file into `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # there is no list of what transformers, tokenizers and gguf raise if a file is damaged
        raise _unreadable(name, file, error) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Context without transformers' progress bars; the one for GGUF files has no switch."""
    logging.disable_progress_bar()
    reader: Any = modeling_gguf_pytorch_utils
    usual = reader.tqdm
    reader.tqdm = partial(usual, disable=True)
    try:
        yield
    finally:
        reader.tqdm = usual


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{what}: {error.strerror or error}. Free some space, or set HF_HOME to another folder.") from error
