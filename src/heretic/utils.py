"""Small things that several parts need and that belong to none: progress, durations, texts. Imports nothing heavy."""

import contextlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

# Plain data, as a JSON object or a TOML table holds it.
JsonObject = dict[str, Any]


class Progress(Protocol):
    """How the core tells what it is doing. The console implements it; tests and library users pass `SilentProgress`."""

    def message(self, text: str) -> None:
        """Say something that the user should read."""

    def warning(self, text: str) -> None:
        """Say something that the user may have to act on."""

    def task(self, description: str, total: int | None = None) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A long step: the value entered is called with the number of units done since the last call."""


class SilentProgress:
    """Says nothing."""

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
    """What an error says, in one line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some_of(names: Sequence[str], n: int) -> str:
    """The first `n` names, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of installed libraries."""
    return {name: importlib.metadata.version(name) for name in libraries}


def can_ask() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdout.isatty() and sys.stdin.isatty()


# C0 without tab and line feed, DEL, and C1: with these a text could move the cursor, set the window's title or fill in the clipboard.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def screen_text(text: str) -> str:
    """A text without the characters that would control a terminal."""
    return _CONTROLS.sub("", text)
