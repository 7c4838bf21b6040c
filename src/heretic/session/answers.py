"""Questions that settings answer instead of a person at the terminal: which answers are missing or impossible, and how to continue later.

Imports nothing heavy: all of this is checked before the model is loaded.
"""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import Settings
from ..errors import UsageError
from ..privacy import shown_location
from ..saving.staging import target_of
from ..trust import code_settings

Trial = TypeVar("Trial")

# Modules that each extra of the distribution installs.
EXTRAS = {"research": ("matplotlib", "pacmap", "sklearn"), "benchmark": ("lm_eval",)}

_FLAG_OF = {
    "trial_index": "--trial-index",
    "export_strategy": "--export-strategy",
    "save_directory": "--save-directory",
    "upload_repo_id": "--upload-repo-id",
    "upload_repo_private": "--upload-repo-private or --no-upload-repo-private",
}
_NEEDED = {
    "save": ("trial_index", "export_strategy", "save_directory"),
    "benchmark": ("trial_index",),
    "upload": ("trial_index", "export_strategy", "upload_repo_id", "upload_repo_private"),
    "scores": ("trial_index",),
}


def check_answers(settings: Settings, can_ask: bool) -> None:
    """Raise `UsageError` for incomplete answers if nobody can be asked for the rest, and for a target that cannot be used.

    Called before the model is loaded: an hour later would be too late.
    """
    action = settings.model_action
    if action == "save" and settings.save_directory is not None:
        target_of(settings, settings.save_directory, settings.overwrite)
    if action == "upload" and settings.upload_repo_id is not None:
        _check_repo_id(settings.upload_repo_id)
    if can_ask:
        return
    if action == "chat":
        raise UsageError("model_action = chat needs a terminal. Use --model-action save, or run it in one.")
    if action is None:
        given = [
            name for name in ("trial_index", "export_strategy", "save_directory", "upload_repo_id") if getattr(settings, name) is not None
        ]
        if given:
            raise UsageError(
                f"{_FLAG_OF[given[0]]} is given, but not what to do with the trial. Add --model-action save, upload or scores."
            )
        return
    missing = [_FLAG_OF[name] for name in _NEEDED.get(action, ()) if getattr(settings, name) is None]
    if missing:
        raise UsageError(f"--model-action {action} needs {', '.join(missing)} if there is no terminal to ask at.")
    if action == "upload" and get_token() is None:
        raise UsageError("--model-action upload needs an access token: set HF_TOKEN, or log in with `hf auth login`.")


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"--upload-repo-id {repo_id!r} is not a valid repository name: {error}") from error


def trial_at(front: Sequence[Trial], index: int) -> Trial:
    """The trial at an index of the Pareto front. Raises `UsageError` if the index is out of range."""
    if index >= len(front):
        raise UsageError(f"--trial-index {index}: the Pareto front has {len(front)} trials, 0 to {len(front) - 1}.")
    return front[index]


def command_lines(settings: Settings) -> list[str]:
    """The commands that continue a finished study whose questions nobody answered: save a trial, run more trials."""
    base = ["heretic", "--demo"] if settings.demo else ["heretic", settings.model]
    if settings.gguf_file is not None:
        base += ["--gguf-file", settings.gguf_file]
    if settings.study_checkpoint_dir != "checkpoints":
        base += ["--study-checkpoint-dir", settings.study_checkpoint_dir]
    if settings.study_storage is not None:
        base += ["--study-storage", shown_location(settings.study_storage), "--study-name", settings.study_name]
    base += dict.fromkeys(found.flag for found in code_settings(settings) if found.path != ("benchmark_path",))
    save_one = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    return [shlex.join([*base, *save_one]), shlex.join([*base, "--n-additional-trials", "50"])]


def require_extra(extra: str, wanted_for: str) -> None:
    """Raise `UsageError`, with the command that installs it, if a module of an extra is missing. Nothing is imported."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"{wanted_for} needs the extra {extra!r}, but {', '.join(missing)} is not installed. "
            f"Install it with: pip install 'heretic-llm[{extra}]' (in a clone: uv sync --extra {extra})."
        )
