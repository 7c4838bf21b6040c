"""Small helpers that several modules share: progress, durations, texts. Imports nothing heavy."""

import contextlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

# Plain data, as a JSON object or a TOML table holds it.
JsonObject = dict[str, Any]


class Progress(Protocol):
    """How the core reports what it is doing. The console implements it; tests and library users pass `SilentProgress`."""

    def message(self, text: str) -> None:
        """Show the user a message."""

    def warning(self, text: str) -> None:
        """Show the user a message that may need action."""

    def task(self, description: str, total: int | None = None) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A long step. The yielded function is called with the number of units done since the last call."""


class SilentProgress:
    """Prints nothing."""

    def message(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda _: None


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_size(n_bytes: int) -> str:
    """`512 B`, `2.4 MB`, `4.9 GB`: powers of 1000, as the hub counts."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size = n_bytes / 1000
    for unit in ("kB", "MB"):
        if size < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some_of(names: Sequence[str], n: int) -> str:
    """The first `n` names, and the number of the others."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of installed libraries."""
    return {name: importlib.metadata.version(name) for name in libraries}


def can_ask() -> bool:
    """Whether questions can be asked: input and output are a terminal."""
    return sys.stdout.isatty() and sys.stdin.isatty()


# C0 without tab and line feed, DEL, and C1: with these a text could move the cursor, set the window title or write to the clipboard.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def screen_text(text: str) -> str:
    """The text without terminal control characters."""
    return _CONTROLS.sub("", text)
