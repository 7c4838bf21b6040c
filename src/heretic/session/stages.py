"""The stages of a run, one function each, shared by a run in one process, a worker, and the evaluation of another model."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from optuna import Study
from optuna.trial import FrozenTrial
from torch import Tensor, nn

from ..config import Settings
from ..console import Console
from ..device import empty_cache
from ..editing.completeness import remainder
from ..editing.directions import mean_residual, refusal_directions, separating_layer, winsorize
from ..errors import Aborted, DirectionError, HereticError, ReportError
from ..evaluator import Evaluator
from ..loading.libraries import collector_paused
from ..loading.load import load_model
from ..loading.source import expand, model_source
from ..model import Model
from ..prompts import Prompts, load_all
from ..reporting.learned import learned_text
from ..reporting.report import facts_of, report_path, write_report
from ..reporting.residual_geometry import residual_geometry
from ..reporting.samples import Samples, sample_prompts, take_samples
from ..reporting.study_view import StudyView
from ..reporting.tables import finalists_table, front_table, geometry_table, space_text
from ..scoring.measured import MeasuredOriginal, measure_original
from ..scoring.response_prefix import PREFIX_TOKENS, find_response_prefix
from ..scoring.score_tables import Baseline
from ..scoring.scorers import fingerprints
from ..study.batching import BatchSize
from ..study.checkpoint import Checkpoint, stored_or_new_space
from ..study.failures import ONE_BY_ONE, failure_as_warning, traceback_of, warn_of_failure
from ..study.finalists import ATTRIBUTE, final_settings, known_finalists, missing_finalists, score_finalists
from ..study.front import front_of
from ..study.journal import file_name, journal_path
from ..study.learned_search import LEARNING_FAILED, LearnedTrials, lacks_learned_trials
from ..study.learning import RESPONSE_TOKENS
from ..study.search import Search
from ..study.space import SearchSpace, search_space
from .answers import command_lines

# How long running trials may take to finish after Ctrl+C.
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Ready:
    """All that it takes to search: what scores trials, what asks for them, and how many share a pass."""

    evaluator: Evaluator
    search: Search
    batch_size: BatchSize


def load_all_prompts(settings: Settings, console: Console) -> Prompts:
    with console.task("Loading prompts"):
        prompts = load_all(settings)
    if set(prompts.good) == set(prompts.bad):
        raise DirectionError("good_prompts and bad_prompts are the same, so they define no refusal direction. Give different ones.")
    console.message("Prompts: " + ", ".join(f"{len(found)} {name}" for name, found in prompts.of_study.items()))
    for kind, scored, own in (("good", prompts.good_evaluation, set(prompts.good)), ("bad", prompts.bad_evaluation, set(prompts.bad))):
        if n := sum(prompt in own for prompt in scored):
            console.warning(
                f"{n} of {len(scored)} {kind}_evaluation_prompts are among the {kind}_prompts, too: scores say less about unseen prompts."
            )
    return prompts


def scorer_identity(settings: Settings) -> dict[str, str]:
    """Fingerprints of the custom scorers. If one cannot be made, that is reported here, before anything heavy is loaded."""
    if not settings.scorers:
        return {}

    return fingerprints(settings)


def load_model_to_edit(settings: Settings, console: Console, name: str | None = None, response_prefix: str = "") -> Model:

    with collector_paused():  # transformers imports the model's own file only now
        loaded = load_model(settings, model_source(settings, name), console)
    model = Model(loaded, settings, console, response_prefix=response_prefix)
    found = ", ".join(f"{count} {component}" for component, count in model.architecture.components.items())
    left = ", ".join(name for name in settings.disabled_components if name in model.architecture.components)
    console.message(
        f"{loaded.source.name}: {loaded.config.model_type}, {len(model.architecture.layers)} layers, "
        f"{'4-bit, computed in ' if loaded.quantized else ''}{loaded.dtype_name}; writing to the residual stream: {found}, "
        + (f"all edited but {left}" if left else "all edited")
    )
    _report_completeness(model, console)
    return model


def prepare(settings: Settings, console: Console, prompts: Prompts) -> tuple[Evaluator, int]:
    """Load the model and get it ready to score trials: response prefix, baseline, directions. With the layer in which the prompts part."""
    model = with_found_prefix(settings, console, load_model_to_edit(settings, console), prompts)
    evaluator = Evaluator(settings, model, measure(settings, console, model, prompts), console)
    separating_layer = compute_directions(settings, console, model, prompts)
    _new_space(evaluator, separating_layer)  # settings that do not fit the model are reported before there is a study
    return evaluator, separating_layer


def _new_space(evaluator: Evaluator, separating_layer: int) -> SearchSpace:
    architecture = evaluator.model.architecture
    return search_space(evaluator.settings, list(architecture.components), architecture.last_layer, separating_layer)


def open_space(console: Console, study: Study, evaluator: Evaluator, separating_layer: int) -> SearchSpace:
    """The space that a study searches, shown."""
    space = stored_or_new_space(study, _new_space(evaluator, separating_layer))
    console.message(space_text(space, separating_layer, evaluator.model.architecture.last_layer))
    return space


def _report_completeness(model: Model, console: Console) -> None:
    """Warn if edits of weights cannot reach everything that is written to the residual stream."""
    left = remainder(model.model, model.architecture)
    does = "gates or scales its residual stream in a way that no edit of weights can reproduce"
    if left.is_missed():
        share = max(left.channel, left.direction)
        why = f"this model normalizes or {does}, or a module that writes to it was not found"
    elif left.is_inexact(model.loaded.dtype):
        share, why = left.direction, f"this model {does}"
    else:
        return
    console.warning(
        f"After an ablation at full strength, {_percent(share)} of what a layer writes along the direction remains in the residual stream: "
        f"{why}. Ablation works on this model, but only approximately."
    )


def _percent(share: float) -> str:
    return f"{min(share, 1):.0%}" if share >= 0.01 else "less than 1%"


def check_lengths(settings: Settings, model: Model, prompts: Prompts) -> None:
    """Raise `PromptError` if prompts, with the tokens generated after them, exceed the model's context length."""
    has_prefix = settings.response_prefix is not None or model.response_prefix
    generated = max(1 if has_prefix else PREFIX_TOKENS, RESPONSE_TOKENS if settings.n_learned_trials else 1)
    after = {
        "good_prompts": (generated, ""),
        "bad_prompts": (generated, ""),
        "good_evaluation_prompts": (settings.kl_tokens, "kl_tokens"),
        "bad_evaluation_prompts": (settings.max_response_length, "max_response_length"),
    }
    for name, found in prompts.of_study.items():
        model.check_lengths(found, name, *after[name])
    if settings.n_finalists and (settings.final_good_prompts or settings.final_bad_prompts):
        _check_final_lengths(settings, model, prompts)  # others are checked when they are needed


