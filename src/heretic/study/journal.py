"""A study's journal: its file, the lock of its writers, and what a torn write or a full disk costs."""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file

from ..config import Settings
from ..errors import CheckpointError
from ..loading.source import expand
from ..utils import JsonObject
from .learned_edits import artifact_folder

# What Optuna raises if a journal contains something that it did not write; it has no exception class for this.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RecursionError)


def journal_path(settings: Settings) -> Path:
    """The journal's file, named after the model."""
    return expand(settings.study_checkpoint_dir) / f"{file_name(settings.model)}.jsonl"


def file_name(model: str) -> str:
    """A model's name as a file name: every character but letters, digits, `_` and `-` becomes `--`."""
    return "".join(c if c.isalnum() or c in "_-" else "--" for c in model)


class JournalLock:
    """Optuna's lock interface over the operating system's file locks, which a killed process cannot leave behind."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class JournalFile(JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, in which incomplete writes are undone: at once if the disk is full, and before the next write if the writer
    was killed."""

    def append_logs(self, logs: list[JsonObject]) -> None:
        with get_lock_file(self._lock):  # this lock is reentrant
            self._cut_incomplete_line()
            size = Path(self._file_path).stat().st_size
            try:
                super().append_logs(logs)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._file_path, size)
                raise

    def _cut_incomplete_line(self) -> None:
        with Path(self._file_path).open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0 or (file.seek(-1, os.SEEK_END), file.read())[1] == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def damaged_line(content: bytes) -> str | None:
    """A description of the first line of a journal that is not a record; None if all are."""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            is_record = "op_code" in json.loads(line)
        except (ValueError, TypeError, RecursionError):
            is_record = False
        if not is_record:
            return f"line {number} is not a record"
    return None


def free_name(path: Path) -> Path:
    """The first of `x.jsonl.old`, `x.jsonl.old2`, ... that does not exist, and whose artifacts do not."""
    candidates = (path.with_name(f"{path.name}.old{n if n > 1 else ''}") for n in itertools.count(1))
    return next(candidate for candidate in candidates if not (candidate.exists() or artifact_folder(candidate).exists()))


@contextlib.contextmanager
def journal_errors(path: Path | str, only: Collection[int] | None = None) -> Iterator[None]:
    """Turn file system errors (all, or those with the numbers in `only`) into a `CheckpointError` that says what to do."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free some space" if full else "Make it writable or set another --study-checkpoint-dir"
        raise CheckpointError(
            f"The study {path} cannot be written: {error.strerror}. {remedy}, then run the same command again: it continues from the "
            "last finished trial."
        ) from error
