"""Save directories: which folders are refused, and atomic creation of a folder.

A folder is written in a workspace next to its target, flushed to the disk, and renamed when it is complete. A workspace is identified by
a marker file, not by its name, and by a lock, which is free if its process was killed. The next run restores a folder that was being
replaced, and deletes the rest.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from huggingface_hub import constants

from ..config import Settings
from ..errors import ExportError
from ..loading.source import expand
from . import RECORD

# Contents of a workspace: the lock of the running process, the marker, the new folder, and the replaced folder.
_LOCK, _MARKER, _NEW, _OLD = "lock", "heretic.txt", "new", "replaced"
# Errors of file systems that cannot flush a folder.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
# From Linux's fcntl.h and stdio.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Target:
    """A save directory. With `overwrite` it may replace an existing folder, but never those in `kept` (description and path)."""

    path: Path
    overwrite: bool = False
    kept: tuple[tuple[str, Path], ...] = ()

    def check(self) -> None:
        """Raise `ExportError` if this folder must not or cannot be replaced. Called at the start, and again just before replacing."""
        path = self.path
        try:
            if path.is_symlink():
                raise ExportError(f"{path} is a symbolic link. Choose the folder that it leads to, {path.resolve()}, or another one.")
            if path.exists() and not path.is_dir():
                raise ExportError(f"{path} is a file. Choose another --save-directory.")
            self._check_kept()
            self._check_mounts()
            if path.is_dir() and any(path.iterdir()) and not self.overwrite:
                raise ExportError(f"The folder {path} is not empty. Choose another --save-directory, or add --overwrite.")
            self._check_parent()
        except OSError as error:
            raise _unusable(path, error) from error

    def _check_kept(self) -> None:
        cache = "the hub's cache", Path(constants.HF_HUB_CACHE)
        own = ("the working directory", Path.cwd()), ("your home directory", expand("~")), cache
        relations = [(relation, name) for name, path in (*self.kept, *own) if (relation := self._relation(path))]
        relations += [("is inside", name) for name, path in self.kept if self._is_part(path)]
        relations += [("is inside", name) for name, path in [cache] if _is_in(self.path, path)]
        if relations:
            relation, name = relations[0]
            raise ExportError(f"{self.path} {relation} {name}, which must not be replaced. Choose another --save-directory.")

    def _relation(self, path: Path) -> str | None:
        """How this folder is related to one that would be replaced with it; None if it is not affected."""
        if not _is_in(path, self.path):
            return None
        return "is" if _is_in(self.path, path) else "contains"

    def _is_part(self, path: Path) -> bool:
        """Whether this folder is inside another one and contains something else than an earlier result."""
        return _is_in(self.path, path) and self.path.is_dir() and any(self.path.iterdir()) and not (self.path / RECORD).is_file()

    def _check_mounts(self) -> None:
        """A mount point cannot be renamed, and the contents of one inside the folder would be deleted."""
        real = self.path.resolve()
        # Besides disks, this finds bind mounts, which `Path.is_mount` does not see.
        mounts = {Path(mount.mountpoint) for mount in psutil.disk_partitions(all=True)}
        if real in mounts or self.path.is_mount():
            raise ExportError(
                f"{self.path} is a mount point, which cannot be replaced. Choose a folder in it, such as {self.path / 'model'}."
            )
        if inside := sorted(mount for mount in mounts if mount.is_relative_to(real)):
            raise ExportError(f"{self.path} contains the mount point {inside[0]}. Choose another --save-directory.")

    def _check_parent(self) -> None:
        parent = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise ExportError(f"{self.path} cannot be created: {parent} is a file. Choose another --save-directory.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ExportError(f"{self.path} cannot be created: {parent} is not writable. Choose another --save-directory.")


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether a path is the same as another one or inside it, also if links give them different names."""
    outer = outer.resolve()
    return any(_is_same(place, outer) for place in (inner.resolve(), *inner.resolve().parents))


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a == b or a.samefile(b)
    except OSError:  # one of them does not exist
        return False


def _unusable(path: Path, error: OSError) -> ExportError:
    return ExportError(f"{path} cannot be used: {error.strerror}. Choose another --save-directory.")


def open_target(directory: str, overwrite: bool, *kept: tuple[str, Path]) -> Target:
    """The save directory, after cleaning up what killed processes left. Raises `ExportError` like `Target.check`."""
    path = expand(directory)
    target = Target(path.resolve() if path.name in ("", "..") else path, overwrite, kept)
    try:
        clean_up(target.path)
    except OSError as error:
        raise _unusable(target.path, error) from error
    target.check()
    return target


def target_of(settings: Settings, directory: str, overwrite: bool) -> Target:
    """The save directory of a run, which must not replace files that the run uses. Raises `ExportError` like `Target.check`."""
    kept = [("the folder of studies", expand(settings.study_checkpoint_dir))]
    if expand(settings.model).exists():
        kept.insert(0, ("the model", expand(settings.model)))
    if settings.study_storage is not None and "://" not in settings.study_storage:
        kept.append(("the study", expand(settings.study_storage)))
    return open_target(directory, overwrite, *kept)


