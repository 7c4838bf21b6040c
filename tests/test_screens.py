"""The screens that the documents show are those that the commands print now, up to numbers. The examples that read their files are run."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import write_screens  # type: ignore[import-not-found]  # noqa: E402

SHOWN: dict[str, str] = {}
for path in write_screens.DOCUMENTS:
    SHOWN |= write_screens.blocks(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("screens")


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, str]:
    """What the commands print now. Where the extra that one needs is missing, its screen is."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return dict(write_screens.screens(folder, [name for name in SHOWN if name != "benchmark"]))
    return dict(write_screens.screens(folder, list(SHOWN)))


def masked(screen: str) -> tuple[set[str], set[str]]:
    """The lines of a screen and the rows of its tables, without what differs between machines: numbers, widths, formats, how many."""
    lines, rows = set(), set()
    for line in screen.splitlines():
        if line.startswith(("Computing in ", "Seed ")):
            continue
        text = re.sub(r"(\d+ h )?(\d+ min )?\d+ s\b", "TIME", re.sub(r"bfloat16|float32", "FORMAT", line))
        text = re.sub(r"-?\d+(\.\d+)?", "0", text.replace("per layer", "0 (layer 0)"))
        text = re.sub(r", 0 degenerate \(original 0[^)]*\)", "", re.sub(r"about (?=0)", "", text))
        text = re.sub(r"\s+", " ", re.sub(r"[━─]+", "─", re.sub(r"(0 at 0, )+", "", text))).strip()
        (rows if text.startswith("│") else lines).add(text)
    return lines, rows


def test_masks_hide_numbers_only() -> None:
    one = "Trial 1/40: about 41 of 100 refused (original 100); 1 min 1 s elapsed; front: 8 at 0.1, 41 at 0.0140\n│ 1 │ per layer │\n"
    other = "Trial 2/40: 8 of 100 refused (original 100); 12 s elapsed; front: 8 at 0.1\n│ 13 │   0.52 (layer 3.6) │\n"
    assert masked(one) == masked(other)
    assert masked(one) != masked(other.replace("refused", "declined"))


def test_every_screen_is_shown() -> None:
    assert {"run", "reproduce", "evaluate", "compare", "benchmark"} <= set(SHOWN) <= set(write_screens.SCREENS)


@pytest.mark.slow
def test_screens_and_examples(
    printed: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one test, so that only one process runs the commands."""
    for name in SHOWN.keys() & printed.keys():  # without the extra "benchmark" its screen is not printed
        (lines, rows), (lines_now, rows_now) = masked(SHOWN[name]), masked(printed[name])
        assert lines == lines_now
        assert rows <= rows_now
    assert SHOWN.keys() - printed.keys() <= {"benchmark"}

    monkeypatch.chdir(folder)
    for page in ("analysis.md", "exporting.md"):
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
        names: dict[str, object] = {}
        exec(compile(example, page, "exec"), names)
        if page == "analysis.md":
            assert "'refusals': " in capsys.readouterr().out
        else:
            assert type(names["model"]).__name__ == "LlamaForCausalLM"
