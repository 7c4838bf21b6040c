"""What is told of something that failed without which a run goes on, and whether it is a bug in heretic."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..device import empty_cache, is_out_of_memory
from ..errors import HereticError
from ..privacy import without_token
from ..utils import Progress, first_line

# What a batch that crashed is told by.
ONE_BY_ONE = "Trials are scored one by one, as scoring them together failed"


def is_bug(error: BaseException) -> bool:
    """Whether nothing foresaw an error: it is neither told in words of ours nor a want of memory."""
    return not (isinstance(error, HereticError) or is_out_of_memory(error))


def reason(error: BaseException) -> str:
    """In one line why something failed. That of a bug says that it is one."""
    if isinstance(error, HereticError):
        return str(error)
    text = without_token(first_line(f"{type(error).__name__}: {error}")).rstrip(".")
    if is_out_of_memory(error):
        return f"memory ran out ({text})."
    return f"{text} (this is a bug in heretic; --debug shows where it happened)."


def tell_failure(progress: Progress, what: str, error: BaseException, debug: bool) -> None:
    """Warn that something failed without which the run goes on; with `debug`, where a bug happened."""
    progress.warning(f"{what}: {reason(error)}")
    if debug and is_bug(error):
        progress.message(traceback_of(error))


@contextmanager
def told(
    progress: Progress, what: str, debug: bool, interrupted: str | None = None, passes: type[Exception] | tuple[()] = ()
) -> Iterator[None]:
    """Within, an error is told as `what` failed, and the run goes on; so is Ctrl+C if there are words for it, `interrupted`.

    Errors of the type `passes` are raised all the same.
    """
    try:
        yield
    except passes:
        raise
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        progress.message(f"Interrupted: {interrupted}")
    except Exception as error:  # whatever it is, what the run has so far is worth more than what failed here
        tell_failure(progress, what, error, debug)
        empty_cache()


def traceback_of(error: BaseException) -> str:
    """Where an error happened, as Python tells it, without the user's access token."""
    return without_token("".join(traceback.format_exception(error)).rstrip())