def _check_final_lengths(settings: Settings, model: Model, prompts: Prompts) -> None:

    final = final_settings(settings)
    for name, found in (("final_good_prompts", prompts.final_good), ("final_bad_prompts", prompts.final_bad)):
        model.check_lengths(found, name, max(final.max_response_length, final.kl_tokens), "final_response_length and final_kl_tokens")


def with_found_prefix(settings: Settings, console: Console, model: Model, prompts: Prompts) -> Model:
    """The model with the common start of all its responses. Raises `PromptError` if prompts are too long without or with it."""
    check_lengths(settings, model, prompts)
    prefix = find_response_prefix(model, settings, prompts.good, prompts.bad)
    model = model.with_response_prefix(prefix)
    if prefix:
        console.message(f"Response prefix: {prefix!r}; evaluation begins after it.")
        check_lengths(settings, model, prompts)
    return model


def measure(settings: Settings, console: Console, model: Model, prompts: Prompts, all_scorers: bool = False) -> MeasuredOriginal:
    """Baseline: the original's scores on the evaluation prompts."""
    original = measure_original(settings, model, prompts.good_evaluation, prompts.bad_evaluation, console, all_scorers)
    summary = f"The original refuses {original.refusals} of {len(original.bad_prompts)} harmful evaluation prompts."
    if n := original.baseline.degenerate:
        summary += f" {n} of its responses {'is' if n == 1 else 'are'} degenerate (empty, repetitive or cut short)."
    console.message(summary)
    return original


def compute_directions(settings: Settings, console: Console, model: Model, prompts: Prompts) -> int:
    """Give the model its directions. Returns the first layer in which harmless and harmful prompts separate."""
    quantile = settings.winsorization_quantile
    sets = ((prompts.good, "Residuals of harmless prompts"), (prompts.bad, "Residuals of harmful prompts"))
    # One set after the other: residuals are computed lazily, as they are consumed.
    batches: Iterable[Iterable[Tensor]] = (model.residuals(found, description) for found, description in sets)
    if settings.print_residual_geometry or settings.plot_residuals:
        batches = _show_residuals(settings, console, batches)
    good, bad = (mean_residual(part, quantile) for part in batches)
    if not (good.isfinite().all() and bad.isfinite().all()):
        raise DirectionError("The residuals are not finite. Try another --dtypes, such as bfloat16 or float32.")
    directions = refusal_directions(good, bad, settings.orthogonalize_direction)
    if not directions[1:].any():
        raise DirectionError("Harmless and harmful prompts give the same residuals in every layer, so they define no direction.")
    model.use_directions(directions, settings.row_normalization)
    return separating_layer(good, bad)


