"""What a run leaves: a model folder or an adapter, with card and record.

A model folder is the original's with only the edited tensors rewritten: each is read from the original's files, edited in float32
and rounded once to its own number format, whatever format or quantization the search used. Everything else is copied byte for byte. No
model is loaded for it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME
from xxhash import xxh3_128_hexdigest

from ..config import Settings
from ..editing.ablation import RowNormalization, edit_bias
from ..editing.hooks import edit_stored
from ..errors import ExportError
from ..model import Model
from ..utils import JsonObject, Progress
from . import DIRECTIONS, RECORD
from .adapter import save_adapter
from .card import write_card
from .edits import Edit, edits_of, save_edits
from .hashed_file import copy_file, sha256
from .original import Original, open_original
from .placement import Piece
from .record import Result, Strategy, record
from .staging import replace_file, staged, target_of
from .stored import bytes_of, resharded, write_stored

# How much of a file that is read again may stay in memory before it is opened anew.
REOPEN_BYTES = 2**29
COMPARED_ROWS = 16
DEQUANTIZED_ROUNDING = 2**-7


def save(
    model: Model,
    result: Result,
    strategy: Strategy,
    directory: str,
    overwrite: bool,
    progress: Progress,
    check: Callable[[Path], JsonObject] = lambda folder: {},
) -> Path:
    """Write the model or adapter to a folder beside the target, and rename it when it is complete and has been read again.

    `check` is given the saved model's folder, and gives what the record is to say of it besides; the model stays whatever it finds.
    Raises `ExportError` where the target must not be replaced or cannot be written, and where an edited parameter is not found in
    the original's files; then nothing is left behind.
    """
    settings = result.settings
    target = target_of(settings, directory, overwrite)
    original = open_original(model.loaded.source, progress)
    edits = edits_of(model, result.ablation)
    with file_errors(target.path), staged(target) as folder:
        if strategy == "merge":
            compare_with_loaded(original, edits, model)
        hashes, more = write_export(original, edits, settings, strategy, folder, progress)
        save_edits(edits, model.directions, folder / DIRECTIONS)
        write_card(model, result, strategy, folder, progress)
        content = {**record(model, result, strategy), **more}
        files = write_record(content, folder, hashes)
        give_usual_permissions(folder)
    if strategy == "merge" and (found := check(target.path)):
        with file_errors(target.path):
            replace_file(target.path / RECORD, record_text({**content, **found, "files": files}))
    return target.path


def write_export(
    original: Original,
    edits: Sequence[Edit],
    settings: Settings,
    strategy: Strategy,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, str], JsonObject]:
    """Write the edited model, or its adapter, with all files of the original's that belong to it.

    Returns the SHA-256 of files that were hashed while they were written, and what the record says of an adapter.
    """
    if strategy == "merge":
        changes = Changes(original, edits, settings.row_normalization)
        return write_model(original, changes, folder, settings.max_shard_size, progress), {}
    adapter = save_adapter(original, edits, settings.row_normalization, settings.full_normalization_lora_rank, folder, progress)
    # The tokenizer anew: ours pads on the left.
    AutoTokenizer.from_pretrained(original.source.path, **original.source.arguments).save_pretrained(folder)
    return {}, {"adapter": adapter}


def write_record(content: JsonObject, folder: Path, hashes: dict[str, str]) -> dict[str, str]:
    """Write `heretic.json` with the SHA-256 of every other file, which are returned; `hashes` are those that are known."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    files = {name: hashes.get(name) or sha256(path) for path in paths for name in [path.relative_to(folder).as_posix()]}
    (folder / RECORD).write_bytes(record_text({**content, "files": files}))
    return files


def record_text(content: JsonObject) -> bytes:
    """The content of `heretic.json`."""
    return (json.dumps(content, indent=2) + "\n").encode()


@contextlib.contextmanager
def file_errors(target: Path) -> Iterator[None]:
    """Errors of writing as `ExportError`."""
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


