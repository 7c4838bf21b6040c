"""Packages that only some commands need: whether they are there, and what to say where not. Imports nothing heavy."""

from importlib.util import find_spec

from ..errors import UsageError

# Modules that each extra of the distribution brings.
EXTRAS = {"research": ("matplotlib", "pacmap", "sklearn"), "benchmark": ("lm_eval",)}


def require_extra(extra: str, wanted_for: str) -> None:
    """Raise `UsageError`, with the command that installs it, where a module of an extra is missing. Nothing is imported."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"{wanted_for} needs the extra {extra!r}, of which {', '.join(missing)} is not installed. "
            f"Install it with: pip install 'heretic-llm[{extra}]' (in a clone: uv sync --extra {extra})."
        )
