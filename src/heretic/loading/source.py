"""Where a model comes from. Imports nothing heavy, so that a mistyped name is told at once."""

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
    """Where a model comes from: what transformers is given, and the name it goes by.

    `gguf`: the name of a GGUF file. Until that is dequantized (`gguf.dequantized_source`) the path is its own, or a hub id.
    """

    path: str
    name: str
    revision: str | None
    trust_remote_code: bool
    gguf: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine."""
        return Path(self.path).is_dir()

    @property
    def repository(self) -> str | None:
        """The hub id of where it comes from; None for what is on this machine only."""
        if self.gguf is not None:
            return self.name if self.revision is not None else None
        return None if self.is_local else self.path

    def pinned(self) -> "ModelSource":
        """The same at the commit that was loaded, so that what is read later is what was read then."""
        return replace(self, revision=hub_commit(self) or self.revision)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every `from_pretrained` of this source takes."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def expand(path: str) -> Path:
    """A path with `~` for the home directory; where that is nobody's, it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_hub_id(name: str) -> bool:
    """Whether a name stands for something on the hub: it has the form, and is no file or folder here."""
    return _HUB_ID.fullmatch(name) is not None and not expand(name).exists()


def model_source(settings: Settings, name: str | None = None) -> ModelSource:
    """The source that a model setting stands for (`name`, default `settings.model`).

    Raises `ModelError` for what looks like a path where there is no folder.
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
            hint = " It holds an adapter, not a model." if (path / "adapter_config.json").is_file() else ""
            files = sorted(file.name for file in path.glob("*.gguf"))
            hint = f" It holds GGUF files; choose one with --gguf-file, such as {files[0]}." if files else hint
            raise ModelError(f"{name} is no model folder: it has no config.json.{hint}")
        return ModelSource(str(path), name, revision, settings.trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file. Give the folder that holds the model, a GGUF file, or a hub id.")
        return ModelSource(str(path), name, None, settings.trust_remote_code, path.name)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"There is no folder {name}. Check the path (a hub id has the form owner/name).")
    return ModelSource(name, name, revision, settings.trust_remote_code, gguf)


def hub_commit(source: ModelSource) -> str | None:
    """The commit of a hub model that was loaded; None for a folder."""
    if source.is_local:
        return None
    file = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return Path(file).parent.name if isinstance(file, str) else None  # .../snapshots/<commit>/config.json


def dataset_commit(dataset: str, revision: str | None) -> str | None:
    """The commit of a hub dataset that was loaded, from the cache's note of it; None for files and folders."""
    if dataset.startswith(demo.PREFIX) or expand(dataset).exists() or not _HUB_ID.fullmatch(dataset):
        return None
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset")
    note = repository / "refs" / (revision or "main")
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return revision


def fingerprint(source: ModelSource) -> str:
    """By which a resumed run knows that the model is the same: the hub commit, or samples of a folder's files."""
    folder = Path(source.path)
    if not source.is_local:
        return hub_commit(source) or "unknown"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    return " ".join(f"{path.name}:{sampled_hash(path)}" for path in files)


def sampled_hash(path: Path) -> str:
    """A hash of a file's size, start, middle and end: another training run changes them all, and reading weights takes minutes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
