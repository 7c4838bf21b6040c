"""Checks of the command line before anything heavy is imported, so that mistakes are reported at once.

Heavy modules are imported in the functions of this file, after the checks; they themselves import everything at the top.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from .. import __version__
from ..config import Settings
from ..console import Console
from ..errors import HereticError, UsageError
from ..loading.libraries import collector_paused, prepare_libraries
from ..loading.source import model_source
from ..prompts import check_paths
from ..session.answers import check_answers, require_extra
from ..settings_sources import ENV_PREFIX, Parser, load_settings_of_names
from ..trust import terminal_ask
from ..utils import can_ask
from . import REBUILD_FLAGS
from .read_record import open_record


def run(settings: Settings, files: Sequence[str] = ()) -> int:
    """A run. Its settings came from the command line and from `files`. Raises `HereticError`; returns the exit code."""
    check_answers(settings, can_ask())
    _check_extras(settings)
    model_source(settings)  # raises `ModelError` for a mistyped path
    console = Console()
    console.message(f"heretic {__version__}" + (f", settings from {' and '.join(files)}" if files else ""))
    if settings.evaluate_model is None:
        check_paths(settings)  # before a study is opened, of which mistyped paths would be reported as other prompts than its own
    with console.task("Loading libraries"), collector_paused():
        from ..saving.upload import HubRepository, check_destination
        from .evaluate import evaluate
        from .run import run_study

    if settings.evaluate_model is not None:
        return evaluate(settings, console)
    token = get_token()
    if settings.model_action == "upload" and settings.upload_repo_id and settings.upload_repo_private is not None and token:
        with console.task(f"Asking the hub about {settings.upload_repo_id}"):
            check_destination(HubRepository(settings.upload_repo_id, settings.upload_repo_private, token), console)
    return run_study(settings, console)


def _check_extras(settings: Settings) -> None:
    """Raise `UsageError` if a setting needs an extra that is not installed. An hour later would be too late."""
    if settings.report_plots:
        require_extra("research", "report_plots")
    if settings.plot_residuals:
        require_extra("research", "plot_residuals")
        from ..reporting.residual_plots import check_plot_settings

        check_plot_settings(settings)
    if settings.model_action == "benchmark":
        require_extra("benchmark", "model_action = benchmark")
        from ..scoring.benchmark import check_tasks

        check_tasks(settings)


def compare(arguments: Sequence[str]) -> int:
    """`heretic compare A B [C...]`, with the options of a run. Raises `HereticError`; returns the exit code."""
    given = load_settings_of_names(arguments, terminal_ask())
    if len(given.names) < 2:
        raise UsageError("heretic compare needs at least two models or studies: heretic compare A B [C...]")
    console = Console()
    if given.files:
        console.message(f"Settings from {' and '.join(given.files)}")
    with console.task("Loading libraries"), collector_paused():
        from .compare import HEADERS, cells, compare

    rows = compare(given.names, given.settings, console)
    console.columns(f"Compared with {rows[0].name}", HEADERS, [cells(row, rows[0]) for row in rows])
    return 0


def rebuild(arguments: Sequence[str]) -> int:
    """`heretic --export-from ...`, `--reproduce ...` and `--reproduce-search ...`. Raises `HereticError`; returns the exit code."""
    parser = Parser(prog="heretic", allow_abbrev=False, add_help=False)
    action = parser.add_mutually_exclusive_group(required=True)
    for flag in REBUILD_FLAGS:
        action.add_argument(flag, metavar="FOLDER_FILE_OR_URL")
    parser.add_argument("--model")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--save-directory")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--debug", action="store_true")
    given, rest = parser.parse_known_args(list(arguments))

    console = Console()
    with open_record(given.reproduce_search or given.export_from or given.reproduce) as record:
        if given.reproduce_search is not None:
            # Settings on the command line override the stored ones.
            own = {"--reproduce-search", given.reproduce_search, f"--reproduce-search={given.reproduce_search}"}
            with collector_paused():
                from .reproduce_search import reproduce_search

            return reproduce_search(record, [argument for argument in arguments if argument not in own], console, run)
        if rest:
            raise UsageError(f"{rest[0]} cannot be used with --export-from or --reproduce. heretic --help lists all options.")
        if given.export_from is not None and given.save_directory is None:
            raise UsageError("--export-from needs --save-directory.")
        with collector_paused():
            from .rebuild import rebuild, reproduce

        if given.export_from is not None:
            target, _ = rebuild(record, given.save_directory, given.overwrite, given.model, given.trust_remote_code, console)
            console.message(f"Rebuilt trial {record.content['trial']['number']} in {target}")
            return 0
        with _directory(given.save_directory) as directory:
            same = reproduce(record, directory, given.overwrite, given.model, given.trust_remote_code, console)
        return 0 if same else 1


@contextlib.contextmanager
def _directory(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="heretic-reproduce-") as temporary:
        yield str(Path(temporary) / "model")


def worker(arguments: Sequence[str]) -> int:
    """`heretic worker`. Raises `HereticError`; returns the exit code."""
    options = _worker_parser().parse_args(list(arguments))
    if options.supervised:
        # The task arrives as one line on standard input; the end of the input means that the parent process has ended.
        order = json.loads(_read_line(0))
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        prepare_libraries(order["settings"]["debug"])
        with collector_paused():
            from ..sharing.worker import run_supervised

        return run_supervised(order)
    url = options.study_storage or os.environ.get(f"{ENV_PREFIX}STUDY_STORAGE")
    if not url:
        raise UsageError("heretic worker needs --study-storage, with the URL that the study was created with.")
    with collector_paused():
        from ..sharing.worker import work

    return work(url, options, Console())


def _worker_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="heretic worker",
        description="Joins a study that was created with --study-storage or --workers. Model, prompts and settings come from the study.",
        allow_abbrev=False,
    )
    parser.add_argument("--study-storage", metavar="URL", help="storage that the study was created with (or HERETIC_STUDY_STORAGE)")
    parser.add_argument("--study-name", metavar="TEXT", default=os.environ.get(f"{ENV_PREFIX}STUDY_NAME", "heretic"))
    parser.add_argument(
        "--workers", metavar="auto|N", help="worker processes on this machine, each with its own copy of the model; one if not given"
    )
    parser.add_argument("--model", metavar="TEXT", help="local path of the same model, if it differs from the study's")
    parser.add_argument("--device-map", type=_json_or_text, metavar="TEXT", help="device map, passed to Accelerate")
    parser.add_argument("--max-memory", type=_json_or_text, metavar="JSON", help="memory limit per device, passed to Accelerate")
    parser.add_argument("--batch-size", metavar="N", help="prompts per forward pass and trial")
    parser.add_argument("--max-batch-size", metavar="N", help="largest batch size that the automatic choice may use")
    parser.add_argument("--trials-per-batch", metavar="N", help="trials that share one forward pass")
    parser.add_argument("--compile-decoding", action="store_true", default=None, help="compile the decode step")
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help="run Python code from the model repository")
    parser.add_argument("--trust-scorers", action="store_true", default=None, help="run scorers named by the study, without asking")
    parser.add_argument("--scorers", type=_json_or_text, metavar="JSON", help="settings of custom scorers, which a study does not store")
    parser.add_argument("--debug", action="store_true", default=None, help="show tracebacks and log messages of libraries")
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    return parser


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_line(file: int) -> bytes:
    """A line, read byte by byte, so that nothing after it is consumed."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(file, 1)
        if not byte:
            raise HereticError("--supervised is only for workers that heretic starts itself.")
        line += byte
    return line


def _leave_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
