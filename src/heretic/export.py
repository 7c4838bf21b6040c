"""What a run leaves: a model folder or an adapter, with card and record.

The edit is computed exactly in float32 from the original weights, read again from their source, and rounded once to their own
number format, whatever format or quantization the search used.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from .ablation import edit_bias
from .adapter import save_adapter
from .answers import check_target
from .card import model_card
from .editing import edit_stored
from .errors import ExportError
from .loading import LoadedModel, auto_class
from .model import Model
from .record import Result, Strategy, record
from .utils import Progress

PROCESSOR_FILES = (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME)


def save(model: Model, result: Result, strategy: Strategy, directory: str, overwrite: bool, progress: Progress) -> Path:
    """Write the model or adapter to a temporary folder beside the target, and rename it when it is complete.

    Raises `ExportError` where the target must not be replaced or cannot be written; then nothing is left behind.
    """
    target = check_target(directory, overwrite)
    original = _read_original(model.loaded, progress)
    with _file_errors(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            _write(model, result, strategy, original, folder, progress)
            _put_in_place(folder, target, Path(temporary) / "replaced")
    return target


def _put_in_place(folder: Path, target: Path, replaced: Path) -> None:
    """Move `folder` to `target`; what was there goes to `replaced`, and back again where that fails."""
    if not target.exists():
        folder.rename(target)
        return
    target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        replaced.rename(target)
        raise


@contextlib.contextmanager
def _file_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as its own error type, with the system's message inside.
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(
            f"{target} cannot be written: {reason}. Nothing was left there; the study is safe. Free space or choose another "
            "--save-directory, then save again."
        ) from error


def _read_original(loaded: LoadedModel, progress: Progress) -> Any:
    """The model as it is stored: in its own number format, on the CPU, whatever the search used."""
    source = loaded.source
    try:
        with progress.task("Reading the original weights"):
            original = auto_class(loaded.config).from_pretrained(source.path, dtype="auto", device_map="cpu", **source.arguments)
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"The weights of {source.name} cannot be read again: {reason} The study is safe.") from error
    return original.requires_grad_(False)


def _write(model: Model, result: Result, strategy: Strategy, original: Any, folder: Path, progress: Progress) -> None:
    """Edit `original`, a fresh copy, in place, and write it or its adapter with all that belongs to it."""
    source = model.loaded.source
    if strategy == "merge":
        _merge(model, result, original, progress)
        with progress.task("Writing the model"):
            _save_model(model, original, folder, result.settings.max_shard_size)
    else:
        save_adapter(model, result, original, folder, progress)
    # The tokenizer anew: ours pads on the left.
    AutoTokenizer.from_pretrained(source.path, **source.arguments).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, result, strategy), encoding="utf-8")
    (folder / "heretic.json").write_text(json.dumps(record(model, result, strategy), indent=2) + "\n", encoding="utf-8")
    _share(folder)


def _share(folder: Path) -> None:
    """Give every file the permissions that new files usually have: safetensors writes its own for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _merge(model: Model, result: Result, original: Any, progress: Progress) -> None:
    """Edit the weights of `original`, a fresh copy, in place."""
    mode = result.settings.row_normalization
    edits = list(model.edits(result.ablation))
    with progress.task("Editing weights", len(edits)) as advance:
        for writer, r, strength in edits:
            module = original.get_submodule(writer.name)
            if writer.storage.weight is not None:
                weight = getattr(module, writer.storage.weight)
                weight.copy_(edit_stored(writer.storage, weight, r, strength, mode))
            if writer.storage.bias is not None:
                bias = getattr(module, writer.storage.bias)
                bias.copy_(edit_bias(bias, r, strength))
            advance(1)


def _save_model(model: Model, original: Any, folder: Path, max_shard_size: str | int) -> None:
    source = model.loaded.source
    original.generation_config = GenerationConfig()  # saving would reject unusual values
    original.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # The files themselves: a processor need not be loadable here, where the library for its images may be missing.
    for name in ("generation_config.json", *(PROCESSOR_FILES if auto_class(model.loaded.config) is AutoModelForImageTextToText else ())):
        file = cached_file(source.path, name, revision=source.revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)
