"""Renews the exact versions under `[tool.uv] constraint-dependencies` in `pyproject.toml`.

Resolves the newest versions that the ranges admit, in a temporary copy without the old pins, and writes the whole closure.
`uv.lock` itself stays out of the repository, since it carries download addresses; `uv run` makes the same one from the pins.

    uv run --no-project python tools/pin.py
"""

import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = re.compile(r"\nconstraint-dependencies = \[\n.*?\n\]\n", re.DOTALL)


def resolve(pyproject: str) -> list[str]:
    """`name==version` for every package of the closure, all extras and groups included."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "pyproject.toml").write_text(pyproject, encoding="utf-8")
        for name in ("README.md", "LICENSE", ".python-version"):
            shutil.copy(ROOT / name, folder)
        subprocess.run(["uv", "lock"], cwd=folder, check=True)
        lock = tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))
    # The project itself has no registry behind it.
    packages = {f"{p['name']}=={p['version']}" for p in lock["package"] if "registry" in p["source"]}
    return sorted(packages)


def main() -> None:
    """Rewrite the pins in place."""
    path = ROOT / "pyproject.toml"
    text = PINS.sub("\n", path.read_text(encoding="utf-8"))
    pins = "".join(f'    "{pin}",\n' for pin in resolve(text))
    path.write_text(text.replace("[tool.uv]\n", f"[tool.uv]\nconstraint-dependencies = [\n{pins}]\n", 1), encoding="utf-8")


if __name__ == "__main__":
    main()
