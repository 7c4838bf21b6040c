"""Files that are written and hashed at the same time, in background threads, from memory and from ranges of other files."""

import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import ModelError

# Bytes that may be queued besides the latest piece, so that the disk is busy while the next one is computed.
BACKLOG = 32 * 2**20


class HashedFile:
    """A file that is written by one thread and hashed by another, while the caller computes the next piece. Use as a context manager.

    `sha256` waits until everything is written and flushed to the disk.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._at_work: deque[tuple[int, Future[None], Future[None]]] = deque()

    def write(self, content: bytes | memoryview) -> None:
        """Queue data to write; it must not change meanwhile. Raises errors of this or earlier writes."""
        self._at_work.append((len(content), self._writer.submit(self._write, content), self._hasher.submit(self._digest.update, content)))
        while sum(n_bytes for n_bytes, *_ in self._at_work) - len(content) > BACKLOG:
            self._wait()

    def copy(self, path: Path, offset: int, n_bytes: int) -> None:
        """Queue a range of another file, like `write`."""
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
            # So that a folder that is renamed to its target is complete even after a power failure.
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
        """The hexadecimal SHA-256, once the file is on the disk. Raises errors of writing."""
        while self._at_work:
            self._wait()
        self._closed.result()
        return self._digest.hexdigest()


def _view(path: Path, offset: int, n_bytes: int) -> memoryview:
    """A memory-mapped range of a file."""
    if not n_bytes:
        return memoryview(b"")
    before = offset % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), before + n_bytes, access=mmap.ACCESS_READ, offset=offset - before)
    except ValueError as error:
        raise ModelError(f"{path} is too short: it was changed since it was opened. Download the file again.") from error
    return memoryview(content)[before:]


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's content. Returns its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(target) as file:
        file.copy(source, 0, source.stat().st_size)
    return file.sha256()


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
