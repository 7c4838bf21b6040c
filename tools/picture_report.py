"""Takes the README's picture of a report, in headless Chromium: tools/picture_report.py checkpoints/heretic-demo.report.html"""

import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import browser  # type: ignore[import-not-found]  # noqa: E402

PICTURE = ROOT / "docs" / "report.png"
WIDTH, HEIGHT, COLORS = 1000, 1130, 256


def main() -> None:
    with NamedTemporaryFile(suffix=".png") as file:
        with browser.Page() as page:
            page.look(width=WIDTH, height=HEIGHT)
            page.call("Emulation.setScrollbarsHidden", hidden=True)
            page.open(Path(sys.argv[1]))
            page.run("document.querySelectorAll('tr[data-place] button')[1].click()")
            page.picture(Path(file.name), whole=False)
        with Image.open(file.name) as picture:
            picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