def _show_residuals(settings: Settings, console: Console, batches: Iterable[Iterable[Tensor]]) -> list[Iterable[Tensor]]:
    """Print the residual geometry and draw residual plots, if settings request it. Returns the residuals, now held in memory."""
    good, bad = (torch.cat([batch.cpu() for batch in part]) for part in batches)
    quantile = settings.winsorization_quantile
    good_seen, bad_seen = winsorize(good, quantile), winsorize(bad, quantile)  # as used for the directions
    if settings.print_residual_geometry:
        console.show(geometry_table(residual_geometry(good_seen, bad_seen), wraps=console.is_terminal))
    if settings.plot_residuals:
        from ..reporting.residual_plots import write_residual_plots  # which imports the extra

        folder = expand(settings.residual_plot_path) / file_name(settings.model)
        paths = write_residual_plots(good_seen, bad_seen, settings, folder, console)
        console.message(f"Plots of the residuals: {paths[0]} to {paths[-2].name}, and {paths[-1]}")
    return [[good], [bad]]


def search_with_view(console: Console, ready: Ready, target: int) -> bool:
    """Run trials up to `target`, showing each as it finishes. Returns whether Ctrl+C stopped the search."""
    evaluator, search, architecture = ready.evaluator, ready.search, ready.evaluator.model.architecture
    report_failures(search, console, evaluator.settings)
    baseline, objectives = evaluator.original.baseline, evaluator.settings.objectives
    with StudyView(console, target, search.n_done, baseline, architecture.last_layer, objectives) as view:
        view.trials = search.trials

        def note_stop() -> None:
            view.say(
                f"Stopping: trials that do not finish within {GRACE_SECONDS} seconds are left to the next run. Press Ctrl+C again to leave "
                "at once."
            )

        with stop_on_interrupt(note_stop) as should_stop, aborted_after(GRACE_SECONDS, should_stop, architecture.layers):
            search.run(
                target,
                evaluator.score_trials,
                evaluator.objectives,
                ready.batch_size,
                evaluator.stops_dominated,
                should_stop,
                lambda trial: view.show(trial, search.trials, search.n_done, search.n_scored),
            )
            return should_stop()


def learn_with_messages(console: Console, trials: LearnedTrials, prompts: Prompts) -> bool:
    """Learn the edits that are still missing before the search, showing each when it is scored. Returns whether Ctrl+C stopped it."""
    evaluator = trials.evaluator
    if not lacks_learned_trials(trials.study, evaluator.settings):
        return False

    def note_stop() -> None:
        console.message("Stopping: the edit being learned is left to the next run. Press Ctrl+C again to leave at once.")

    def show(trial: FrozenTrial) -> None:
        console.message(learned_text(trial, evaluator.settings.n_learned_trials, evaluator.original.baseline))

    with stop_on_interrupt(note_stop) as should_stop, aborted_after(GRACE_SECONDS, should_stop, evaluator.model.architecture.layers):
        trials.learn((prompts.good, prompts.bad), show, should_stop)
        empty_cache()  # of what was learned from
        return should_stop()


def report_failures(search: Search, console: Console, settings: Settings) -> None:
    """Have a search warn of batches that crash and, with `debug`, print the traceback of a bug that failed a trial."""
    search.on_crash = partial(warn_of_failure, console, ONE_BY_ONE, debug=settings.debug)
    if settings.debug:
        search.on_bug = lambda number, error: console.message(f"Trial {number}:\n{traceback_of(error)}")


