"""The modules under src/heretic: none imports itself through others, and everything imports only what is below it."""

import ast
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "heretic"

# Modules and folders from the ground up: each may import what comes before it, and modules of its own folder.
ORDER = [
    "heretic",  # the version
    "errors",
    "utils",
    "device",
    "demo",
    "console",
    "parameters",
    "specifications",
    "config",
    "trust",
    "settings_sources",
    "loading",
    "prompts",
    "privacy",
    "editing",
    "decoding",
    "model",
    "scoring",
    "evaluator",
    "study",
    "reporting",
    "saving",
    "session",
    "sharing",
    "commands",
    "main",
    "__main__",
]

# Modules by name ("editing.hooks"; the package itself is "heretic"), with those that they import and the lines of the imports.
Imports = dict[str, dict[str, int]]


def imports_of(package: Path) -> Imports:
    """All imports within a package: those inside functions and for type checkers only count like any other."""
    paths = {_name(path.relative_to(package)): path for path in package.rglob("*.py")}
    found: Imports = {}
    for name, path in paths.items():
        folder = path.relative_to(package).parent.parts
        targets = found.setdefault(name, {})
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, folder, paths):
                if target != name:
                    targets.setdefault(target, node.lineno)  # type: ignore[attr-defined]
    return found


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "heretic"


def _targets(node: ast.AST, folder: tuple[str, ...], known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            first, *rest = alias.name.split(".")
            if first == "heretic":
                yield ".".join(rest) or "heretic"
    elif isinstance(node, ast.ImportFrom):
        module = node.module.split(".") if node.module else []
        if node.level:
            parts = [*folder[: len(folder) + 1 - node.level], *module]
        elif module[:1] == ["heretic"]:
            parts = module[1:]
        else:
            return
        for alias in node.names:
            inner = ".".join([*parts, alias.name])
            yield inner if inner in known else ".".join(parts) or "heretic"


def circles(imports: Imports) -> list[list[str]]:
    """Groups of modules each of which is imported, through others or directly, by itself."""
    reached = {name: _reached(name, imports) for name in imports}
    groups = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in imports if name in reached[name]}
    return [list(group) for group in sorted(groups)]


def _reached(name: str, imports: Imports) -> set[str]:
    seen: set[str] = set()
    waiting = list(imports.get(name, ()))
    while waiting:
        other = waiting.pop()
        if other not in seen:
            seen.add(other)
            waiting += imports.get(other, ())
    return seen


def against_order(imports: Imports) -> list[str]:
    """Imports of what does not come before, as `module:line imports module`."""
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = []
    for name, targets in imports.items():
        own = name.partition(".")[0]
        for target, line in targets.items():
            other = target.partition(".")[0]
            if own != other and place[other] > place[own]:
                wrong.append(f"{name}:{line} imports {target}")
    return sorted(wrong)


def test_everything_has_a_place() -> None:
    there = {"heretic", *(name.partition(".")[0] for name in imports_of(PACKAGE))}
    assert there == set(ORDER)


def test_no_module_imports_itself_through_others() -> None:
    assert circles(imports_of(PACKAGE)) == []


def test_imports_go_down() -> None:
    assert against_order(imports_of(PACKAGE)) == []


@pytest.mark.parametrize(
    ("module", "line", "circle", "wrong"),
    [
        # Inside a function, upwards: both are found.
        (
            "editing/ablation.py",
            "def late() -> None:\n    from .hooks import AblationHooks\n",
            ["editing.ablation", "editing.hooks"],
            [],
        ),
        (
            "errors.py",
            "def late() -> None:\n    from . import config\n",
            ["config", "errors"],
            ["errors:2 imports config"],
        ),
        # For type checkers only.
        (
            "utils.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .console import Console\n",
            ["console", "utils"],
            ["utils:3 imports console"],
        ),
        # By its full name, upwards without a circle.
        ("demo/__init__.py", "import heretic.privacy\n", None, ["demo:1 imports privacy"]),
    ],
)
def test_a_circle_that_was_put_in_is_found(module: str, line: str, circle: list[str] | None, wrong: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "heretic"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "model"))
    path = copy / module
    content = path.read_text(encoding="utf-8")
    path.write_text(f"{line}{content}", encoding="utf-8")
    imports = imports_of(copy)
    if circle is not None:
        assert any(set(circle) <= set(group) for group in circles(imports))
    assert against_order(imports) == wrong
