"""Benchmarks of lm-evaluation-harness (extra `benchmark`) on the original and the edited model.

Both see the same examples, so the standard error of the difference is computed from paired differences, which is smaller than combining
the two models' standard errors. The latter is used for metrics without values per example (such as perplexity).
"""

import contextlib
import copy
import difflib
import functools
import io
import logging
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from .. import demo
from ..config import Settings
from ..device import empty_cache, is_out_of_memory
from ..editing.ablation import Ablation
from ..errors import ReportError, UsageError
from ..loading.source import expand
from ..model import Model
from ..utils import Progress, first_line

BATCH_SIZE = 16
HEADERS = ("Task", "Metric", "Examples", "Original", "Edited", "Difference")

# What lm-evaluation-harness gives for a task, or for one of its parts.
Results = Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkRow:
    """One metric of one task before and after; `error` is the standard error of the difference, None if unknown."""

    task: str
    metric: str
    n_examples: int | None
    original: float
    edited: float
    error: float | None

    @property
    def difference(self) -> float:
        return self.edited - self.original


def cells(row: BenchmarkRow) -> list[str]:
    """The cells of a row, in the order of `HEADERS`."""
    error = "" if row.error is None else f" ± {row.error:.4f}"
    n = "" if row.n_examples is None else str(row.n_examples)
    return [row.task, row.metric, n, f"{row.original:.4f}", f"{row.edited:.4f}", f"{row.difference:+.4f}{error}"]


def _task_manager(settings: Settings) -> TaskManager:
    """The available tasks: only those of the user's folder if it has all requested ones, since reading all takes seconds."""
    path = None if settings.benchmark_path is None else str(expand(settings.benchmark_path))
    if path is None and settings.demo:
        path = str(demo.BENCHMARKS)
    if path is not None:
        own = _index(path, False)
        if set(settings.benchmarks) <= set(own.all_subtasks):
            return own
    return _index(path, True)


@functools.cache
def _index(path: str | None, with_defaults: bool) -> TaskManager:
    return TaskManager(include_path=path, include_defaults=with_defaults)


def check_tasks(settings: Settings) -> None:
    """Raise `UsageError` for a missing task folder and for unknown task names. Reads no data."""
    if settings.benchmark_path is not None and not expand(settings.benchmark_path).is_dir():
        raise UsageError(f"benchmark_path: the folder {settings.benchmark_path} does not exist. Check the path.")
    known = _task_manager(settings).all_tasks
    for name in settings.benchmarks:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise UsageError(f"benchmarks: there is no task {name!r}{hint}. `lm-eval ls tasks` lists all.")


def run_benchmarks(model: Model, ablation: Ablation, settings: Settings, progress: Progress) -> list[BenchmarkRow]:
    """Run the benchmarks of the settings, task by task. A task that cannot be run is skipped with a warning.

    Raises `UsageError` for unknown names, and `ReportError` if no task could be run.
    """
    check_tasks(settings)
    manager = _task_manager(settings)
    rows: list[BenchmarkRow] = []
    for task in settings.benchmarks:
        try:
            results = []
            for title, edit in (("original", None), ("edited model", ablation)):
                progress.message(f"{task}: {title} ...")
                with model.edited(edit):
                    results.append(_evaluate(model, task, manager, settings))
        except Exception as error:  # a task's data and code are not ours and may raise anything
            line = first_line(error)
            progress.warning(f"The benchmark {task} cannot be run: {line} Check the network, or remove it from benchmarks.")
            continue
        rows += compare_results(*results)
    if not rows:
        raise ReportError("No benchmark could be run.")
    return rows


def _evaluate(model: Model, task: str, manager: TaskManager, settings: Settings) -> Results:
    """lm-evaluation-harness's results for the model in its current state; with smaller batches if memory runs out."""
    batch_size = settings.batch_size or min(BATCH_SIZE, settings.max_batch_size)
    while True:
        try:
            with _quiet(settings.debug):
                # A copy of the tokenizer, because the harness changes its padding.
                harness = HFLM(pretrained=model.model, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size)
                results = simple_evaluate(
                    harness,
                    tasks=[task],
                    limit=settings.benchmark_limit,
                    task_manager=manager,
                    apply_chat_template=settings.benchmark_chat_template,
                    log_samples=True,
                )
            assert results is not None
            return results
        except RuntimeError as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        empty_cache()
        batch_size //= 2


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Context that hides the harness's messages below errors, and its progress bars if the output is not a terminal."""
    if debug:
        yield
        return
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, before)
        # It asks git for the commit of the working directory, and git prints an error if that is not a repository.
        stack.enter_context(patch("lm_eval.evaluator.get_git_commit_hash", return_value=None, create=True))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def compare_results(original: Results, edited: Results) -> list[BenchmarkRow]:
    """One row for each metric of the requested tasks; for a group, its own scores if it has any, else those of its tasks."""
    rows = []
    groups = {name for name, values in original.get("groups", {}).items() if _metrics(values)}
    members = {member for name in groups for member in _members(original, name)}
    for task, values in original["results"].items():
        if task in members:
            continue
        for key in _metrics(values):
            pairs = _pairs(original, edited, task, key)
            rows.append(
                BenchmarkRow(
                    task=task,
                    metric=key.removesuffix(",none").replace(",", ", "),
                    n_examples=_n_examples(original, task),
                    original=float(values[key]),
                    edited=float(edited["results"][task][key]),
                    error=paired_error(pairs) if pairs else _unpaired_error(values, edited["results"][task], key),
                )
            )
    return rows


def _members(results: Results, group: str) -> set[str]:
    found = set()
    for name in results.get("group_subtasks", {}).get(group, []):
        found |= {name} | _members(results, name)
    return found


def _metrics(values: Results) -> list[str]:
    """Keys of metrics, such as `acc,none`, that have a number and are not standard errors."""
    return [k for k, v in values.items() if "," in k and "_stderr," not in k and isinstance(v, (int, float)) and not isinstance(v, bool)]


def _n_examples(results: Results, task: str) -> int | None:
    counts = results.get("n-samples", {}).get(task)
    return None if counts is None else int(counts["effective"])


def _pairs(original: Results, edited: Results, task: str, key: str) -> list[tuple[float, float]]:
    """Both models' values of a metric per example if the metric is their mean; else empty."""
    metric, _, chosen = key.partition(",")
    columns = []
    for results in (original, edited):
        samples = [s for s in results.get("samples", {}).get(task, []) if s.get("filter", "none") == chosen]
        column = {s["doc_id"]: s[metric] for s in samples if isinstance(s.get(metric), (int, float))}
        if (
            len(column) != len(samples)
            or len(column) < 2
            or not math.isclose(statistics.fmean(column.values()), results["results"][task][key], rel_tol=1e-6, abs_tol=1e-9)
        ):
            return []
        columns.append(column)
    first, second = columns
    return [(float(first[i]), float(second[i])) for i in first] if first.keys() == second.keys() else []


def paired_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Standard error of the mean of paired differences."""
    return statistics.stdev(after - before for before, after in pairs) / math.sqrt(len(pairs))


def _unpaired_error(original: Results, edited: Results, key: str) -> float | None:
    """The standard error of the difference from those of both models, as if their examples were independent."""
    errors = [values.get(key.replace(",", "_stderr,")) for values in (original, edited)]
    known = [float(error) for error in errors if isinstance(error, (int, float))]
    return math.hypot(*known) if len(known) == 2 else None
