"""What others wrote is not what the user typed: which of it may let code run, and how it may be shown. See `docs/security.md`.

Others wrote model files, records, journals, prompts, responses, and the configuration files that happen to lie in the working directory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import Settings, is_true
from .errors import UsageError
from .utils import JsonObject, can_ask, screen_text

# Asks the user a question whose answer is yes or no.
Ask = Callable[[str], bool]

TRUST_SCORERS = "--trust-scorers"


@dataclass(frozen=True)
class Door:
    """A setting that lets code run which is not a part of this program, and the flag by which the user says so."""

    path: tuple[str, ...]
    value: str | bool
    flag: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} = {str(self.value).lower() if isinstance(self.value, bool) else self.value}"

    def is_opened_by(self, own: JsonObject) -> bool:
        """Whether `own`, settings as plain data, says the same."""
        said: Any = own
        for part in self.path:
            said = said.get(part) if isinstance(said, Mapping) else None
        return said == self.value if isinstance(self.value, str) else is_true(said)


def doors(settings: Settings) -> list[Door]:
    """Everything in the settings that lets code run."""
    found = [
        Door(("scorers", name, "use"), scorer.use, TRUST_SCORERS)
        for name, scorer in settings.scorers.items()
        if scorer.is_custom and scorer.use is not None
    ]
    if settings.trust_scorers:
        found.append(Door(("trust_scorers",), True, TRUST_SCORERS))
    if settings.trust_remote_code:
        found.append(Door(("trust_remote_code",), True, "--trust-remote-code"))
    if settings.benchmark_path is not None:  # its YAML files may name functions
        found.append(Door(("benchmark_path",), settings.benchmark_path, f"--benchmark-path {settings.benchmark_path}"))
    return found


def who_asks() -> Ask | None:
    """Asks a question of yes or no at the terminal; None without one."""
    return _confirm if can_ask() else None


def _confirm(question: str) -> bool:
    import questionary  # which a run without questions does not need

    return bool(questionary.confirm(question, default=False).ask())


def require_consent(origin: str, settings: Settings, own: JsonObject, ask: Ask | None, otherwise: str = "") -> None:
    """Ask whether code may run that is named by `settings`, which come from `origin`, and not by `own`, what the user said.

    Raises `UsageError`, which names the flags (and what to do `otherwise`), unless the answer is yes.
    """
    trusts_scorers = is_true(own.get("trust_scorers"))
    closed = [door for door in doors(settings) if not door.is_opened_by(own) and not (trusts_scorers and door.flag == TRUST_SCORERS)]
    if not closed:
        return
    names = screen_text(f"{origin} names code to run: {', '.join(map(str, closed))}.")
    if ask is not None and ask(f"{names} Run it?"):
        return
    flags = screen_text(" ".join(dict.fromkeys(door.flag for door in closed)))
    raise UsageError(f"{names} It runs only if you say so. Read it, and if you trust it, add {flags}{otherwise}.")
