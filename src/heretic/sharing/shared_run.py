"""A run of a shared study: a search in this process or in workers that it starts, then the front and the menu."""

from pathlib import Path

import optuna
from optuna.trial import TrialState

from ..config import Settings
from ..console import Console
from ..loading.gguf import dequantized_source
from ..loading.load import load_config
from ..loading.source import fingerprint, model_source
from ..prompts import Prompts
from ..session.answers import command_lines
from ..session.interact import InteractiveSession
from ..session.stages import finish_without_asking, make_report, raise_for_no_trial, rescore_finalists, search_with_view
from ..study.checkpoint import SHARED, Checkpoint, is_counted
from ..study.finalists import missing_finalists
from ..study.front import front_of
from ..study.learned_search import lacks_learned_trials
from .shared_study import open_for_workers
from .storage import WORKER, requeue
from .worker import ReadyWorker, join
from .workers import supervise


def run_shared(
    settings: Settings, console: Console, checkpoint: Checkpoint, is_new: bool, identity: dict[str, str], prompts: Prompts
) -> int:
    """The run after loading the prompts, whose hashes are in `identity`: study, search, front. Returns the exit code."""
    source = dequantized_source(model_source(settings), console)
    if not source.is_local:
        load_config(source)  # so that the commit is known
    identity["the model"] = fingerprint(source)
    if is_new:
        checkpoint.create(settings, identity)
    else:
        checkpoint.check_identity(identity)
    was_shared = checkpoint.is_shared
    study, url, store = open_for_workers(checkpoint, settings, console)
    if not was_shared:
        _requeue_all(study)
    target = checkpoint.target(settings, checkpoint.n_done, is_new)
    checkpoint.note(target=target, **{SHARED: True})

    joined: ReadyWorker | None = None
    if settings.workers is None:
        joined = join(settings, console, study, store, prepares=True)
        _search_here(console, joined, target, checkpoint)
    elif checkpoint.n_done < target or (is_new and settings.n_learned_trials):
        console.message(f"Seed {settings.seed}; a run of several workers cannot be repeated exactly.")
        supervise(settings, console, study, url, prepares=True)

    if not front_of(study):
        return raise_for_no_trial(study.get_trials(deepcopy=False))
    is_finished = checkpoint.n_done >= target
    lacks = missing_finalists(study, settings) or lacks_learned_trials(study, settings)
    if joined is None and is_finished and (settings.report or lacks):
        console.message("The workers are done; loading the model in this process for the remaining steps.")
        joined = join(settings, console, study, store, prepares=True)
    report = _conclude(settings, console, checkpoint, joined if is_finished else None, prompts)
    if finish_without_asking(settings, console, checkpoint, report):
        return 0
    _act(console, checkpoint, joined or join(settings, console, study, store, prepares=False), prompts)
    return 0


def _conclude(settings: Settings, console: Console, checkpoint: Checkpoint, joined: ReadyWorker | None, prompts: Prompts) -> Path | None:
    """Score the finalists again with the model that is loaded here, and write the report. Returns the report's path."""
    if joined is not None:
        rescore_finalists(settings, console, checkpoint, joined.evaluator, prompts, joined.batch_size.value)
    return make_report(settings, console, checkpoint, None if joined is None else joined.evaluator)


def _search_here(console: Console, joined: ReadyWorker, target: int, checkpoint: Checkpoint) -> None:
    console.heading(f"Search: {target} trials, {checkpoint.n_done} done")
    search_with_view(console, joined.evaluator, joined.search, target, joined.batch_size)


def _act(console: Console, checkpoint: Checkpoint, joined: ReadyWorker, prompts: Prompts) -> None:
    def run_trials(n_more: int) -> None:
        target = checkpoint.n_done + n_more
        checkpoint.note(target=target)
        if joined.settings.workers is not None:
            again = command_lines(joined.settings)[-1]
            console.message(f"They run in this process. To use several workers: {again} --workers N")
        _search_here(console, joined, target, checkpoint)
        _conclude(joined.settings, console, checkpoint, joined if checkpoint.n_done >= target else None, prompts)

    bench = InteractiveSession(joined.settings, console, joined.model, joined.evaluator, joined.search, run_trials)
    bench.menu() if joined.settings.model_action is None else bench.act(joined.settings.model_action)


def _requeue_all(study: optuna.Study) -> None:
    """Requeue unfinished trials of a single-process run, which nobody else can be working on."""
    for trial in study.get_trials(deepcopy=True, states=(TrialState.RUNNING,)):
        if WORKER not in trial.system_attrs and not is_counted(trial):
            study.tell(trial.number, state=TrialState.FAIL)
            requeue(study, trial, counts=False)
