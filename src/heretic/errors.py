"""All errors that a user can understand and fix.

Library code raises these `from` their cause; only `main.py` turns them into a line on the screen and an exit code.
"""

import difflib
from collections.abc import Sequence


class HereticError(Exception):
    """An error described in plain words: what is wrong, which file or setting, what to do."""

    exit_code = 1


class UsageError(HereticError):
    """Wrong usage or settings: nothing was started."""

    exit_code = 2


class ModelError(HereticError):
    """The model cannot be found, loaded or run."""


class UnsupportedModelError(ModelError):
    """The model's architecture is not one whose residual-writing modules can be edited."""


class PromptError(HereticError):
    """A prompt source is missing, empty, unreadable or does not fit the model."""


class DirectionError(HereticError):
    """The two prompt sets do not define a direction."""


class EvaluationError(HereticError):
    """The model's responses cannot be scored because of the model or the settings."""


class TrialError(HereticError):
    """One trial cannot be scored; the study continues without it."""


class LearningError(HereticError):
    """No edit can be learned for this model; the search continues without learned edits."""


class CheckpointError(HereticError):
    """The study's journal is missing, locked, damaged or belongs to another study."""


class ExportError(HereticError):
    """The result cannot be written or uploaded."""


class ReportError(HereticError):
    """A report, a plot or a benchmark cannot be produced."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` (did you mean x?)` with the closest known name, or nothing if none is close."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


class Aborted(KeyboardInterrupt):
    """The user stopped the search and the running trials did not finish in time. Not an error of a trial."""
