"""A folder that appears in its place all at once: written beside it under another name, and renamed when it is complete.

What a killed process left is known by its name and by the lock that nobody holds any more; the next one puts back what was on its way
out and deletes the rest.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import ExportError
from ..loading.source import expand

_LOCK, _NEW, _OLD = "lock", "new", "replaced"


def _prefix(target: Path) -> str:
    return f".{target.name}.heretic-"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder to be filled, which becomes `target` when the block is left without an error, and else is deleted.

    What was at `target` is replaced; where that fails, it comes back.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    clean_up(target)
    place = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=parent))
    try:
        with FileLock(place / _LOCK):
            folder = place / _NEW
            folder.mkdir()
            yield folder
            _put_in_place(folder, target, place / _OLD)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _put_in_place(folder: Path, target: Path, replaced: Path) -> None:
    """Move `folder` to `target`; what was there goes to `replaced`, and back again where that fails."""
    if target.exists():
        target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    _flush_folder(target.absolute().parent)


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk once the folder is; not every system lets folders be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def clean_up(target: Path) -> None:
    """Delete what processes that are no more left beside `target`; a folder that they had moved away comes back first."""
    parent = target.absolute().parent
    if not parent.is_dir():
        return
    for place in parent.glob(f"{_prefix(target)}*"):
        try:
            with FileLock(place / _LOCK, blocking=False):
                if (place / _OLD).exists() and not target.exists():
                    (place / _OLD).rename(target)
        except Timeout:  # at work
            continue
        shutil.rmtree(place, ignore_errors=True)


def check_target(directory: str, overwrite: bool) -> Path:
    """The folder to save to. Raises `ExportError` where it holds something that must not be replaced."""
    target = expand(directory)
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file. Choose another --save-directory.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ExportError(f"The folder {target} is not empty. Choose another --save-directory, or add --overwrite to replace it.")
    return target
