"""The source of a model. Imports nothing heavy, so that a mistyped name is reported at once."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from .. import demo
from ..config import DEMO_MODEL, Settings
from ..errors import ModelError

_HUB_ID = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?", re.ASCII)
SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class ModelSource:
    """The source of a model: the path for transformers, and the model's name.

    `gguf`: the name of a GGUF file. Until that is dequantized (`gguf.dequantized_source`) the path is its own, or a hub id.
    """

    path: str
    name: str
    revision: str | None
    trust_remote_code: bool
    gguf: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a local folder."""
        return Path(self.path).is_dir()

    @property
    def repository(self) -> str | None:
        """The hub id; None for a local model."""
        if self.gguf is not None:
            return self.name if self.revision is not None else None
        return None if self.is_local else self.path

    def pinned(self) -> "ModelSource":
        """The same source pinned to the commit that was loaded, so that the same files are read later."""
        return replace(self, revision=hub_commit(self) or self.revision)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every `from_pretrained` of this source takes."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def expand(path: str) -> Path:
    """A path with `~` expanded; unchanged if that user does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id: it has the form of one, and no local file or folder has this name."""
    return _HUB_ID.fullmatch(name) is not None and not expand(name).exists()


def model_source(settings: Settings, name: str | None = None) -> ModelSource:
    """The source of a model name (default: `settings.model`).

    Raises `ModelError` for a path that is not a model folder.
    """
    name = name or settings.model
    revision, gguf = (settings.model_commit, settings.gguf_file) if name == settings.model else (None, None)
    if name == DEMO_MODEL and settings.demo:
        return ModelSource(str(demo.MODEL), DEMO_MODEL, None, False)
    path = expand(name)
    if path.is_dir():
        if gguf is not None:
            if not (path / gguf).is_file():
                raise ModelError(f"The folder {name} has no file {gguf}. Check --gguf-file.")
            return ModelSource(str(path / gguf), name, None, settings.trust_remote_code, gguf)
        if not (path / "config.json").is_file():
            hint = " It contains an adapter, not a model." if (path / "adapter_config.json").is_file() else ""
            files = sorted(file.name for file in path.glob("*.gguf"))
            hint = f" It contains GGUF files; choose one with --gguf-file, such as {files[0]}." if files else hint
            raise ModelError(f"{name} is not a model folder: it has no config.json.{hint}")
        return ModelSource(str(path), name, revision, settings.trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file. Give the model's folder, a GGUF file, or a hub id.")
        return ModelSource(str(path), name, None, settings.trust_remote_code, path.name)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"The folder {name} does not exist. Check the path (a hub id has the form owner/name).")
    return ModelSource(name, name, revision, settings.trust_remote_code, gguf)


def hub_commit(source: ModelSource) -> str | None:
    """The commit of a loaded hub model; None for a local folder."""
    if source.is_local:
        return None
    file = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return Path(file).parent.name if isinstance(file, str) else None  # .../snapshots/<commit>/config.json


def dataset_commit(dataset: str, revision: str | None) -> str | None:
    """The commit of a loaded hub dataset, as recorded in the cache; None for files and folders."""
    if dataset.startswith(demo.PREFIX) or expand(dataset).exists() or not _HUB_ID.fullmatch(dataset):
        return None
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset")
    note = repository / "refs" / (revision or "main")
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return revision


def fingerprint(source: ModelSource) -> str:
    """A fingerprint by which a resumed run recognizes the model: the hub commit, or sampled hashes of a folder's files."""
    folder = Path(source.path)
    if not source.is_local:
        return hub_commit(source) or "unknown"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    return " ".join(f"{path.name}:{sampled_hash(path)}" for path in files)


def sampled_hash(path: Path) -> str:
    """A hash of a file's size, start, middle and end, since reading whole files would take minutes. Files of the same size that differ
    only elsewhere have the same."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
