"""Everything that can go wrong in a way the user can understand and mend.

Library code raises these `from` their cause; only `main.py` turns them into a line on the screen and an exit code.
"""

import difflib
from collections.abc import Sequence


class HereticError(Exception):
    """An error told in plain words: what, which file or setting, what to do."""

    exit_code = 1


class UsageError(HereticError):
    """Wrong usage or settings: nothing was started."""

    exit_code = 2


class ModelError(HereticError):
    """The model cannot be found, loaded or run."""


class UnsupportedModelError(ModelError):
    """The model's structure is not one whose residual-writing modules can be edited."""


class PromptError(HereticError):
    """A prompt source is missing, empty, unreadable or does not fit the model."""


class DirectionError(HereticError):
    """The two prompt sets do not define a direction."""


class EvaluationError(HereticError):
    """The model's answers cannot be scored, for a reason that lies in the model or the settings."""


class TrialError(HereticError):
    """One trial cannot be scored; the study goes on without it."""


class LearningError(HereticError):
    """No edit can be learned from this model; the search goes on without."""


class CheckpointError(HereticError):
    """The study's journal is missing, locked, damaged or belongs to something else."""


class ExportError(HereticError):
    """The result cannot be written or uploaded."""


class ReportError(HereticError):
    """A report, a picture or a benchmark cannot be made."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` (did you mean x?)` with the nearest known name, or nothing where none is near."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


class GivenUp(KeyboardInterrupt):
    """The user stops the search and does not wait for the trials that are running. Not an error that a trial could have."""
