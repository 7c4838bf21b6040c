"""Consent to run code that is named by untrusted input. See `docs/security.md`.

Untrusted are model files, records, journals, prompts, responses, and configuration files that happen to be in the working directory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Settings, is_true
from .errors import UsageError
from .utils import JsonObject, can_ask, screen_text

# Asks the user a yes/no question.
Ask = Callable[[str], bool]

TRUST_SCORERS = "--trust-scorers"


@dataclass(frozen=True)
class CodeSetting:
    """A setting that lets code from outside this package run, and the flag by which the user agrees to it."""

    path: tuple[str, ...]
    value: str | bool
    flag: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} = {str(self.value).lower() if isinstance(self.value, bool) else self.value}"

    def is_confirmed_by(self, own: JsonObject) -> bool:
        """Whether `own`, settings as plain data, has the same value."""
        said: Any = own
        for part in self.path:
            said = said.get(part) if isinstance(said, Mapping) else None
        return said == self.value if isinstance(self.value, str) else is_true(said)


def code_settings(settings: Settings) -> list[CodeSetting]:
    """All settings that let code from outside this package run."""
    found = [
        CodeSetting(("scorers", name, "use"), scorer.use, TRUST_SCORERS)
        for name, scorer in settings.scorers.items()
        if scorer.is_custom and scorer.use is not None
    ]
    if settings.trust_scorers:
        found.append(CodeSetting(("trust_scorers",), True, TRUST_SCORERS))
    if settings.trust_remote_code:
        found.append(CodeSetting(("trust_remote_code",), True, "--trust-remote-code"))
    if settings.benchmark_path is not None:  # its YAML files may name functions
        found.append(CodeSetting(("benchmark_path",), settings.benchmark_path, f"--benchmark-path {settings.benchmark_path}"))
    return found


def terminal_ask() -> Ask | None:
    """A function that asks a yes/no question at the terminal; None if there is no terminal."""
    return _confirm if can_ask() else None


def _confirm(question: str) -> bool:
    import questionary  # only needed to ask

    from .console import answer_of

    return bool(answer_of(questionary.confirm(question, default=False).ask))


def require_consent(origin: str, settings: Settings, own: JsonObject, ask: Ask | None, otherwise: str = "") -> None:
    """Ask whether code may run that is named by `settings`, which come from `origin`, but not by `own`, what the user typed.

    Raises `UsageError`, which names the flags (and, in `otherwise`, an alternative), unless the answer is yes.
    """
    trusts_scorers = is_true(own.get("trust_scorers"))
    unconfirmed = [s for s in code_settings(settings) if not s.is_confirmed_by(own) and not (trusts_scorers and s.flag == TRUST_SCORERS)]
    if not unconfirmed:
        return
    names = screen_text(f"{origin} names code to run: {', '.join(map(str, unconfirmed))}.")
    if ask is not None and ask(f"{names} Run it?"):
        return
    flags = screen_text(" ".join(dict.fromkeys(setting.flag for setting in unconfirmed)))
    raise UsageError(f"{names} It only runs with your consent. Read it, and if you trust it, add {flags}{otherwise}.")
