"""A run, from settings that `start.py` has checked to the Pareto front and what is done with it."""

import secrets
from pathlib import Path

from ..config import Settings
from ..console import Console
from ..decoding.decoder import Decoder
from ..device import describe_device
from ..evaluator import Evaluator
from ..loading.source import fingerprint, model_source
from ..model import Model
from ..prompts import Prompts
from ..reporting.tables import space_text
from ..session.answers import trial_at
from ..session.interact import InteractiveSession, ask_checkpoint_action
from ..session.stages import (
    check_lengths,
    compute_directions,
    finish_without_asking,
    learn_with_messages,
    load_all_prompts,
    load_model_to_edit,
    make_report,
    measure,
    raise_for_no_trial,
    rescore_finalists,
    scorer_identity,
    search_with_view,
    show_outcome,
    with_found_prefix,
)
from ..sharing.shared_run import run_shared
from ..sharing.shared_study import SharedCheckpoint
from ..study.batching import BatchSize, automatic_trials_per_batch
from ..study.checkpoint import Checkpoint
from ..study.finalists import missing_finalists
from ..study.front import front_of
from ..study.learned_search import lacks_learned_trials
from ..study.samplers import check_sampler
from ..study.search import Search
from ..study.space import SearchSpace, search_space
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
    # 3. Device, model and what can be edited in it
    console.message(f"Seed {settings.seed}; {describe_device()}")
    model = load_model_to_edit(settings, console)
    check_lengths(settings, model, prompts)

    # 4. Response prefix, baseline, directions
    model = with_found_prefix(settings, console, model, prompts)
    evaluator = Evaluator(settings, model, measure(settings, console, model, prompts), console)
    separating_layer = compute_directions(settings, console, model, prompts)

    # 5. The study
    last_layer = len(model.architecture.layers) - 1
    space = search_space(settings, list(model.architecture.components), last_layer, separating_layer)
    identity["the model"] = fingerprint(model.loaded.source)
    if is_new:
        checkpoint.create(settings, identity)
    else:
        checkpoint.check_identity(identity)
    space = checkpoint.search_space(space)
    console.message(space_text(space, separating_layer, last_layer))
    if warning := checkpoint.degenerate_count_warning(evaluator.original.baseline.degenerate):
        console.warning(warning)
    checkpoint.note(**evaluator.original.baseline.attributes(), last_layer=last_layer)
    search = _open_search(settings, checkpoint, space)

    batch_size = _batch_size(settings, console, checkpoint, model, evaluator, may_measure)

    def search_up_to(target: int) -> Path | None:
        checkpoint.note(target=target)
        return conclude(search_with_view(console, evaluator, search, target, batch_size))

    def conclude(was_stopped: bool) -> Path | None:
        if not search.front:
            return None
        if not was_stopped:
            rescore_finalists(settings, console, checkpoint, evaluator, prompts, batch_size.value)
        return make_report(settings, console, checkpoint, None if was_stopped else evaluator)

    was_stopped = learn_with_messages(settings, console, search.study, checkpoint.edits, checkpoint.path, evaluator, prompts)
    target = checkpoint.target(settings, search.n_done, is_new)
    if was_stopped or not target:
        report = conclude(was_stopped)
    else:
        console.heading(f"Search: {target} trials, {search.n_done} done")
        report = search_up_to(target)
    if not search.front:
        return raise_for_no_trial(search.trials)

    # 6. The Pareto front, and what to do with it
    if finish_without_asking(settings, console, checkpoint, report):
        return 0

    bench = InteractiveSession(settings, console, model, evaluator, search, lambda n_more: search_up_to(search.n_done + n_more))
    bench.menu() if settings.model_action is None else bench.act(settings.model_action)
    return 0


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
        if action is None and console.can_ask:
            action = ask_checkpoint_action(str(checkpoint.path), checkpoint.n_done)
            if action is None:
                return None
        is_new = action == "restart"
    if not is_new:
        settings = checkpoint.restored(settings, terminal_ask())
        console.message(f"Continuing the study {checkpoint.path} ({checkpoint.n_done} trials done).")
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
        trial_at(front, settings.trial_index)  # summary before the model is loaded
    if settings.model_action not in (None, "none") or (console.can_ask and settings.model_action is None):
        return False
    if settings.print_residual_geometry or settings.plot_residuals:
        return False  # these need the model
    show_outcome(settings, console, checkpoint, make_report(settings, console, checkpoint, None))
    return True


def _open_search(settings: Settings, checkpoint: Checkpoint, space: SearchSpace) -> Search:
    assert settings.seed is not None
    return Search(
        checkpoint.study,
        checkpoint.path,
        space,
        settings.seed,
        settings.n_startup_trials,
        settings.sampler,
        settings.first_trials,
        checkpoint.edits,
    )


def _batch_size(
    settings: Settings, console: Console, checkpoint: Checkpoint, model: Model, evaluator: Evaluator, may_measure: bool
) -> BatchSize:
    """How many trials share a forward pass. It is measured only if the run does not have to repeat another one exactly."""
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
