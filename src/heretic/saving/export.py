"""Export of a trial: a model folder or an adapter, with model card and record.

A model folder is a copy of the original's in which only the edited tensors are rewritten: each is read from the original's files, edited
in float32 and rounded once to its own dtype, whatever dtype or quantization the search used. Everything else is copied byte for byte. No
model is loaded for this.
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

# A file that is read again is reopened after this many bytes, to limit the memory that its mapped pages take.
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
    """Write the model or adapter to a temporary folder next to the target, verify it, and rename it.

    `check` is called with the folder of the saved model and returns further entries of the record; whatever it finds, the model is kept.
    Raises `ExportError` if the target must not be replaced or cannot be written, or if an edited parameter is not found in the original's
    files. Then nothing is left behind.
    """
    settings = result.settings
    target = target_of(settings, directory, overwrite)
    original = open_original(model.loaded.source, progress, settings)
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
        try:
            replace_file(target.path / RECORD, record_text({**content, **found, "files": files}))
        except OSError as error:
            progress.warning(f"The KL divergence of the saved model was not added to {target.path / RECORD}: {error.strerror or error}")
    return target.path


def write_export(
    original: Original,
    edits: Sequence[Edit],
    settings: Settings,
    strategy: Strategy,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, str], JsonObject]:
    """Write the edited model, or its adapter, with all other files of the original that belong to it.

    Returns the SHA-256 of files that were hashed while they were written, and the record's entries about an adapter.
    """
    if strategy == "merge":
        changes = Changes(original, edits, settings.row_normalization)
        return write_model(original, changes, folder, settings.max_shard_size, progress), {}
    adapter = save_adapter(original, edits, settings.row_normalization, settings.full_normalization_lora_rank, folder, progress)
    # A freshly loaded tokenizer, since ours pads on the left.
    AutoTokenizer.from_pretrained(original.source.path, **original.source.arguments).save_pretrained(folder)
    return {}, {"adapter": adapter}


def write_record(content: JsonObject, folder: Path, hashes: dict[str, str]) -> dict[str, str]:
    """Write `heretic.json` with the SHA-256 of every other file, and return these; `hashes` are those already known."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    files = {name: hashes.get(name) or sha256(path) for path in paths for name in [path.relative_to(folder).as_posix()]}
    (folder / RECORD).write_bytes(record_text({**content, "files": files}))
    return files


def record_text(content: JsonObject) -> bytes:
    """The content of `heretic.json`."""
    return (json.dumps(content, indent=2) + "\n").encode()


@contextlib.contextmanager
def file_errors(target: Path) -> Iterator[None]:
    """Context that turns errors of writing into `ExportError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as its own exception type that contains the system's message.
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(
            f"{target} cannot be written: {reason}. Nothing was left there; the study is safe. Free some space or choose another "
            "--save-directory, then save again."
        ) from error


class Changes:
    """The stored tensors that edits change, each computed on request.

    Raises `ExportError` if an edited parameter is not in the original's files. `digests` are the hashes of those computed so far.
    """

    def __init__(self, original: Original, edits: Sequence[Edit], mode: RowNormalization) -> None:
        self.digests: dict[str, str] = {}
        self._placements = original.placements
        self._mode = mode
        self._changed: dict[str, tuple[Piece, list[Callable[[Tensor], Tensor]]]] = {}
        self._latest: dict[str, Tensor] = {}  # results of one piece, for tensors that are converted together
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
                    f"{entry[0].parameter} and {piece.parameter} are stored as one tensor, {name}. Both are edited, which cannot be "
                    "saved. Nothing was written; the study is safe."
                )
        entry[1].append(change)

    @property
    def names(self) -> set[str]:
        """Names of the stored tensors that are changed."""
        return set(self._changed)

    def __call__(self, name: str) -> Tensor | None:
        """The tensor to store in place of the original's; None if it is unchanged."""
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
    """Write and verify the model's files. Returns the SHA-256 of each. Without `max_shard_size` the original's sharding is kept."""
    stored = original.stored if max_shard_size is None else resharded(original.stored, max_shard_size)
    n_tensors = sum(len(shard.tensors) for shard in stored.shards)
    with progress.task(f"Writing {n_tensors} tensors, {len(changes.names)} of them edited", n_tensors) as advance:
        hashes = write_stored(stored, folder, changes, advance)
    weights = getattr(original.config, "transformers_weights", None)
    untrue = {"quantization_config": original.dequantized, "transformers_weights": weights is not None and weights not in hashes}
    for name in original.files:
        hashes[name] = copy_file(original.folder / name, folder / name)
    if any(untrue.values()):
        path = folder / CONFIG_NAME
        config = {key: value for key, value in json.loads(path.read_bytes()).items() if not untrue.get(key)}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        hashes[path.name] = sha256(path)
    with progress.task("Verifying the written files", len(changes.names)) as advance:
        check_written(folder, {shard.name: {t.name for t in shard.tensors} for shard in stored.shards}, changes.digests, advance)
    return hashes


def check_written(folder: Path, shards: dict[str, set[str]], digests: dict[str, str], advance: Callable[[int], None]) -> None:
    """Open the files again and compare every edited tensor with the computed one. Raises `ExportError` if they differ."""
    for name, tensors in shards.items():
        todo = sorted(tensors & digests.keys())
        while True:
            with safe_open(folder / name, "pt") as file:
                if set(file.keys()) != tensors:
                    raise ExportError(f"{name} does not contain the tensors that were written to it. Check the disk. The study is safe.")
                n_bytes = 0
                while todo and n_bytes < REOPEN_BYTES:
                    content = bytes_of(file.get_tensor(todo[0]))
                    n_bytes += len(content)
                    if xxh3_128_hexdigest(content) != digests[todo[0]]:
                        raise ExportError(f"{todo[0]} in {name} differs from what was written. Check the disk. The study is safe.")
                    del content, todo[0]
                    advance(1)
            if not todo:
                break


def compare_with_loaded(original: Original, edits: Sequence[Edit], model: Model) -> None:
    """Compare a part of every edited parameter in the files with the loaded model's, unless that is quantized.

    Raises `ExportError` if they differ: then a wrong stored tensor was found for the parameter, or the files have changed.
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
                        f"{parameter} in the files of {model.loaded.source.name} differs from the loaded model: the files have changed "
                        "since, or have an unknown layout. Nothing was written; the study is safe."
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
        # A dequantized weight has another precision in the files than in a search that uses another dtype.
        rtol = DEQUANTIZED_ROUNDING if original.dequantized else 0.0
        if not torch.allclose(value.to(loaded.dtype), part.cpu(), rtol=rtol, atol=0, equal_nan=True):
            return False
    return True


def give_usual_permissions(folder: Path) -> None:
    """Give every file the default permissions of new files: safetensors makes its files readable by the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