@contextmanager
def aborted_after(seconds: float, should_stop: Callable[[], bool], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which a forward pass raises `Aborted` at its next layer once `should_stop` has been true for `seconds`."""
    since: float | None = None

    def check(module: nn.Module, args: object) -> None:
        nonlocal since
        if not should_stop():
            return
        since = time.monotonic() if since is None else since
        if time.monotonic() - since >= seconds:
            raise Aborted

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(check))
        yield


@contextmanager
def stop_on_interrupt(note: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl+C makes the yielded function return True, and the second raises `KeyboardInterrupt`.

    A thread of its own calls `note` then: a signal may have interrupted this one in the middle of printing, which cannot begin anew.
    """
    pressed, awake = False, threading.Event()

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        awake.set()

    def tell() -> None:
        awake.wait()
        if pressed:
            note()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
        awake.set()
        teller.join()


def raise_for_no_trial(study: Study) -> NoReturn:
    """Raise `HereticError` with the reason why a study has no trial to choose, or `KeyboardInterrupt` if it was stopped before."""
    reasons = [trial.user_attrs["failure"] for trial in study.get_trials(deepcopy=False) if "failure" in trial.user_attrs]
    if not reasons and LEARNING_FAILED in study.user_attrs and not study.user_attrs.get("target"):
        raise HereticError("There is no trial: no edit could be learned. Run the same command with --n-trials 200, for a search.")
    if not reasons:
        raise KeyboardInterrupt
    raise HereticError(f"No trial could be scored: all {len(reasons)} failed. The last one: {reasons[-1]}")


def rescore_finalists(console: Console, checkpoint: Checkpoint, evaluator: Evaluator, prompts: Prompts, n_together: int) -> None:
    """Score the best trials of the front again and store the results. The front is kept even if this fails."""
    settings = evaluator.settings
    if not missing_finalists(checkpoint.study, settings):
        return
    found, what = None, "The finalists were not scored again"
    with failure_as_warning(console, what, settings.debug, interrupted="Interrupted: the finalists were not scored again."):
        _check_final_lengths(settings, evaluator.model, prompts)
        found = score_finalists(checkpoint.study, checkpoint.edits, evaluator, (prompts.final_good, prompts.final_bad), n_together, console)
    if found:
        checkpoint.note(**{ATTRIBUTE: found})


def conclude(settings: Settings, console: Console, checkpoint: Checkpoint, prompts: Prompts, ready: Ready | None) -> Path | None:
    """Score the finalists again, with what is `ready` for it (None: the search was stopped), and write the report; where that lies."""
    if ready is not None:
        rescore_finalists(console, checkpoint, ready.evaluator, prompts, ready.batch_size.value)
    return make_report(settings, console, checkpoint, None if ready is None else ready.evaluator)


def make_report(settings: Settings, console: Console, checkpoint: Checkpoint, evaluator: Evaluator | None) -> Path | None:
    """Write the report, with responses of the finalists if there is an evaluator to generate them. Returns its path.

    Failures are reported, and the run goes on: the study matters more.
    """
    if not settings.report:
        return None
    # A study in a database has no file that the report could be written next to.
    path = report_path(checkpoint.path if isinstance(checkpoint.path, Path) else journal_path(settings))
    if evaluator is not None:
        samples, what = None, "The report contains no new responses"
        with failure_as_warning(console, what, settings.debug, interrupted="Interrupted: the report contains no new responses."):
            samples = _take_samples(checkpoint, evaluator)
        if samples is not None:
            checkpoint.note(samples=samples)
    with failure_as_warning(console, "No report was written", settings.debug):
        try:
            facts = facts_of(checkpoint.study)
            write_report(facts, path)
            if settings.report_plots:
                from ..reporting.report_plots import write_plots  # which imports the extra

                write_plots(facts, path)
            return path
        except ReportError as error:
            console.warning(str(error))
    return None


def _take_samples(checkpoint: Checkpoint, evaluator: Evaluator) -> Samples:
    prompts = sample_prompts(evaluator.good_prompts, evaluator.bad_prompts)
    front = front_of(checkpoint.study)
    kept = checkpoint.study.user_attrs.get("samples", {})
    length = evaluator.settings.max_response_length
    return take_samples(evaluator.model, evaluator.original.rule, prompts, front, length, kept, checkpoint.edits.ablation_of)


def finish_without_asking(settings: Settings, console: Console, checkpoint: Checkpoint, report: Path | None) -> bool:
    """Show the outcome if nobody will be asked about it. Returns whether nothing is left to do."""
    if settings.model_action is None and console.can_ask:
        return False
    show_outcome(settings, console, checkpoint, report)
    return settings.model_action in (None, "none")


def show_outcome(settings: Settings, console: Console, checkpoint: Checkpoint, report: Path | None) -> None:
    """Print the front and, if no setting says what to do with it, the command lines that continue from there."""
    attributes = checkpoint.study.user_attrs
    front = front_of(checkpoint.study)
    console.heading(checkpoint.progress)
    console.show(front_table(front, attributes.get("last_layer"), Baseline.of(attributes), settings.objectives))
    if (table := finalists_table(front, known_finalists(checkpoint.study))) is not None:
        console.show(table)
    if report is not None:
        console.message(f"Report: {report}")
    if settings.model_action is None:
        console.message("To continue from here (the trial index is the number in the first column):")
        for line in command_lines(settings):
            console.message(f"  {line}")
