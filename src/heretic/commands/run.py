"""A run, from settings that were checked (`start.py`) to the front and what is done with it."""

import secrets
from pathlib import Path

from ..config import Settings
from ..console import Console
from ..decoding.decoder import Decoder
from ..device import describe_device
from ..evaluator import Evaluator
from ..loading.source import fingerprint, model_source
from ..prompts import Prompts
from ..session.answers import trial_at
from ..session.interact import Workbench, ask_checkpoint_action
from ..session.stages import (
    Ready,
    conclude,
    is_told,
    learn_shown,
    load_all_prompts,
    make_report,
    no_trial,
    open_space,
    prepare,
    scorer_identity,
    search_shown,
    show_outcome,
)
from ..sharing.shared_run import run_shared
from ..sharing.shared_study import SharedCheckpoint
from ..study.batching import BatchSize, automatic_trials_per_batch
from ..study.checkpoint import Checkpoint
from ..study.finalists import missing_finalists
from ..study.front import front_of
from ..study.journal import journal_errors
from ..study.learned_search import LearnedTrials, lacks_learned_trials
from ..study.samplers import Sampling, check_sampler
from ..study.search import Search
from ..trust import who_asks


def run_study(settings: Settings, console: Console) -> int:
    """The stages of a run. Raises `HereticError`; returns the exit code."""
    with SharedCheckpoint(settings, console) if settings.study_storage else Checkpoint(settings) as checkpoint:
        return _run_study(settings, console, checkpoint)


def _run_study(settings: Settings, console: Console, checkpoint: Checkpoint) -> int:
    # 1. Settings and seed
    seed_is_given = settings.seed is not None
    opened = _open_study(settings, console, checkpoint)
    if opened is None:
        return 0
    settings, is_new = opened

    # 2. Prompts and scorers, which cost little and are most often what is wrong
    prompts = load_all_prompts(settings, console)
    identity = {**prompts.identity, **scorer_identity(settings)}
    if not is_new:
        source = model_source(settings)
        # A model on the hub may have to be fetched first; it is checked below.
        checkpoint.check_identity({**identity, "the model": fingerprint(source)} if source.is_local else identity)
        if _is_over(settings, console, checkpoint):
            return 0
    if settings.workers or settings.study_storage or checkpoint.is_shared:
        return run_shared(settings, console, checkpoint, is_new, identity, prompts)
    return _run_alone(settings, console, checkpoint, is_new, prompts, identity, may_measure=is_new and not seed_is_given)


def _run_alone(
    settings: Settings,
    console: Console,
    checkpoint: Checkpoint,
    is_new: bool,
    prompts: Prompts,
    identity: dict[str, str],
    may_measure: bool,
) -> int:
    # 3. Device, model and what can be edited in it; response prefix, baseline, directions
    console.message(f"Seed {settings.seed}; {describe_device()}")
    evaluator, parting = prepare(settings, console, prompts)

    # 4. The study
    identity["the model"] = fingerprint(evaluator.model.loaded.source)
    if is_new:
        checkpoint.create(settings, identity)
    else:
        checkpoint.check_identity(identity)
    ready = _ready(console, checkpoint, evaluator, parting, may_measure)
    search = ready.search

    # 5. Learned trials, and the search
    def search_up_to(target: int) -> Path | None:
        checkpoint.note(target=target)
        return finish(search_shown(console, ready, target))

    def finish(was_stopped: bool) -> Path | None:
        return conclude(settings, console, checkpoint, prompts, None if was_stopped else ready) if search.front else None

    was_stopped = learn_shown(console, LearnedTrials(search.study, checkpoint.path, checkpoint.edits, evaluator), prompts)
    target = checkpoint.target(settings, search.n_done, is_new)
    if was_stopped or not target:
        report = finish(was_stopped)
    else:
        console.heading(f"Search: {target} trials, {search.n_done} done")
        report = search_up_to(target)
    if not search.front:
        return no_trial(search.trials)

    # 6. The Pareto front, and what to do with it
    if not is_told(settings, console, checkpoint, report):
        Workbench(console, evaluator, search, lambda n_more: search_up_to(search.n_done + n_more)).work()
    return 0


