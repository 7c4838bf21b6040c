"""Messages about failures that do not end a run, and whether they are bugs in heretic."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..device import empty_cache, is_out_of_memory
from ..errors import HereticError
from ..privacy import without_token
from ..utils import Progress, first_line

# Warning about a batch that crashed.
ONE_BY_ONE = "Trials are scored one by one, because scoring them together failed"


def is_bug(error: BaseException) -> bool:
    """Whether an error is unforeseen: neither a `HereticError` nor a lack of memory."""
    return not (isinstance(error, HereticError) or is_out_of_memory(error))


def reason(error: BaseException) -> str:
    """One line that says why something failed, and whether it is a bug in heretic."""
    if isinstance(error, HereticError):
        return str(error)
    text = without_token(first_line(f"{type(error).__name__}: {error}")).rstrip(".")
    if is_out_of_memory(error):
        return f"memory ran out ({text})."
    return f"{text} (this is a bug in heretic; --debug shows where it happened)."


def warn_of_failure(progress: Progress, what: str, error: BaseException, debug: bool) -> None:
    """Warn about a failure that does not end the run; with `debug`, print the traceback of a bug."""
    progress.warning(f"{what}: {reason(error)}")
    if debug and is_bug(error):
        progress.message(traceback_of(error))


@contextmanager
def failure_as_warning(progress: Progress, what: str, debug: bool, interrupted: str | None = None) -> Iterator[None]:
    """Context in which an error becomes a warning that begins with `what`, so that the run goes on. Ctrl+C becomes a message if its text,
    `interrupted`, is given.
    """
    try:
        yield
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        progress.message(interrupted)
    except Exception as error:  # whatever it is, what the run has so far is worth more than what failed here
        warn_of_failure(progress, what, error, debug)
        empty_cache()


def traceback_of(error: BaseException) -> str:
    """The traceback of an error, without the user's access token."""
    return without_token("".join(traceback.format_exception(error)).rstrip())
