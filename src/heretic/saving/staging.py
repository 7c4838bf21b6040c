"""Where results are saved: which folders are refused, and how a folder appears in its place all at once.

A folder is written in a workspace beside its place, flushed to the disk, and renamed when it is complete. A workspace is known by a marker
in it, not by its name, and by a lock that nobody holds any more where the process was killed. The next run puts back what was on its way
out, and deletes the rest.
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

# What a workspace holds: the lock of the process at work, the marker, what is written, and what that replaces.
_LOCK, _MARKER, _NEW, _OLD = "lock", "heretic.txt", "new", "replaced"
# Not every file system can flush a folder.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
# From Linux's fcntl.h and stdio.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Target:
    """A folder to save to. With `overwrite` it replaces what is there, but never what `kept` names: words for it, and its path."""

    path: Path
    overwrite: bool = False
    kept: tuple[tuple[str, Path], ...] = ()

    def check(self) -> None:
        """Raise `ExportError` where this folder must not or cannot be replaced. Called at the start, and again just before that."""
        path = self.path
        try:
            if path.is_symlink():
                raise ExportError(f"{path} is a symbolic link. Choose the folder that it leads to, {path.resolve()}, or another one.")
            if path.exists() and not path.is_dir():
                raise ExportError(f"{path} is a file. Choose another --save-directory.")
            self._check_kept()
            self._check_mounts()
            if path.is_dir() and any(path.iterdir()) and not self.overwrite:
                raise ExportError(f"The folder {path} is not empty. Choose another --save-directory, or add --overwrite to replace it.")
            self._check_parent()
        except OSError as error:
            raise ExportError(f"{path} cannot be saved to: {error.strerror}. Choose another --save-directory.") from error

    def _check_kept(self) -> None:
        cache = "the hub's cache", Path(constants.HF_HUB_CACHE)
        own = ("the working directory", Path.cwd()), ("your home directory", expand("~")), cache
        relations = [(relation, name) for name, path in (*self.kept, *own) if (relation := self._relation(path))]
        relations += [("is a part of", name) for name, path in self.kept if self._is_part(path)]
        relations += [("is a part of", name) for name, path in [cache] if _is_in(self.path, path)]
        if relations:
            relation, name = relations[0]
            raise ExportError(f"{self.path} {relation} {name}, which must not be replaced. Choose another --save-directory.")

    def _relation(self, path: Path) -> str | None:
        """How this folder lies to one that it would take along; None where it would not."""
        if not _is_in(path, self.path):
            return None
        return "is" if _is_in(self.path, path) else "holds"

    def _is_part(self, path: Path) -> bool:
        """Whether this folder lies in another one and holds something else than an earlier result."""
        return _is_in(self.path, path) and self.path.is_dir() and any(self.path.iterdir()) and not (self.path / RECORD).is_file()

    def _check_mounts(self) -> None:
        """A mount point cannot be renamed; one further down would have its content deleted."""
        real = self.path.resolve()
        # Beside disks what is bound to a second place, which `Path.is_mount` does not see.
        mounts = {Path(mount.mountpoint) for mount in psutil.disk_partitions(all=True)}
        if real in mounts or self.path.is_mount():
            raise ExportError(
                f"{self.path} is a mount point, which cannot be replaced. Choose a folder in it, such as {self.path / 'model'}."
            )
        if inside := sorted(mount for mount in mounts if mount.is_relative_to(real)):
            raise ExportError(f"{self.path} holds the mount point {inside[0]}. Choose another --save-directory.")

    def _check_parent(self) -> None:
        parent = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise ExportError(f"{self.path} cannot be made: {parent} is a file. Choose another --save-directory.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ExportError(f"{self.path} cannot be made: {parent} is not writable. Choose another --save-directory.")


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another one or lies in it, under whatever names."""
    outer = outer.resolve()
    return any(_is_same(place, outer) for place in (inner.resolve(), *inner.resolve().parents))


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a == b or a.samefile(b)
    except OSError:  # one of them is not there
        return False


