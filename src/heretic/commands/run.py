"""A run, from settings that `start.py` has checked to the Pareto front and what is done with it."""

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
from ..session.interact import InteractiveSession, ask_checkpoint_action
from ..session.stages import (
    Ready,
    conclude,
    finish_without_asking,
    learn_with_messages,
    load_all_prompts,
    make_report,
    open_space,
    prepare,
    raise_for_no_trial,
    scorer_identity,
    search_with_view,
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
from ..trust import terminal_ask


def run_study(settings: Settings, console: Console) -> int:
    """All stages of a run. Raises `HereticError`; returns the exit code."""
    with SharedCheckpoint(settings, console) if settings.study_storage else Checkpoint(settings) as checkpoint:
        return _run_study(settings, console, checkpoint)


def _run_study(settings: Settings, console: Console, checkpoint: Checkpoint) -> int:
    # 1. Settings and seed
    seed_is_given = settings.seed is not None
    opened = _open_study(settings, console, checkpoint)
    if opened is None:
        return 0
    settings, is_new = opened

    # 2. Prompts and scorers, which cost little and are the most frequent source of errors
    prompts = load_all_prompts(settings, console)
    identity = {**prompts.identity, **scorer_identity(settings)}
    if not is_new:
        source = model_source(settings)
        # A model on the hub may have to be downloaded first; it is checked below.
        checkpoint.check_identity({**identity, "the model": fingerprint(source)} if source.is_local else identity)
        if _shown_as_finished(settings, console, checkpoint):
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
    evaluator, separating_layer = prepare(settings, console, prompts)

    # 4. The study
    identity["the model"] = fingerprint(evaluator.model.loaded.source)
    if is_new:
        checkpoint.create(settings, identity)
    else:
        checkpoint.check_identity(identity)
    ready = _ready(console, checkpoint, evaluator, separating_layer, may_measure)
    search = ready.search

    # 5. Learned trials, and the search
    def search_up_to(target: int) -> Path | None:
        checkpoint.note_search(settings, target)
        return finish(search_with_view(console, ready, target))

    def finish(was_stopped: bool) -> Path | None:
        return conclude(settings, console, checkpoint, prompts, None if was_stopped else ready) if search.front else None

    target = checkpoint.target(settings, search.n_done, is_new)
    checkpoint.note_search(settings, target)  # before learning, in which this run may be stopped or killed
    was_stopped = learn_with_messages(console, LearnedTrials(search.study, checkpoint.path, checkpoint.edits, evaluator), prompts)
    if was_stopped or not target:
        report = finish(was_stopped)
    else:
        console.heading(f"Search: {target} trials, {search.n_done} done")
        report = search_up_to(target)
    if not search.front:
        raise_for_no_trial(search.study)

    # 6. The Pareto front, and what to do with it
    if not finish_without_asking(settings, console, checkpoint, report):
        InteractiveSession(console, evaluator, search, lambda n_more: search_up_to(search.n_done + n_more)).work()
    return 0


def _ready(console: Console, checkpoint: Checkpoint, evaluator: Evaluator, separating_layer: int, may_measure: bool) -> Ready:
    """What searches an open study."""
    original, settings = evaluator.original, evaluator.settings
    with journal_errors(checkpoint.path):
        space = open_space(console, checkpoint.study, evaluator, separating_layer)
    checkpoint.note(**original.baseline.attributes(), last_layer=evaluator.model.architecture.last_layer)
    search = Search(checkpoint.study, checkpoint.path, space, Sampling.of(settings), checkpoint.edits)
    return Ready(evaluator, search, _batch_size(console, checkpoint, evaluator, may_measure))


def _open_study(settings: Settings, console: Console, checkpoint: Checkpoint) -> tuple[Settings, bool] | None:
    """The effective settings and whether the study is new; None if the user leaves."""
    if checkpoint.lost_bytes:
        console.warning(
            f"The last line of {checkpoint.path} is incomplete and was removed ({checkpoint.lost_bytes} bytes); "
            "all lines before it are kept."
        )
    is_new = not checkpoint.exists
    if not is_new:
        action: str | None = settings.checkpoint_action
        if action is None and console.can_ask and not settings.study_storage:  # a study there is never replaced
            action = ask_checkpoint_action(str(checkpoint.path), checkpoint.progress)
            if action is None:
                return None
        is_new = action == "restart"
    if not is_new:
        settings = checkpoint.restored(settings, terminal_ask())
        console.message(f"Continuing the study {checkpoint.path} ({checkpoint.progress}).")
    check_sampler(settings.sampler)
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": secrets.randbelow(2**32)})
    return settings, is_new


def _shown_as_finished(settings: Settings, console: Console, checkpoint: Checkpoint) -> bool:
    """Show the front of a finished study without loading the model, if nothing more is requested. Returns whether it was shown."""
    front = front_of(checkpoint.study)
    if not front or checkpoint.n_done < checkpoint.target(settings, checkpoint.n_done, False):
        return False
    if missing_finalists(checkpoint.study, settings) or lacks_learned_trials(checkpoint.study, settings):
        return False
    if settings.trial_index is not None:
        trial_at(front, settings.trial_index)  # raises its error before the model is loaded
    if settings.model_action not in (None, "none") or (console.can_ask and settings.model_action is None):
        return False
    if settings.print_residual_geometry or settings.plot_residuals:
        return False  # these need the model
    show_outcome(settings, console, checkpoint, make_report(settings, console, checkpoint, None))
    return True


def _batch_size(console: Console, checkpoint: Checkpoint, evaluator: Evaluator, may_measure: bool) -> BatchSize:
    """How many trials share a forward pass. It is measured only if the run does not have to repeat another one exactly."""
    settings, model = evaluator.settings, evaluator.model
    if not model.batches_trials:
        console.message("Trials are evaluated one at a time: this model's experts do not know which prompt a token belongs to.")
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
            console.message(f"{settled} trials share a forward pass from here on; that was measured to be faster than {value}.")

    return BatchSize(value, lambda: decoder.n_tokens, settings.n_startup_trials, settle)
