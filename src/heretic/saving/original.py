"""The original that an export is made from: its files, local or downloaded, and which of them belong to the copy."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.hf_api import RepoFile
from torch import Tensor
from transformers import PreTrainedConfig

from ..config import Settings
from ..errors import ExportError, ModelError
from ..loading.files import files_of_index, leads_out, plain_names
from ..loading.load import load_config, stored_dtype
from ..loading.quantized import stored_method
from ..loading.source import ModelSource, expand
from ..study.journal import journal_path
from ..study.learned_edits import artifact_folder
from ..utils import Progress, first_line, some_of
from . import CARD, DIRECTIONS, PICTURE, RECORD
from .dequantize import dequantized
from .placement import Piece, Placements, skeleton
from .stored import WEIGHT_FILES, StoredModel, open_stored

# Weights in formats that are not read here: a copy would contain the unedited weights.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tflite")
INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
# Written by the export itself.
REPLACED = (CARD, PICTURE, RECORD, DIRECTIONS)
# Other tensor files are taken for a second copy of the model if they have at least this share of its size, else for an extra part.
SECOND_COPY = 0.5


@dataclass(frozen=True)
class Original:
    """A model's folder: its tensors, the placement of parameters in them, and the other files to copy.

    `dequantized`: the files contain quantized weights, which `stored` dequantizes.
    """

    source: ModelSource
    folder: Path
    config: PreTrainedConfig
    stored: StoredModel
    placements: Placements
    files: tuple[str, ...]
    dequantized: bool

    def read(self, parameter: str) -> Tensor:
        """A complete parameter in the loaded model's layout."""
        return torch.cat([self.placements.read(piece) for piece in self.pieces(parameter)])

    def pieces(self, parameter: str) -> tuple[Piece, ...]:
        """The pieces of a parameter's first copy."""
        pieces = self.placements.place(parameter).pieces
        first = next((i for i, piece in enumerate(pieces) if i and piece.index in (None, 0)), len(pieces))
        return pieces[:first]


def open_original(source: ModelSource, progress: Progress, settings: Settings | None = None) -> Original:
    """Find everything that an export needs, without reading tensors. Missing files of a hub model are downloaded.

    `settings`: those of the run, whose own files may be in the model's folder and do not belong to the copy.
    Raises `ExportError` if the original is no longer readable.
    """
    try:
        config = load_config(source)
        model = skeleton(source, config)
        weights = getattr(config, "transformers_weights", None)
        folder = Path(source.path) if source.is_local else _fetch(source, weights, progress)
        stored = open_stored(folder, weights, model.all_tied_weights_keys)
        method = stored_method(config)
        if method is not None:
            stored = dequantized(stored, method, stored_dtype(config))
        placements = Placements(model, stored.tensors)
    except (OSError, HTTPError, ModelError) as error:
        reason = first_line(error)
        raise ExportError(f"The files of {source.name} cannot be read again: {reason} The study is safe.") from error
    own = () if settings is None else _own_places(settings, folder)
    paths = [path for path in folder.rglob("*") if path.is_file() and not any(path.resolve().is_relative_to(place) for place in own)]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    files, left_out = files_to_copy(sizes, stored.files, source.trust_remote_code)
    if left_out:
        progress.message(f"Not copied, because they contain the original's weights again or untrusted code: {some_of(left_out, 5)}")
    refuse_links(folder, [*files, *REPLACED])
    return Original(source, folder, config, stored, placements, tuple(files), method is not None)


def _own_places(settings: Settings, folder: Path) -> list[Path]:
    """Files and folders of studies, plots and settings, which a run in the model's folder reads or writes there."""
    journals = [journal_path(settings)]
    if settings.study_storage is not None and "://" not in settings.study_storage:
        journals.append(expand(settings.study_storage))
    places = [expand(settings.study_checkpoint_dir), expand(settings.residual_plot_path), *Path().glob("*.toml")]
    places += [place for journal in journals for place in (journal, artifact_folder(journal))]
    # A folder of studies may also be the model's folder, or contain it.
    return [place.resolve() for place in places if not folder.resolve().is_relative_to(place.resolve())]


def refuse_links(folder: Path, names: Sequence[str]) -> None:
    """Raise `ExportError` if files that would become part of an export are links to outside the folder."""
    if outside := [name for name in names if leads_out(folder / name, folder)]:
        raise ExportError(
            f"{folder} contains links to files elsewhere, which would be copied into the saved model: {some_of(outside, 5)}. Replace them "
            "with the files, or delete them, then save again. The study is safe."
        )


def files_to_copy(sizes: Mapping[str, int], own: frozenset[str], with_code: bool) -> tuple[list[str], list[str]]:
    """Files of a model's folder (name and size) to copy besides its weights (`own`), and files that are left out on purpose.

    Folders with earlier results, which have a record, are in neither.
    """
    results = {PurePosixPath(name).parent for name in sizes if name.endswith(f"/{RECORD}")}
    kept: list[str] = []
    left_out: list[str] = []
    extra: list[str] = []
    for name in sorted(set(sizes) - own - set(REPLACED)):
        path = PurePosixPath(name)
        if any(part.startswith(".") or part == "__pycache__" for part in path.parts) or not results.isdisjoint(path.parents):
            continue
        if _is_like(path.name, INDEXES) or (path.suffix == ".py" and not with_code):
            left_out.append(name)
        elif path.suffix == ".safetensors":
            extra.append(name)
        else:
            (left_out if _is_like(path.name, WEIGHTS) else kept).append(name)
    is_copy = sum(sizes[name] for name in extra) > SECOND_COPY * sum(sizes[name] for name in own if name in sizes)
    (left_out if is_copy else kept).extend(extra)
    return sorted(kept), sorted(left_out)


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _fetch(source: ModelSource, weights: str | None, progress: Progress) -> Path:
    """The folder of a hub model in the cache, after downloading files that loading did not need."""
    cached = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    if not isinstance(cached, str):
        raise ModelError("its configuration is no longer in the cache. Load the model again.")
    folder = Path(cached).parent
    _fetch_weights(source, weights, folder, progress)
    try:
        tree = HfApi().list_repo_tree(source.path, recursive=True, revision=source.revision)
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    except (HTTPError, OSError, OfflineModeIsEnabled) as error:
        reason = first_line(error)
        progress.message(f"The hub does not list the files of {source.name}, so those in the cache are used: {reason}")
        return folder
    own = open_stored(folder, weights).files
    missing = [name for name in files_to_copy(sizes, own, source.trust_remote_code)[0] if not (folder / name).is_file()]
    if missing:
        with progress.task(f"Downloading {len(missing)} more files of {source.name}: {some_of(missing, 5)}", len(missing)) as advance:
            for name in missing:
                hf_hub_download(source.path, name, revision=source.revision)
                advance(1)
    return folder


def _fetch_weights(source: ModelSource, weights: str | None, folder: Path, progress: Progress) -> None:
    """Download a hub model's weights if they are not in the cache, since the model was never loaded here."""
    names = WEIGHT_FILES if weights is None else plain_names([weights], f"The configuration of {source.name} (transformers_weights)")
    for name in names:
        try:
            found = folder / name if (folder / name).is_file() else Path(_download(source, name, progress))
        except EntryNotFoundError:
            continue
        if name.endswith(".index.json"):
            for file in files_of_index(found, found.read_bytes()):
                if not (folder / file).is_file():
                    _download(source, file, progress)
        return


def _download(source: ModelSource, name: str, progress: Progress) -> str:
    with progress.task(f"Downloading {name} of {source.name}"):
        return hf_hub_download(source.path, name, revision=source.revision)