def open_target(directory: str, overwrite: bool, *kept: tuple[str, Path]) -> Target:
    """The folder to save to, after putting in order what killed processes left of it. Raises `ExportError` as `Target.check` does."""
    path = expand(directory)
    target = Target(path.resolve() if path.name in ("", "..") else path, overwrite, kept)
    clean_up(target.path)
    target.check()
    return target


def target_of(settings: Settings, directory: str, overwrite: bool) -> Target:
    """The folder to save a trial of a run to; what the run works on and with is kept. Raises `ExportError` as `Target.check` does."""
    kept = [("the folder of studies", expand(settings.study_checkpoint_dir))]
    if expand(settings.model).is_dir():
        kept.insert(0, ("the model", expand(settings.model)))
    if settings.study_storage is not None and "://" not in settings.study_storage:
        kept.append(("the study", expand(settings.study_storage)))
    return open_target(directory, overwrite, *kept)


@contextlib.contextmanager
def staged(target: Target) -> Iterator[Path]:
    """An empty folder to be filled, which becomes the target when the block is left without an error, and else is deleted.

    What was there is replaced; where that fails, it comes back. Raises `ExportError` where it must not be replaced any more.
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
    """A folder beside `path`, deleted in the end; a killed process's is deleted by the next one that saves to `path`."""
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
            _remove(place)  # where an open file, as the lock was, cannot be deleted


def _make_parents(path: Path) -> list[Path]:
    """Make the folders that are missing above a path; those in which something new is."""
    parents = path.absolute().parents
    n_missing = next(i for i, parent in enumerate(parents) if parent.exists())
    parents[0].mkdir(parents=True, exist_ok=True)
    return list(parents[: n_missing + 1])


def _make_workspace(path: Path) -> tuple[Path, FileLock]:
    """A marked folder and its lock, which is held."""
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
        except FileNotFoundError:  # another process took the empty folder for a leftover
            return _make_workspace(path)
        undo.pop_all()
    return place, lock


def _prefix(path: Path) -> str:
    return f".{path.name}.heretic-"


def _mark(path: Path) -> str:
    return f"heretic writes {path.name} here. What is left of it after a crash is put in order by the next run that saves there.\n"


def _put_in_place(target: Target, place: Path) -> None:
    """Move the new folder to the target. Without `overwrite` the system itself refuses to replace a folder that is not empty."""
    new, path = place / _NEW, target.path
    if not (target.overwrite and path.exists() and _swap(new, path)):
        if target.overwrite and path.exists():
            path.rename(place / _OLD)
        try:
            if os.name == "nt" and path.exists():  # which replaces no folder, not even an empty one
                path.rmdir()
            new.rename(path)
        except OSError:
            target.check()  # where somebody else was faster, it says so
            raise
    _flush_folder(place)
    _flush_folder(path.absolute().parent)


def _swap(a: Path, b: Path) -> bool:
    """Swap two folders at once, so that a process that is killed leaves one or the other; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _settle(place: Path, path: Path) -> None:
    """Put back a folder that was moved away and not replaced, and delete everything else in a workspace.

    Raises `ExportError` where it cannot come back since something else is in its place: then it stays where it is.
    """
    new, old = place / _NEW, place / _OLD
    if new.exists() and old.exists():
        try:
            old.rename(path)
        except OSError as error:
            raise ExportError(
                f"A save to {path} was cut off, and what was there before is in {old}. Move it to where you want it, delete {place}, then "
                "save again."
            ) from error
        _flush_folder(path.absolute().parent)
    for folder in (old, new):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(place: Path) -> None:
    """Delete a workspace that holds nothing any more that was to come back; its marker at the very last, so that it stays known."""
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
    """Put in order what processes that are no more left beside `path`. Raises `ExportError` where the user has to do that."""
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
    """Whether it is one for saving to `path`: by its marker, or, without one, since it holds nothing that could be lost."""
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
    """A rename is on the disk once the folder is; not every system lets folders be opened for that."""
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
    """Give a file of a saved folder another content, all at once."""
    with workspace(path.parent) as place:
        (place / path.name).write_bytes(content)
        (place / path.name).chmod(path.stat().st_mode)
        flush(place)
        (place / path.name).replace(path)
        _flush_folder(path.parent)
