"""The command: reads, validates, calls, renders. Library errors become one line and an exit code here and nowhere else."""

import atexit
import contextlib
import errno
import io
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.resources import files
from pkgutil import resolve_name
from typing import NoReturn

from . import __version__
from .commands import COMMANDS, REBUILD_FLAGS
from .errors import HereticError
from .loading.libraries import prepare_libraries
from .utils import first_line, screen_text

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `heretic` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks must not end the run
    try:
        code = run_command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader, such as `head`, closed the pipe
            print(f"Error: The output cannot be written: {error.strerror}.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process. Once torch is loaded, an ordinary interpreter shutdown spends a second on freeing objects; this skips it."""
    if "torch" not in sys.modules:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads, as an ordinary exit does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 done, 1 error, 2 wrong usage, 130 interrupted.

    What is imported here would slow down `--help`, or read the environment before `prepare_libraries` has set it.
    """
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None and {"-h", "--help"} & set(arguments):  # printed from a file, before anything slow is imported
        print(files("heretic").joinpath("help.txt").read_text(encoding="utf-8"), end="")
        return 0
    if "--version" in arguments:
        print(f"heretic {__version__}")
        return 0
    debug = "--debug" in arguments
    try:
        if command is not None:
            prepare_libraries(debug)
            code: int = resolve_name(command)(arguments[1:])
            return code
        if any(argument.partition("=")[0] in REBUILD_FLAGS for argument in arguments):
            prepare_libraries(debug)
            from .commands.start import rebuild

            return rebuild(arguments)
        from .settings_sources import read_settings
        from .trust import terminal_ask

        given = read_settings(arguments, ask=terminal_ask())
        debug = given.settings.debug
        prepare_libraries(debug)
        from .commands.start import run

        return run(given.settings, given.files)
    except HereticError as error:
        _print_error(str(error), debug)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:  # unforeseen: reported in one line as well
        reason = first_line(f"{type(error).__name__}: {error}")
        if _is_out_of_memory(error):
            _print_error(
                f"Out of memory ({reason.rstrip('.')}). Try --quantization bnb_4bit or --max-memory. Finished trials are kept.", debug
            )
            return 1
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # perhaps of the output
            _print_error(f"A disk is full ({reason}). Free some space, then run the same command again. Finished trials are kept.", debug)
            return 1
        _print_error(f"{reason} (this is a bug in heretic; --debug shows where it happened). Finished trials are kept.", debug)
        return 1


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # not worth its import
        return isinstance(error, MemoryError)
    from .device import is_out_of_memory

    return is_out_of_memory(error)


def _print_error(text: str, debug: bool) -> None:
    from .privacy import without_token  # not needed by `--help`

    if debug:
        print(screen_text(without_token(traceback.format_exc())), end="", file=sys.stderr)
    for line in screen_text(without_token(text)).splitlines():
        print(f"Error: {line}", file=sys.stderr)
