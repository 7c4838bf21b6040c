"""A run, from the settings to the Pareto front and what is done with it."""

from typing import TYPE_CHECKING

from .. import __version__
from ..loading.libraries import collector_paused, prepare_libraries
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

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..config import Settings
    from ..console import Console
    from ..evaluator import Evaluator
    from ..model import Model
    from ..prompts import Prompts
    from ..study.batching import BatchSize
    from ..study.checkpoint import Checkpoint
    from ..study.search import Search
    from ..study.space import SearchSpace


def run(settings: "Settings", files: "Sequence[str]" = ()) -> int:
    """All stages of a run. Its settings came from the command line and from `files`. Raises `HereticError`; returns the exit code."""
    from ..loading.source import model_source
    from ..session.answers import check_answers
    from ..utils import can_ask

    check_answers(settings, can_ask())
    _check_extras(settings)
    model_source(settings)  # reports a mistyped path before anything heavy is imported or a study is locked
    prepare_libraries(settings.debug)

    with collector_paused():
        from ..console import Console

    console = Console()
    console.message(f"heretic {__version__}" + (f", settings from {' and '.join(files)}" if files else ""))
    if settings.evaluate_model is not None:
        from .evaluate import evaluate

        return evaluate(settings, console)

    if settings.model_action == "upload":
        _check_upload(settings, console)

    from ..sharing.shared_study import SharedCheckpoint
    from ..study.checkpoint import Checkpoint

    with SharedCheckpoint(settings, console) if settings.study_storage else Checkpoint(settings) as checkpoint:
        return _run_study(settings, console, checkpoint)


def _check_extras(settings: "Settings") -> None:
    """Raise `UsageError` if a setting needs an extra that is not installed. An hour later would be too late."""
    from ..session.answers import require_extra

    if settings.report_plots:
        require_extra("research", "report_plots")
    if settings.plot_residuals:
        require_extra("research", "plot_residuals")
        from ..reporting.residual_plots import check_plot_settings

        check_plot_settings(settings)
    if settings.model_action == "benchmark":
        require_extra("benchmark", "model_action = benchmark")
        prepare_libraries(settings.debug)
        from ..scoring.benchmark import check_tasks

        check_tasks(settings)


def _check_upload(settings: "Settings", console: "Console") -> None:
    """Ask the hub whether the upload at the end of the run will be possible, as far as the settings describe it."""
    from huggingface_hub import get_token

    from ..saving.upload import check_destination

    token = get_token()
    if settings.upload_repo_id is not None and settings.upload_repo_private is not None and token is not None:
        with console.task(f"Asking the hub about {settings.upload_repo_id}"):
            check_destination(settings.upload_repo_id, settings.upload_repo_private, token, console)


def _run_study(settings: "Settings", console: "Console", checkpoint: "Checkpoint") -> int:
    # 1. Settings and seed
    seed_is_given = settings.seed is not None
    opened = _open_study(settings, console, checkpoint)
    if opened is None:
        return 0
    settings, is_new = opened

    from ..loading.source import fingerprint, model_source

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
        from ..sharing.shared_run import run_shared

        return run_shared(settings, console, checkpoint, is_new, identity, prompts)
    return _run_alone(settings, console, checkpoint, is_new, prompts, identity, may_measure=is_new and not seed_is_given)


def _run_alone(
    settings: "Settings",
    console: "Console",
    checkpoint: "Checkpoint",
    is_new: bool,
    prompts: "Prompts",
    identity: dict[str, str],
    may_measure: bool,
) -> int:
    # 3. Device, model and what can be edited in it
    from ..device import describe_device
    from ..evaluator import Evaluator
    from ..loading.source import fingerprint

    console.message(f"Seed {settings.seed}; {describe_device()}")
    model = load_model_to_edit(settings, console)
    check_lengths(settings, model, prompts)

    # 4. Response prefix, baseline, directions
    model = with_found_prefix(settings, console, model, prompts)
    evaluator = Evaluator(settings, model, measure(settings, console, model, prompts), console)
    separating_layer = compute_directions(settings, console, model, prompts)

    # 5. The study
    from ..reporting.tables import space_text
    from ..study.space import search_space

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

    def search_up_to(target: int) -> "Path | None":
        checkpoint.note(target=target)
        return conclude(search_with_view(console, evaluator, search, target, batch_size))

    def conclude(was_stopped: bool) -> "Path | None":
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

    from ..session.interact import Workbench

    bench = Workbench(settings, console, model, evaluator, search, lambda n_more: search_up_to(search.n_done + n_more))
    bench.menu() if settings.model_action is None else bench.act(settings.model_action)
    return 0


def _open_study(settings: "Settings", console: "Console", checkpoint: "Checkpoint") -> "tuple[Settings, bool] | None":
    """The effective settings and whether the study is new; None if the user leaves."""
    from ..session.answers import terminal_ask
    from ..study.samplers import check_sampler

    if checkpoint.lost_bytes:
        console.warning(
            f"The last line of {checkpoint.path} is incomplete and was removed ({checkpoint.lost_bytes} bytes); "
            "all lines before it are kept."
        )
    is_new = not checkpoint.exists
    if not is_new:
        action: str | None = settings.checkpoint_action
        if action is None and console.can_ask:
            from ..session.interact import ask_checkpoint_action

            action = ask_checkpoint_action(str(checkpoint.path), checkpoint.n_done)
            if action is None:
                return None
        is_new = action == "restart"
    if not is_new:
        settings = checkpoint.restored(settings, terminal_ask())
        console.message(f"Continuing the study {checkpoint.path} ({checkpoint.n_done} trials done).")
    check_sampler(settings.sampler)
    if settings.seed is None:
        import secrets

        settings = settings.model_copy(update={"seed": secrets.randbelow(2**32)})
    return settings, is_new


def _shown_as_finished(settings: "Settings", console: "Console", checkpoint: "Checkpoint") -> bool:
    """Show the front of a finished study without loading the model, if nothing more is requested. Returns whether it was shown."""
    from ..session.answers import trial_at
    from ..study.finalists import missing_finalists
    from ..study.front import front_of
    from ..study.learned_search import lacks_learned_trials

    front = front_of(checkpoint.study)
    if not front or checkpoint.n_done < checkpoint.target(settings, checkpoint.n_done, False):
        return False
    if missing_finalists(checkpoint.study, settings) or lacks_learned_trials(checkpoint.study, settings):
        return False
    if settings.trial_index is not None:
        trial_at(front, settings.trial_index)  # an error is reported before the model is loaded
    if settings.model_action not in (None, "none") or (console.can_ask and settings.model_action is None):
        return False
    if settings.print_residual_geometry or settings.plot_residuals:
        return False  # these need the model
    show_outcome(settings, console, checkpoint, make_report(settings, console, checkpoint, None))
    return True


def _open_search(settings: "Settings", checkpoint: "Checkpoint", space: "SearchSpace") -> "Search":
    from ..study.search import Search

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
    settings: "Settings", console: "Console", checkpoint: "Checkpoint", model: "Model", evaluator: "Evaluator", may_measure: bool
) -> "BatchSize":
    """How many trials share a forward pass. It is measured only if the run does not have to repeat another one exactly."""
    from ..decoding.decoder import Decoder
    from ..study.batching import BatchSize, automatic_trials_per_batch

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
