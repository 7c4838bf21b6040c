"""Takes the picture of the terminal for the documents: a demonstration run in a pseudo-terminal, as an SVG of its text.

    uv run --group docs python tools/picture_terminal.py

What is drawn is the live view when four fifths of the trials are done, as a terminal of this size shows it.
"""

import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "terminal.svg"
COLUMNS, LINES = 128, 32
ARGUMENTS = ["--demo", "--seed", "1"]
SHARE = 0.8


def live_view() -> pyte.Screen:
    """The terminal's screen during the search."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.Stream(screen)
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(sys.executable).with_name("heretic"))
        command = pexpect.spawn(program, ARGUMENTS, cwd=folder, dimensions=(LINES, COLUMNS), encoding="utf-8", timeout=600)
        while not _is_far(screen):
            stream.feed(command.read_nonblocking(size=65536, timeout=600))
        command.close(force=True)
    return screen


def _is_far(screen: pyte.Screen) -> bool:
    """Whether a complete live view is shown that is as far as it should be."""
    text = "\n".join(screen.display)
    done = re.search(r"(\d+)/(\d+) .* elapsed", text)
    return done is not None and int(done[1]) >= SHARE * int(done[2]) and "Ctrl+C stops" in text


def as_text(screen: pyte.Screen) -> Text:
    """The lines from the view's title on, with their colours."""
    first = next(number for number, line in enumerate(screen.display) if line.startswith("Search:"))
    last = max(number for number, line in enumerate(screen.display) if line.strip())
    text = Text()
    for number in range(first, last + 1):
        cells = [screen.buffer[number][column] for column in range(COLUMNS)]
        for (color, bold, italic), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold, cell.italics)):
            text.append("".join(cell.data for cell in run), Style(color=_color(color), bold=bold, italic=italic))
        text.append("\n")
    return text


def _color(name: str) -> str | None:
    if name == "default":
        return None
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return f"#{name}"
    return re.sub("^bright", "bright_", name.replace("brown", "yellow"))


def main() -> None:
    text = as_text(live_view())
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(text, end="")
    picture = console.export_svg(title=" ".join(["heretic", *ARGUMENTS]))
    # A page that shows the picture shall load nothing: the fonts are those of the reader.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    PICTURE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