@contextlib.contextmanager
def staged(target: Target) -> Iterator[Path]:
    """Context with an empty folder to fill. It becomes the target if the block ends without an error, else it is deleted.

    An existing target is replaced, and restored if that fails. Raises `ExportError` if it must no longer be replaced.
    """
    with workspace(target.path) as place:
        folder = place / _NEW
        folder.mkdir()
        yield folder
        flush(folder)
        target.check()
        _put_in_place(target, place)


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Context with a folder next to `path`, deleted at the end. If the process is killed, the next save to `path` deletes it."""
    made = _make_parents(path)
    place, lock = _make_workspace(path)
    try:
        yield place
        for parent in made:
            _flush_folder(parent)
    finally:
        try:
            _settle(place, path)
            _remove(place)
        finally:
            lock.release()
            _remove(place)  # on systems that cannot delete an open file such as the lock


def _make_parents(path: Path) -> list[Path]:
    """Create the missing parent folders of a path. Returns those that contain something new."""
    parents = path.absolute().parents
    n_missing = next(i for i, parent in enumerate(parents) if parent.exists())
    parents[0].mkdir(parents=True, exist_ok=True)
    return list(parents[: n_missing + 1])


def _make_workspace(path: Path) -> tuple[Path, FileLock]:
    """Create a marked workspace and acquire its lock."""
    place = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.absolute().parent))
    lock = FileLock(place / _LOCK)
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, place)
        undo.callback(lock.release)
        try:
            lock.acquire()
            with (place / _MARKER).open("w", encoding="utf-8") as file:
                file.write(_mark(path))
                file.flush()
                os.fsync(file.fileno())
            _flush_folder(place)
        except FileNotFoundError:  # another process deleted the empty folder as a leftover
            return _make_workspace(path)
        undo.pop_all()
    return place, lock


def _prefix(path: Path) -> str:
    return f".{path.name}.heretic-"


def _mark(path: Path) -> str:
    return f"heretic writes {path.name} here. After a crash, the next run that saves there cleans up this folder.\n"


def _put_in_place(target: Target, place: Path) -> None:
    """Rename the new folder to the target. Without `overwrite`, the system itself refuses to replace a non-empty folder."""
    new, path = place / _NEW, target.path
    if not (target.overwrite and path.exists() and _swap(new, path)):
        if target.overwrite and path.exists():
            path.rename(place / _OLD)
        try:
            if os.name == "nt" and path.exists():  # on Windows, which does not replace folders, not even empty ones
                path.rmdir()
            new.rename(path)
        except OSError:
            target.check()  # raises the right error if another process was faster
            raise
    _flush_folder(place)
    _flush_folder(path.absolute().parent)


def _swap(a: Path, b: Path) -> bool:
    """Swap two folders atomically, so that a killed process leaves one or the other. False if the system does not support it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _settle(place: Path, path: Path) -> None:
    """Restore a folder that was moved away but not replaced, and delete everything else in a workspace.

    Raises `ExportError` if it cannot be restored because something else is in its place. Then it is left where it is.
    """
    new, old = place / _NEW, place / _OLD
    if new.exists() and old.exists():
        try:
            old.rename(path)
        except OSError as error:
            raise ExportError(
                f"A save to {path} was interrupted; its previous contents are in {old}. Move them where you want them, delete {place}, "
                "then save again."
            ) from error
        _flush_folder(path.absolute().parent)
    for folder in (old, new):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(place: Path) -> None:
    """Delete a workspace that contains nothing to restore; its marker last, so that it can be identified until then."""
    if (place / _OLD).exists():
        return
    with contextlib.suppress(OSError):
        for entry in place.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in (_LOCK, _MARKER):
                entry.unlink()
        (place / _LOCK).unlink(missing_ok=True)
        (place / _MARKER).unlink(missing_ok=True)
        place.rmdir()


def clean_up(path: Path) -> None:
    """Clean up workspaces that killed processes left next to `path`. Raises `ExportError` if the user has to do that."""
    parent = path.absolute().parent
    if not parent.is_dir():
        return
    for place in [place for place in parent.iterdir() if place.name.startswith(_prefix(path)) and _is_workspace(place, path)]:
        try:
            with FileLock(place / _LOCK, blocking=False):
                _settle(place, path)
                _remove(place)
        except Timeout:  # at work
            continue
        _remove(place)


def _is_workspace(place: Path, path: Path) -> bool:
    """Whether a folder is a workspace for saving to `path`: it has the marker, or it contains nothing that could be lost."""
    if place.is_symlink() or not place.is_dir():
        return False
    marker, expected = place / _MARKER, _mark(path).encode()
    content = marker.read_bytes() if marker.is_file() else b""
    if content == expected:
        return True
    files = {entry.name: entry.stat().st_size for entry in place.iterdir()}
    return files.keys() <= {_LOCK, _MARKER} and not files.get(_LOCK) and expected.startswith(content)


def flush(folder: Path) -> None:
    """Wait until all files of a folder, and the folder itself, are on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            _flush_folder(path)
        elif path.is_file():
            with path.open("r+b" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder, so that renames in it are on the disk. Not every system can open folders for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of a file in a saved folder atomically."""
    with workspace(path.parent) as place:
        (place / path.name).write_bytes(content)
        (place / path.name).chmod(path.stat().st_mode)
        flush(place)
        (place / path.name).replace(path)
        _flush_folder(path.parent)
