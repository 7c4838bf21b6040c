"""Checks of file names and links in a model's folder, which may be untrusted: they must not lead out of the folder."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from ..errors import ModelError


def plain_names(names: Iterable[Any], where: str) -> list[str]:
    """The file names that `where` contains. Raises `ModelError` for one that is not a plain name."""
    found = []
    for name in names:
        is_plain = isinstance(name, str) and name not in ("", ".", "..") and PurePosixPath(name).name == PureWindowsPath(name).name == name
        if not is_plain or ":" in name or "\0" in name:
            raise ModelError(f"{where} names the file {name!r}. Only plain file names in the model's own folder are allowed.")
        found.append(name)
    return found


def files_of_index(path: Path, index: bytes) -> list[str]:
    """The file names in an index of a model's weights. Raises `ModelError` if it is not a valid index."""
    try:
        names = json.loads(index)["weight_map"].values()
        found = set(plain_names(names, str(path)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a valid index of a model's files: {error}. Download the file again.") from error
    return sorted(found)


def check_indexes(folder: Path, weights: object) -> None:
    """Raise `ModelError` if loading a local model would read files outside of its folder.

    `weights`: the file named by its configuration.
    """
    names = [SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME] if weights is None else plain_names([weights], str(folder / "config.json"))
    for name in names:
        if name.endswith(".index.json") and (folder / name).is_file():
            files_of_index(folder / name, (folder / name).read_bytes())


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder leads out of it through a link; in the hub's cache, out of the model's cache folder.

    In the cache, `models--owner--name/snapshots/commit/config.json` is a link to `models--owner--name/blobs/...`.
    """
    real, inside = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    return not any(real.is_relative_to(place) for place in inside)
