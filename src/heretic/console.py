"""All output: live displays in a terminal, plain lines without control codes elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from .utils import can_ask, format_duration, screen_text

# If the output is not a terminal, steps shorter than this do not get a second line.
SECOND_LINE_SECONDS = 5.0


class _Screen(RichConsole):
    """Rich's console, which removes control codes that come with printed text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(screen_text(segment.text), segment.style)


class Console:
    """The screen. Implements `utils.Progress`."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.can_ask = can_ask()
        width = None if self.is_terminal else 10_000
        self.rich = _Screen(highlight=False, width=width, no_color=not self.is_terminal, emoji=False)
        self.errors = _Screen(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 10_000, emoji=False)

    def message(self, text: str) -> None:
        self.rich.print(escape(text))

    def warning(self, text: str) -> None:
        self.rich.print(f"[yellow]Warning:[/] {escape(text)}")

    def error(self, text: str) -> None:
        """An error in plain words, on the standard error stream."""
        self.errors.print(f"[bold red]Error:[/] {escape(text)}")

    def heading(self, text: str) -> None:
        """Title of a stage of the run."""
        self.rich.print(f"\n[bold]{escape(text)}[/]")

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = time.monotonic()
        if self.is_terminal:
            with _bar(self.rich, total) as bar:
                task = bar.add_task(escape(description), total=total)
                yield lambda n: bar.advance(task, n)
            self.rich.print(f"[dim]{escape(description)}: {format_duration(time.monotonic() - start)}[/]")
            return
        self.message(f"{description} ...")
        yield lambda n: None
        seconds = time.monotonic() - start
        if seconds >= SECOND_LINE_SECONDS:
            self.message(f"{description}: done in {format_duration(seconds)}")

    def show(self, renderable: RenderableType) -> None:
        """Print anything that Rich can render, such as a table."""
        self.rich.print(renderable)

    def columns(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose texts are wrapped within their columns."""
        table = Table(title=escape(title), show_lines=True, expand=self.is_terminal)
        for header in headers:
            table.add_column(escape(header), ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table)


def answer_of(ask: Callable[[], Any]) -> Any:
    """The answer to one of questionary's questions, of which this is `ask`; None if the user presses Ctrl+C or Ctrl+D."""
    try:
        return ask()
    except EOFError:  # questionary only catches Ctrl+C
        return None


def _bar(console: RichConsole, total: int | None) -> Progress:
    counted = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) if total else ()
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn(), console=console, transient=True)