class Changes:
    """The stored tensors that edits change, each computed when it is asked for.

    Raises `ExportError` where an edited parameter is not in the original's files. `digests` are the XXH3 of those computed so far.
    """

    def __init__(self, original: Original, edits: Sequence[Edit], mode: RowNormalization) -> None:
        self.digests: dict[str, str] = {}
        self._placements = original.placements
        self._mode = mode
        self._changed: dict[str, tuple[Piece, list[Callable[[Tensor], Tensor]]]] = {}
        self._latest: dict[str, Tensor] = {}  # what one piece gave, for tensors that are converted together
        for edit in edits:
            for parameter, change in ((edit.weight, self._weight_change(edit)), (edit.bias, self._bias_change(edit))):
                for piece in () if parameter is None else self._placements.place(parameter).pieces:
                    self._add(piece, change)

    def _weight_change(self, edit: Edit) -> Callable[[Tensor], Tensor]:
        return lambda weight: edit_stored(edit.storage, weight, edit.direction, edit.strength, self._mode)

    def _bias_change(self, edit: Edit) -> Callable[[Tensor], Tensor]:
        return lambda bias: edit_bias(bias, edit.direction, edit.strength).to(bias.dtype)

    def _add(self, piece: Piece, change: Callable[[Tensor], Tensor]) -> None:
        entry: tuple[Piece, list[Callable[[Tensor], Tensor]]] = (piece, [])
        for name in piece.names:
            entry = self._changed.setdefault(name, entry)
            if entry[0].parameter != piece.parameter:
                raise ExportError(
                    f"{entry[0].parameter} and {piece.parameter} are stored as one tensor, {name}, and both are edited, which cannot be "
                    "saved. Nothing was written; the study is safe."
                )
        entry[1].append(change)

    @property
    def names(self) -> set[str]:
        """Names of the stored tensors that change."""
        return set(self._changed)

    def __call__(self, name: str) -> Tensor | None:
        """The tensor that is to be stored in place of the original's, None where that stays."""
        if name not in self._changed:
            return None
        if name not in self._latest:
            piece, changes = self._changed[name]
            value = self._placements.read(piece)
            for change in changes:
                value = change(value)
            self._latest = self._placements.stored(piece, value)
        tensor = self._placements.tensors[name].round(self._latest.pop(name)).contiguous()
        self.digests[name] = xxh3_128_hexdigest(bytes_of(tensor))
        return tensor


def write_model(original: Original, changes: Changes, folder: Path, max_shard_size: str | int | None, progress: Progress) -> dict[str, str]:
    """Write the model's files and check them; the SHA-256 of each. The original's files are kept as they are without `max_shard_size`."""
    stored = original.stored if max_shard_size is None else resharded(original.stored, max_shard_size)
    n_tensors = sum(len(shard.tensors) for shard in stored.shards)
    with progress.task(f"Writing {n_tensors} tensors, {len(changes.names)} of them edited", n_tensors) as advance:
        hashes = write_stored(stored, folder, changes, advance)
    for name in original.files:
        hashes[name] = copy_file(original.folder / name, folder / name)
    if original.dequantized:
        path = folder / CONFIG_NAME
        config = json.loads(path.read_bytes())
        config.pop("quantization_config", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        hashes[path.name] = sha256(path)
    with progress.task("Checking what was written", len(changes.names)) as advance:
        check_written(folder, {shard.name: {t.name for t in shard.tensors} for shard in stored.shards}, changes.digests, advance)
    return hashes


def check_written(folder: Path, shards: dict[str, set[str]], digests: dict[str, str], advance: Callable[[int], None]) -> None:
    """Open the files again and compare every edited tensor with what was to be written. Raises `ExportError` where they differ."""
    for name, tensors in shards.items():
        todo = sorted(tensors & digests.keys())
        while True:
            with safe_open(folder / name, "pt") as file:
                if set(file.keys()) != tensors:
                    raise ExportError(f"{name} does not hold the tensors that were written to it. Is the disk sound? The study is safe.")
                n_bytes = 0
                while todo and n_bytes < REOPEN_BYTES:
                    content = bytes_of(file.get_tensor(todo[0]))
                    n_bytes += len(content)
                    if xxh3_128_hexdigest(content) != digests[todo[0]]:
                        raise ExportError(f"{todo[0]} is not in {name} as it was written. Is the disk sound? The study is safe.")
                    del content, todo[0]
                    advance(1)
            if not todo:
                break


def compare_with_loaded(original: Original, edits: Sequence[Edit], model: Model) -> None:
    """Compare a part of every edited parameter in the files with the loaded model's, where that is not quantized.

    Raises `ExportError` where they differ: then the parameter was not found where it lies, or the files have changed.
    """
    for edit in edits:
        module = model.model.get_submodule(edit.module)
        with align_module_device(module):
            for parameter in (edit.weight, edit.bias):
                if parameter is None:
                    continue
                loaded = getattr(module, parameter.rpartition(".")[2]).detach()
                if loaded.is_floating_point() and loaded.element_size() > 1 and not _agrees(original, parameter, loaded):
                    raise ExportError(
                        f"{parameter} is not the same in the files of {model.loaded.source.name} as in the model that was searched: they "
                        "have changed since, or are laid out in a way that is not known. Nothing was written; the study is safe."
                    )


def _agrees(original: Original, parameter: str, loaded: Tensor) -> bool:
    pieces = original.pieces(parameter)
    for piece in {pieces[0], pieces[-1]}:
        if piece.converter is None:
            n_rows = None if loaded.dim() == 1 else COMPARED_ROWS if loaded.dim() == 2 else 1
            value, part = original.placements.tensors[piece.names[0]].read(slice(0, n_rows)), loaded[slice(0, n_rows)]
        else:
            value = original.placements.read(piece)
            part = loaded if piece.index is None else loaded[piece.index][None]
        # A dequantized weight is rounded to its number format in the files and not in a search in another one.
        rtol = DEQUANTIZED_ROUNDING if original.dequantized else 0.0
        if not torch.allclose(value.to(loaded.dtype), part.cpu(), rtol=rtol, atol=0, equal_nan=True):
            return False
    return True


def give_usual_permissions(folder: Path) -> None:
    """Give every file the permissions that new files usually have: safetensors writes its own for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
