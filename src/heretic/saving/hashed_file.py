"""Files that are written and hashed at once, from memory and from ranges of other files, while what comes next is computed."""

import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import ModelError

# Bytes that may wait to be written beside the latest piece, so that the disk is busy while the next one is computed.
BACKLOG = 32 * 2**20


class HashedFile:
    """A file that is written by one thread and hashed by another, while what comes next is computed. Use as a context manager.

    What is still to be written when the context is left, and the way to the disk, are waited for by `sha256`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._at_work: deque[tuple[int, Future[None], Future[None]]] = deque()

    def write(self, content: bytes | memoryview) -> None:
        """Write all of it, which must not change meanwhile. Raises what went wrong with this or an earlier one."""
        self._at_work.append((len(content), self._writer.submit(self._write, content), self._hasher.submit(self._digest.update, content)))
        while sum(n_bytes for n_bytes, *_ in self._at_work) - len(content) > BACKLOG:
            self._wait()

    def copy(self, path: Path, offset: int, n_bytes: int) -> None:
        """Write a range of another file, as `write` does."""
        self.write(_view(path, offset, n_bytes))

    def _wait(self) -> None:
        _, written, hashed = self._at_work.popleft()
        written.result()
        hashed.result()

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _close(self) -> None:
        with self._file:
            # So that a folder which is renamed into its place is complete after a power failure too.
            os.fsync(self._file.fileno())

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._closed = self._writer.submit(self._close)
        for thread in (self._writer, self._hasher):
            thread.shutdown(wait=error is not None, cancel_futures=error is not None)
        if error is not None:
            self._file.close()

    def sha256(self) -> str:
        """In hexadecimal digits, when the file is on the disk. Raises what went wrong."""
        while self._at_work:
            self._wait()
        self._closed.result()
        return self._digest.hexdigest()


def _view(path: Path, offset: int, n_bytes: int) -> memoryview:
    """A range of a file, which the system reads where it is looked at."""
    if not n_bytes:
        return memoryview(b"")
    before = offset % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), before + n_bytes, access=mmap.ACCESS_READ, offset=offset - before)
    except ValueError as error:
        raise ModelError(f"{path} ends too early: it was changed since it was opened. Fetch the file again.") from error
    return memoryview(content)[before:]


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's content; its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(target) as file:
        file.copy(source, 0, source.stat().st_size)
    return file.sha256()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