def _ready(console: Console, checkpoint: Checkpoint, evaluator: Evaluator, parting: int, may_measure: bool) -> Ready:
    """What searches an open study."""
    original, settings = evaluator.original, evaluator.settings
    with journal_errors(checkpoint.path):
        space = open_space(console, checkpoint.study, evaluator, parting)
    if warning := checkpoint.counts_otherwise(original.baseline.degenerate):
        console.warning(warning)
    checkpoint.note(**original.baseline.attributes(), last_layer=evaluator.model.architecture.last_layer)
    search = Search(checkpoint.study, checkpoint.path, space, Sampling.of(settings), checkpoint.edits)
    return Ready(evaluator, search, _batch_size(console, checkpoint, evaluator, may_measure))


def _open_study(settings: Settings, console: Console, checkpoint: Checkpoint) -> tuple[Settings, bool] | None:
    """The settings in force and whether the study is new; None where the user leaves."""
    if checkpoint.lost_bytes:
        console.warning(
            f"The last line of {checkpoint.path} was cut off in the middle and is lost ({checkpoint.lost_bytes} bytes); "
            "everything before it is kept."
        )
    is_new = not checkpoint.exists
    if not is_new:
        action: str | None = settings.checkpoint_action
        if action is None and console.can_ask:
            action = ask_checkpoint_action(str(checkpoint.path), checkpoint.n_done)
            if action is None:
                return None
        is_new = action == "restart"
    if not is_new:
        settings = checkpoint.restored(settings, who_asks())
        console.message(f"Continuing the study {checkpoint.path} ({checkpoint.n_done} trials done).")
    check_sampler(settings.sampler)
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": secrets.randbelow(2**32)})
    return settings, is_new


def _is_over(settings: Settings, console: Console, checkpoint: Checkpoint) -> bool:
    """Show the front of a finished study where nobody asks for more, without loading the model for it."""
    front = front_of(checkpoint.study)
    if not front or checkpoint.n_done < checkpoint.target(settings, checkpoint.n_done, False):
        return False
    if missing_finalists(checkpoint.study, settings) or lacks_learned_trials(checkpoint.study, settings):
        return False
    if settings.trial_index is not None:
        trial_at(front, settings.trial_index)  # told before the model is loaded
    if settings.model_action not in (None, "none") or (console.can_ask and settings.model_action is None):
        return False
    if settings.print_residual_geometry or settings.plot_residuals:
        return False  # the model has to be run for those
    show_outcome(settings, console, checkpoint, make_report(settings, console, checkpoint, None))
    return True


def _batch_size(console: Console, checkpoint: Checkpoint, evaluator: Evaluator, may_measure: bool) -> BatchSize:
    """How many trials are computed together. It is measured only where the run was not asked to be an exact repetition of another."""
    settings, model = evaluator.settings, evaluator.model
    if not model.batches_trials:
        console.message("Trials are evaluated one at a time: this model's experts cannot tell which prompt a token belongs to.")
        return BatchSize(1)
    decoder, n_prompts = model.decoder, len(evaluator.bad_prompts)
    if not isinstance(decoder, Decoder):
        return BatchSize(checkpoint.trials_per_batch(settings, automatic_trials_per_batch(n_prompts, settings.n_trials)))
    automatic = automatic_trials_per_batch(n_prompts, settings.n_trials, decoder.rows_that_fit())
    value = checkpoint.trials_per_batch(settings, automatic)
    if settings.trials_per_batch or not may_measure:
        return BatchSize(value)

    def settle(settled: int) -> None:
        checkpoint.note(trials_per_batch=settled)
        if settled != value:
            console.message(f"{settled} trials share a pass from here on: that is faster here than {value}.")

    return BatchSize(value, lambda: decoder.n_tokens, settings.n_startup_trials, settle)
