"""A run of a shared study: a search in this process or in workers that it starts, then the front and the menu."""

import optuna
from optuna.trial import TrialState

from ..config import Settings
from ..console import Console
from ..device import describe_device
from ..loading.gguf import dequantized_source
from ..loading.load import load_config
from ..loading.source import fingerprint, model_source
from ..prompts import Prompts
from ..session.answers import command_lines
from ..session.interact import InteractiveSession
from ..session.stages import Ready, conclude, finish_without_asking, raise_for_no_trial, search_with_view
from ..study.checkpoint import SHARED, Checkpoint
from ..study.finalists import missing_finalists
from ..study.front import front_of, is_counted
from ..study.learned_search import lacks_learned_trials
from .preparation import ATTRIBUTE
from .shared_study import open_for_workers
from .storage import WORKER, requeue
from .worker import join
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
    checkpoint.note(**{SHARED: True})
    checkpoint.note_search(settings, target)

    ready: Ready | None = None
    if settings.workers is None:
        console.message(f"Seed {settings.seed}; {describe_device()}")
        ready = join(settings, console, study, store, prepares=True)
        _search_here(console, checkpoint, ready, target)
    elif checkpoint.n_done < target or (ATTRIBUTE not in study.user_attrs and lacks_learned_trials(study, settings)):
        console.message(f"Seed {settings.seed}; a run of several workers cannot be repeated exactly.")
        supervise(settings, console, study, url, prepares=True)

    if not front_of(study):
        raise_for_no_trial(study)
    is_finished = checkpoint.n_done >= target
    lacks = missing_finalists(study, settings) or lacks_learned_trials(study, settings)
    if ready is None and is_finished and (settings.report or lacks):
        console.message("The workers are done; loading the model in this process for the remaining steps.")
        ready = join(settings, console, study, store, prepares=True)
    report = conclude(settings, console, checkpoint, prompts, ready if is_finished else None)
    if finish_without_asking(settings, console, checkpoint, report):
        return 0
    _act(console, checkpoint, ready or join(settings, console, study, store, prepares=ATTRIBUTE not in study.user_attrs), prompts)
    return 0


def _search_here(console: Console, checkpoint: Checkpoint, ready: Ready, target: int) -> None:
    console.heading(f"Search: {target} trials, {checkpoint.n_done} done")
    search_with_view(console, ready, target)


def _act(console: Console, checkpoint: Checkpoint, ready: Ready, prompts: Prompts) -> None:
    settings = ready.evaluator.settings

    def run_trials(n_more: int) -> None:
        target = checkpoint.n_done + n_more
        checkpoint.note_search(settings, target)
        if settings.workers is not None:
            again = command_lines(settings)[-1]
            console.message(f"They run in this process. To use several workers: {again} --workers N")
        _search_here(console, checkpoint, ready, target)
        conclude(settings, console, checkpoint, prompts, ready if checkpoint.n_done >= target else None)

    InteractiveSession(console, ready.evaluator, ready.search, run_trials).work()


def _requeue_all(study: optuna.Study) -> None:
    """Requeue unfinished trials of a single-process run, which nobody else can be working on."""
    for trial in study.get_trials(deepcopy=True, states=(TrialState.RUNNING,)):
        if WORKER not in trial.system_attrs and not is_counted(trial):
            study.tell(trial.number, state=TrialState.FAIL)
            requeue(study, trial, counts=False)
