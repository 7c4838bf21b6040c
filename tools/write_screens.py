"""Runs the commands whose screens the documents show, and writes what they print into the documents.

    uv run --all-extras python tools/write_screens.py

A screen is a block that follows a line `<!-- screen: NAME -->`. The commands run one after the other in one new folder, as they stand in
`SCREENS`, on the demonstration model; nobody edits the blocks by hand. `tests/test_screens.py` compares them with what is printed now.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"(<!-- screen: ([\w-]+) -->\n+```text\n)(.*?)(```)", re.DOTALL)
ELLIPSIS = "..."


def search(lines: list[str]) -> list[str]:
    """A run whose trials are left out, but the first three and the last one."""
    lines = [line for line in lines if ": done in " not in line]  # said of what takes long only
    trials = [number for number, line in enumerate(lines) if line.startswith("Trial ")]
    return [*lines[: trials[2] + 1], ELLIPSIS, *lines[trials[-1] :]]


def table(lines: list[str]) -> list[str]:
    """What is printed from the last table's title on."""
    top = max(number for number, line in enumerate(lines) if line.startswith("┏"))
    return lines[top - 1 :]


def last(lines: list[str]) -> list[str]:
    return lines[-1:]


# Commands by the name of their screen, and which of their lines are shown.
SCREENS: dict[str, tuple[list[str], Callable[[list[str]], list[str]]]] = {
    "run": (["--demo", "--seed", "1"], search),
    "save": (
        ["--demo", "--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"],
        last,
    ),
    "compare": (["compare", "--demo", "heretic-demo", "checkpoints/heretic-demo.jsonl", "checkpoints/heretic-demo.jsonl:1"], table),
    "evaluate": (["--demo", "--evaluate-model", "out"], last),
    "benchmark": (["--demo", "--trial-index", "0", "--model-action", "benchmark"], table),
    "reproduce": (["--reproduce", "out"], lambda lines: lines),
}


def screens(folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """The screens of these names, by commands that run in a folder. Raises `CalledProcessError` if one fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HERETIC_")}
    for name, (arguments, shown) in SCREENS.items():
        if name in names or name == "save":  # which others need
            command = [str(Path(sys.executable).with_name("heretic")), *arguments]
            run = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
            yield name, "".join(f"{line.rstrip()}\n" for line in shown(run.stdout.splitlines()))


def blocks(text: str) -> dict[str, str]:
    """The screens that a document shows."""
    return {found[2]: found[3] for found in BLOCK.finditer(text)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = dict(screens(Path(folder), list(SCREENS)))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        path.write_text(BLOCK.sub(lambda found: f"{found[1]}{written[found[2]]}{found[4]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
